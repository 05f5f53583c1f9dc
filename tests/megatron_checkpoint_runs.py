"""Checkpoints of Megatron jobs at several layouts, in processes of their own.

Every function gives what plain classes can hold: whoever asks imports nothing of this.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.megatron_cautious_runs import inner_of, scheduler_of
from tests.megatron_runs import Case, Gathered, Job, mains, make_job, parallel, states

# isort: split
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from effx_dist.config import EffxConfig
from effx_dist.engines.megatron import Handle, attach
from effx_dist.errors import EffxError
from effx_dist.shard import Piece, WholeTensor

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = {"fp32": FP32, "bf16": BF16}
STEPS = 3
MOMENTS = ("exp_avg", "exp_avg_sq")
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "dp, overlap": {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    "dp, whole": {"distributed": False},
    "tp": {"tp": 2},
    "tp, whole": {"tp": 2, "distributed": False},
    "pp": {"pp": 2},
    "tp pp": {"tp": 2, "pp": 2},
}


def config(profile: str = "lossless", mode: str = "sync", **excp: Any) -> EffxConfig:
    return EffxConfig.from_dict(
        {"cautious": {}, "excp": {"profile": profile, "async_mode": mode, **excp}}
    )


@contextmanager
def job_of(case: Case, settings: EffxConfig | None = None) -> Iterator[tuple[Job, Handle]]:
    with parallel(case):
        job = make_job(case)
        with attach(job.optimizer, job.chunks, settings or config()) as handle:
            yield job, handle


@dataclass
class State:
    """Of a whole job, on every rank."""

    mains: dict[str, torch.Tensor]
    moments: dict[str, dict[str, torch.Tensor]]
    steps: set[float]


def state_of(handle: Handle) -> State:
    layout = handle.layout

    def values(found: dict[str, Gathered]) -> dict[str, torch.Tensor]:
        return {name: tensor.values for name, tensor in found.items()}

    steps = values(states(layout, "step"))
    found = [
        State(
            values(mains(layout)),
            {key: values(states(layout, key)) for key in MOMENTS},
            {float(x) for tensor in steps.values() for x in tensor.unique()},
        )
    ]
    dist.broadcast_object_list(found, 0)
    return found[0]


def is_same(a: State, b: State) -> bool:
    return (
        a.steps == b.steps
        and _equal(a.mains, b.mains)
        and all(_equal(a.moments[key], b.moments[key]) for key in MOMENTS)
    )


def _equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def is_rounded(handle: Handle, whole: dict[str, torch.Tensor]) -> bool:
    """Whether the parameters that compute are what master weights are, in their dtype, on this rank."""
    for local in handle.layout.local_tensors:
        expected = whole[local.name].to(local.tensor.dtype)
        for box, start in local.boxes:
            piece = Piece(WholeTensor(local.name, local.shape), box, start)
            if not torch.equal(piece.view(local.tensor.data), expected[box.slices]):
                return False
    return True


def distance(a: State, b: State) -> tuple[float, float]:
    """Of master weights: the largest and the mean difference."""
    differences = torch.cat([(a.mains[name] - b.mains[name]).abs().flatten() for name in a.mains])
    return float(differences.max()), float(differences.mean())


# What is saved first


def save_first(folder: Path) -> None:
    """Of each dtype: a checkpoint, what was saved, and what comes next."""
    for name, dtype in DTYPES.items():
        with job_of(Case(dtype=dtype)) as (job, handle):
            job.train(STEPS)
            handle.save_checkpoint(folder / name, STEPS, extra={"note": 7}).wait()
            saved = state_of(handle)
            job.train(1, first=STEPS)
            following = state_of(handle)
            if dist.get_rank() == 0:
                torch.save((saved, following), folder / f"{name}.pt")
    dist.barrier()


def expected_of(folder: Path, name: str) -> tuple[State, State]:
    found: tuple[State, State] = torch.load(folder / f"{name}.pt", weights_only=False)
    return found


def load_at(folder: Path, layouts: list[str]) -> dict[str, dict[str, Any]]:
    """Of each layout and dtype: what came of loading, and of a step after it."""
    found = {}
    for layout in layouts:
        for name, dtype in DTYPES.items():
            saved, following = expected_of(folder, name)
            with job_of(Case(dtype=dtype, **LAYOUTS[layout])) as (job, handle):
                extra = handle.load_checkpoint(folder / name)
                loaded = state_of(handle)
                rounded = is_rounded(handle, saved.mains)
                job.train(1, first=STEPS)
                found[f"{layout}, {name}"] = {
                    "extra": extra,
                    "is_same": is_same(saved, loaded),
                    "is_rounded": rounded,
                    "distance": distance(following, state_of(handle)),
                }
    return found


# Chains


def chain(folder: Path, profile: str, mode: str, dtype: str) -> dict[str, Any]:
    """Each link by a job at another layout, which loads the one before and trains on."""
    found: dict[str, Any] = {"errors": [], "is_same": []}
    layouts = ["dp", "tp", "pp", "dp, whole", "dp"]
    saved: State | None = None
    for number, layout in enumerate(layouts):
        case = Case(dtype=DTYPES[dtype], **LAYOUTS[layout])
        with job_of(case, config(profile, mode)) as (job, handle):
            if saved is not None:
                step = handle.load_checkpoint(folder)["step"]
                assert step == 2 * number, f"{layout}: {step}"
                loaded = state_of(handle)
                found["is_same"].append(is_same(saved, loaded))
                found["errors"].append(distance(saved, loaded))
            for step in (2 * number + 1, 2 * number + 2):
                job.train(1, first=step - 1)
                handle.save_checkpoint(folder, step)
            saved = state_of(handle)
    return found


def same_reconstruction(folder: Path, name: str, layouts: list[str]) -> None:
    """At each layout: two links of a lossy chain that hold the same; the states that come back."""
    for layout in layouts:
        case = Case(dtype=DTYPES[name], **LAYOUTS[layout])
        place = folder / f"{layout}, {dist.get_world_size()}"
        with job_of(case, config("balanced")) as (job, handle):
            exact = attach(job.optimizer, job.chunks, config())
            exact.load_checkpoint(folder / name)
            handle.save_checkpoint(place, 1).wait()
            for inner in inner_of(job):  # the same change wherever an element lies
                for group in inner.param_groups:
                    for param in group["params"]:
                        param.data.mul_(1.01)
                        inner.state[param]["exp_avg"].mul_(0.9)
            handle.save_checkpoint(place, 2).wait()
            exact.close()
        with job_of(replace(case, **LAYOUTS["dp"]), config("balanced")) as (job, handle):
            restored = []
            for step in (1, 2):
                handle.load_checkpoint(place, iteration=step)
                restored.append(vars(state_of(handle)))
            if dist.get_rank() == 0:
                torch.save(restored, place.with_suffix(".pt"))


# Errors


def errors(folder: Path) -> dict[str, tuple[str, str]]:
    """By cause: kind and words of the error on this rank."""
    name = "fp32"
    if dist.get_rank() == 0:
        shutil.copytree(folder / name, folder / "torn")
        (folder / "torn" / f"step-{STEPS}" / "rank-00001.effx").unlink()
    dist.barrier()
    causes: dict[str, tuple[Case, Callable[[Handle], Any]]] = {
        "nothing there": (Case(), lambda h: h.load_checkpoint(folder / "empty")),
        "no such step": (Case(), lambda h: h.load_checkpoint(folder / name, iteration=9)),
        "another model": (
            Case(tp=2, config={"num_layers": 3}),
            lambda h: h.load_checkpoint(folder / name),
        ),
        "another shape": (
            Case(config={"ffn_hidden_size": 64}),
            lambda h: h.load_checkpoint(folder / name),
        ),
        "a rank's file is missing": (Case(tp=2), lambda h: h.load_checkpoint(folder / "torn")),
    }
    found = {}
    for cause, (case, load) in causes.items():
        with job_of(case) as (_, handle):
            error: Exception | None = None
            try:
                load(handle)
            except EffxError as caught:
                error = caught
            found[cause] = (type(error).__name__, str(error))
    return found


# Other contents


def padded(folder: Path, dtype: str) -> dict[str, Any]:
    """Vocabularies padded to other sizes: one chain through all of them."""
    found: dict[str, Any] = {}
    names = ("embedding.word_embeddings.weight", "output_layer.weight")
    before: State | None = None
    sizes = [(96, {}), (128, {"tp": 2}), (80, {"tp": 2}), (96, {"pp": 2}), (100, {})]
    for number, (rows, layout) in enumerate(sizes):
        case = Case(dtype=DTYPES[dtype], vocabulary=rows, **layout)
        with job_of(case) as (job, handle):
            if before is not None:
                fresh = state_of(handle)
                handle.load_checkpoint(folder)
                loaded = state_of(handle)
                found[f"{number}: {rows}"] = [
                    problem
                    for name in names
                    for problem in _compare_rows(name, before, fresh, loaded)
                ] + ([] if is_rounded(handle, loaded.mains) else ["not rounded"])
            job.step(job.batch(number).clamp(max=79))
            handle.save_checkpoint(folder, number + 1).wait()
            before = state_of(handle)
    return found


def _compare_rows(name: str, before: State, fresh: State, loaded: State) -> Iterator[str]:
    rows = min(len(before.mains[name]), len(loaded.mains[name]))
    if not torch.equal(before.mains[name][:rows], loaded.mains[name][:rows]):
        yield f"{name}: common rows"
    if not torch.equal(fresh.mains[name][rows:], loaded.mains[name][rows:]):
        yield f"{name}: other rows"
    for key in MOMENTS:
        if not torch.equal(before.moments[key][name][:rows], loaded.moments[key][name][:rows]):
            yield f"{name}: common rows of {key}"
        if loaded.moments[key][name][rows:].any():
            yield f"{name}: other rows of {key}"
    if before.steps != loaded.steps:
        yield f"steps {before.steps} {loaded.steps}"


def between(folder: Path, saving: Case, loading: Case) -> dict[str, Any]:
    """From one kind of job to another."""
    with job_of(saving) as (job, handle):
        job.train(STEPS)
        handle.save_checkpoint(folder, STEPS).wait()
        saved = state_of(handle)
        job.train(1, first=STEPS)
        following = state_of(handle)
    with job_of(loading) as (job, handle):
        handle.load_checkpoint(folder)
        loaded = state_of(handle)
        whole = {p.name for p in handle.layout.local_tensors} <= saved.mains.keys()
        rounded = is_rounded(handle, saved.mains) if whole else None
        job.train(1, first=STEPS)
        return {
            "is_same": is_same(saved, loaded),
            "is_rounded": rounded,
            "distance": distance(following, state_of(handle)),
        }


def other_contents(folder: Path) -> dict[str, Any]:
    tied = Case(pp=2, tied=True, dtype=BF16)
    frozen = Case(tp=2, dtype=BF16, frozen=("embedding.word_embeddings.weight",))
    whole = Case(dtype=BF16, distributed=False)
    sgd = Case(tp=2, optimizer="sgd", distributed=False, weight_decay=0.0)
    return {
        "tied": between(folder / "tied", tied, replace(tied, pp=1)),
        "tied later": between(folder / "tied later", replace(tied, pp=1, tp=2), tied),
        "frozen": between(folder / "frozen", frozen, replace(frozen, tp=1)),
        "whole": between(folder / "whole", whole, replace(whole, distributed=True)),
        "whole later": between(folder / "whole later", Case(tp=2), Case(distributed=False)),
        "wider": between(folder / "wider", Case(dtype=BF16), Case(tp=2)),
        "narrower": between(folder / "narrower", Case(), Case(tp=2, dtype=BF16)),
    } | {"sgd": sgd_round(folder / "sgd", sgd)}


def sgd_round(folder: Path, case: Case) -> float:
    with job_of(case) as (job, handle):
        job.train(2)
        handle.save_checkpoint(folder, 2).wait()
        job.train(1, first=2)
        expected = mains(handle.layout)
    with job_of(case) as (job, handle):
        handle.load_checkpoint(folder)
        job.train(1, first=2)
        found = mains(handle.layout)
    pairs = [(found[name].values, expected[name].values) for name in expected]
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0)


def weights_alone(folder: Path) -> dict[str, bool]:
    """Loads without the optimizer, and without there being one."""
    found = {}
    saved, _ = expected_of(folder, "fp32")
    with job_of(Case(tp=2, dtype=BF16)) as (_, handle):
        handle.load_checkpoint(folder / "fp32", load_optimizer=False)
        found["masters"] = _equal(state_of_mains(handle), saved.mains)
        found["parameters"] = is_rounded(handle, saved.mains)
        found["no state"] = not any(o.optimizer.state for o in handle.layout.optimizers)
    for name, case in (("bf16", Case(tp=2, dtype=BF16)), ("fp32", Case(pp=2))):
        with parallel(case):
            job = make_job(case)
            with attach(None, job.chunks, config()) as handle:
                handle.load_checkpoint(folder / "fp32")
                found[f"no optimizer, {name}"] = is_rounded(handle, saved.mains)
    return found


def state_of_mains(handle: Handle) -> dict[str, torch.Tensor]:
    found = [{name: tensor.values for name, tensor in mains(handle.layout).items()}]
    dist.broadcast_object_list(found, 0)
    return found[0]


def companions(folder: Path) -> dict[str, Any]:
    """What travels with a run: loss scale, schedule, random states."""
    options = {"initial_loss_scale": 2.0**10, "loss_scale_window": 2, "hysteresis": 1}
    case = Case(tp=2, dtype=FP16, options=options)
    found: dict[str, Any] = {}
    with job_of(case) as (job, handle):
        scheduler = scheduler_of(job)
        for step in range(STEPS):
            job.step(job.batch(step))
            scheduler.step(1)
        with get_cuda_rng_tracker().fork():
            torch.rand(3)
        handle.save_checkpoint(folder, STEPS, scheduler).wait()
        saved = _companions_of(job, scheduler)
        with get_cuda_rng_tracker().fork():
            found["drawn"] = torch.rand(3).tolist()
        job.step(job.batch(STEPS))
        scheduler.step(1)
        with get_cuda_rng_tracker().fork():
            torch.rand(3)
        handle.load_checkpoint(folder, scheduler)  # back, into what has gone on
        found["rolled back"] = saved == _companions_of(job, scheduler)
    with job_of(case) as (job, handle):
        scheduler = scheduler_of(job)
        handle.load_checkpoint(folder, scheduler)
        found["resumed"] = saved == _companions_of(job, scheduler)
        with get_cuda_rng_tracker().fork():
            found["drawn again"] = torch.rand(3).tolist()
    with job_of(replace(case, tp=1)) as (job, handle):
        own = {name: s.clone() for name, s in get_cuda_rng_tracker().get_states().items()}
        handle.load_checkpoint(folder, scheduler_of(job))
        now = get_cuda_rng_tracker().get_states()
        found["left alone"] = all(torch.equal(own[name], now[name]) for name in own)
    return found


def _companions_of(job: Job, scheduler: Any) -> dict[str, Any]:
    scaler = job.optimizer.chained_optimizers[0].grad_scaler
    state = {key: float(value) for key, value in scaler.state_dict().items()}
    rates = [group["lr"] for inner in inner_of(job) for group in inner.param_groups]
    return {"scaler": state, "steps": scheduler.num_steps, "rates": rates}
