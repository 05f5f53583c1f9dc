"""Who holds what: which rank owns a sample's score, and which slot of the epoch falls to which rank and batch."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effx_dist.errors import ConfigError
from effx_dist.shard import Group


@dataclass(frozen=True)
class Owners:
    """Scores live in contiguous ranges of ``ceil(num_samples / size)`` ids; the last ranks may own fewer, or none."""

    num_samples: int
    size: int

    @property
    def rows_per_rank(self) -> int:
        """Ids that a full range holds."""
        return -(-self.num_samples // self.size)

    def start(self, rank: int) -> int:
        """First id that ``rank`` owns."""
        return min(rank * self.rows_per_rank, self.num_samples)

    def num_owned(self, rank: int) -> int:
        """Number of ids that ``rank`` owns."""
        return self.start(rank + 1) - self.start(rank)

    def of(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The owner of each id."""
        return ids // self.rows_per_rank


@dataclass(frozen=True)
class Batches:
    """How an epoch's slots fall into micro-batches: slot ``s`` (counted from the plan's first) belongs to micro-step
    ``s // (batch_size * size)`` and to rank ``s % (batch_size * size) // batch_size``.

    An optimizer step takes ``global_batch`` consecutive slots, whichever way the product is made up.
    """

    batch_size: int
    num_accumulated: int
    rank: int
    size: int

    @property
    def micro_step(self) -> int:
        """Slots that all ranks take together in one micro-step."""
        return self.batch_size * self.size

    @property
    def global_batch(self) -> int:
        """Slots of one optimizer step."""
        return self.micro_step * self.num_accumulated

    def place(
        self, slots: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Rank of each slot, and its place among the slots of that rank."""
        step, within = np.divmod(slots, self.micro_step)
        rank, lane = np.divmod(within, self.batch_size)
        step *= self.batch_size
        step += lane
        return rank, step

    def slots(self, num_local: int) -> npt.NDArray[np.int64]:
        """The way back, for this rank: the slot of each of its ``num_local`` places."""
        step, lane = np.divmod(np.arange(num_local, dtype=np.int64), self.batch_size)
        return step * self.micro_step + self.rank * self.batch_size + lane


@dataclass(frozen=True)
class Ranks:
    """The ranks among which samples differ, which of them owns which score, and how slots fall to them."""

    group: Group
    owners: Owners
    batches: Batches

    @classmethod
    def of(cls, group: Group, num_samples: int, batch_size: int, num_accumulated: int) -> Ranks:
        """Ranges and batches for the ranks of ``group``. No communication is performed."""
        batches = Batches(batch_size, num_accumulated, group.rank, group.size)
        return cls(group, Owners(num_samples, group.size), batches)

    def check_that_a_batch_is_filled(self) -> None:
        """Raises ConfigError where the samples are fewer than one global batch. No communication is performed."""
        batches, num_samples = self.batches, self.owners.num_samples
        if num_samples < batches.global_batch:
            raise ConfigError(
                f"num_samples={num_samples}: must be at least one global batch of {batches.global_batch} (batch_size "
                f"{batches.batch_size} x {batches.num_accumulated} accumulated x {batches.size} ranks) with "
                "drop_last=True; use smaller batches, or drop_last=False"
            )

    @property
    def owned_start(self) -> int:
        """First id whose score this rank owns."""
        return self.owners.start(self.group.rank)

    @property
    def num_owned(self) -> int:
        """Number of ids whose score this rank owns."""
        return self.owners.num_owned(self.group.rank)


@dataclass(frozen=True)
class Span:
    """Which slots of an epoch a plan covers.

    ``num_kept`` samples and, with ``drop_last=False``, pads are permuted over ``num_slots`` slots; the plan covers
    ``[first, end)`` of them. Slots from ``end`` on are dropped; with ``drop_last=False``, and where a run was resumed
    with another global batch, ``end`` may lie beyond ``num_slots``: pads fill the rest.
    """

    num_kept: int
    num_slots: int
    first: int
    end: int
    global_batch: int

    @classmethod
    def of_epoch(cls, num_kept: int, batches: Batches, drop_last: bool) -> Span:
        """The span of a whole epoch that begins now."""
        size = batches.global_batch
        whole = num_kept // size * size
        padded = -(-num_kept // size) * size
        if drop_last:
            return cls(num_kept, num_kept, 0, whole, size)
        return cls(num_kept, padded, 0, padded, size)

    def resumed_at(self, position: int, batches: Batches, drop_last: bool) -> Span:
        """The slots from ``position`` on, in the batches of a layout that may differ from the one they began in.

        Where the same global batch still fits, the end stays what it was: the rest of the epoch is the same.
        Otherwise global batches are counted anew from ``position``; none of their samples repeats or is skipped.
        """
        size, end = batches.global_batch, self.end
        if size != self.global_batch or (end - position) % batches.micro_step:
            num_left = self.num_slots - position
            end = position + (num_left // size if drop_last else -(-num_left // size)) * size
        return Span(self.num_kept, self.num_slots, position, end, size)


def whole_number(name: str, value: int, at_least: int = 1) -> int:
    """``value`` as a Python integer.

    Raises:
        ConfigError: It is not a whole number (a boolean is not one), or it is below ``at_least``.
    """
    is_whole = hasattr(value, "__index__") and not isinstance(value, bool)
    if not is_whole or operator.index(value) < at_least:
        raise ConfigError(f"{name}={value!r}: must be a whole number, at least {at_least}")
    return operator.index(value)
