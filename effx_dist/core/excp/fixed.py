"""Exact sums: fixed point integers, so that no order of ranks, blocks or threads changes a bit.

A value x with |x| <= limit becomes the integer rint(x * 2^k). The exponent k depends only on the
whole tensor's limit and length, so every rank uses the same one. Each integer has at most 35 bits:
a block's sum stays below 2^53, where float64 adds integers exactly (np.bincount, np.sum), and the
whole tensor's sum stays below 2^62, in int64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from effx_dist.core.excp.arrays import BLOCK_VALUES, F64, I64
from effx_dist.core.fixed_point import scale_exponent

_EXACT_BITS = 53
_BLOCK_BITS = BLOCK_VALUES.bit_length() - 1


def fixed_exponent(limit: float, global_numel: int) -> int:
    """k for values of magnitude <= limit in a whole tensor of global_numel values."""
    if limit == 0.0:
        return 0
    block_exponent = _EXACT_BITS - _BLOCK_BITS - math.frexp(limit)[1]
    return min(block_exponent, scale_exponent(limit, global_numel))


def to_fixed(values: npt.NDArray[np.floating[Any]], exponent: int) -> F64:
    """rint(values * 2^exponent): integers, held in float64."""
    scaled: F64 = np.multiply(values, math.ldexp(1.0, exponent), dtype=np.float64)
    return np.rint(scaled, out=scaled)


def fixed_sum(values: npt.NDArray[np.floating[Any]], exponent: int) -> int:
    """Sum of one block in fixed point."""
    return int(to_fixed(values, exponent).sum())


def count_by(index: npt.NDArray[np.integer[Any]], length: int) -> I64:
    """How many values of one block fall in each of `length` cells."""
    return np.bincount(index, minlength=length).astype(np.int64, copy=False)


def sum_by(index: npt.NDArray[np.integer[Any]], integers: F64, length: int) -> I64:
    """Sums of one block's integers (held in float64) over each of `length` cells; exact."""
    return np.bincount(index, weights=integers, minlength=length).astype(np.int64)
