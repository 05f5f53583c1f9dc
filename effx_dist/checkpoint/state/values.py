"""Entries of a state dict that are no tensors, as planners hand them over and as a manifest holds
them.

A manifest holds JSON. The bytes of a planner that does not speak JSON (the stock one pickles) are
taken only if the caller allows it; they stand in the manifest as ``{"$opaque": base64}`` and are
never looked into.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable
from typing import Any

from effx_dist.errors import CorruptCheckpointError

OPAQUE = "$opaque"
Pickled = Callable[[str, Any], bytes]
MAX_OPAQUE_BYTES = 2**24
"""Largest entry of opaque bytes: manifests are read whole by every rank."""


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
