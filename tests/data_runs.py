"""Runs of the sampler for its tests: deterministic losses, whole epochs, and plans merged over ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch

from effx_dist.core.counter_random import stream_key, uniform
from effx_dist.data import InfoBatchSampler
from effx_dist.data.plan import EpochPlan
from effx_dist.shard import Group

LossOf = Callable[[int, np.ndarray], np.ndarray]
# (ranks, batch_size, gradient_accumulation_steps), every product 168
LAYOUTS = [(1, 168, 1), (2, 6, 14), (3, 56, 1), (4, 21, 2), (7, 8, 3), (8, 7, 3)]


def plain_losses(epoch: int, ids: np.ndarray) -> np.ndarray:
    """Skewed losses that depend on the sample and, less, on the epoch."""
    hard = -np.log1p(-uniform(stream_key(11), ids))
    noise = uniform(stream_key(12, epoch), ids)
    return (hard + 0.1 * noise).astype(np.float32)


def faulty_losses(epoch: int, ids: np.ndarray) -> np.ndarray:
    """The same with some NaN and infinite ones."""
    losses = plain_losses(epoch, ids)
    losses[(ids + epoch) % 53 == 0] = np.nan
    losses[(ids + epoch) % 101 == 0] = np.inf
    return losses


@dataclasses.dataclass
class Merged:
    """One epoch over all ranks, by slot."""

    epoch: int
    threshold: float | None
    slots: list[int]
    ids: list[int]
    weights: list[float]

    @property
    def kept(self) -> set[int]:
        return set(self.ids)


def merge(plans: Sequence[EpochPlan]) -> Merged:
    """The plans of all ranks for one epoch, in slot order."""
    assert len({len(p.local_ids) for p in plans}) == 1, "ranks have unequal numbers of samples"
    slots = np.concatenate([p.local_slots for p in plans])
    order = np.argsort(slots)
    ids = np.concatenate([p.local_ids for p in plans])[order]
    weights = np.concatenate([p.local_weights for p in plans])[order]
    threshold = plans[0].threshold
    assert len({p.threshold for p in plans}) == 1
    return Merged(plans[0].epoch, threshold, slots[order].tolist(), ids.tolist(), weights.tolist())


def merge_runs(runs: Sequence[Sequence[EpochPlan]]) -> list[Merged]:
    """Plans by rank and epoch -> epochs."""
    return [merge(plans) for plans in zip(*runs, strict=True)]


def consume(
    sampler: InfoBatchSampler, losses_of: LossOf, num_batches: int | None = None
) -> list[int]:
    """Weigh the rest of the epoch, or ``num_batches`` micro-batches of it; return the ids."""
    size = sampler.batch_size
    ids = list(islice(sampler, None if num_batches is None else num_batches * size))
    batches = [ids[i : i + size] for i in range(0, len(ids), size)]
    for batch in batches:
        losses = torch.from_numpy(losses_of(sampler.epoch, np.array(batch)))
        sampler.weigh(losses, torch.tensor(batch))
    return [i for batch in batches for i in batch]


def train(
    sampler: InfoBatchSampler, losses_of: LossOf, first: int = 0, end: int | None = None
) -> list[EpochPlan]:
    """Epochs ``[first, end)``; their plans."""
    plans = []
    for epoch in range(first, end if end is not None else sampler.config.num_epochs):
        sampler.set_epoch(epoch)
        plans.append(sampler.plan)
        consume(sampler, losses_of)
    return plans


def make(group: Group, layout: tuple[int, int, int], **settings: Any) -> InfoBatchSampler:
    """A sampler of one rank of ``layout``."""
    _, batch_size, num_accumulated = layout
    return InfoBatchSampler(
        batch_size=batch_size, gradient_accumulation_steps=num_accumulated, group=group, **settings
    )


def recorded(sampler: InfoBatchSampler) -> dict[int, float]:
    """Losses that this rank has recorded in this epoch, by sample; those before a load left out."""
    losses = sampler.state_dict()["recorded"].local.numpy()
    ids = sampler.plan.local_ids
    return {int(i): float(x) for i, x in zip(ids, losses, strict=True) if not np.isnan(x)}
