"""InfoBatch under DeepSpeed: a loader on our sampler, and losses that are recorded and weighed.

`DataFeed` is the part of `engine.effx` that deals with samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.dataloader import DeepSpeedDataLoader
from torch.utils.data import DataLoader

from effx_dist.config import InfoBatchConfig
from effx_dist.data import EffxWarning, InfoBatchSampler, ProgressLR
from effx_dist.data.dataset import SAMPLE_ID, batches_with_ids
from effx_dist.engines.feed import Feed
from effx_dist.errors import ConfigError
from effx_dist.shard import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Collate = Callable[[list[Any]], Any]


class InfoBatchLoader(DeepSpeedDataLoader):  # type: ignore[misc]  # DeepSpeed has no annotations
    """DeepSpeed's loader over the samples that InfoBatch keeps; batches carry the samples' ids.

    A batch is what the collate function makes of the items, with the ids (int64 ``[micro batch]``) under
    "sample_id" where it is a mapping, else behind its last element. Plain loops and DeepSpeed's
    RepeatingLoader work: a new iteration goes on where weighing stands, with the next epoch if this one was
    weighed to its end. Nothing is fetched before the first batch is asked for, so a checkpoint may be loaded
    after the iterator was made; one that is loaded later is taken up at the next batch.

    **Communication.** The first batch of an epoch and `set_epoch` are collective over the data-parallel
    ranks; `len` is not.
    """

    def __init__(
        self,
        engine: Any,
        dataset: Any,
        sampler: InfoBatchSampler,
        collate_fn: Collate | None,
        pin_memory: bool,
        num_local_io_workers: int | None,
    ) -> None:
        with_ids, collate = batches_with_ids(dataset, collate_fn)
        super().__init__(
            dataset=with_ids,
            batch_size=sampler.batch_size,
            pin_memory=pin_memory,
            local_rank=engine.local_rank,
            tput_timer=engine.tput_timer,
            collate_fn=collate,
            num_local_io_workers=num_local_io_workers,
            data_sampler=sampler,
            dataloader_drop_last=engine.dataloader_drop_last(),
        )
        self.dataloader: DataLoader[Any] = DataLoader(
            with_ids,
            batch_size=sampler.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_local_io_workers,
            pin_memory=pin_memory,
            drop_last=self.dataloader_drop_last,
        )

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``, as `InfoBatchSampler.set_epoch`. Collective; nothing if it is the current one."""
        self.data_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        """Micro-batches of one rank in the whole current epoch; `set_epoch` first for that of the next.
        No communication is performed."""
        sampler: InfoBatchSampler = self.data_sampler
        return -(-len(sampler) // sampler.batch_size)

    def __iter__(self) -> Iterator[Any]:
        self.data = self._batches()
        return self.data

    def __next__(self) -> Any:
        """The next batch of the newest iteration."""
        return next(self.data)

    def _batches(self) -> Iterator[Any]:
        sampler: InfoBatchSampler = self.data_sampler
        is_at_end = False
        while not is_at_end:
            plan = None
            self.tput_timer.start()
            for batch in self.dataloader:
                plan = plan or sampler.plan
                yield batch
                if sampler.plan is not plan:  # another epoch was set, or a checkpoint loaded
                    break
                self.tput_timer.start()
            else:
                is_at_end = True
        if plan is not None and sampler.num_remaining == len(plan.local_ids):
            warnings.warn(
                f"epoch {plan.epoch} has ended and no loss of it was weighed, so InfoBatch cannot tell its samples "
                "apart: engine.backward(engine.effx.weigh(losses, batch)) for every batch",
                EffxWarning,
                stacklevel=2,
            )


class DataFeed(Feed[InfoBatchSampler]):
    """Makes the sampler and the loader of an engine, and weighs its losses.

    Where the engine's ``lr_scheduler`` is a ProgressLR, ``engine.step`` sets its rate by the sampler's progress:
    ``initialize(lr_scheduler=lambda optimizer: effx_dist.ProgressLR(optimizer, total_epochs=4), ...)``.
    """

    how_to_make_one = (
        "pass training_data to initialize, or make a loader with engine.effx.deepspeed_io(dataset) or a sampler "
        "with engine.effx.make_sampler(num_samples)"
    )

    def __init__(self, engine: Any, config: InfoBatchConfig | None) -> None:
        super().__init__(config)
        self._engine = engine
        if isinstance(engine.lr_scheduler, ProgressLR):
            engine.step = self._at_the_rate_of_progress(engine.step, engine.lr_scheduler)

    def make_sampler(
        self, num_samples: int, group: Group | ProcessGroup | None = None
    ) -> InfoBatchSampler:
        """The engine's sampler over ``num_samples``, for a loader of the user's own.

        Micro-batch and accumulation are the engine's, the rest is the "infobatch" section's. It takes the
        place of the sampler made before, if any.

        Args:
            num_samples: samples of the data set, over all ranks.
            group: the ranks that see different samples; None: DeepSpeed's data-parallel group.

        Collective: the first epoch is planned.

        Raises:
            ConfigError: the section is absent or off; the engine names no data-parallel group; see
                InfoBatchSampler.
        """
        self.sampler = InfoBatchSampler.from_config(
            self._section,
            num_samples,
            self._engine.train_micro_batch_size_per_gpu(),
            self._engine.gradient_accumulation_steps(),
            self._data_group() if group is None else group,
        )
        _ = self.sampler.plan  # now, while all ranks are here: `len` on one alone must not wait
        return self.sampler

    def deepspeed_io(
        self,
        dataset: Any,
        pin_memory: bool | None = None,
        collate_fn: Collate | None = None,
        num_local_io_workers: int | None = None,
    ) -> Any:
        """What ``engine.deepspeed_io`` is for, with InfoBatch: a loader over ``dataset``, on a new sampler.

        Args:
            dataset: map-style. Items may be anything; ``collate_fn`` sees them as they are.
            pin_memory: None: where there is an accelerator.
            collate_fn: None: the engine's, from ``initialize(collate_fn=...)``, else torch's default.
            num_local_io_workers: processes per rank; None: 2, as DeepSpeed does.

        Collective where InfoBatch is on. Where it is off, DeepSpeed's own loader, without ids.

        Raises:
            ConfigError: the data set is iterable-style; see `make_sampler`.
        """
        engine = self._engine
        if pin_memory is None:
            pin_memory = get_accelerator().device_name() != "cpu"
        if self._infobatch is None:
            return engine.deepspeed_io(
                dataset,
                pin_memory=pin_memory,
                collate_fn=collate_fn,
                num_local_io_workers=num_local_io_workers,
            )
        collate = collate_fn if collate_fn is not None else engine.collate_fn
        batches_with_ids(dataset, collate)  # refuses what has no length, before it is asked for
        sampler = self.make_sampler(len(dataset))
        return InfoBatchLoader(engine, dataset, sampler, collate, pin_memory, num_local_io_workers)

    def weigh(self, losses: torch.Tensor, batch: Any) -> torch.Tensor:
        """Record the losses of a micro-batch and return the scalar to call ``engine.backward`` on.

        The engine divides by the accumulation steps and scales for fp16 itself, after this. No
        communication is performed. Where InfoBatch is off this is the mean, in float32 or wider; and so it is
        under torch.no_grad, in an evaluation: nothing is recorded there.

        Args:
            losses: ``[micro batch]``, one loss a sample, any floating dtype, on any device.
            batch: as the loader gave it (a mapping with "sample_id", or a tuple or list whose last element
                is the ids), or the ids themselves, as integers.

        Raises:
            ConfigError: no ids are found; there is no sampler yet; see InfoBatchSampler.weigh.
        """
        is_training = self._infobatch is not None and torch.is_grad_enabled()
        return self._weigh(losses, ids_of(batch) if is_training else (), is_training)

    def _at_the_rate_of_progress(
        self, step: Callable[..., Any], schedule: ProgressLR
    ) -> Callable[..., Any]:
        """``engine.step``, before which the rate is set. DeepSpeed steps the schedule once more, after the
        optimizer; without the keyword it would take its batch size for the progress."""

        def step_with_rate(lr_kwargs: dict[str, Any] | None = None) -> Any:
            if lr_kwargs is None and self.sampler is not None:
                lr_kwargs = {"progress": self.sampler.progress}
            lr_kwargs = lr_kwargs or {"progress": schedule.progress}
            schedule.step(**lr_kwargs)
            return step(lr_kwargs)

        return step_with_rate

    def _data_group(self) -> ProcessGroup:
        group: ProcessGroup | None = self._engine.data_parallel_group
        if group is None:
            raise ConfigError(
                f"mpu of type {type(self._engine.mpu).__name__}: names no data-parallel group; make the sampler with "
                "engine.effx.make_sampler(num_samples, group=the ranks that see different samples)"
            )
        return group


def ids_of(batch: Any) -> torch.Tensor | Sequence[int]:
    """The sample ids of a batch, or ``batch`` where it is the ids.

    Raises:
        ConfigError: a mapping has no "sample_id".
    """
    if isinstance(batch, Mapping):
        if SAMPLE_ID not in batch:
            raise ConfigError(
                f'batch with the keys {", ".join(map(str, batch))}: has no "{SAMPLE_ID}"; weigh what the loader '
                "gave, or wrap the data set of your own loader by effx_dist.with_sample_ids"
            )
        ids: torch.Tensor | Sequence[int] = batch[SAMPLE_ID]
        return ids
    is_batch = isinstance(batch, tuple | list) and len(batch) > 0
    if is_batch and isinstance(batch[-1], torch.Tensor) and batch[-1].dim():
        last: torch.Tensor = batch[-1]
        return last
    whole: torch.Tensor | Sequence[int] = batch
    return whole
