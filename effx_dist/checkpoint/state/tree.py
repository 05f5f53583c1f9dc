"""Nested values as JSON, with the tensors taken out and named; and the way back.

A manifest holds only what JSON can say. Tuples, bytes, namespaces, non-finite floats and dictionaries
whose keys are not strings are tagged, so that they come back as they went in; anything else is refused
by its path. Bytes are handed back as bytes: nothing here looks into them.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from effx_dist.checkpoint.format.manifest import short
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.errors import CorruptCheckpointError
from effx_dist.shard import LocalRows

OPAQUE = "$opaque"
Pickled = Callable[[str, Any], bytes]
MAX_OPAQUE_BYTES = 2**24
"""Largest entry of opaque bytes: manifests are read whole by every rank."""
PER_RANK = "$per_rank"
"""Marks one tree for each rank, by its number: what only a rank that asks for it takes."""
TAGS = frozenset(
    {"$tensor", "$sharded", "$rows", "$tuple", "$float", "$items", "$bytes", "$namespace"}
    | {PER_RANK, OPAQUE}
)
LEAF_TAGS = frozenset({"$tensor", "$sharded", "$rows"})
Leaf = torch.Tensor | LocalRows | Fragment
"""A tensor of a state as it lies in memory. Trees hold no fragments."""


def tree_to_json(value: Any, path: str, tensors: dict[str, Leaf]) -> Any:
    """``value`` as JSON. Tensor leaves are put into ``tensors`` under their dotted path.

    Raises TypeError naming the path and type of what JSON cannot hold.
    """
    match value:
        case torch.Tensor() | LocalRows():
            if path in tensors:
                raise TypeError(f"{path}: two tensors have this path; rename one of the keys")
            tensors[path] = value
            return {_leaf_tag(value): path}
        case None | bool() | int() | str():
            return value
        case np.bool_() | np.integer():
            return value.item()
        case float() | np.floating():
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case argparse.Namespace():
            return {"$namespace": tree_to_json(vars(value), path, tensors)}
        case list():
            return [tree_to_json(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        case tuple():
            return {"$tuple": tree_to_json(list(value), path, tensors)}
        case Mapping():
            return _mapping_to_json(value, path, tensors)
    raise TypeError(
        f"{path}: a {type(value).__name__} cannot be kept in a checkpoint; "
        "use tensors, numbers, strings, bytes, None, lists, tuples and dictionaries of these"
    )


def _leaf_tag(value: Leaf) -> str:
    """``$sharded`` says that a load has to look for a live tensor of the same kind."""
    if isinstance(value, LocalRows):
        return "$rows"
    return "$sharded" if isinstance(value, DTensor) else "$tensor"


def _mapping_to_json(value: Mapping[Any, Any], path: str, tensors: dict[str, Leaf]) -> Any:
    plain = all(isinstance(key, str) and key not in TAGS for key in value)
    if plain:
        return {key: tree_to_json(v, f"{path}.{key}", tensors) for key, v in value.items()}
    items = []
    for key, v in value.items():
        inside_key: dict[str, Leaf] = {}
        items.append(
            [
                tree_to_json(key, f"{path} (a key)", inside_key),
                tree_to_json(v, f"{path}.{key}", tensors),
            ]
        )
        if inside_key:
            raise TypeError(f"{path}: a tensor cannot be the key of a dictionary in a checkpoint")
    return {"$items": items}


def tree_from_json(value: Any, leaf: Callable[[str], Leaf]) -> Any:
    """The way back: ``leaf(path)`` gives the tensor or rows that stood at ``path``."""
    if isinstance(value, list):
        return [tree_from_json(v, leaf) for v in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (tag := next(iter(value))) in TAGS:
        return _untag(tag, value[tag], leaf)
    return {key: tree_from_json(v, leaf) for key, v in value.items()}


def _untag(tag: str, content: Any, leaf: Callable[[str], Leaf]) -> Any:
    match tag:
        case "$tensor" | "$sharded" | "$rows":
            return leaf(content)
        case "$bytes":
            return base64.b64decode(content, validate=True)
        case "$namespace":
            return argparse.Namespace(**tree_from_json(content, leaf))
        case "$per_rank":
            return {int(rank): tree_from_json(state, leaf) for rank, state in content.items()}
        case "$tuple":
            return tuple(tree_from_json(content, leaf))
        case "$float":
            return float(content)
        case "$opaque":
            raise TypeError("opaque bytes are no value; the planner that wrote them can read them")
        case _:
            return {tree_from_json(key, leaf): tree_from_json(v, leaf) for key, v in content}


def read_tree(value: Any, leaves: Mapping[str, Leaf], what: str) -> Any:
    """A tree of the manifest with its tensors. Raises CorruptCheckpointError for what is not a tree."""
    try:
        return tree_from_json(value, leaves.__getitem__)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = short(f"{type(error).__name__}: {error}")
        raise CorruptCheckpointError(f"the manifest's {what} cannot be read: {reason}") from None


def leaf_paths(value: Any) -> dict[str, str]:
    """``{path: tag}`` of every tensor leaf of a tree made by :func:`tree_to_json`."""
    found: dict[str, str] = {}

    def visit(node: Any) -> None:
        if isinstance(node, list):
            for child in node:
                visit(child)
        elif isinstance(node, dict):
            for key, child in node.items():
                if key in LEAF_TAGS and len(node) == 1:
                    found[child] = key
                else:
                    visit(child)

    visit(value)
    return found


def parse_value(name: str, payload: bytes, allow_opaque_bytes: bool = False) -> Any:
    """What the manifest holds for a planner's ``payload``: the JSON value in it, or opaque bytes.

    Raises TypeError for what is not JSON, such as what ``torch.save`` writes, unless
    ``allow_opaque_bytes``; ValueError for more than MAX_OPAQUE_BYTES of it.
    """
    try:
        value = json.loads(payload)
        if not is_opaque(value):  # else JSON that would be taken for our mark
            return value
        reason = f"a dictionary whose one key is {OPAQUE!r}, which marks opaque bytes"
    except (ValueError, RecursionError):
        reason = "bytes that are not JSON (the stock planner pickles non-tensors)"
    if not allow_opaque_bytes:
        raise TypeError(
            f"{name}: the planner handed over {reason}; "
            "pass planner=effx_dist.checkpoint.ExcpSavePlanner(), take the entry out of the state "
            "dict, or keep the bytes unread with ExcpWriter(..., allow_opaque_bytes=True)"
        )
    if len(payload) > MAX_OPAQUE_BYTES:
        raise ValueError(
            f"{name}: {len(payload)} opaque bytes; a checkpoint keeps {MAX_OPAQUE_BYTES} at most. "
            "Hand it over as a tensor"
        )
    return {OPAQUE: base64.b64encode(payload).decode()}


def is_opaque(value: Any) -> bool:
    """Whether an entry of a manifest stands for opaque bytes."""
    return isinstance(value, dict) and value.keys() == {OPAQUE}


def payload_of(
    name: str, value: Any, allow_opaque_bytes: bool, reads_json: bool, pickled: Pickled
) -> bytes:
    """The way back: what the planner that loads gets for an entry of a manifest.

    Args:
        reads_json: whether that planner reads JSON; the stock one unpickles, and gets what ``pickled``
            makes of the value here. No bytes of a checkpoint come near an unpickler.

    Raises TypeError for opaque bytes unless ``allow_opaque_bytes``; CorruptCheckpointError for opaque
    bytes that are none.
    """
    if not is_opaque(value):
        return json.dumps(value).encode() if reads_json else pickled(name, value)
    if not allow_opaque_bytes:
        raise TypeError(
            f"{name}: is stored as bytes that only the planner that wrote them can read, and the "
            "stock one unpickles them, which runs whatever code they name. If you trust them: "
            "ExcpReader(..., allow_opaque_bytes=True), with that planner"
        )
    try:
        return base64.b64decode(value[OPAQUE], validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"{name}: its opaque bytes are not base64: {error}") from None
