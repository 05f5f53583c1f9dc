"""One epoch's plan: from each owner's kept samples to each rank's sample ids and weights.

The samples kept, in the order of their ids over all ranks, have places 0, 1, ...; a keyed permutation gives each place
its slot in the epoch, and a slot belongs to a rank (see `slots.Batches`). Owners send every sample straight to the
rank of its slot. Time and memory per rank are O(num_samples / ranks), and nothing depends on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.config import InfoBatchConfig
from effx_dist.core.counter_random import stream_key
from effx_dist.core.infobatch import PLAIN, is_full_epoch, roles, stretch_of_slots, weight_table
from effx_dist.data.exchange import OwnedSlots, exchange, exclusive_scan, scan_and_sum
from effx_dist.data.messages import Messages
from effx_dist.data.scores import ScoreBook
from effx_dist.data.slots import Batches, Ranks, Span
from effx_dist.errors import LayoutMismatchError

_KEEP, _ORDER, _REST = 1, 2, 3  # purposes of random numbers: none are those of another


@dataclass(frozen=True)
class Rest:
    """The samples of an epoch that were left when it was taken up again, where they are no run of its slots.

    They are planned anew, among themselves: the samples kept in slots below ``bound`` that no loss was recorded of,
    permuted over the slots of ``span``.
    """

    bound: int
    span: Span


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """What one rank does in one epoch, or in the rest of it after a resume."""

    epoch: int
    pruned: bool
    """Whether the keep rule was applied; else all samples are kept, with weight 1."""
    threshold: float | None
    """Score below which samples may be dropped; None in an epoch that is not pruned."""
    span: Span
    batches: Batches
    local_ids: npt.NDArray[np.int64]
    """Sample ids in the order in which this rank takes them, int64 ``[num_local]``."""
    local_weights: npt.NDArray[np.float32]
    """Weight of each: 1, 1 / (1 - r), or 0 for a pad; float32 ``[num_local]``."""
    owned_stretches: npt.NDArray[np.int8]
    """Stretch of the epoch in which each owned sample is visited; -1 for a dropped one. int8 ``[num_owned]``."""
    rest: Rest | None = None
    """Where the plan is of what was left of an epoch whose samples were weighed out of order; else None."""

    @property
    def planned(self) -> Span:
        """The slots that the plan covers: of the epoch, or of its rest."""
        return self.span if self.rest is None else self.rest.span

    @property
    def num_before(self) -> int:
        """Samples of the epoch, over all ranks, that were done before this plan was made."""
        if self.rest is None:
            return self.span.first
        return min(self.rest.bound, self.span.num_kept) - self.rest.span.num_kept

    @property
    def num_total(self) -> int:
        """Samples of the whole epoch, over all ranks: those done before, and those of this plan."""
        return self.num_before + self.planned.end - self.planned.first

    @property
    def local_slots(self) -> npt.NDArray[np.int64]:
        """Slot of each of ``local_ids``, int64 ``[num_local]``; the same slots at any world size."""
        return self.batches.slots(len(self.local_ids)) + self.planned.first


@dataclass(frozen=True, eq=False)
class Unfinished:
    """An epoch that was planned and not finished, as a state tells of it."""

    epoch: int
    pruned: bool
    span: Span
    """The slots that the plan covered, or that its rest is of."""
    position: int
    """All slots before it are done."""
    rest: Rest | None = None
    """Where that plan was of a rest itself."""


@dataclass(frozen=True, eq=False)
class _Kept:
    """What the keep rule says of this rank's own samples."""

    epoch: int
    pruned: bool
    threshold: float | None
    role: npt.NDArray[np.uint8]
    before: int
    """Number of samples that lower ranks keep."""


@dataclass(frozen=True, eq=False)
class Recalled:
    """An epoch's keep rule and slots for this rank's own samples, as they were when it was planned."""

    kept: _Kept
    slots: OwnedSlots


class Planner:
    """Plans epochs for one rank. Every method is a collective of the ranks; scores are read, not changed."""

    def __init__(self, config: InfoBatchConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks

    def is_ever_pruning(self) -> bool:
        """Whether any epoch of the run prunes. No communication is performed."""
        config = self.config
        return config.prune_ratio > 0 and not all(
            self._is_full(epoch) for epoch in range(config.num_epochs)
        )

    def _is_full(self, epoch: int) -> bool:
        config = self.config
        return is_full_epoch(epoch, config.num_epochs, config.delta, config.full_epochs)

    def begin(self, epoch: int, book: ScoreBook, messages: Messages) -> EpochPlan:
        """Plan all of ``epoch``. At most four small all-reduces and one all-to-all."""
        config, ranks = self.config, self.ranks
        full = self._is_full(epoch)
        pruned = config.prune_ratio > 0 and not full
        threshold, role = self._roles(epoch, pruned, book)
        num_low = len(role) - int(np.count_nonzero(role == PLAIN))
        before, kept, low = scan_and_sum(int(np.count_nonzero(role)), num_low, ranks.group)
        if threshold is not None and config.threshold == "mean":
            messages.lopsided_mean(ranks.group, epoch, threshold, low / ranks.owners.num_samples)
        global_batch = ranks.batches.global_batch
        if config.drop_last and kept < global_batch:
            messages.too_few_kept(ranks.group, epoch, kept, global_batch)
            pruned, (threshold, role) = False, self._roles(epoch, False, book)
            before, kept = ranks.owned_start, ranks.owners.num_samples
        span = Span.of_epoch(kept, ranks.batches, config.drop_last)
        kept_ones = _Kept(epoch, pruned, threshold, role, before)
        return self._build(kept_ones, span, self._slots(kept_ones, span))

    def resume(self, unfinished: Unfinished, recalled: Recalled, book: ScoreBook) -> EpochPlan:
        """Plan what is left of an epoch that was planned from the same scores, in any layout of ranks.

        What was weighed is what has a loss in ``book.fresh``, and what lies before ``unfinished.position``. Where that
        is all the slots up to there and no other, the rest of the epoch is what it would have been, bit for bit;
        else what is left is planned anew. ``recalled``: see `recall`.
        """
        span, kept, slots = unfinished.span, recalled.kept, recalled.slots
        is_weighed = ~np.isnan(book.fresh[slots.offsets])
        last = np.array([slots.slots[is_weighed].max(initial=-1)], dtype=np.int64)
        self.ranks.group.all_reduce(torch.from_numpy(last), "max")
        if unfinished.rest is None and last[0] < unfinished.position:
            span = span.resumed_at(unfinished.position, self.ranks.batches, self.config.drop_last)
            return self._build(kept, span, slots)
        return self._build_rest(kept, replace(span, first=unfinished.position), slots, is_weighed)

    def _roles(
        self, epoch: int, pruned: bool, book: ScoreBook
    ) -> tuple[float | None, npt.NDArray[np.uint8]]:
        config, ranks = self.config, self.ranks
        threshold = None
        if pruned:
            threshold = book.threshold(config.threshold, ranks.owners.num_samples, ranks.group)
        if threshold is None:
            return None, np.full(ranks.num_owned, PLAIN, dtype=np.uint8)
        key = stream_key(config.seed, epoch, _KEEP)
        role = roles(book.scores, ranks.owned_start, threshold, config.prune_ratio, key)
        return threshold, role

    def recall(self, unfinished: Unfinished, book: ScoreBook) -> Recalled:
        """What was kept when the epoch was planned, and in which slots. One all-reduce, and those of the threshold.

        Raises:
            LayoutMismatchError: The scores are not those that the epoch was planned from.
        """
        epoch, pruned = unfinished.epoch, unfinished.pruned
        threshold, role = self._roles(epoch, pruned, book)
        before, num_kept = exclusive_scan(int(np.count_nonzero(role)), self.ranks.group)
        if num_kept != unfinished.span.num_kept:
            raise LayoutMismatchError(
                f"the scores keep {num_kept} samples in epoch {epoch}, the state says {unfinished.span.num_kept}: they "
                "do not belong together; load the scores and the rest of the state from one checkpoint"
            )
        kept = _Kept(epoch, pruned, threshold, role, before)
        return Recalled(kept, self._slots(kept, unfinished.span))

    def planned_before(
        self, unfinished: Unfinished, recalled: Recalled, book: ScoreBook
    ) -> OwnedSlots:
        """This rank's own samples in the plan that ``unfinished`` tells of, and the slots that they had there.

        One all-reduce, where that plan was of a rest.
        """
        slots = recalled.slots
        if unfinished.rest is None:
            return slots.within(unfinished.span)
        is_weighed = ~np.isnan(book.fresh[slots.offsets])
        left = self._left(slots, is_weighed, unfinished.span.first, unfinished.rest.bound)
        before, _ = exclusive_scan(len(left), self.ranks.group)
        return self._rest_slots(unfinished.epoch, left, before, unfinished.rest.span).within(
            unfinished.rest.span
        )

    def _slots(self, kept: _Kept, span: Span) -> OwnedSlots:
        key = stream_key(self.config.seed, kept.epoch, _ORDER)
        return OwnedSlots.place(np.flatnonzero(kept.role), kept.before, span.num_slots, key)

    def _left(
        self, slots: OwnedSlots, is_weighed: npt.NDArray[np.bool_], first: int, bound: int
    ) -> npt.NDArray[np.int64]:
        """Offsets of what was not weighed, in slots from ``first`` to ``bound``."""
        return slots.offsets[~is_weighed & (slots.slots >= first) & (slots.slots < bound)]

    def _rest_slots(
        self, epoch: int, left: npt.NDArray[np.int64], before: int, span: Span
    ) -> OwnedSlots:
        """What is left, permuted over the slots of its own span; lower ranks have ``before`` of it."""
        key = stream_key(self.config.seed, epoch, _REST, span.num_kept)
        return OwnedSlots.place(left, before, span.num_slots, key)

    def _build_rest(
        self, kept: _Kept, span: Span, slots: OwnedSlots, is_weighed: npt.NDArray[np.bool_]
    ) -> EpochPlan:
        """What is left of the slots that were planned; with those that were dropped, where it does not come out
        even in the batches there are now."""
        batches, group = self.ranks.batches, self.ranks.group
        bound = span.end if self.config.drop_last else span.num_slots
        left = self._left(slots, is_weighed, span.first, bound)
        before, num_left = exclusive_scan(len(left), group)
        is_same = span.global_batch == batches.global_batch
        if self.config.drop_last and num_left % (
            batches.micro_step if is_same else batches.global_batch
        ):
            bound = span.num_slots
            left = self._left(slots, is_weighed, span.first, bound)
            before, num_left = exclusive_scan(len(left), group)
            is_same = False
        rest = Span.of_epoch(num_left, batches, self.config.drop_last)
        if is_same and self.config.drop_last:
            rest = replace(rest, end=num_left)  # the end of an accumulation that had begun
        owned = self._rest_slots(kept.epoch, left, before, rest)
        return self._build(kept, span, slots, Rest(bound, rest), owned)

    def _build(
        self,
        kept: _Kept,
        span: Span,
        slots: OwnedSlots,
        rest: Rest | None = None,
        rest_slots: OwnedSlots | None = None,
    ) -> EpochPlan:
        stretches = np.full(len(kept.role), -1, dtype=np.int8)
        stretches[slots.offsets] = stretch_of_slots(slots.slots, span.num_slots)
        ids, weights = exchange(
            slots if rest_slots is None else rest_slots,
            kept.role,
            span if rest is None else rest.span,
            weight_table(self.config.prune_ratio, self.config.max_weight),
            self.ranks,
        )
        return EpochPlan(
            epoch=kept.epoch,
            pruned=kept.pruned,
            threshold=kept.threshold,
            span=span,
            batches=self.ranks.batches,
            local_ids=ids,
            local_weights=weights,
            owned_stretches=stretches,
            rest=rest,
        )
