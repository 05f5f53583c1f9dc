"""Cautious Megatron optimizers beside one process that steps with the same gradients, in processes of
their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer

from tests.megatron_runs import Case, Job, gathered, mains, make_job, parallel
from tests.optim_runs import Traffic

# isort: split
from megatron.core import parallel_state
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from effx_dist.config import EffxConfig
from effx_dist.engines.megatron import Handle, attach
from effx_dist.optim import CautiousAdamW, CautiousSGD

NUM_STEPS = 3
BF16, FP16 = torch.bfloat16, torch.float16
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
LOSS_SCALE = {"initial_loss_scale": 2.0**10, "loss_scale_window": 2, "hysteresis": 1}


class FusedAdam(Optimizer):
    """Has what Transformer Engine's and Apex's have for others to see, and cannot step."""

    adam_w_mode = True

    def step(self, closure: Any = None) -> Any:
        raise AssertionError("stepped as it is, not in its cautious form")


@dataclass(frozen=True)
class Scenario:
    """A job and how it is to be cautious."""

    case: Case
    cautious: dict[str, Any] = field(default_factory=dict)
    overflows_at: int | None = None
    is_fused: bool = False
    has_control: bool = True


SGD = {"optimizer": "sgd", "distributed": False, "weight_decay": 0.0}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {},
    "dp, whole": {"distributed": False},
    "tp": {"tp": 2},
    "tp, whole": {"tp": 2, "distributed": False},
    "pp": {"pp": 2},
    "pp, tied": {"pp": 2, "tied": True},
    "pp, tied, whole": {"pp": 2, "tied": True, "distributed": False},
}
DTYPES = {"fp32": torch.float32, "bf16": BF16}
MATRIX = {
    f"{layout}, {dtype}": Scenario(Case(dtype=DTYPES[dtype], **settings))
    for layout, settings in LAYOUTS.items()
    for dtype in DTYPES
}
SPECIAL = {
    "overlap": Scenario(Case(dtype=BF16, ddp=OVERLAP)),
    "one bucket": Scenario(Case(dtype=BF16, ddp={"bucket_size": None})),
    "cautious decay": Scenario(Case(tp=2), {"cautious_weight_decay": True}, has_control=False),
    "Adam without decay": Scenario(
        Case(weight_decay=0.0, options={"decoupled_weight_decay": False})
    ),
    "SGD": Scenario(Case(tp=2, **SGD)),
    "SGD, bf16": Scenario(Case(dtype=BF16, **SGD)),
    "FusedAdam": Scenario(Case(tp=2, distributed=False), is_fused=True),
    "FusedAdam, bf16": Scenario(Case(dtype=BF16), is_fused=True),
    "fp16": Scenario(Case(dtype=FP16, options=LOSS_SCALE), overflows_at=1),
    "fp16, whole, tp": Scenario(
        Case(tp=2, dtype=FP16, distributed=False, options=LOSS_SCALE), overflows_at=1
    ),
    "fp16, pp": Scenario(Case(pp=2, dtype=FP16, options=LOSS_SCALE), overflows_at=1),
}
SCENARIOS = {**MATRIX, **SPECIAL}


@dataclass
class Run:
    """What came of one job. Tensors are known to the first rank alone."""

    kinds: list[str]
    num_steps: int = 0
    differing: list[str] = field(default_factory=list)
    """When, and the name of what was not as in one process."""
    sent: list[list[str]] = field(default_factory=list)
    """Collectives by call of an inner optimizer's step(), after the first."""
    rates: list[float] = field(default_factory=list)
    num_hook_calls: int = 0
    skipped: list[int] = field(default_factory=list)
    alignment: dict[str, float] = field(default_factory=dict)
    mains: dict[str, torch.Tensor] = field(default_factory=dict)
    is_same_optimizer: bool = True


def everything(names: list[str]) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """By scenario, the cautious run and that of the optimizer as it was."""
    found = {}
    for name in names:
        scenario = SCENARIOS[name]
        has_control = scenario.has_control and not scenario.is_fused
        control = vars(train(scenario, is_cautious=False)) if has_control else None
        found[name] = (vars(train(scenario, is_cautious=True)), control)
    return found


def everything_but(names: list[str]) -> dict[str, Any]:
    return everything([name for name in SCENARIOS if name not in names])


def train(scenario: Scenario, is_cautious: bool) -> Run:
    with parallel(scenario.case):
        return _Training(scenario, is_cautious).run()


class _Training:
    def __init__(self, scenario: Scenario, is_cautious: bool) -> None:
        self._scenario = scenario
        self.job = make_job(scenario.case)
        self._inner = inner_of(self.job)
        if scenario.is_fused:
            for inner in self._inner:
                inner.__class__ = FusedAdam
        sections = {"cautious": scenario.cautious} if is_cautious else {}
        self._scheduler = scheduler_of(self.job)
        self.handle = attach(self.job.optimizer, self.job.chunks, EffxConfig.from_dict(sections))
        self._run = Run([type(inner).__name__ for inner in inner_of(self.job)])
        self._run.is_same_optimizer = all(
            a is b for a, b in zip(self._inner, inner_of(self.job), strict=True)
        )
        self._twin = Twin(self.handle, scenario, is_cautious)
        for inner in self._inner:
            inner.register_step_pre_hook(self._before)
            inner.register_step_post_hook(self._after)
        self._stepped: dict[int, tuple[torch.Tensor, dict[str, Any]]] = {}
        self._traffic = Traffic()

    def run(self) -> Run:
        self._compare("at the start")
        for step in range(NUM_STEPS):
            overflows = step == self._scenario.overflows_at and self._is_first
            is_done, *_ = self.job.step(
                self.job.batch(step), self._overflow if overflows else lambda: None
            )
            if is_done:
                self._scheduler.step(1)
                self._follow(step)
            else:
                self._run.skipped.append(step)
            self._compare(f"after step {step}")
        self._run.alignment = self.handle.alignment
        self._run.mains = {
            name: tensor.values for name, tensor in mains(self.handle.layout).items()
        }
        return self._run

    @property
    def _is_first(self) -> bool:
        """Whether this rank is to overflow: what is reduced but not cut is alike on data-parallel ranks."""
        if self._scenario.case.distributed:
            return dist.get_rank() == 0
        return parallel_state.get_model_parallel_group().rank() == 0

    def _overflow(self) -> None:
        for chunk in self.job.chunks:
            for buffer in chunk.buffers:
                buffer.grad_data.fill_(torch.inf)

    def _before(self, inner: Any, *_: Any) -> None:
        for group in inner.param_groups:
            options = {key: group.get(key) for key in ("lr", "weight_decay")}
            for param in group["params"]:
                self._stepped[id(param)] = (param.grad.clone(), options)
        self._traffic = Traffic()
        self._traffic.__enter__()

    def _after(self, *_: Any) -> None:
        self._traffic.__exit__(None, None, None)
        self._run.num_hook_calls += 1
        if self._run.num_steps:
            self._run.sent.append([name for name, _ in self._traffic.sent])

    def _follow(self, step: int) -> None:
        """One process takes the step that the job has taken."""
        stepped, self._stepped = self._stepped, {}
        layout = self.handle.layout
        grads = gathered(layout, lambda _, param: stepped[id(param.main)][0])
        params = [param for params in layout.params for param in params if param.main is not None]
        own = {param.whole.name: stepped[id(param.main)][1] for param in params}
        of_ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_ranks, own)
        options = {name: of_name for of_rank in of_ranks for name, of_name in of_rank.items()}
        self._run.num_steps += 1
        self._run.rates.append(max(of_name["lr"] for of_name in options.values()))
        if dist.get_rank() == 0:
            self._twin.step({name: grad.values for name, grad in grads.items()}, options)
        self._run.differing += self._twin.wrong_alignment(self.handle, step)

    def _compare(self, when: str) -> None:
        found = mains(self.handle.layout)
        self._run.differing += [
            f"{name} {when}" for name in found if not self._twin.is_equal(name, found[name].values)
        ]


class Twin:
    """Whole parameters, on the first rank."""

    def __init__(self, handle: Handle, scenario: Scenario, is_cautious: bool) -> None:
        self.params = {n: tensor.values for n, tensor in mains(handle.layout).items()}
        groups = [{"params": [(name, param)]} for name, param in self.params.items()]
        self._is_cautious = is_cautious
        self.optimizer: Any = None
        if not groups:
            return
        if scenario.case.optimizer == "sgd":
            kind: Any = CautiousSGD if is_cautious else torch.optim.SGD
            self.optimizer = kind(groups, lr=1.0, momentum=0.9)
        else:
            kind = CautiousAdamW if is_cautious else torch.optim.AdamW
            self.optimizer = kind(groups, lr=1.0, **scenario.cautious)

    def step(self, grads: dict[str, torch.Tensor], options: dict[str, dict[str, float]]) -> None:
        for group, (name, param) in zip(
            self.optimizer.param_groups, self.params.items(), strict=True
        ):
            param.grad = grads[name]
            group |= options[name]
        self.optimizer.step()

    def is_equal(self, name: str, values: torch.Tensor) -> bool:
        return torch.equal(values, self.params[name])

    def wrong_alignment(self, handle: Handle, step: int) -> list[str]:
        """Collective: the first rank knows what is right of all stages."""
        expected = [self.optimizer.alignment if self.optimizer and self._is_cautious else {}]
        dist.broadcast_object_list(expected, 0)
        own = {param.whole.name for params in handle.layout.params for param in params}
        right = {name: mean for name, mean in expected[0].items() if name in own}
        return [] if handle.alignment == right else [f"alignment of step {step}"]


def inner_of(job: Job) -> list[Any]:
    return [chained.optimizer for chained in job.optimizer.chained_optimizers]


def scheduler_of(job: Job) -> OptimizerParamScheduler:
    """Warms up for two steps, and decays."""
    return OptimizerParamScheduler(
        job.optimizer,
        init_lr=1e-3,
        max_lr=1e-2,
        min_lr=1e-4,
        lr_warmup_steps=2,
        lr_decay_steps=10,
        lr_decay_style="linear",
        start_wd=job.case.weight_decay,
        end_wd=job.case.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
