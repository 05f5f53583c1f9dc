"""One epoch's plan: from each owner's kept samples to each rank's sample ids and weights.

The samples kept, in the order of their ids over all ranks, have places 0, 1, ...; a keyed permutation gives each place
its slot in the epoch, and a slot belongs to a rank (see `slots.Batches`). Owners send every sample straight to the
rank of its slot. Time and memory per rank are O(num_samples / ranks), and nothing depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.config import InfoBatchConfig
from effx_dist.core.counter_random import stream_key
from effx_dist.core.infobatch import (
    DROPPED,
    PAD,
    PLAIN,
    is_full_epoch,
    roles,
    stretch_of_slots,
    weight_table,
)
from effx_dist.core.permutation import permute
from effx_dist.data.messages import Messages
from effx_dist.data.scores import ScoreBook
from effx_dist.data.slots import Batches, Owners, Ranks, Span
from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Group

_KEEP, _ORDER = 1, 2  # purposes of random numbers, so that they are not those of one another
_ROLE_BITS = 2
_BLOCK = 4096
_INT32_LIMIT = 1 << 29  # a role and an offset below this share an int32


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

    @property
    def local_slots(self) -> npt.NDArray[np.int64]:
        """Slot of the epoch of each of ``local_ids``, int64 ``[num_local]``; the same slots at any world size."""
        return self.batches.slots(len(self.local_ids)) + self.span.first

    def ids_from(self, place: int) -> Iterator[int]:
        """``local_ids`` from that place on, as Python's integers."""
        for block in range(place, len(self.local_ids), _BLOCK):
            yield from self.local_ids[block : block + _BLOCK].tolist()


def exclusive_scan(count: int, group: Group) -> tuple[int, int]:
    """Sum of the lower ranks' ``count`` and of all ranks'. One all-reduce of ``group.size`` integers."""
    counts = torch.zeros(group.size, dtype=torch.int64)
    counts[group.rank] = count
    group.all_reduce(counts)
    return int(counts[: group.rank].sum()), int(counts.sum())


def exchange(
    role: npt.NDArray[np.uint8],
    places_before: int,
    span: Span,
    key: int,
    prune_ratio: float,
    ranks: Ranks,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int8]]:
    """Send every kept sample to the rank of its slot. One all-to-all.

    Args:
        role: What each owned sample does, uint8 ``[num_owned]``.
        places_before: Number of samples that lower ranks keep.
        span: The slots that are planned.
        key: Key of the permutation, the same on every rank.
        prune_ratio: The r of the weight 1 / (1 - r).
        ranks: Who owns which sample, and which slot falls to which rank.

    Returns:
        `local_ids`, `local_weights` and `owned_stretches` of the `EpochPlan`.
    """
    slots, packed, owned_stretches = _owned_slots(role, places_before, span, key)
    is_planned = (slots >= span.first) & (slots < span.end)
    if not is_planned.all():
        slots, packed = slots[is_planned], packed[is_planned]
    num_local = (span.end - span.first) // ranks.group.size
    is_short = max(ranks.owners.rows_per_rank, num_local) < _INT32_LIMIT
    wire: np.dtype[np.signedinteger] = np.dtype(np.int32 if is_short else np.int64)
    slots -= span.first
    received = ranks.group.all_to_all(_to_ranks(slots, packed, ranks.batches, wire))
    del slots, packed, is_planned
    ids, weights = _unpack(received, num_local, ranks.owners, weight_table(prune_ratio))
    return ids, weights, owned_stretches


def _owned_slots(
    role: npt.NDArray[np.uint8], places_before: int, span: Span, key: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int8]]:
    """Slot and packed (offset, role) of each kept sample that this rank owns, pads included; stretch of each owned."""
    offsets = np.flatnonzero(role != DROPPED)
    places = np.arange(places_before, places_before + len(offsets), dtype=np.int64)
    slots = permute(places, span.num_slots, key)
    stretches = np.full(len(role), -1, dtype=np.int8)
    stretches[offsets] = stretch_of_slots(slots, span.num_slots)
    packed = offsets << _ROLE_BITS | role[offsets]
    if span.end > span.num_kept:
        pad_slots, repeated = _pads(span, places_before, len(offsets), key)
        slots = np.concatenate([slots, pad_slots])
        packed = np.concatenate([packed, offsets[repeated] << _ROLE_BITS | PAD])
    return slots, packed, stretches


def _pads(
    span: Span, places_before: int, num_places: int, key: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Slots of the pads that repeat a sample of this rank, and which of its kept samples each repeats.

    The pads are permuted with the samples, so every global batch gets its share of them: all in the last one would
    leave it with few samples, and an optimizer that normalises its step would overrate those.
    """
    numbers = np.arange(span.end - span.num_kept, dtype=np.int64)
    repeated = numbers * span.num_kept // len(numbers) - places_before
    is_mine = (repeated >= 0) & (repeated < num_places)
    slots = numbers[is_mine] + span.num_kept
    is_permuted = slots < span.num_slots
    slots[is_permuted] = permute(slots[is_permuted], span.num_slots, key)
    return slots, repeated[is_mine]


def _to_ranks(
    slots: npt.NDArray[np.int64],
    packed: npt.NDArray[np.int64],
    batches: Batches,
    wire: np.dtype[np.signedinteger],
) -> list[torch.Tensor]:
    """For each rank: the places of its samples, then the samples, in one 1-D tensor."""
    rank, place = batches.place(slots)
    order = np.argsort(rank.astype(np.uint16), kind="stable")  # a radix sort, as the type is short
    counts = np.bincount(rank, minlength=batches.size)
    ends = np.cumsum(counts)
    place, packed = place.astype(wire)[order], packed.astype(wire)[order]
    return [
        torch.from_numpy(np.concatenate([place[end - n : end], packed[end - n : end]]))
        for n, end in zip(counts.tolist(), ends.tolist(), strict=True)
    ]


def _unpack(
    received: list[torch.Tensor], num_local: int, owners: Owners, table: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    ids = np.empty(num_local, dtype=np.int64)
    weights = np.empty(num_local, dtype=np.float32)
    num_filled = 0
    for rank, message in enumerate(received):
        place, packed = np.split(message.numpy(), 2)
        ids[place] = (packed >> _ROLE_BITS) + np.int64(owners.start(rank))
        weights[place] = table[packed & ((1 << _ROLE_BITS) - 1)]
        num_filled += len(place)
    assert num_filled == num_local, f"{num_filled} of {num_local} places filled"
    return ids, weights


class Planner:
    """Plans epochs for one rank. Every method is a collective of the ranks; scores are read, not changed."""

    def __init__(self, config: InfoBatchConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks

    def is_ever_pruning(self) -> bool:
        """Whether any epoch of the run prunes. No communication is performed."""
        config = self.config
        return config.prune_ratio > 0 and not all(
            is_full_epoch(epoch, config.num_epochs, config.delta)
            for epoch in range(config.num_epochs)
        )

    def begin(self, epoch: int, book: ScoreBook, messages: Messages) -> EpochPlan:
        """Plan all of ``epoch``. At most four small all-reduces and one all-to-all."""
        config, ranks = self.config, self.ranks
        full = is_full_epoch(epoch, config.num_epochs, config.delta)
        pruned = config.prune_ratio > 0 and not full
        threshold, role = self._roles(epoch, pruned, book)
        before, kept = exclusive_scan(int(np.count_nonzero(role)), ranks.group)
        global_batch = ranks.batches.global_batch
        if config.drop_last and kept < global_batch:
            messages.too_few_kept(ranks.group, epoch, kept, global_batch)
            pruned, (threshold, role) = False, self._roles(epoch, False, book)
            before, kept = ranks.owned_start, ranks.owners.num_samples
        span = Span.of_epoch(kept, ranks.batches, config.drop_last)
        return self._build(epoch, pruned, threshold, role, before, span)

    def resume(
        self, epoch: int, pruned: bool, span: Span, position: int, book: ScoreBook
    ) -> EpochPlan:
        """Plan what is left of an epoch that was planned as ``span`` from the same scores, in any layout of ranks.

        Raises:
            LayoutMismatchError: The scores are not those that the epoch was planned from.
        """
        threshold, role = self._roles(epoch, pruned, book)
        before, kept = exclusive_scan(int(np.count_nonzero(role)), self.ranks.group)
        if kept != span.num_kept:
            raise LayoutMismatchError(
                f"the scores keep {kept} samples in epoch {epoch}, the state says {span.num_kept}: they do not belong "
                "together; load the scores and the rest of the state from one checkpoint"
            )
        span = span.resumed_at(position, self.ranks.batches, self.config.drop_last)
        return self._build(epoch, pruned, threshold, role, before, span)

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

    def _build(
        self,
        epoch: int,
        pruned: bool,
        threshold: float | None,
        role: npt.NDArray[np.uint8],
        before: int,
        span: Span,
    ) -> EpochPlan:
        key = stream_key(self.config.seed, epoch, _ORDER)
        ids, weights, stretches = exchange(
            role, before, span, key, self.config.prune_ratio, self.ranks
        )
        return EpochPlan(
            epoch=epoch,
            pruned=pruned,
            threshold=threshold,
            span=span,
            batches=self.ranks.batches,
            local_ids=ids,
            local_weights=weights,
            owned_stretches=stretches,
        )
