"""Cautious optimizers under DeepSpeed equal one process bit for bit, where DeepSpeed's own AdamW does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD, CautiousWrapper, cautious
from effx_dist.shard import ShardMap
from tests.conformance import cautious as conformance
from tests.deepspeed_runs import (
    BASE,
    BLOCK,
    ZERO_SCENARIOS,
    ZERO_SHAPES,
    DeepSpeedSession,
    Model,
    be_a_rank,
    merged,
    needs_deepspeed,
    tokens_of,
    two_groups,
    whole_tensors,
)
from tests.optim_runs import Traffic
from tests.ranks import spawn

pytestmark = [pytest.mark.ranks, pytest.mark.deepspeed, needs_deepspeed]

Groups = Sequence[dict[str, Any]]
Make = Callable[[Any], torch.optim.Optimizer]

LR, DECAY = 0.03, 0.1
NUM_STEPS = 3
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": LR, "weight_decay": DECAY}}}
# What the cautious one is to be compared with: DeepSpeed's own kernels round differently.
TORCH_ADAMW = {"optimizer": {"params": {"torch_adam": True}}, "zero_force_ds_cpu_optimizer": False}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 4, "loss_scale_window": 2}}
OFFLOAD = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": False}}}
ACCUMULATES = {"gradient_accumulation_steps": 2, "gradient_clipping": 0.5}


def cautious_adamw(groups: Groups) -> torch.optim.Optimizer:
    return CautiousAdamW(groups, lr=LR, weight_decay=DECAY)


def torch_adamw(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)


@dataclass(frozen=True)
class Case:
    """A configuration of DeepSpeed, and what it is to be like."""

    stage: int
    config: Mapping[str, Any] = field(default_factory=dict)
    overflows_at: int | None = None
    is_stepped_at_start: bool = False
    """DeepSpeed has AdamW step once as it makes the engine, so that it is no control."""
    in_zero_init: bool = False
    """The model is cut as it is made."""
    optimizer: Callable[[Groups], Any] | None = None
    """Makes what the user passes."""
    one_process: Make = cautious_adamw
    kind: type = CautiousAdamW

    def full(self) -> dict[str, Any]:
        return merged(BASE, ADAMW, {"zero_optimization": {"stage": self.stage}}, self.config)


MATRIX = {
    f"stage {stage}, {dtype}{', offload' if offload else ''}": Case(
        stage, merged(config, OFFLOAD if offload else {})
    )
    for stage in (1, 2, 3)
    for dtype, config in (("fp32", {}), ("bf16", BF16))
    for offload in (False, True)
}
SPECIAL = {
    "no ZeRO, fp32": Case(0),
    "no ZeRO, bf16": Case(0, BF16, is_stepped_at_start=True),
    "BF16_Optimizer": Case(1, merged(BF16, {"data_types": {"grad_accum_dtype": "fp32"}})),
    "round robin": Case(2, merged(BF16, {"zero_optimization": {"round_robin_gradients": True}})),
    "aligned": Case(1, merged(BF16, {"zero_optimization": {"parameter_alignment": True}})),
    "zero.Init": Case(3, BF16, in_zero_init=True),
    "small sub-groups": Case(3, {"zero_optimization": {"sub_group_size": 20}}),
    "accumulation and clipping, stage 2": Case(2, ACCUMULATES),
    "accumulation and clipping, stage 3": Case(3, merged(BF16, ACCUMULATES)),
    "fp16, stage 1": Case(1, FP16, overflows_at=1),
    "fp16, stage 2, offload": Case(2, merged(FP16, OFFLOAD), overflows_at=1),
    "fp16, stage 3": Case(3, FP16, overflows_at=1),
}


def adam(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, lr=LR, weight_decay=DECAY)


def nadam(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.NAdam(groups, lr=LR)


def sgd(groups: Groups) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=LR, momentum=0.9)


def lion(groups: Groups) -> torch.optim.Optimizer:
    return CautiousLion(groups, lr=LR, betas=(0.9, 0.99), weight_decay=DECAY)


def decays_cautiously(groups: Groups) -> torch.optim.Optimizer:
    return CautiousAdamW(groups, lr=LR, weight_decay=DECAY, cautious_weight_decay=True)


def masked(make: Make) -> Make:
    return lambda groups: cautious(make(groups))


OTHERS = {
    "Lion of the configuration": Case(
        2,
        {"optimizer": {"type": "Lion", "params": {"betas": [0.9, 0.99]}}},
        one_process=lion,
        kind=CautiousLion,
    ),
    "Adam of the configuration": Case(1, {"optimizer": {"type": "Adam"}}),
    "its Adam with L2": Case(
        3,
        {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}},
        one_process=masked(adam),
        kind=CautiousWrapper,
    ),
    "its cautious decay": Case(
        2, {"effx": {"cautious": {"cautious_weight_decay": True}}}, one_process=decays_cautiously
    ),
    "a user's AdamW": Case(3, merged(BF16, OFFLOAD), optimizer=torch_adamw),
    "a user's callable": Case(
        1,
        optimizer=lambda _: sgd,
        one_process=lambda groups: CautiousSGD(groups, lr=LR, momentum=0.9),
        kind=CautiousSGD,
    ),
    "a user's NAdam": Case(2, optimizer=nadam, one_process=masked(nadam), kind=CautiousWrapper),
    "a user's cautious one": Case(
        2, BF16, optimizer=decays_cautiously, one_process=decays_cautiously
    ),
}
CASES = {**MATRIX, **SPECIAL, **OTHERS}


@dataclass
class Run:
    """What came of one engine, on one rank."""

    kind: str
    num_steps: int = 0
    differing: list[str] = field(default_factory=list)
    """When, and the name of what was not as in one process."""
    sent: list[list[str]] = field(default_factory=list)
    """Collectives, by call of the base optimizer's step(), after the first engine step."""
    unfit: list[str] = field(default_factory=list)
    """Tensors that the compiled step cannot take as they lie."""


class Watch:
    """Sees what the base optimizer is stepped with, and what it sends."""

    def __init__(self, engine: Any, run: Run) -> None:
        self._engine = engine
        self._run = run
        self._grads: dict[int, torch.Tensor] = {}
        self._traffic = Traffic()
        engine.basic_optimizer.register_step_pre_hook(self._before)
        engine.basic_optimizer.register_step_post_hook(self._after)

    def _before(self, optimizer: Any, *_: Any) -> None:
        for flat in (flat for group in optimizer.param_groups for flat in group["params"]):
            if flat.grad is None:
                continue
            self._grads[id(flat)] = flat.grad.clone()
            lies_flat = flat.is_contiguous() and flat.grad.is_contiguous()
            if not lies_flat or {flat.dtype, flat.grad.dtype} != {torch.float32}:
                self._run.unfit.append(f"{flat.dtype} {flat.stride()}, {flat.grad.dtype}")
        self._traffic = Traffic()
        self._traffic.__enter__()

    def _after(self, *_: Any) -> None:
        self._traffic.__exit__(None, None, None)
        if self._run.num_steps:
            self._run.sent.append([name for name, _ in self._traffic.sent])

    def whole_grads(self) -> dict[str, torch.Tensor]:
        """The gradients of the last engine step, and forgets them. Collective."""
        grads, self._grads = self._grads, {}
        return whole_tensors(self._engine, lambda partition: grads.get(id(partition.flat)))


def train(case: Case, config: dict[str, Any], one_process: Make, spoil: bool = False) -> Run:
    """Train an engine, and one process with the gradients that the engine steps with.

    Where ``spoil``, the optimizer is told that each flat tensor is one parameter, whole on its rank.
    """
    from effx_dist import deepspeed

    model, initial = made(case, config)
    groups = two_groups(model)
    optimizer = None if case.optimizer is None else case.optimizer(groups)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=groups, config=config
    )
    if spoil:
        engine.basic_optimizer.shard_map = one_whole_each
    masters = whole_tensors(engine, lambda partition: partition.flat)
    dtype = next(engine.module.parameters()).dtype
    twin = {name: initial[name].to(dtype).float() for name in masters}
    reference = one_process(groups_of(twin))
    run = Run(type(engine.basic_optimizer).__name__)
    run.differing += different(engine, twin, "at the start")
    watch = Watch(engine, run)
    for step in range(NUM_STEPS):
        for micro_step in range(engine.gradient_accumulation_steps()):
            overflows = step == case.overflows_at and dist.get_rank() == 0
            loss = engine(tokens_of(10 * step + micro_step), 1e38 if overflows else 1.0)
            engine.backward(loss)
            engine.step()
        grads = watch.whole_grads()
        if grads:
            for name, param in twin.items():
                param.grad = grads.get(name)
            reference.step()
            run.num_steps += 1
        run.differing += different(engine, twin, f"after step {step}")
        if grads and hasattr(reference, "alignment"):
            is_same = engine.effx.alignment == reference.alignment
            run.differing += [] if is_same else [f"alignment of step {step}"]
    engine.destroy()
    return run


def made(case: Case, config: dict[str, Any]) -> tuple[Model, dict[str, torch.Tensor]]:
    """A model, and its values."""
    from effx_dist import deepspeed

    cut = case.in_zero_init
    with deepspeed.zero.Init(config_dict_or_path=config) if cut else nullcontext():
        model = Model()
    params = dict(model.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())) if cut else nullcontext():
        return model, {name: param.detach().clone() for name, param in params.items()}


def one_whole_each(flats: Sequence[torch.Tensor]) -> ShardMap:
    return ShardMap.of_tensors([(f"flat {i}", flat) for i, flat in enumerate(flats)])


def groups_of(twin: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """As two_groups has them."""
    matrices = [(name, param) for name, param in twin.items() if param.dim() > 1]
    rest = [(name, param) for name, param in twin.items() if param.dim() <= 1]
    return [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]


def different(engine: Any, twin: Mapping[str, torch.Tensor], when: str) -> list[str]:
    """What of the master weights is not as in one process, to the last bit."""
    masters = whole_tensors(engine, lambda partition: partition.flat)
    assert masters.keys() == twin.keys()
    return [f"{name} {when}" for name in twin if not torch.equal(masters[name], twin[name])]


def run_cases(names: Sequence[str]) -> dict[str, tuple[Run, Run | None]]:
    """By case, the cautious run and that of torch's AdamW."""
    be_a_rank()
    found: dict[str, tuple[Run, Run | None]] = {}
    for name in names:
        case = CASES[name]
        ours = train(case, merged(BLOCK, case.full()), case.one_process)
        is_control = name not in OTHERS
        control = train(case, merged(case.full(), TORCH_ADAMW), torch_adamw) if is_control else None
        found[name] = (ours, control)
    return found


def run_all(names: Sequence[str]) -> tuple[dict[str, tuple[Run, Run | None]], list[str], Run]:
    """The cases, scenarios that fail the conformance suite, and a run with a wrong shard map."""
    cases = run_cases(names)
    failures = []
    for stage in (2, 3):
        for scenario in ZERO_SCENARIOS:
            try:
                conformance.check(
                    lambda *args, stage=stage: DeepSpeedSession(stage, *args),
                    [scenario],
                    ZERO_SHAPES,
                )
            except AssertionError as error:
                failures.append(f"stage {stage}: {error}")
    case = CASES["stage 2, fp32"]
    spoilt = train(case, merged(BLOCK, case.full()), cautious_adamw, spoil=True)
    return cases, failures, spoilt


def check(name: str, runs: Sequence[dict[str, tuple[Run, Run | None]]]) -> None:
    """One case on all ranks."""
    case = CASES[name]
    for ours, control in (of_rank[name] for of_rank in runs):
        if control is not None:
            assert control.kind == "AdamW"
            assert bool(control.differing) == case.is_stepped_at_start
        assert ours.kind == case.kind.__name__
        assert not ours.differing
        assert not ours.unfit
        assert ours.num_steps == NUM_STEPS - (case.overflows_at is not None)
        assert ours.sent
        assert all(sent == (["allreduce"] if case.stage else []) for sent in ours.sent)


ON_THREE_RANKS = (*MATRIX, "small sub-groups")
THE_REST = [name for name in CASES if name not in ON_THREE_RANKS]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(2, run_all, tmp_path_factory.mktemp("ranks"), list(CASES))


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(3, run_cases, tmp_path_factory.mktemp("ranks"), ON_THREE_RANKS)


@pytest.fixture(scope="module")
def three_ranks_slow(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(3, run_cases, tmp_path_factory.mktemp("ranks"), THE_REST)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_equal_one_process(name: str, two_ranks: list[Any]) -> None:
    check(name, [cases for cases, _, _ in two_ranks])


def test_two_ranks_conform(two_ranks: list[Any]) -> None:
    assert [failures for _, failures, _ in two_ranks] == [[], []]


def test_the_comparison_sees_a_mean_over_local_pieces(two_ranks: list[Any]) -> None:
    assert all(spoilt.differing for _, _, spoilt in two_ranks)


@pytest.mark.parametrize("name", ON_THREE_RANKS)
def test_three_ranks_equal_one_process(name: str, three_ranks: list[Any]) -> None:
    check(name, three_ranks)


@pytest.mark.slow
@pytest.mark.parametrize("name", THE_REST)
def test_three_ranks_equal_one_process_in_other_cases(
    name: str, three_ranks_slow: list[Any]
) -> None:
    check(name, three_ranks_slow)
