"""What `effx_dist.megatron.attach` refuses, leaves alone and keeps, in processes of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron_cautious_runs import FusedAdam, inner_of
from tests.megatron_runs import Case, Job, mains, make_job, parallel, states

# isort: split
from effx_dist.config import EffxConfig
from effx_dist.engines.megatron import Handle, attach
from effx_dist.errors import EffxError

CAUTIOUS = EffxConfig.from_dict({"cautious": {}, "excp": {"profile": "lossless"}})
WHOLE = Case(tp=2, distributed=False)


def refusals() -> dict[str, tuple[str, str, bool]]:
    """By cause: kind and words of the error on this rank, and whether the optimizer is as it was."""
    return {name: _refused(case, spoil) for name, (case, spoil) in _CAUSES.items()}


def _refused(case: Case, spoil: Callable[[Job], Any]) -> tuple[str, str, bool]:
    with parallel(case):
        job = make_job(case)
        chunks = spoil(job) or job.chunks
        kinds = [type(inner) for inner in inner_of(job)]
        groups = [dict(group) for inner in inner_of(job) for group in inner.param_groups]
        error: Exception | None = None
        try:
            attach(job.optimizer, chunks, CAUTIOUS)
        except EffxError as caught:
            error = caught
        now = [dict(group) for inner in inner_of(job) for group in inner.param_groups]
        is_same = kinds == [type(inner) for inner in inner_of(job)] and all(
            a.keys() == b.keys() for a, b in zip(groups, now, strict=True)
        )
        return type(error).__name__, str(error), is_same


def _set_option(name: str) -> Callable[[Job], None]:
    def spoil(job: Job) -> None:
        for optimizer in job.optimizer.chained_optimizers:
            setattr(optimizer.config, name, True)

    return spoil


def _set_ddp(name: str) -> Callable[[Job], None]:
    def spoil(job: Job) -> None:
        for chunk in job.chunks:
            setattr(chunk.ddp_config, name, True)

    return spoil


def _other_chunks(job: Job) -> Any:
    return make_job(job.case).chunks


def _other_chunks_here(job: Job) -> Any:
    other = make_job(job.case).chunks  # collective
    return other if dist.get_rank() == 1 else job.chunks


def _schedule(job: Job) -> None:
    """torch's schedulers put a step of their own in front of the class's."""
    torch.optim.lr_scheduler.ConstantLR(inner_of(job)[0])


def _nothing(_: Job) -> None:
    pass


_CAUSES: dict[str, tuple[Case, Callable[[Job], Any]]] = {
    "precision-aware": (Case(), _set_option("use_precision_aware_optimizer")),
    "offload": (Case(), _set_option("optimizer_cpu_offload")),
    "Megatron FSDP": (Case(), _set_ddp("use_megatron_fsdp")),
    "8-bit parameters": (Case(), _set_ddp("fp8_param_gather")),
    "coupled decay": (Case(options={"decoupled_weight_decay": False}), _nothing),
    "SGD with decay": (Case(optimizer="sgd", distributed=False), _nothing),
    "scheduler of torch": (Case(), _schedule),
    "other chunks": (Case(tp=2), _other_chunks),
    "other chunks on one rank": (Case(tp=2), _other_chunks_here),
}


def twice() -> dict[str, Any]:
    """Two attachments, and then a step: what the second has changed."""
    with parallel(Case(tp=2)):
        job = make_job(Case(tp=2))
        first = attach(job.optimizer, job.chunks, CAUTIOUS)
        second = attach(job.optimizer, job.chunks, CAUTIOUS)
        counted: list[Any] = []
        inner_of(job)[0].register_step_post_hook(lambda *_: counted.append(1))
        job.train(1)
        return {
            "num_hook_calls": len(counted),
            "is_same": first.alignment == second.alignment,
            "num_parameters": len(second.alignment),
        }


def fused(folder: Path) -> dict[str, Any]:
    """A FusedAdam made cautious: what it keeps, and what becomes of it by Megatron's own state dict and by
    a checkpoint. Differences are the largest ones of master weights."""
    found: dict[str, Any] = {}
    with parallel(WHOLE):
        with _fused_job() as (job, handle):
            job.train(2)
            inner = inner_of(job)[0]
            found["keys"] = {key for state in inner.state.values() for key in state}
            found["steps"] = [group["step"] for group in inner.param_groups]
            own = copy.deepcopy(job.optimizer.state_dict())
            model = {name: p.detach().clone() for name, p in job.chunks[0].named_parameters()}
            handle.save_checkpoint(folder, 2).wait()
            job.train(1, first=2)
            expected = mains(handle.layout)
        with _fused_job() as (job, handle):
            for name, param in job.chunks[0].named_parameters():
                param.data.copy_(model[name])
            job.optimizer.load_state_dict(own)
            job.train(1, first=2)
            found["after Megatron's own"] = _largest(expected, mains(handle.layout))
        with _fused_job() as (job, handle):
            handle.load_checkpoint(folder)
            found["loaded steps"] = [group["step"] for group in inner_of(job)[0].param_groups]
            job.train(1, first=2)
            found["after loading"] = _largest(expected, mains(handle.layout))
        job = make_job(WHOLE)
        with attach(job.optimizer, job.chunks, CAUTIOUS) as handle:
            handle.load_checkpoint(folder)
            steps = states(handle.layout, "step")
            found["AdamW's steps"] = {x for s in steps.values() for x in s.values.unique().tolist()}
            job.train(1, first=2)
            found["as AdamW"] = _largest(expected, mains(handle.layout))
    return found


@contextmanager
def _fused_job() -> Iterator[tuple[Job, Handle]]:
    job = make_job(WHOLE)
    for inner in inner_of(job):
        inner.__class__ = FusedAdam
    with attach(job.optimizer, job.chunks, CAUTIOUS) as handle:
        yield job, handle


def _largest(expected: dict[str, Any], found: dict[str, Any]) -> float:
    assert expected.keys() == found.keys()
    pairs = [(expected[name].values, found[name].values) for name in expected]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)
