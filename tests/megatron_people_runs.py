"""What people do with Megatron-core that our own loops do not, in processes of their own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron_cautious_runs import scheduler_of
from tests.megatron_checkpoint_runs import BF16, config, is_rounded, is_same, job_of, state_of
from tests.megatron_runs import Case, make_job, parallel
from tests.megatron_strategy_runs import CASES, OTHER, SAME, place, save, sharded_state, train

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling

from effx_dist.engines.megatron import attach
from effx_dist.engines.megatron.checks import check
from effx_dist.engines.megatron.local_tensors import unwrapped
from effx_dist.errors import EffxError

MOE = {"num_experts": 4, "dtype": BF16}


def strict_modes(root: Path) -> dict[str, Any]:
    """All eight, by the strategy that Megatron finds itself: what fits, and what does not on either side."""
    found: dict[str, Any] = {}
    with job_of(CASES["dp"], config(mode="thread")) as (job, handle):
        scheduler = scheduler_of(job)
        train(job, scheduler, 1)
        save(job, handle, scheduler, root, 1)
        saved = state_of(handle)
    for mode in StrictHandling:
        for kind in ("fits", "other format", "fewer", "stranger"):
            with job_of(CASES["dp"]) as (job, handle):
                found[mode.value, kind] = _load(job, handle, root, mode, kind)
                loaded = found[mode.value, kind]["error"] == "" and kind in ("fits", "other format")
                found[mode.value, kind]["is_same"] = loaded and is_same(saved, state_of(handle))
    return found


def _load(job: Any, handle: Any, root: Path, mode: StrictHandling, kind: str) -> dict[str, Any]:
    form = OTHER if kind == "other format" else SAME
    for optimizer in job.optimizer.chained_optimizers:
        optimizer._init_optimizer_states_with_dummy_values()
    state = sharded_state(job, scheduler_of(job), 1, True, form)
    lacked = ""
    if kind == "fewer":
        lacked = state["model"].pop("decoder.final_layernorm.weight").key
    if kind == "stranger":
        state["stranger"] = ShardedTensor.from_rank_offsets(
            "stranger", torch.zeros(4), replica_id=dist.get_rank()
        )
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron").addHandler(handler)
    result: Any = None
    error = ""
    try:
        result = dist_checkpointing.load(
            state, place(root, 1), strict=mode, validate_access_integrity=kind != "fewer"
        )
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    logging.getLogger("megatron").removeHandler(handler)
    keys = [sorted(k) for k in result[1:]] if isinstance(result, tuple) else None
    logged = [r for r in records if "keys" in r]
    return {"error": error, "keys": keys, "logged": logged, "lacked": lacked}


def weights_alone(root: Path) -> dict[str, Any]:
    """Of a bf16 model that was trained, at layouts where ranks hold nothing of some tensors."""
    found = {}
    for name, saving, others in (
        ("dense", Case(dtype=BF16), (Case(dtype=BF16, pp=2), Case(dtype=BF16, tp=2))),
        ("experts", Case(**MOE, ep=2), (Case(**MOE), Case(**MOE, ep=2), Case(**MOE, pp=2))),
    ):
        with job_of(saving) as (job, handle):
            job.train(1)
            handle.save_checkpoint(root / name, 1).wait()
            mains = state_of(handle).mains
        for index, case in enumerate(others):
            with parallel(case):
                job = make_job(case)
                with attach(None, job.chunks, config()) as handle:
                    handle.load_checkpoint(root / name, load_optimizer=False)
                    found[name, index] = is_rounded(handle, mains)
    return found


def experts_elsewhere(root: Path) -> dict[str, Any]:
    """Expert parallelism changes how many parameter groups there are, and in which order."""
    found = {}
    with job_of(Case(**MOE, ep=2)) as (job, handle):
        scheduler = scheduler_of(job)
        train(job, scheduler, 2)
        for number, group in enumerate(handle.layout.param_groups):
            group["lr"] = 0.01 * (1 + bool(group.get("wd_mult", 1.0)))  # by kind, not by number
            found["groups", 2, number] = float(group["lr"])
        handle.save_checkpoint(root, 2).wait()
        saved = state_of(handle)
    for ep in (1, 2):
        with job_of(Case(**MOE, ep=ep)) as (job, handle):
            handle.load_checkpoint(root)
            rates = {
                name: group["lr"]
                for group, names in zip(
                    handle.layout.param_groups, handle.layout.group_parameters, strict=True
                )
                for name in names
            }
            found["loaded", ep] = (is_same(saved, state_of(handle)), rates)
    return found


def unwrapped_chunks(root: Path) -> dict[str, Any]:
    """The bare model instead of what is around it, saved, loaded and gathered."""
    case = Case(dtype=BF16)
    with parallel(case):
        job = make_job(case)
        with attach(job.optimizer, [unwrapped(chunk) for chunk in job.chunks], config()) as handle:
            job.train(1)
            handle.save_checkpoint(root, 1).wait()
            saved = state_of(handle)
            job.train(1, first=1)
            handle.load_checkpoint(root)
            return {
                "is_same": is_same(saved, state_of(handle)),
                "is_rounded": is_rounded(handle, saved.mains),
            }


class TensorParallelMuon(torch.optim.SGD):
    """Named as Megatron's."""


class LayerWiseDistributedOptimizer:
    """Named as Megatron's."""

    chained_optimizers: tuple[Any, ...] = ()


def messages() -> dict[str, str]:
    """What is said of optimizers that are refused."""
    found = {}
    with parallel(Case(distributed=False)):
        job = make_job(Case(distributed=False))
        own = job.optimizer.chained_optimizers[0]
        inner = own.optimizer
        own.optimizer = TensorParallelMuon(inner.param_groups[0]["params"], lr=1.0)
        found["muon"] = _refusal(job.optimizer, job)
        own.optimizer = inner
        del own.tp_group
        found["unknown make"] = _refusal(job.optimizer, job)
        found["layer-wise"] = _refusal(LayerWiseDistributedOptimizer(), job)
    return found


def _refusal(optimizer: Any, job: Any) -> str:
    try:
        check(optimizer, job.optimizer.chained_optimizers, job.chunks)
    except EffxError as error:
        return str(error)
    return ""


def torch_dist(root: Path) -> dict[str, Any]:
    """Megatron's own folders, of either format, for `effx compress` to read."""
    with job_of(CASES["dp"]) as (job, handle):
        scheduler = scheduler_of(job)
        for step in (1, 2):
            train(job, scheduler, 1, first=step - 1)
            for form in (SAME, OTHER):
                state = sharded_state(job, scheduler, step, False, form)
                dist_checkpointing.save(state, place(root / form, step))
        return {
            "mains": state_of(handle).mains,
            "weights": dict(unwrapped(job.chunks[0]).state_dict()),
        }
