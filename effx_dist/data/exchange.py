"""How samples travel when an epoch is planned: from the rank that owns each to the rank of its slot."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.core.infobatch import PAD
from effx_dist.core.permutation import permute
from effx_dist.data.slots import Batches, Owners, Ranks, Span
from effx_dist.shard import Group

_ROLE_BITS = 2
_INT32_LIMIT = 1 << 29  # a role and an offset below this share an int32


@dataclass(frozen=True, eq=False)
class OwnedSlots:
    """Those of this rank's own samples that take part in a plan, and where they go."""

    offsets: npt.NDArray[np.int64]
    """Their numbers among the owned samples, ascending, int64 ``[n]``."""
    slots: npt.NDArray[np.int64]
    """The slot of each, int64 ``[n]``."""
    before: int
    """How many of them lower ranks have."""
    key: int
    """Key of the permutation that gave the slots, the same on every rank."""

    @classmethod
    def place(
        cls, offsets: npt.NDArray[np.int64], before: int, num_slots: int, key: int
    ) -> OwnedSlots:
        """Permute the samples that lower ranks do not have over the slots. No communication is performed."""
        places = np.arange(before, before + len(offsets), dtype=np.int64)
        return cls(offsets, permute(places, num_slots, key), before, key)

    def within(self, span: Span) -> OwnedSlots:
        """Those whose slots the span covers."""
        is_covered = (self.slots >= span.first) & (self.slots < span.end)
        if is_covered.all():
            return self
        return OwnedSlots(self.offsets[is_covered], self.slots[is_covered], self.before, self.key)


def exclusive_scan(count: int, group: Group) -> tuple[int, int]:
    """Sum of the lower ranks' ``count`` and of all ranks'. One all-reduce of ``group.size`` integers."""
    before, total, _ = scan_and_sum(count, 0, group)
    return before, total


def scan_and_sum(count: int, other: int, group: Group) -> tuple[int, int, int]:
    """As `exclusive_scan`, and the sum of all ranks' ``other`` with it."""
    counts = torch.zeros(group.size + 1, dtype=torch.int64)
    counts[group.rank], counts[-1] = count, other
    group.all_reduce(counts)
    return int(counts[: group.rank].sum()), int(counts[:-1].sum()), int(counts[-1])


def exchange(
    owned: OwnedSlots,
    role: npt.NDArray[np.uint8],
    span: Span,
    weights_of_roles: npt.NDArray[np.float32],
    ranks: Ranks,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Send every sample to the rank of its slot. One all-to-all.

    Args:
        owned: The samples, and their slots.
        role: What each owned sample does, uint8 ``[num_owned]``.
        span: The slots that are planned.
        weights_of_roles: See `core.infobatch.weight_table`.
        ranks: Who owns which sample, and which slot falls to which rank.

    Returns:
        `local_ids` and `local_weights` of the `EpochPlan`.
    """
    covered = owned.within(span)
    slots, packed = covered.slots, covered.offsets << _ROLE_BITS | role[covered.offsets]
    if span.end > span.num_kept:
        pad_slots, repeated = _pads(span, owned.before, len(owned.offsets), owned.key)
        is_planned = (pad_slots >= span.first) & (pad_slots < span.end)
        slots = np.concatenate([slots, pad_slots[is_planned]])
        pads = owned.offsets[repeated[is_planned]] << _ROLE_BITS | PAD
        packed = np.concatenate([packed, pads])
    num_local = (span.end - span.first) // ranks.group.size
    is_short = max(ranks.owners.rows_per_rank, num_local) < _INT32_LIMIT
    wire: np.dtype[np.signedinteger] = np.dtype(np.int32 if is_short else np.int64)
    if span.first:
        slots = slots - span.first
    received = ranks.group.all_to_all(_to_ranks(slots, packed, ranks.batches, wire))
    del slots, packed, covered
    return _unpack(received, num_local, ranks.owners, weights_of_roles)


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
