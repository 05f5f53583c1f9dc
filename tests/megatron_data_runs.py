"""InfoBatch with whole Megatron models and their schedules, in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.megatron_runs import SEQUENCE, VOCABULARY, Case, make_job, parallel, transformer_config

# isort: split
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import forward_step_calc_loss

from effx_dist.config import InfoBatchConfig
from effx_dist.engines.megatron.data import DataFeed

TOTAL, GLOBAL, MICRO = 40, 8, 2
CONFIG = InfoBatchConfig(num_epochs=4, delta=0.5, seed=1)
# Gradients stay whole without the distributed optimizer, so that they can be compared.
LAYOUTS = {"tp2": Case(tp=2, distributed=False), "pp2": Case(pp=2, distributed=False)}


@dataclass
class Seen:
    """What one rank did under one layout."""

    data_rank: int
    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    state: Any = None
    max_error: float | None = None
    """Largest difference of a gradient from the expected one, over the largest element of that; of the
    first step with samples of more than one weight."""


def everything() -> dict[str, Any]:
    """What this rank saw, `Seen`, of every layout, and what `context_parallel` gives."""
    results: dict[str, Any] = {"cp2": context_parallel()}
    for name, case in LAYOUTS.items():
        with parallel(case):
            results[name] = vars(_Run(case).train())
    return results


def tokens_of(index: int) -> torch.Tensor:
    """``[sequence + 1]`` tokens of one sample."""
    generator = torch.Generator().manual_seed(index)
    return torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=generator)


class _Run:
    """One epoch of everything and one that is pruned, without updates: the model stays as it is."""

    def __init__(self, case: Case) -> None:
        self.job = make_job(case)
        self.feed = DataFeed(CONFIG, [self.job.chunks[0].config])
        self.sampler = self.feed.make_sampler(
            TOTAL, micro_batch_size=MICRO, global_batch_size=GLOBAL
        )

    def train(self) -> Seen:
        seen = Seen(parallel_state.get_data_parallel_rank())
        for epoch in range(2):
            self.sampler.set_epoch(epoch)
            plan = self.sampler.plan
            seen.ids.append(plan.local_ids.tolist())
            seen.weights.append(plan.local_weights.tolist())
            batches = list(self.sampler)
            per_step = GLOBAL // self.job.dp // MICRO
            for start in range(0, len(batches), per_step):
                if epoch == 1 and start == per_step:
                    seen.state = _as_lists(self.sampler.state_dict())
                self.step(batches[start : start + per_step], self.weighed_loss)
                self.feed.advance()
                samples = self.samples_of(slice(start * MICRO, (start + per_step) * MICRO))
                if seen.max_error is None and len({weight for _, weight in samples}) > 1:
                    seen.max_error = self.gradient_error(samples)
        return seen

    def samples_of(self, places: slice) -> list[tuple[int, float]]:
        """Id and weight of all ranks' samples at these places of their plans."""
        plan, group = self.sampler.plan, self.sampler.inner.group
        here = zip(
            plan.local_ids[places].tolist(), plan.local_weights[places].tolist(), strict=True
        )
        return [sample for part in group.all_gather_object(list(here)) for sample in part]

    def step(self, batches: list[list[int]], loss_func: Callable[..., Any]) -> None:
        """Forward and backward of these micro-batches, by Megatron's schedule for the layout."""
        init_num_microbatches_calculator(
            0, None, len(batches) * len(batches[0]) * self.job.dp, len(batches[0]), self.job.dp
        )
        for chunk in self.job.chunks:
            chunk.zero_grad_buffer()

        def forward_step(data: Iterator[list[int]], model: Any) -> Any:
            ids = next(data)
            tokens = torch.stack([tokens_of(index) for index in ids])
            positions = torch.arange(SEQUENCE).expand(len(ids), -1)
            mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)[None, None]
            output = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:])
            return output, lambda losses: loss_func(ids, losses)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.job.chunks[0],
            num_microbatches=len(batches),
            seq_length=SEQUENCE,
            micro_batch_size=len(batches[0]),
            forward_only=False,
        )
        destroy_num_microbatches_calculator()

    def weighed_loss(self, ids: list[int], output: torch.Tensor) -> Any:
        losses = self.feed.sample_losses(output, _mask(ids))
        return self.feed.weigh(losses, ids), {}

    def plain_loss(self, ids: list[int], output: torch.Tensor) -> Any:
        return self.feed.sample_losses(output, _mask(ids)).mean(), {}

    def gradient_error(self, samples: list[tuple[int, float]]) -> float:
        """How far the gradient of the last step is from the weighed sum of its samples', one by one."""
        params = [p for p in self.job.chunks[0].parameters() if p.requires_grad]
        found = [param.main_grad.clone() for param in params]
        expected = [torch.zeros_like(grad) for grad in found]
        for index, weight in samples:
            self.step([[index]], self.plain_loss)
            for total, param in zip(expected, params, strict=True):
                total += weight / GLOBAL * param.main_grad
        errors = [
            float((grad - total).abs().max() / total.abs().max())
            for grad, total in zip(found, expected, strict=True)
        ]
        return max(errors)


def _mask(ids: Iterable[int]) -> torch.Tensor:
    """Some samples have few targets: a mean over all tokens of a batch would be another one."""
    return torch.stack([torch.arange(SEQUENCE) >= index % 13 for index in ids]).float()


def _as_lists(state: dict[str, Any]) -> dict[str, Any]:
    told = {name: value for name, value in state.items() if name not in ("recorded", "progress")}
    rows = {name: told[name] for name in ("scores", "fresh_losses")}
    bits = {name: rows[name].local.view(torch.int32).tolist() for name in rows}
    return {**told, **bits}


@contextmanager
def _context_parallel() -> Iterator[None]:
    parallel_state.initialize_model_parallel(context_parallel_size=2)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def context_parallel() -> tuple[torch.Tensor, ...]:
    """A model of one parameter, on two ranks that hold halves of every sequence, two times.

    Returns the losses and those of whole sequences, then the gradient as Megatron makes it and that of all samples.
    """
    tokens = torch.arange(4.0 * SEQUENCE).reshape(4, SEQUENCE).sin()
    mask = _mask([3, 9, 1, 12])
    with _context_parallel():
        feed = DataFeed(CONFIG)
        sampler = feed.make_sampler(TOTAL, micro_batch_size=MICRO, global_batch_size=GLOBAL)
        sampler.set_epoch(0)
        data_rank = parallel_state.get_data_parallel_rank()
        part = parallel_state.get_context_parallel_rank()
        rows = slice(data_rank * MICRO, (data_rank + 1) * MICRO)
        columns = slice(part * SEQUENCE // 2, (part + 1) * SEQUENCE // 2)
        parameter = torch.tensor(1.5, requires_grad=True)
        losses = feed.sample_losses(parameter * tokens[rows, columns], mask[rows, columns])
        ids = next(iter(sampler))
        scaled = _scaled_by_megatron(feed.weigh(losses, ids))
        scaled.backward()
        gradient = parameter.grad
        assert gradient is not None
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(gradient, group=group)
        gradient /= group.size()  # as DistributedDataParallel averages
        states = sampler.state_dict()
        assert states["consumed_samples"] == GLOBAL // 2
    means = (tokens * mask).sum(dim=1) / mask.sum(dim=1)
    return losses.detach(), 1.5 * means[rows], gradient, means.mean()


def _scaled_by_megatron(loss: torch.Tensor) -> torch.Tensor:
    """What the schedule makes of the first of the two values that a ``loss_func`` returns."""
    store: list[Any] = []
    output, _ = forward_step_calc_loss(
        None,
        torch.zeros(()),
        lambda _: (loss, {}),
        transformer_config(Case()),
        None,
        False,
        1,
        store,
        cp_group_size=2,
        is_last_stage=True,
    )
    scaled: torch.Tensor = output
    return scaled
