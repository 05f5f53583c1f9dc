"""Rounds 1 and 2 of a quantiser's statistics: ranges, then a magnitude histogram and sums.

Every function sees one piece of the whole tensor and returns a vector of fixed length. Round 1
merges by elementwise maximum, rounds 2 and 3 by integer sum, in any order. No communication is
performed here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from effx_dist.core.excp.arrays import (
    F32,
    F64,
    I64,
    LARGEST,
    JointArrays,
    from_bits,
    magnitude_bits,
)
from effx_dist.core.fixed_point import block_exponent, count_by, fixed_sum, from_fixed
from effx_dist.native import kernels as native

RANGES_LEN = 5
_NON_FINITE, _NEGATIVE_V, _MAX_R, _MAX_M, _MAX_V = range(RANGES_LEN)

_BIN_SHIFT = 19
"""A magnitude's histogram bin is its 8 exponent bits and 4 mantissa bits."""
_NUM_BINS = 1 << (31 - _BIN_SHIFT)
_SQUARES, _ABS_M, _SUM_V = _NUM_BINS, _NUM_BINS + 1, _NUM_BINS + 2
SUMS_LEN = _NUM_BINS + 3
"""Length of the round 2 vector."""


def _range(values: F32 | None) -> tuple[float, bool]:
    """max|values| (0 for none, NaN or infinity where one is present); whether one is below 0."""
    if values is None or values.size == 0:
        return 0.0, False
    if (compiled := native.kernels()) is not None:
        largest, has_negative = compiled.range(np.ascontiguousarray(values))
        return float(largest), has_negative
    low, high = np.min(values), np.max(values)
    return abs(float(np.maximum(high, -low))), bool(low < 0)


def ranges(a: JointArrays) -> F64:
    """Round 1: float64 [RANGES_LEN] of one piece; merge by np.maximum.

    Holds a flag for non-finite values, one for negative v, and the largest |r|, |m| and v.
    """
    found = [_range(x) for x in (a.r, a.m, a.v)]
    largest = np.array([magnitude for magnitude, _ in found])
    out = np.zeros(RANGES_LEN)
    if not np.isfinite(largest).all():
        out[_NON_FINITE] = 1.0
        return out
    out[_MAX_R:] = largest
    out[_NEGATIVE_V] = float(found[2][1])
    return out


@dataclass(frozen=True)
class Scales:
    """What the merged ranges say of the whole tensor: limits, and exponents of its exact sums."""

    global_numel: int
    max_r: float
    max_m: float
    max_v: float

    @classmethod
    def from_ranges(cls, merged_ranges: F64, global_numel: int) -> Scales:
        """Scales of a whole tensor of global_numel values."""
        max_r, max_m, max_v = (float(x) for x in merged_ranges[_MAX_R:])
        return cls(global_numel, max_r, max_m, max_v)

    @property
    def squares_exponent(self) -> int:
        """Exponent of the fixed point sum of r^2."""
        return block_exponent(self.max_r * self.max_r, self.global_numel)

    @property
    def m_exponent(self) -> int:
        """Exponent of the fixed point sum of |m|."""
        return block_exponent(self.max_m, self.global_numel)

    @property
    def v_exponent(self) -> int:
        """Exponent of the fixed point sum of v."""
        return block_exponent(self.max_v, self.global_numel)


def quantisable(merged_ranges: F64) -> bool:
    """False where the whole tensor holds a non-finite value or a negative v."""
    return not (merged_ranges[_NON_FINITE] or merged_ranges[_NEGATIVE_V])


def sums(a: JointArrays, merged_ranges: F64, global_numel: int) -> I64:
    """Round 2: int64 [SUMS_LEN] of one piece; merge by +.

    A histogram of |r| over 4096 bins of its bit pattern, and fixed point sums of r^2, |m| and v.
    All zero where the tensor is not quantisable.
    """
    out = np.zeros(SUMS_LEN, dtype=np.int64)
    if not quantisable(merged_ranges):
        return out
    scales = Scales.from_ranges(merged_ranges, global_numel)
    compiled = native.kernels()
    exponents = (scales.squares_exponent, scales.m_exponent, scales.v_exponent)
    for block in a.blocks():
        if compiled is not None:
            factors = [math.ldexp(1.0, exponent) for exponent in exponents]
            compiled.sums(block.r, block.m, block.v, factors, out)
            continue
        out[:_NUM_BINS] += count_by(magnitude_bits(block.r) >> _BIN_SHIFT, _NUM_BINS)
        squares = np.multiply(block.r, block.r, dtype=np.float64)
        out[_SQUARES] += fixed_sum(squares, scales.squares_exponent)
        if block.m is not None:
            out[_ABS_M] += fixed_sum(np.abs(block.m), scales.m_exponent)
        if block.v is not None:
            out[_SUM_V] += fixed_sum(block.v, scales.v_exponent)
    return out


@dataclass(frozen=True, eq=False)
class Totals:
    """What the merged sums say of the whole tensor."""

    magnitudes: I64
    """Histogram of |r|. Bin 0 holds the zeros and everything below 2^-130."""
    squared_norm: float
    """Sum of r^2."""
    mean_abs_m: float
    fixed_sum_v: int
    """Sum of v, times 2^v_exponent."""

    @classmethod
    def from_sums(cls, merged_sums: I64, scales: Scales) -> Totals:
        """Totals of the whole tensor."""
        numel = max(scales.global_numel, 1)
        return cls(
            magnitudes=merged_sums[:_NUM_BINS],
            squared_norm=from_fixed(int(merged_sums[_SQUARES]), scales.squares_exponent),
            mean_abs_m=from_fixed(int(merged_sums[_ABS_M]), scales.m_exponent) / numel,
            fixed_sum_v=int(merged_sums[_SUM_V]),
        )

    def mean_v(self, scales: Scales) -> float:
        """Mean of v over the whole tensor."""
        return from_fixed(self.fixed_sum_v, scales.v_exponent) / max(scales.global_numel, 1)

    def median(self) -> float:
        """Median of |r|, 0 where at least half are (nearly) zero; see value_at_rank."""
        count = int(self.magnitudes.sum())
        if count == 0 or (count - 1) // 2 < int(self.magnitudes[0]):
            return 0.0
        return value_at_rank(self.magnitudes, (count - 1) / 2)

    def non_zero(self) -> I64:
        """The histogram without its bin 0."""
        out = self.magnitudes.copy()
        out[0] = 0
        return out


def value_at_rank(magnitudes: I64, rank: float) -> float:
    """The value at a rank (0-based, may be fractional) of a non-empty magnitude histogram.

    Linear inside the bin, so within one bin width (1/16) of the true value, and within about 1 %
    where the density changes little over a bin. The same for every cut of the tensor.
    """
    ends = np.cumsum(magnitudes)
    index = int(np.searchsorted(ends, int(rank), side="right"))
    before = int(ends[index]) - int(magnitudes[index])
    low = float(from_bits(index << _BIN_SHIFT))
    high = min(float(from_bits((index + 1) << _BIN_SHIFT)), float(LARGEST))
    return low + (high - low) * min((rank - before + 0.5) / int(magnitudes[index]), 1.0)
