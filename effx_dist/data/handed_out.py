"""What the sampler hands out: an iterator over this rank's places, with a state for loaders that snapshot at dispatch.

Two states tell two things. The sampler's, for checkpoints, says what was *weighed*. The iterator's says what was
*handed out*, which in a loader with workers is ahead of training; torchdata's StatefulDataLoader keeps it with each
batch. Both are taken without communication.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from effx_dist.data import kinds
from effx_dist.data.plan import EpochPlan
from effx_dist.data.surroundings import Surroundings
from effx_dist.errors import ConfigError, LayoutMismatchError

_BLOCK = 4096


@dataclass(frozen=True)
class Mark:
    """How far an epoch was handed out to one rank."""

    epoch: int
    num_given: int
    """Samples of this rank, those weighed before a resume included."""
    num_total: int
    """Samples of the epoch, over all ranks."""
    rank: int
    size: int

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"kind": kinds.HANDED_OUT} | {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """The way back.

        Raises:
            ConfigError: It is another state, such as a sampler's, or malformed.
        """
        if state.get("kind") != kinds.HANDED_OUT:
            raise ConfigError(
                f"kind={state.get('kind')!r}: is not what an iterator of the sampler handed out; the sampler's own "
                "state goes to sampler.load_state_dict"
            )
        values = {field.name: state.get(field.name) for field in fields(cls)}
        for name, value in values.items():
            if type(value) is not int or value < 0:
                raise ConfigError(f'"{name}" is {value!r} in an iterator\'s state: must be >= 0')
        return cls(**values)  # type: ignore[arg-type]


class HandedOut(Iterator[int]):
    """Ids of one rank in the order of its plan, those that were weighed left out.

    Args:
        plan: The epoch's plan for this rank.
        places: The places of it that are to be handed out, int64, ascending.
        batch_size: The sampler's samples of a micro-batch.
        around: Who asks. Where a wrapper takes every so many-th batch, each is given as often; batches that it will
            throw away come first, and hold any ids.
        is_resumed: Whether a state was loaded, so that what is thrown away was weighed.
        skipped: What to tell of places that a loader's state says were handed out before.

    Raises:
        ConfigError: Whoever asks deals out batches that do not come out even.
    """

    def __init__(
        self,
        plan: EpochPlan,
        places: npt.NDArray[np.int64],
        batch_size: int,
        around: Surroundings,
        is_resumed: bool,
        skipped: Callable[[npt.NDArray[np.int64]], None] = lambda _: None,
    ) -> None:
        self.plan = plan
        self._is_resumed = is_resumed
        self._skipped = skipped
        self._places = places
        self._num_times = around.num_shards
        self._batch_size = (around.batch_size or batch_size) if around.num_shards > 1 else 1
        if self._num_times > 1 and len(places) % self._batch_size:
            raise ConfigError(
                f"batch_size={self._batch_size} of the loader that is sharded over {self._num_times} processes: must "
                f"divide the {len(places)} samples that this rank has left; give it the sampler's, {batch_size}"
            )
        num_skipped = around.num_skipped if is_resumed else 0
        per_skip = (around.batch_size or batch_size) * self._num_times
        self._num_before = num_skipped * per_skip
        self._num_drawn = 0
        self._ids = self._draw()

    def __iter__(self) -> HandedOut:
        return self

    def __next__(self) -> int:
        sample_id = next(self._ids)
        self._num_drawn += 1
        return sample_id

    def _draw(self) -> Iterator[int]:
        ids = self.plan.local_ids
        filler = int(ids[0]) if len(ids) else 0
        for _ in range(self._num_before):
            yield filler
        block = max(1, _BLOCK // self._batch_size) * self._batch_size
        for start in range(0, len(self._places), block):
            batches = ids[self._places[start : start + block]]
            if self._num_times > 1:
                shape = (-1, 1, self._batch_size)
                batches = np.repeat(batches.reshape(shape), self._num_times, axis=1).ravel()
            yield from batches.tolist()

    @property
    def num_places(self) -> int:
        """How many of the places were given, in all the copies that whoever asks takes one of."""
        drawn = max(0, self._num_drawn - self._num_before)
        whole, part = divmod(drawn, self._batch_size * self._num_times)
        last_copy = part - self._batch_size * (self._num_times - 1)
        return whole * self._batch_size + max(0, last_copy)

    @property
    def end(self) -> int:
        """The place behind the last that was given; 0 before the first."""
        num = self.num_places
        return int(self._places[num - 1]) + 1 if num else 0

    @property
    def is_exhausted(self) -> bool:
        """Whether all were given."""
        return self.num_places == len(self._places)

    def state_dict(self) -> dict[str, Any]:
        """How far the epoch was handed out, for a loader's snapshot. No communication is performed."""
        plan, num = self.plan, self.num_places
        given = plan.num_before // plan.batches.size + len(plan.local_ids) - len(self._places) + num
        batches = plan.batches
        return Mark(plan.epoch, given, plan.num_total, batches.rank, batches.size).to_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind what was handed out, where no sampler's state was loaded that says what was weighed.

        Raises:
            ConfigError: It is another state, or of another rank.
            LayoutMismatchError: It is of another epoch or plan.
        """
        mark, here = Mark.from_dict(state), Mark.from_dict(self.state_dict())
        if (mark.rank, mark.size) != (here.rank, here.size):
            raise ConfigError(
                f"the loader's state is of rank {mark.rank} of {mark.size}, this is rank {here.rank} of {here.size}: "
                "each rank keeps its own (effx_dist.checkpoint.PerRank); at another number of ranks load the sampler's "
                "state alone"
            )
        if (mark.epoch, mark.num_total) != (here.epoch, here.num_total):
            raise LayoutMismatchError(
                f"the loader's state is of epoch {mark.epoch} of {mark.num_total} samples, the sampler stands in epoch "
                f"{here.epoch} of {here.num_total}: load the sampler's own state, which has the scores that its plan "
                'follows from, before the loader is iterated: stateful={"sampler": sampler}'
            )
        num = min(mark.num_given - here.num_given, len(self._places))
        if num > 0 and not self._is_resumed:
            self._skipped(self._places[:num])
            self._places = self._places[num:]
