"""Who takes part in bench_cautious.py: optimizers on the same tensors, and what each has to move."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import cpp_extension

from benchmarks.cautious_workloads import COPY_ELEMENTS, Tensors
from effx_dist.core.cautious import scale_from_count
from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.optim.kernels import Implementation
from effx_dist.optim.param_layout import draw_layout
from effx_dist.optim.step_plan import StepPlan, plan_step

FUSED = "torch AdamW fused"
COPY = "copy"
LR = 1e-5
NEVER = 1e9
"""A norm to clip to that no gradient here has: the factor is 1, and the work is the same."""

KERNELS: dict[str, Implementation] = {"cpu": "compiled", "cuda": "triton"}


class UnavailableError(Exception):
    """A contender cannot take part; the message says why."""


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        bytes_moved: per call, reads and writes, where the number of passes follows from the design;
            None for chains of operations with temporary tensors.
        walks: the class that computed the step, for our own.
    """

    name: str
    run: Callable[[], object]
    bytes_moved: int | None = None
    walks: str | None = None


class Published(torch.optim.Optimizer):
    """C-AdamW as published in C-Optim's c_adamw.py (``foreach=False``): for each parameter a chain of
    operations, each over all of it.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "decay": 1e-2})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                self._step_one(param, group)

    def _step_one(self, param: torch.Tensor, group: dict[str, Any]) -> None:
        state, grad, (beta1, beta2) = self.state[param], param.grad, group["betas"]
        assert grad is not None, "every parameter here has a gradient"
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(grad)
            state["exp_avg_sq"] = torch.zeros_like(grad)
        state["step"] += 1
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        param.add_(param, alpha=-group["lr"] * group["decay"])
        exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = exp_avg_sq.sqrt().add_(group["eps"])
        root_correction = math.sqrt(1 - beta2 ** state["step"])
        step_size = group["lr"] * root_correction / (1 - beta1 ** state["step"])
        mask = (exp_avg * grad > 0).to(grad.dtype)
        mask.div_(mask.mean().clamp_(min=1e-3))
        param.add_((exp_avg * mask) / denominator, alpha=-step_size)


def all_contenders(
    tensors: Tensors, device: torch.device, *, build_deepspeed: bool
) -> tuple[list[Contender], list[dict[str, str]]]:
    """Those that can run here, each after a first step, and why the others cannot."""
    params = tensors.params
    kernel = KERNELS[device.type]

    def fused() -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, fused=True)

    def foreach() -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, foreach=True)

    others: dict[str, tuple[Callable[[], torch.optim.Optimizer], int | None]] = {
        FUSED: (fused, 1),
        "torch AdamW foreach": (foreach, None),
        "published formula, eager": (lambda: Published(params, lr=LR), None),
        "timm AdamW with caution": (lambda: _timm_adamw(params), None),
        "DeepSpeedCPUAdam": (lambda: _deepspeed(params, device, build_deepspeed), 1),
    }
    found, missing = [_copy(tensors.numel, device)], []
    for name, (make, passes) in others.items():
        try:
            found.append(_other(name, make(), tensors, passes))
        except UnavailableError as reason:
            missing.append({"name": name, "skipped": str(reason)})
    found.append(_ours(CautiousAdamW(params, lr=LR, implementation="eager"), "eager", tensors))
    found += _with_parts(CautiousAdamW(params, lr=LR, implementation=kernel), kernel, tensors)
    found.append(_ours(CautiousLion(params, lr=LR), "auto", tensors))
    found.append(_ours(CautiousSGD(params, lr=LR), "auto", tensors))
    found.append(_clipped_other(fused(), tensors))
    found.append(_clipped_ours(CautiousAdamW(params, lr=LR), tensors))
    return found, missing


def _copy(numel: int, device: torch.device) -> Contender:
    numel = min(numel, COPY_ELEMENTS[device.type])
    source = torch.ones(numel, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return Contender(COPY, lambda: target.copy_(source), 2 * source.nbytes)


def _other(
    name: str, optimizer: torch.optim.Optimizer, tensors: Tensors, passes: int | None
) -> Contender:
    optimizer.step()
    moments = tensors.share_moments(optimizer)
    moved = None if passes is None else _update_bytes(tensors, moments)
    return Contender(name, optimizer.step, moved)


def _clipped_other(optimizer: torch.optim.Optimizer, tensors: Tensors) -> Contender:
    plain = _other("", optimizer, tensors, passes=1)
    assert plain.bytes_moved is not None, "it makes one pass"

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(tensors.params, NEVER)
        optimizer.step()

    # The norm reads the gradients, the clipping reads and writes them.
    moved = plain.bytes_moved + 3 * _grad_bytes(tensors)
    return Contender(f"torch clip_grad_norm_ + {FUSED}", run, moved)


def _ours(optimizer: CautiousOptimizer, label: str, tensors: Tensors) -> Contender:
    optimizer.step()
    moments = tensors.share_moments(optimizer)
    moved = _count_bytes(tensors, moments) + _update_bytes(tensors, moments)
    plan = _planner(optimizer)()
    (walks,) = {type(walk).__name__ for part in plan.walks for _, walk in part}
    name = f"effx {type(optimizer).__name__} {label}"
    return Contender(name, optimizer.step, None if walks == "EagerKernels" else moved, walks)


def _clipped_ours(optimizer: CautiousOptimizer, tensors: Tensors) -> Contender:
    plain = _ours(optimizer, "auto", tensors)

    def run() -> None:
        optimizer.clip_grad_norm_(NEVER)
        optimizer.step()

    moved = None if plain.bytes_moved is None else plain.bytes_moved + _grad_bytes(tensors)
    return Contender(f"opt.clip_grad_norm_ + {plain.name}", run, moved, plain.walks)


def _with_parts(optimizer: CautiousOptimizer, label: str, tensors: Tensors) -> list[Contender]:
    """The whole step; the same in two walks over all parameters, as where these are sharded and ranks
    sum their counts in between; and apart: what it does on the host beforehand, and each walk.
    """
    whole = _ours(optimizer, label, tensors)
    moments = tensors.share_moments(optimizer)
    planner = _planner(optimizer)
    (part,) = planner().walks
    num_slots = len(tensors.params) + 1  # one for the only bucket
    counts = torch.zeros(num_slots, dtype=torch.int64, device=tensors.params[0].device)
    numels = torch.tensor([*map(torch.numel, tensors.params), 0], device=counts.device)
    scales = torch.ones(num_slots, dtype=torch.float64, device=counts.device)

    def count() -> None:
        for _, walk in part:
            walk.count_into(counts)

    def update() -> None:
        with torch.no_grad():
            for _, walk in part:
                walk.update(scales, None)

    def sharded() -> None:
        with torch.no_grad():
            planned = planner()
            summed = torch.zeros_like(counts)
            for _, walk in planned.walks[0]:
                walk.count_into(summed)
            for _, walk in planned.walks[0]:
                walk.update(scale_from_count(summed, numels), None)
            planned.advance_steps(None)

    return [
        whole,
        Contender("  in two walks, as if sharded", sharded, whole.bytes_moved, whole.walks),
        Contender("  its plan alone", planner, None, whole.walks),
        Contender("  its count walk alone", count, _count_bytes(tensors, moments), whole.walks),
        Contender("  its update walk alone", update, _update_bytes(tensors, moments), whole.walks),
    ]


def _planner(optimizer: CautiousOptimizer) -> Callable[[], StepPlan]:
    """What draws up what a step walks over, as each step does anew."""
    layout = draw_layout(optimizer.param_groups, None)

    def plan() -> StepPlan:
        return plan_step(
            layout,
            optimizer.param_groups,
            optimizer.state,
            optimizer._rule,
            optimizer.implementation,
            None,
            may_skip=True,  # in two walks, as sharded parameters are stepped
        )

    return plan


def _grad_bytes(tensors: Tensors) -> int:
    return sum(param.grad.nbytes for param in tensors.params if param.grad is not None)


def _update_bytes(tensors: Tensors, moments: list[int]) -> int:
    """One pass: gradients are read, parameters and moments read and written."""
    params = sum(param.nbytes for param in tensors.params)
    return _grad_bytes(tensors) + 2 * params + 2 * sum(moments) * tensors.numel


def _count_bytes(tensors: Tensors, moments: list[int]) -> int:
    """The count walk reads gradients and first moments."""
    return _grad_bytes(tensors) + moments[0] * tensors.numel


def _timm_adamw(params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    try:
        optim = importlib.import_module("timm.optim")
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision of another torch
        raise UnavailableError(f"not installed ({error})") from error
    found: torch.optim.Optimizer = optim.create_optimizer_v2(
        params, opt="cadamw", lr=LR, weight_decay=1e-2
    )
    return found


def _deepspeed(
    params: list[torch.nn.Parameter], device: torch.device, may_build: bool
) -> torch.optim.Optimizer:
    if device.type != "cpu":
        raise UnavailableError("for the CPU only")
    with stdout_to_stderr():  # it logs to stdout, which is for the JSON
        try:
            adam = importlib.import_module("deepspeed.ops.adam")
            installed = importlib.import_module("deepspeed.git_version_info").installed_ops
        except ImportError as error:
            raise UnavailableError(f"not installed ({error})") from error
        is_built = installed.get("cpu_adam") or any(_extension_folder().glob("cpu_adam*.so"))
        if not is_built and not may_build:
            raise UnavailableError("its op is not built; --build-deepspeed builds it (minutes)")
        try:
            found: torch.optim.Optimizer = adam.DeepSpeedCPUAdam(params, lr=LR, weight_decay=1e-2)
        except Exception as error:  # whatever the build of a C++ extension may raise
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        return found


def _extension_folder() -> Path:
    """Where torch keeps the op once it was built."""
    return Path(cpp_extension._get_build_directory("cpu_adam", verbose=False))


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what this process, and compilers that it starts, print meanwhile to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
