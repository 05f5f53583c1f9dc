"""A fingerprint of a data set, for the sampler's ``dataset=``: scores belong to (data set, sample)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
import xxhash


def fingerprint(dataset: Any, num_items: int = 64) -> str:
    """32 hexadecimal digits that follow from a map-style data set's length and ``num_items`` of its items.

    A Hugging Face data set's own fingerprint where it has one. A data set that grew, was reordered or filtered gets
    another one; a change in items that are not looked at is not seen. No communication is performed.
    """
    own = getattr(dataset, "_fingerprint", None)
    if isinstance(own, str):
        return own
    hasher, size = xxhash.xxh3_128(), len(dataset)
    _feed(hasher, size)
    for index in np.unique(np.linspace(0, size - 1, min(num_items, size), dtype=np.int64)).tolist():
        _feed(hasher, dataset[index])
    digest: str = hasher.hexdigest()
    return digest


def _feed(hasher: Any, value: Any) -> None:
    """Hash a value of an item: its kind, and what is in it."""
    hasher.update(type(value).__name__.encode())
    match value:
        case torch.Tensor():
            contiguous = value.detach().cpu().contiguous()
            hasher.update(str(tuple(value.shape)).encode())
            hasher.update(contiguous.flatten().view(torch.uint8).numpy().tobytes())
        case np.ndarray():
            hasher.update(str(value.shape).encode())
            hasher.update(np.ascontiguousarray(value).tobytes())
        case bytes():
            hasher.update(value)
        case Mapping():
            for key in sorted(value, key=str):
                _feed(hasher, key)
                _feed(hasher, value[key])
        case str() | int() | float() | None:
            hasher.update(repr(value).encode())
        case Iterable():
            for item in value:
                _feed(hasher, item)
        case _:
            told = str(vars(value)) if hasattr(value, "__dict__") else repr(value)
            hasher.update(told.encode())
