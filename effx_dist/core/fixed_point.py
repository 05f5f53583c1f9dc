"""Sums that do not depend on the order of their terms, nor on how ranks share them out.

Floating-point addition rounds differently in every order; integer addition does not round. Each value becomes
``round(x * 2**k)`` in int64, with the largest ``k`` at which the sum of all terms of all ranks cannot overflow,
integers are added, and the total goes back. A rounded value is off by at most ``2**-(k + 1)``: with n terms, about
``max|x| * n * 2**-62``. No communication is performed here: callers merge ``max|x|`` and the sums over ranks.

Where values are summed block by block, integers of at most 35 bits are held in float64: a block's sum stays below 2^53,
where float64 adds integers exactly (np.bincount, np.sum), and the whole tensor's sum below 2^62, in int64.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_SUM_BITS = 62
_EXACT_BITS = 53
_BLOCK_BITS = 18
BLOCK_VALUES = 1 << _BLOCK_BITS
"""Values worked on at once: temporaries stay in cache, and sums within a block stay exact."""


def scale_exponent(max_abs: float, num_terms: int) -> int:
    """The largest ``k`` at which ``num_terms`` values of at most ``max_abs`` sum to no more than 2**62.

    Args:
        max_abs: Largest absolute value of all ranks, finite.
        num_terms: Number of terms of all ranks, or any bound on it that all ranks agree on.
    """
    _, exponent = math.frexp(max_abs)  # max_abs < 2**exponent; (0, 0) for 0
    return _SUM_BITS - exponent - num_terms.bit_length()


def to_fixed(
    values: npt.NDArray[np.floating], exponent: int | npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """``round(values * 2**exponent)`` as int64. ``values`` must be finite; one exponent for all, or one each."""
    scaled = np.ldexp(values.astype(np.float64), exponent)
    return np.rint(scaled, out=scaled).astype(np.int64)


def from_fixed(total: int, exponent: int) -> float:
    """The way back: ``total / 2**exponent``, rounded once."""
    return math.ldexp(float(total), -exponent)


def fixed_mean(total: int, num_terms: int, exponent: int) -> float:
    """Mean of ``num_terms`` values whose fixed-point sum is ``total``, rounded once."""
    return math.ldexp(total / num_terms, -exponent)


def max_abs_by_bucket(
    values: npt.NDArray[np.floating], buckets: npt.NDArray[np.integer], num_buckets: int
) -> npt.NDArray[np.float64]:
    """Largest absolute value in each bucket, 0 where it is empty. To be merged over ranks by maximum."""
    largest = np.zeros(num_buckets, dtype=np.float64)
    np.maximum.at(largest, buckets, np.abs(values).astype(np.float64))
    return largest


def sums_by_bucket(
    values: npt.NDArray[np.floating],
    buckets: npt.NDArray[np.integer],
    exponents: npt.NDArray[np.int32],
) -> npt.NDArray[np.int64]:
    """Fixed-point sum and count of each bucket, int64 ``[2, num_buckets]``. To be merged over ranks by sum.

    Every bucket has its own exponent, so that one huge value does not coarsen the others' sums.
    """
    merged = np.zeros((2, len(exponents)), dtype=np.int64)
    np.add.at(merged[0], buckets, to_fixed(values, exponents[buckets]))
    merged[1] = np.bincount(buckets, minlength=len(exponents))
    return merged


def scale_exponents(max_abs: npt.NDArray[np.float64], num_terms: int) -> npt.NDArray[np.int32]:
    """:func:`scale_exponent` of each bucket."""
    return np.array([scale_exponent(float(m), num_terms) for m in max_abs], dtype=np.int32)


def means_by_bucket(
    merged: npt.NDArray[np.int64], exponents: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    """Mean of each bucket from the merged :func:`sums_by_bucket`; 0 where it is empty."""
    totals, counts = merged.tolist()
    return np.array(
        [
            fixed_mean(total, count, exponent) if count else 0.0
            for total, count, exponent in zip(totals, counts, exponents.tolist(), strict=True)
        ]
    )


def block_exponent(limit: float, global_numel: int) -> int:
    """k for values of magnitude <= limit in a whole tensor of global_numel values, summed block by block."""
    if limit == 0.0:
        return 0
    exponent = _EXACT_BITS - _BLOCK_BITS - math.frexp(limit)[1]
    return min(exponent, scale_exponent(limit, global_numel))


def fixed_floats(values: npt.NDArray[np.floating], exponent: int) -> npt.NDArray[np.float64]:
    """rint(values * 2^exponent) of one block: integers, held in float64."""
    scaled: npt.NDArray[np.float64] = np.multiply(
        values, math.ldexp(1.0, exponent), dtype=np.float64
    )
    return np.rint(scaled, out=scaled)


def fixed_sum(values: npt.NDArray[np.floating], exponent: int) -> int:
    """Sum of one block in fixed point."""
    return int(fixed_floats(values, exponent).sum())


def count_by(index: npt.NDArray[np.integer], length: int) -> npt.NDArray[np.int64]:
    """How many values of one block fall in each of ``length`` cells."""
    return np.bincount(index, minlength=length).astype(np.int64, copy=False)


def sum_by(
    index: npt.NDArray[np.integer], integers: npt.NDArray[np.float64], length: int
) -> npt.NDArray[np.int64]:
    """Sums of one block's integers (held in float64) over each of ``length`` cells; exact."""
    return np.bincount(index, weights=integers, minlength=length).astype(np.int64)
