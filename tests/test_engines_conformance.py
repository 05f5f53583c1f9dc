"""Every engine under the suites that judge an adapter: the state of each, and Megatron's step.

The cautious step of the other engines is judged in test_optim_ranks, test_optim_fsdp1 and
test_engines_deepspeed_cautious.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from effx_dist.checkpoint import Fragment
from effx_dist.checkpoint.state.live import LiveState
from effx_dist.checkpoint.state.torch_state import TorchState
from effx_dist.shard import TorchGroup, whole_box
from tests.conformance import cautious as cautious_conformance
from tests.conformance import state as conformance
from tests.conformance.cautious import SCENARIOS, SHAPES
from tests.deepspeed_runs import BASE, Model, be_a_rank, merged, needs_deepspeed, tokens_of
from tests.megatron_processes import needs_megatron
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

MEGATRON_SCENARIOS = tuple(
    scenario
    for scenario in SCENARIOS
    if scenario.optimizer.__name__ == "CautiousAdamW"
    and scenario.dtype == torch.float32
    and not scenario.second_group
    and not scenario.without_grad
    and not scenario.defaults.get("capturable")
)
MEGATRON_SHAPES = {name: shape for name, shape in SHAPES.items() if shape and 0 not in shape}
"""Megatron gives every parameter a gradient; none of its layers has a 0-d or an empty one."""


def fsdp2_state() -> TorchState:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(2, 5)).sum().backward()
    optimizer.step()
    return TorchState(model, optimizer)


def judge_fsdp2() -> None:
    live = fsdp2_state()
    conformance.check(lambda: live, TorchGroup())


def test_fsdp2(tmp_path: Path) -> None:
    spawn(3, judge_fsdp2, tmp_path)


def test_the_suite_notices(tmp_path: Path) -> None:
    spawn(2, judge_wrong_states, tmp_path)


class WrongState(TorchState):
    """Loses a row, saves one twice, or is known to one rank alone."""

    wrong = ""

    def model_state(self) -> dict[str, Any]:
        found = super().model_state()
        name, leaf = next(iter(found.items()))
        fragment = Fragment.of(name, leaf)
        box, part = fragment.pieces[0]
        if self.wrong == "lost":
            found[name] = Fragment(fragment.shape, fragment.dtype, fragment.pieces[1:])
        elif self.wrong == "twice":
            again = (whole_box(fragment.shape), torch.zeros(fragment.shape))
            found[name] = Fragment(fragment.shape, fragment.dtype, [(box, part), again])
        elif dist.get_rank() == 0:
            del found[name]
        return found


def judge_wrong_states() -> None:
    good = fsdp2_state()
    for wrong, complaint in {
        "lost": "saved .* times",
        "twice": "saved .* times",
        "elsewhere": "other names",
    }.items():
        live = WrongState(good._model, good._optimizer)
        live.wrong = wrong
        with pytest.raises(AssertionError, match=complaint):
            conformance.check(lambda live=live: live, TorchGroup())  # type: ignore[misc]


@needs_deepspeed
@pytest.mark.deepspeed
def test_deepspeed(tmp_path: Path) -> None:
    spawn(2, judge_deepspeed, tmp_path)


def judge_deepspeed() -> None:
    be_a_rank()
    import deepspeed

    from effx_dist.engines.deepspeed.live import ZeroState

    for stage in (1, 3):
        model = Model()
        config = merged(BASE, {"zero_optimization": {"stage": stage}})
        config = merged(config, {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}})
        engine, *_ = deepspeed.initialize(
            model=model, config=config, model_parameters=model.parameters()
        )
        engine.backward(engine(tokens_of(0)))
        engine.step()

        def make(engine: Any = engine) -> LiveState:
            return ZeroState(engine)

        conformance.check(make, TorchGroup())
        engine.destroy()


@needs_megatron
def test_megatron(tmp_path: Path) -> None:
    spawn(4, judge_megatron, tmp_path)


def judge_megatron() -> None:
    import effx_dist as effx
    from effx_dist.engines.megatron.live import MegatronState
    from tests.megatron_runs import Case, make_job, parallel

    for case in (Case(tp=2, dtype=torch.bfloat16), Case(pp=2, tied=True), Case(tp=2, pp=2)):
        with parallel(case):
            job = make_job(case)
            handle = effx.megatron.attach(job.optimizer, job.chunks)
            job.train(1)

            def make(layout: Any = handle.layout) -> LiveState:
                return MegatronState(layout)

            conformance.check(make, TorchGroup())
            handle.close()


@needs_megatron
@pytest.mark.parametrize("tp", [1, 2])
def test_megatrons_step(tp: int, tmp_path: Path) -> None:
    spawn(2 * tp, judge_megatrons_step, tmp_path, tp)


def judge_megatrons_step(tp: int) -> None:
    from tests.megatron_bag import BagSession
    from tests.megatron_runs import Case, parallel

    assert MEGATRON_SCENARIOS
    with parallel(Case(tp=tp)):
        cautious_conformance.check(BagSession, MEGATRON_SCENARIOS, MEGATRON_SHAPES)
