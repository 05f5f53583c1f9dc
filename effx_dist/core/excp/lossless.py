"""Bit-exact links: the difference of bit patterns, which is small where values moved little."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_ITEM_BYTES = (1, 2, 4, 8)


def _patterns(name: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array's bit patterns as unsigned integers of the same width."""
    if array.dtype.itemsize not in _ITEM_BYTES or array.dtype.hasobject:
        raise ValueError(f"{name}: dtype {array.dtype}, must have 1, 2, 4 or 8 bytes a value")
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def _check_same(array: npt.NDArray[Any], reference: npt.NDArray[Any]) -> None:
    if array.shape != reference.shape or array.dtype.itemsize != reference.dtype.itemsize:
        raise ValueError(
            f"reference: {reference.dtype}{reference.shape}, must be as wide and as long as "
            f"{array.dtype}{array.shape}"
        )


def delta_bits(current: npt.NDArray[Any], reference: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Bit patterns of current minus those of reference, modulo 2^bits.

    Both arrays have one dtype (any of 1, 2, 4 or 8 bytes) and shape; the result is unsigned.
    """
    if current.dtype != reference.dtype:
        raise ValueError(f"reference: dtype {reference.dtype}, must be {current.dtype}")
    _check_same(current, reference)
    delta: npt.NDArray[Any] = _patterns("current", current) - _patterns("reference", reference)
    return delta


def undo_delta_bits(delta: npt.NDArray[Any], reference: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The array that delta_bits was given as current, in the reference's dtype, bit for bit."""
    _check_same(delta, reference)
    out: npt.NDArray[Any] = _patterns("delta", delta) + _patterns("reference", reference)
    return out.view(reference.dtype)
