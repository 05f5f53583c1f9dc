"""InfoBatch (Qin et al., ICLR 2024) as pure functions: which samples an epoch leaves out, and what the rest weigh.

With score H(z) of sample z and threshold h, a pruning epoch leaves z out with probability (the paper's equation 3)

    P(z) = r  if H(z) < h  else  0

and z weighs ``1 / (1 - P(z))`` where it is kept (equations 5 to 7), so that the expected gradient is that of all the
data. The first epoch and the last ones use everything. No communication is performed: what needs all ranks (a sum, a
histogram) is split into a local part, which callers merge, and a part that reads the merged result.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from effx_dist.core.counter_random import uniform

# What a sample does in one epoch. The values index `weight_table`.
DROPPED, PLAIN, RESCALED, PAD = 0, 1, 2, 3

NUM_STRETCHES = 40
MIN_STRETCH_SAMPLES = 8
STALENESS_BOUND = 0.2
LOPSIDED_BOUND = 0.9
HEAVY_WEIGHT = 4.0
_MIN_STALENESS_SAMPLES = 400

_DIGIT_BITS = 16
NUM_DIGITS = 1 << _DIGIT_BITS
_SIGN = np.uint32(0x80000000)


FullEpochs = Literal["rounded", "official"]


def is_full_epoch(
    epoch: int, num_epochs: int, delta: float, counted: FullEpochs = "rounded"
) -> bool:
    """Whether ``epoch`` (from 0) uses all samples with weight 1.

    That is the first epoch, for want of scores, and the last ones (the paper's equation 8), none if ``delta`` is 1.
    "rounded": ``max(1, round((1 - delta) * num_epochs))`` of them. "official": as the authors' code counts, which
    prunes the epochs with ``epoch + 1 <= delta * num_epochs``. Epochs beyond ``num_epochs`` are full as well.
    """
    if epoch == 0 or epoch >= num_epochs:
        return True
    if counted == "official":
        return epoch + 1 > delta * num_epochs
    return delta < 1 and epoch >= num_epochs - max(1, round((1 - delta) * num_epochs))


def full_epochs(num_epochs: int, delta: float, counted: FullEpochs = "rounded") -> tuple[int, ...]:
    """The epochs of a run that use all samples, ascending."""
    return tuple(e for e in range(num_epochs) if is_full_epoch(e, num_epochs, delta, counted))


def roles(
    scores: npt.NDArray[np.float32], first_id: int, threshold: float, prune_ratio: float, key: int
) -> npt.NDArray[np.uint8]:
    """The keep rule: DROPPED, PLAIN (weight 1) or RESCALED (weight 1 / (1 - r)) for samples ``first_id + i``.

    A sample that was never scored (NaN) is PLAIN. What happens to a sample depends on its score and on (key, id)
    alone, not on which samples stand beside it.
    """
    role = np.full(len(scores), PLAIN, dtype=np.uint8)
    # float64, as a Python float would be rounded to float32
    low = np.flatnonzero(scores < np.float64(threshold))
    is_dropped = uniform(key, low + first_id) < prune_ratio
    role[low] = np.where(is_dropped, np.uint8(DROPPED), np.uint8(RESCALED))
    return role


def weight_table(prune_ratio: float, max_weight: float | None = None) -> npt.NDArray[np.float32]:
    """Weight of each role: ``[0, 1, 1 / (1 - r), 0]``, float32; the third at most ``max_weight`` where that is given.

    A cap below ``1 / (1 - r)`` is biased: samples below the threshold then count ``max_weight * (1 - r)`` times what
    they count in all the data, in expectation.
    """
    weight = 1 / (1 - prune_ratio)
    capped = weight if max_weight is None else min(weight, max_weight)
    return np.array([0, 1, capped, 0], dtype=np.float32)


def num_stretches(num_slots: int) -> int:
    """Stretches that an epoch of ``num_slots`` samples is cut into: 40, fewer where they would hold under 8 samples.

    The mean over a shorter stretch would follow the samples themselves rather than the training's progress.
    """
    return min(NUM_STRETCHES, max(1, num_slots // MIN_STRETCH_SAMPLES))


def stretch_of_slots(slots: npt.NDArray[np.int64], num_slots: int) -> npt.NDArray[np.int8]:
    """The stretch, from 0, in which each slot of an epoch of ``num_slots`` slots lies."""
    return (slots * num_stretches(num_slots) // num_slots).astype(np.int8)


def staleness(
    counts: npt.NDArray[np.int64], means: npt.NDArray[np.float64], within: float
) -> float:
    """Share of the scores' variance that is explained by when a sample was visited, at most 1.

    Between-stretch variance over total variance, adjusted for the number of stretches (the adjusted R squared of a
    one-way analysis of variance), so that it is 0 on average where time explains nothing. Returns 0 below 400 samples,
    where chance alone would exceed any useful bound.

    Args:
        counts: Scored samples in each stretch.
        means: Mean score of each stretch.
        within: Sum of the squared distances of the scores from their stretch's mean.
    """
    num_scored, num_used = int(counts.sum()), int(np.count_nonzero(counts))
    if num_scored < _MIN_STALENESS_SAMPLES:
        return 0.0
    overall = float((counts * means).sum() / num_scored)
    total = within + float((counts * (means - overall) ** 2).sum())
    if not np.isfinite(total) or total <= 0:
        return 0.0
    return 1 - (within / (num_scored - num_used)) / (total / (num_scored - 1))


def ordered_bits(scores: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    """Integers in the order of the (finite) scores; equal scores, -0.0 and 0.0 among them, give equal integers."""
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits >= _SIGN, ~bits, bits | _SIGN)


def from_ordered_bits(bits: int) -> float:
    """The way back, for one value."""
    sign = int(_SIGN)
    raw = bits ^ sign if bits >= sign else ~bits & 0xFFFFFFFF
    return float(np.array([raw], dtype=np.uint32).view(np.float32)[0])


def digit_counts(bits: npt.NDArray[np.uint32], top: int | None = None) -> npt.NDArray[np.int64]:
    """Histogram of the top 16 bits, or, given ``top``, of the low 16 bits of the values that begin with it.

    int64 ``[65536]``, to be merged over ranks by sum. Two of them find any quantile exactly.
    """
    digits = bits >> np.uint32(_DIGIT_BITS)
    if top is not None:
        digits = bits[digits == top] & np.uint32(NUM_DIGITS - 1)
    return np.bincount(digits, minlength=NUM_DIGITS).astype(np.int64)


def digit_at(merged_counts: npt.NDArray[np.int64], position: int) -> tuple[int, int]:
    """The digit that holds the value at ``position`` (from 0) in ascending order, and its position among those."""
    ends = np.cumsum(merged_counts)
    digit = int(np.searchsorted(ends, position, side="right"))
    return digit, position - int(ends[digit] - merged_counts[digit])


def quantile_position(num_scored: int, quantile: float) -> int:
    """Place in ascending order of the threshold score: ``floor(quantile * num_scored)`` scores lie before it."""
    return min(num_scored - 1, int(quantile * num_scored))


def join_digits(top: int, low: int) -> float:
    """The score whose ordered bits are ``top`` and ``low``."""
    return from_ordered_bits(top << _DIGIT_BITS | low)
