"""The scores of the samples that this rank owns: how losses reach them, and the threshold that all ranks share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.core import fixed_point, infobatch
from effx_dist.data.slots import Ranks
from effx_dist.shard import Group

_Array = TypeVar("_Array", npt.NDArray[np.float64], npt.NDArray[np.int64])


@dataclass(eq=False)
class ScoreBook:
    """Score of every owned sample as the current epoch was planned from it, and the losses recorded since.

    NaN in ``scores`` is "never scored"; in ``fresh``, NaN is "not recorded since" and infinity "was not finite".
    """

    scores: npt.NDArray[np.float32]
    fresh: npt.NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        self.fresh = np.full_like(self.scores, np.nan)

    @classmethod
    def unscored(cls, num_owned: int) -> ScoreBook:
        """A book in which no sample has a score yet."""
        return cls(np.full(num_owned, np.nan, dtype=np.float32))

    def receive(
        self, ids: npt.NDArray[np.int64], losses: npt.NDArray[np.float32], ranks: Ranks
    ) -> None:
        """Send (id, loss) to the id's owner, and note what arrives here in ``fresh``. Two all-to-alls."""
        owner = ranks.owners.of(ids)
        order = np.argsort(owner.astype(np.uint16), kind="stable")
        counts = np.bincount(owner, minlength=ranks.group.size).tolist()
        group = ranks.group
        got_ids = group.all_to_all(list(torch.from_numpy(ids[order]).split(counts)))
        got_losses = group.all_to_all(list(torch.from_numpy(losses[order]).split(counts)))
        for some_ids, some_losses in zip(got_ids, got_losses, strict=True):
            self.fresh[some_ids.numpy() - ranks.owned_start] = some_losses.numpy()

    def take_scores(
        self,
        owned_stretches: npt.NDArray[np.int8],
        num_samples: int,
        is_relative: bool,
        group: Group,
    ) -> float:
        """Turn the losses of the epoch that ends into scores; return how stale they would be as they are, in [0, 1].

        Three all-reduces of 40 to 80 numbers. The means behind relative scores are exact sums, so they do not depend
        on the order or the number of ranks.
        """
        is_finite = np.isfinite(self.fresh)
        losses, stretches = self.fresh[is_finite], owned_stretches[is_finite]
        means, counts, max_abs = _stretch_means(losses, stretches, num_samples, group)
        distances = losses - means[stretches]
        self.scores[np.isinf(self.fresh)] = np.nan
        self.scores[is_finite] = distances if is_relative else losses
        self.fresh.fill(np.nan)
        return 0.0 if is_relative else _staleness(distances, means, counts, max_abs, group)

    def threshold(self, kind: str | float, num_samples: int, group: Group) -> float | None:
        """The mean of all ranks' scores, or a quantile of them; None where there is no score yet. Exact.

        Two small all-reduces for the mean, three (two of 512 KiB) for a quantile.
        """
        scores = self.scores[~np.isnan(self.scores)]
        if isinstance(kind, str):
            return _mean(scores, num_samples, group)
        return _quantile(scores, kind, group)


def _stretch_means(
    losses: npt.NDArray[np.float32], stretches: npt.NDArray[np.int8], num_samples: int, group: Group
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Mean, count and largest absolute loss of each stretch, over all ranks."""
    num = infobatch.NUM_STRETCHES
    max_abs = _reduced(fixed_point.max_abs_by_bucket(losses, stretches, num), group, is_max=True)
    exponents = fixed_point.scale_exponents(max_abs, num_samples)
    merged = _reduced(fixed_point.sums_by_bucket(losses, stretches, exponents), group)
    return fixed_point.means_by_bucket(merged, exponents), merged[1], max_abs


def _staleness(
    distances: npt.NDArray[np.float64],
    means: npt.NDArray[np.float64],
    counts: npt.NDArray[np.int64],
    max_abs: npt.NDArray[np.float64],
    group: Group,
) -> float:
    bound = (2 * float(max_abs.max())) ** 2  # no loss is further than that from its mean, squared
    exponent = fixed_point.scale_exponent(bound, int(counts.sum()))
    within = np.array([fixed_point.to_fixed(distances**2, exponent).sum()], dtype=np.int64)
    total = int(_reduced(within, group)[0])
    return infobatch.staleness(counts, means, fixed_point.from_fixed(total, exponent))


def _mean(scores: npt.NDArray[np.float32], num_samples: int, group: Group) -> float | None:
    largest = np.array([np.abs(scores).max(initial=0)], dtype=np.float64)
    exponent = fixed_point.scale_exponent(float(_reduced(largest, group, True)[0]), num_samples)
    local = [fixed_point.to_fixed(scores, exponent).sum(), len(scores)]
    total, count = _reduced(np.array(local, dtype=np.int64), group).tolist()
    return fixed_point.fixed_mean(total, count, exponent) if count else None


def _quantile(scores: npt.NDArray[np.float32], quantile: float, group: Group) -> float | None:
    bits = infobatch.ordered_bits(scores)
    counts = _reduced(infobatch.digit_counts(bits), group)
    num_scored = int(counts.sum())
    if not num_scored:
        return None
    position = infobatch.quantile_position(num_scored, quantile)
    top, position = infobatch.digit_at(counts, position)
    low, _ = infobatch.digit_at(_reduced(infobatch.digit_counts(bits, top), group), position)
    return infobatch.join_digits(top, low)


def _reduced(values: _Array, group: Group, is_max: bool = False) -> _Array:
    """Merge over ranks, in place."""
    group.all_reduce(torch.from_numpy(values), "max" if is_max else "sum")
    return values
