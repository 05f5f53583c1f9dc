"""Bit-exact links: the difference of bit patterns, which is small where values moved little."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from effx_dist.native import kernels as native

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


def folded_delta(current: npt.NDArray[Any], reference: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """delta_bits with the sign moved to the last bit: small differences of either sign become small
    numbers (0, -1, 1, -2, ... become 0, 1, 2, 3, ...), whose upper bytes are 0."""
    if current.dtype != reference.dtype:
        raise ValueError(f"reference: dtype {reference.dtype}, must be {current.dtype}")
    _check_same(current, reference)
    if (compiled := native.kernels()) is not None:
        return compiled.delta(_patterns("current", current), _patterns("reference", reference))
    delta = delta_bits(current, reference)
    signed = delta.view(f"i{delta.dtype.itemsize}")
    folded: npt.NDArray[Any] = (signed << 1) ^ (signed >> (8 * delta.dtype.itemsize - 1))
    return folded.view(delta.dtype)


def undo_folded_delta_(folded: npt.NDArray[Any], reference: npt.NDArray[Any]) -> None:
    """The contiguous reference becomes, in place, what folded_delta was given as current."""
    _check_same(folded, reference)
    if not reference.flags.c_contiguous:
        raise ValueError("reference: must be contiguous to be changed in place")
    words = reference.view(f"u{reference.dtype.itemsize}")
    if (compiled := native.kernels()) is not None:
        compiled.undo_delta_(_patterns("folded", folded), words)
        return
    unsigned = _patterns("folded", folded)
    words += (unsigned >> 1) ^ (~(unsigned & 1) + 1)
