"""Saves and loads by Megatron's own calls with this library's strategies, in processes of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron_cautious_runs import scheduler_of
from tests.megatron_checkpoint_runs import (
    BF16,
    STEPS,
    State,
    config,
    distance,
    is_rounded,
    is_same,
    job_of,
    state_of,
    state_of_mains,
)
from tests.megatron_runs import Case, Job

# isort: split
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from effx_dist.engines.megatron import Handle
from effx_dist.engines.megatron.local_tensors import unwrapped

CASES = {
    "dp": Case(dtype=BF16),
    "tp": Case(dtype=BF16, tp=2),
    "pp": Case(dtype=BF16, pp=2, tied=True),
    "dp, tied": Case(dtype=BF16, tied=True),
    "whole": Case(dtype=BF16, distributed=False),
    "fp32": Case(),
    "fp32, tp, whole": Case(tp=2, distributed=False),
}
SAME, OTHER = "dp_reshardable", "fully_reshardable"
"""Megatron's formats; names in the first's hold for one tensor- and pipeline-parallel layout alone, which
must not matter here."""


def place(root: Path, iteration: int) -> str:
    """As Megatron-LM calls its folders, which it has made by then."""
    folder = root / f"iter_{iteration:07d}"
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    return str(folder)


def sharded_state(
    job: Job,
    scheduler: Any,
    iteration: int,
    is_loading: bool,
    form: str = SAME,
    has_random: bool = True,
) -> dict[str, Any]:
    """What a Megatron-LM script gives to both calls; random states where the layout is the same."""
    model = unwrapped(job.chunks[0]).sharded_state_dict()
    pipeline = parallel_state.get_pipeline_model_parallel_rank()
    tensor = parallel_state.get_tensor_model_parallel_rank()
    sizes = (
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )
    drawn = ShardedObject(
        "rng_state",
        {"seen": torch.full((2,), float(iteration))},
        sizes,
        (pipeline, tensor),
        replica_id=parallel_state.get_data_parallel_rank(),
    )
    found: dict[str, Any] = {
        "model": model,
        "optimizer": job.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata={"distrib_optim_sharding_type": form}
        ),
    }
    if has_random:
        found["rng_state"] = drawn
    if not is_loading:
        found |= {"opt_param_scheduler": scheduler.state_dict(), "iteration": iteration}
    return found


def save(
    job: Job, handle: Handle, scheduler: Any, root: Path, iteration: int, form: str = SAME
) -> None:
    dist_checkpointing.save(
        sharded_state(job, scheduler, iteration, False, form),
        place(root, iteration),
        sharded_strategy=handle.save_strategy(),
    )


def load(
    job: Job,
    handle: Handle,
    scheduler: Any,
    root: Path,
    iteration: int,
    form: str,
    has_random: bool,
) -> dict[str, Any]:
    for optimizer in job.optimizer.chained_optimizers:
        if isinstance(optimizer, DistributedOptimizer):
            # Megatron asks for a state before it has any, where its Adam is torch's
            optimizer._init_optimizer_states_with_dummy_values()
    state: dict[str, Any] = dist_checkpointing.load(
        sharded_state(job, scheduler, iteration, True, form, has_random),
        place(root, iteration),
        sharded_strategy=handle.load_strategy(),
    )
    unwrapped(job.chunks[0]).load_state_dict(state["model"])
    job.optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    return state


def train(job: Job, scheduler: Any, num_steps: int, first: int = 0) -> None:
    for step in range(first, first + num_steps):
        job.train(1, first=step)
        scheduler.step(1)


def round_trip(root: Path, saving: str, loading: list[str], is_async: bool = False) -> Any:
    """From one case to others: what came of it."""
    form = OTHER if is_async and loading != [saving] else SAME
    with job_of(CASES[saving], config(mode="thread")) as (job, handle):
        scheduler = scheduler_of(job)
        train(job, scheduler, STEPS)
        if is_async:
            saved = _save_beside(job, handle, scheduler, root, form)
        else:
            save(job, handle, scheduler, root, STEPS, form)
            saved = state_of(handle)
            train(job, scheduler, 1, first=STEPS)
        following = state_of(handle)
    found = {}
    for name in loading:
        with job_of(CASES[name]) as (job, handle):
            scheduler = scheduler_of(job)
            state = load(job, handle, scheduler, root, STEPS, form, name == saving)
            loaded = state_of(handle)
            rounded = is_rounded(handle, saved.mains)
            rates = {
                (group["lr"], group["weight_decay"])
                for optimizer in handle.layout.optimizers
                for group in optimizer.optimizer.param_groups
            }
            train(job, scheduler, 1, first=STEPS)
            found[name] = {
                "is_same": is_same(saved, loaded),
                "is_rounded": rounded,
                "distance": distance(following, state_of(handle)),
                "iteration": state["iteration"],
                "steps": scheduler.num_steps,
                "rates": rates,
                "drawn": state["rng_state"]["seen"].tolist() if name == saving else [],
            }
    return found


def _save_beside(job: Job, handle: Handle, scheduler: Any, root: Path, form: str) -> State:
    """Training goes on while the save does."""
    queue = AsyncCallsQueue()
    request = dist_checkpointing.save(
        sharded_state(job, scheduler, STEPS, False, form),
        place(root, STEPS),
        sharded_strategy=handle.save_strategy(),
        async_sharded_save=True,
    )
    queue.schedule_async_request(request)
    saved = state_of(handle)
    train(job, scheduler, 1, first=STEPS)
    assert len(queue.maybe_finalize_async_calls(blocking=True)) == 1
    queue.close()
    return saved


def saved_after_a_step(root: Path) -> State:
    with job_of(CASES["dp"]) as (job, handle):
        train(job, scheduler := scheduler_of(job), 1)
        save(job, handle, scheduler, root, 1)
        return state_of(handle)


def model_alone(root: Path) -> dict[str, Any]:
    """The state dict of the model alone, with strict loading and the checkpoint's list of tensors."""
    saved = saved_after_a_step(root)
    with job_of(CASES["tp"]) as (job, handle):
        folder = place(root, 1)
        model = unwrapped(job.chunks[0])
        state = dist_checkpointing.load(
            {"model": model.sharded_state_dict()}, folder, sharded_strategy=handle.load_strategy()
        )
        model.load_state_dict(state["model"])
        metadata = handle.load_strategy().load_tensors_metadata(Path(folder))
        return {
            "is_rounded": is_rounded(handle, saved.mains),
            "is_master_same": all(
                torch.equal(saved.mains[n], t) for n, t in state_of_mains(handle).items()
            ),
            "no state": not any(o.optimizer.state for o in handle.layout.optimizers),
            "metadata": sorted(metadata),
            "backend": json.loads((Path(folder) / "metadata.json").read_text())["sharded_backend"],
        }


def asked_by_one_rank(root: Path) -> dict[str, Any]:
    """The optimizer is in the state dict of rank 0 only, as where the others have no part of it."""
    saved = saved_after_a_step(root)
    with job_of(CASES["dp"]) as (job, handle):
        asked = {"model": unwrapped(job.chunks[0]).sharded_state_dict()}
        if dist.get_rank() == 0:
            part = ShardedObject("optimizer.state", None, (1,), (0,))
            asked["optimizer"] = {"state": part}
        handle.load_strategy().load(asked, place(root, 1))
        return {"is_same": is_same(saved, state_of(handle))}


def refusals(root: Path) -> dict[str, tuple[str, str]]:
    """By cause: kind and words of the error on this rank."""
    found = {}
    with job_of(CASES["tp"]) as (job, handle):
        scheduler = scheduler_of(job)
        train(job, scheduler, 1)
        stranger = ShardedTensor.from_rank_offsets("stranger", torch.zeros(4))
        strange = sharded_state(job, scheduler, 1, is_loading=False)
        if dist.get_rank() == 1:
            strange["stranger"] = stranger
        plain = root / "iter_0000005"
        dist.barrier()
        causes = {
            "stranger on one rank": lambda: dist_checkpointing.save(
                strange,
                place(root, 1),
                sharded_strategy=handle.save_strategy(),
                validate_access_integrity=False,
            ),
            "no number": lambda: handle.save_strategy().save({}, root / "latest"),
            "not there": lambda: handle.load_strategy().load(
                sharded_state(job, scheduler, 1, is_loading=True), plain
            ),
            "another's": lambda: handle.load_strategy().check_backend_compatibility("torch_dist"),
            "newer": lambda: handle.load_strategy().check_version_compatibility(9),
        }
        for cause, act in causes.items():
            error: Exception | None = None
            try:
                act()
            except Exception as caught:
                error = caught
            found[cause] = (type(error).__name__, str(error))
    return found
