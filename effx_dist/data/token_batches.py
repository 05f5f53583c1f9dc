"""Batches by tokens: as many samples as fit, and the same number of batches on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from effx_dist.data import surroundings
from effx_dist.data.plan import EpochPlan
from effx_dist.data.sampler import InfoBatchSampler
from effx_dist.data.slots import whole_number
from effx_dist.errors import ConfigError


class TokenBatches(Sampler[list[int]]):
    """A batch sampler over the samples that InfoBatch keeps, with at most ``max_tokens`` tokens a batch::

        batches = TokenBatches(sampler, lengths, max_tokens=8192)
        loader = DataLoader(with_sample_ids(dataset), batch_sampler=batches, collate_fn=pad)
        ...
        loss = sampler.weigh(losses, batch["sample_id"], num_items=batches.samples_per_batch)

    Samples come in the sampler's order; a batch is closed when the next sample does not fit. Ranks then have different
    numbers of batches, and the one with fewest would leave the others waiting: batches of such ranks are split until
    all have as many, in whole accumulations. Where samples are too few for that, the number is that of the samples.

    Batches have different numbers of samples, so the mean over each would count samples of small batches more: divide
    by `samples_per_batch`, which is the same for all (``num_items`` of ``weigh``).

    **Communication.** `iter` and `len` are collectives of the sampler's ranks: one small all-reduce, and what
    `InfoBatchSampler.__iter__` does.

    Args:
        sampler: The run's sampler.
        lengths: Tokens of each sample of the data set, by id: an array (it may lie in a file), or a function of an id.
        max_tokens: Tokens of one batch of one rank, padding not counted.

    Raises:
        ConfigError: ``max_tokens`` is no whole number. When batches are made: a sample alone is longer.
    """

    batch_size = None
    drop_last = False

    def __init__(
        self,
        sampler: InfoBatchSampler,
        lengths: Sequence[int] | np.ndarray | Callable[[int], int],
        max_tokens: int,
    ) -> None:
        self.sampler = sampler
        self._lengths = lengths
        self.max_tokens = whole_number("max_tokens", max_tokens)
        self._counted: tuple[EpochPlan, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """As `InfoBatchSampler.set_epoch`. Collective."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        around = surroundings.find()
        surroundings.check(around, self.sampler.group.size)
        self.sampler.begin_pass()
        batches = self._batches_of(list(self.sampler.hand_out(surroundings.Surroundings())))
        num_skipped = around.num_skipped if self.sampler.is_resumed else 0
        return self._given(batches, num_skipped, around.num_shards)

    def _given(
        self, batches: list[list[int]], num_skipped: int, num_shards: int
    ) -> Iterator[list[int]]:
        for _ in range(num_skipped * num_shards):
            yield batches[0] if batches else []
        for batch in batches:
            for _ in range(num_shards):
                yield batch

    def __len__(self) -> int:
        """Batches of one rank in the current epoch, or in what this process has of it."""
        return self._num_batches() * surroundings.find().num_shards

    @property
    def samples_per_batch(self) -> float:
        """Samples of the current epoch over its batches, the same on every rank. Collective where it is the first to
        ask in an epoch."""
        return len(self.sampler.plan.local_ids) / max(1, self._num_batches())

    def _num_batches(self) -> int:
        plan = self.sampler.plan
        if self._counted is None or self._counted[0] is not plan:
            self._counted = (plan, len(self._batches_of(plan.local_ids.tolist())))
        return self._counted[1]

    def _batches_of(self, ids: list[int]) -> list[list[int]]:
        """Batches of this rank, as many as every other rank has. One small all-reduce."""
        error: ConfigError | None = None
        batches: list[list[int]] = []
        try:
            batches = self._filled(ids)
        except ConfigError as caught:
            error = caught
        group = self.sampler.group
        told = group.tell_all(error, (len(batches), len(ids)))
        per_step = self.sampler.plan.batches.num_accumulated
        wanted = -(-max(num_batches for num_batches, _ in told) // per_step) * per_step
        number = min(wanted, min(num_ids for _, num_ids in told))
        if number < max(num_batches for num_batches, _ in told):
            raise ConfigError(
                f"ranks have {', '.join(str(num_ids) for _, num_ids in told[:8])} samples left: iterate the loader "
                "once an epoch; a run that is resumed by load_state_dict has equal numbers"
            )
        return split_to(batches, number)

    def _filled(self, ids: list[int]) -> list[list[int]]:
        batches: list[list[int]] = []
        room = 0
        for sample_id in ids:
            lengths = self._lengths
            length = int(lengths(sample_id) if callable(lengths) else lengths[sample_id])
            if length > self.max_tokens:
                raise ConfigError(
                    f"max_tokens={self.max_tokens}: sample {sample_id} alone has {length} tokens; must be at least that"
                )
            if length > room:
                batches.append([])
                room = self.max_tokens
            batches[-1].append(sample_id)
            room -= length
        return batches


def split_to(batches: list[list[int]], number: int) -> list[list[int]]:
    """``number`` batches of the same samples in the same order: the largest are halved until they are as many."""
    found = list(batches)
    while len(found) < number:
        largest = max(range(len(found)), key=lambda i: len(found[i]))
        batch = found[largest]
        half = len(batch) // 2
        found[largest : largest + 1] = [batch[:half], batch[half:]]
    return found
