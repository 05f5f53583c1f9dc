"""Nested values as JSON, with the tensors taken out and named; and the way back.

A manifest holds only what JSON can say. Tuples, non-finite floats and dictionaries whose keys are
not strings are tagged, so that they come back as they went in; anything else is refused by its
path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from effx_dist.checkpoint.fragment import Fragment
from effx_dist.checkpoint.values import OPAQUE
from effx_dist.shard import LocalRows

TAGS = frozenset({"$tensor", "$rows", "$tuple", "$float", "$items", OPAQUE})
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
            return {"$rows" if isinstance(value, LocalRows) else "$tensor": path}
        case None | bool() | int() | str():
            return value
        case np.bool_() | np.integer():
            return value.item()
        case float() | np.floating():
            return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
        case list():
            return [tree_to_json(v, f"{path}.{i}", tensors) for i, v in enumerate(value)]
        case tuple():
            return {"$tuple": tree_to_json(list(value), path, tensors)}
        case Mapping():
            return _mapping_to_json(value, path, tensors)
    raise TypeError(
        f"{path}: a {type(value).__name__} cannot be kept in a checkpoint; "
        "use tensors, numbers, strings, None, lists, tuples and dictionaries of these"
    )


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
        case "$tensor" | "$rows":
            return leaf(content)
        case "$tuple":
            return tuple(tree_from_json(content, leaf))
        case "$float":
            return float(content)
        case "$opaque":
            raise TypeError("opaque bytes are no value; the planner that wrote them can read them")
        case _:
            return {tree_from_json(key, leaf): tree_from_json(v, leaf) for key, v in content}


def leaf_paths(value: Any) -> dict[str, str]:
    """``{path: tag}`` of every tensor leaf of a tree made by :func:`tree_to_json`."""
    found: dict[str, str] = {}

    def visit(node: Any) -> None:
        if isinstance(node, list):
            for child in node:
                visit(child)
        elif isinstance(node, dict):
            for key, child in node.items():
                if key in ("$tensor", "$rows") and len(node) == 1:
                    found[child] = key
                else:
                    visit(child)

    visit(value)
    return found
