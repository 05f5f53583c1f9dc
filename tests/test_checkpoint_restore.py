"""What a Checkpointer saves comes back: every optimizer's state, groups, generators, rows, extras."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.config import ExcpConfig
from effx_dist.optim import CautiousAdamW, CautiousLion
from effx_dist.shard import Group, LocalRows
from tests.chain_runs import same_bits
from tests.runs import MakeOptimizer, Run, lossless, two_groups
from tests.thread_ranks import run_ranks


class Tied(nn.Module):
    """One parameter under two names, a frozen one, an empty one, a 0-d one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(3))


def save_and_load(folder: Path, run: Run, other: Run, config: ExcpConfig | None = None) -> None:
    """Two saves of ``run``, the second a link where the config has links; loaded into ``other``."""
    with Checkpointer(folder, config or lossless()) as checkpointer:
        checkpointer.save(1, run.model, run.optimizer)
        run.train(1, seed=2)
        checkpointer.save(2, run.model, run.optimizer)
    with Checkpointer(folder, config or lossless()) as checkpointer:
        assert checkpointer.load(other.model, other.optimizer) == {"step": 2}
    assert not verify_folder(folder).findings


OPTIMIZERS: dict[str, tuple[MakeOptimizer, dict[str, Any]]] = {
    "cautious adamw": (CautiousAdamW, {}),
    "cautious lion": (CautiousLion, {}),
    "adamw amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
    "adamw fused": (torch.optim.AdamW, {"fused": True}),
    "adamw tensor lr": (torch.optim.AdamW, {"lr": torch.tensor(1e-2), "foreach": False}),
    "sgd momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {}),
    "nadam": (torch.optim.NAdam, {}),
    "adafactor": (torch.optim.Adafactor, {}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("into", ["fresh", "used"])
def test_training_goes_on_bit_for_bit(name: str, into: str, tmp_path: Path) -> None:
    make, options = OPTIMIZERS[name]
    run, other = Run(make_optimizer=make, **options), Run(make_optimizer=make, seed=9, **options)
    run.train(3)
    if into == "used":
        other.train(2, seed=4)
    save_and_load(tmp_path, run, other)
    same_bits(other.state(), run.state())
    for one in (run, other):
        one.train(3, seed=3)
    same_bits(other.state(), run.state())


@pytest.mark.parametrize("profile", ["lossless", "balanced"])
def test_odd_parameters(profile: str, tmp_path: Path) -> None:
    """A lossy profile may change matrices that train; here the embedding alone."""
    run, other = Run(Tied), Run(Tied, seed=9)
    run.train(2)
    run.model.count.fill_(8)
    save_and_load(tmp_path, run, other, lossless(profile=profile))
    found, truth = other.state(), run.state()
    assert other.model.head.weight is other.model.embed.weight
    if profile == "balanced":
        for state in (found, truth):
            for name in [n for n in state if "embed" in n or "head" in n]:
                if not name.endswith(".step"):
                    del state[name]
    same_bits(found, truth)


def test_empty_tensors(tmp_path: Path) -> None:
    """A parameter, a buffer and an extra without elements are saved and fit on the way back."""

    def make() -> nn.Module:
        model = nn.Linear(3, 2)
        model.register_buffer("nothing", torch.empty(0, 4))
        return model

    run, other = Run(make), Run(make, seed=9)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, run.model, extra={"none": torch.empty(0, dtype=torch.int64)})
        extra = checkpointer.load(other.model)
    same_bits(other.state(), run.state())
    assert extra["none"].shape == (0,)


def test_parameters_in_another_memory_order(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    run, other = Run(make), Run(make, seed=9)
    run.train(1)
    save_and_load(tmp_path, run, other)
    same_bits(other.state(), run.state())


@pytest.mark.parametrize("into", ["fresh", "used"])
def test_a_save_before_the_first_step(into: str, tmp_path: Path) -> None:
    """The optimizer has no state yet; one that has some loses it."""
    run, other = Run(), Run(seed=9)
    if into == "used":
        other.train(2)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(0, run.model, run.optimizer)
        checkpointer.load(other.model, other.optimizer)
    same_bits(other.state(), run.state())
    for one in (run, other):
        one.train(2)
    same_bits(other.state(), run.state())


@pytest.mark.parametrize("into", ["fresh", "used"])
def test_a_parameter_that_has_had_no_gradient_yet(into: str, tmp_path: Path) -> None:
    """Its step count starts when its gradients do, also after a resume."""
    runs = [Run(), Run(seed=9)]
    for run in runs[:1] if into == "fresh" else runs:
        run.model[0].weight.requires_grad_(False)
        run.train(3)
        run.model[0].weight.requires_grad_(True)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(3, runs[0].model, runs[0].optimizer)
        checkpointer.load(runs[1].model, runs[1].optimizer)
    same_bits(runs[1].state(), runs[0].state())
    for run in runs:
        run.train(2, seed=3)
    same_bits(runs[1].state(), runs[0].state())


def test_a_fresh_optimizer_whose_parameters_have_gradients(tmp_path: Path) -> None:
    """As after a backward pass that no step followed; the gradients stay."""
    run, other = Run(), Run(seed=9)
    run.train(2)
    other.train(1)
    other.optimizer = torch.optim.AdamW(other.model.parameters())
    gradients = {name: p.grad.clone() for name, p in other.model.named_parameters()}
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(2, run.model, run.optimizer)
        checkpointer.load(other.model, other.optimizer)
    same_bits(other.state(), run.state())
    same_bits({name: p.grad for name, p in other.model.named_parameters()}, gradients)


def test_parameter_groups_and_schedulers(tmp_path: Path) -> None:
    run, other = Run(make_optimizer=two_groups), Run(make_optimizer=two_groups, seed=9, lr=5.0)
    schedulers = [torch.optim.lr_scheduler.StepLR(r.optimizer, 1, gamma=0.5) for r in (run, other)]
    for _ in range(3):
        run.train(1)
        schedulers[0].step()
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(3, run.model, run.optimizer, stateful={"lr": schedulers[0]})
        checkpointer.load(other.model, other.optimizer, stateful={"lr": schedulers[1]})
    for one, scheduler in zip((run, other), schedulers, strict=True):
        one.train(1)
        scheduler.step()
    same_bits(other.state(), run.state())
    groups = [
        [{k: v for k, v in group.items() if k != "params"} for group in one.optimizer.param_groups]
        for one in (run, other)
    ]
    assert groups[0] == groups[1]


def test_random_generators_come_back_at_the_same_rank(tmp_path: Path) -> None:
    def draw() -> list[float]:
        python, numpy = [random.random(), random.gauss(0, 1)], [np.random.rand(), np.random.randn()]
        return [*python, *numpy, float(torch.rand(()))]

    run = Run()
    draw()  # leaves half of a Gaussian pair behind in two of them
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, run.model)
        first = draw()
        assert draw() != first
        checkpointer.load(run.model)
        assert draw() == first


EXTRA: dict[str, Any] = {
    "tuple": (1, (2.5, None), [True, "text"]),
    "numbers": {"nan": math.nan, "inf": math.inf, "minus": -math.inf, "big": 2**80, "zero": -0.0},
    "keys": {1: "a", (2, 3): "b", "$tensor": "c"},
    "tensors": {
        "half": torch.tensor([1.5, math.nan], dtype=torch.bfloat16),
        "flag": torch.ones(2) > 0,
    },
    "grid": torch.arange(6.0).reshape(2, 3),
    "dotted.name": {"": torch.tensor(1)},
    "unicode \N{SNOWMAN}": "é\n",
    "empty": [{}, [], ()],
}


def test_extra_round_trips(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, run.model, extra=EXTRA)
        found = checkpointer.load(run.model)
    assert found.pop("step") == 2
    assert_same(found, EXTRA)


def assert_same(found: Any, truth: Any) -> None:
    assert type(found) is type(truth)
    if isinstance(truth, torch.Tensor):
        same_bits({"": found}, {"": truth})
    elif isinstance(truth, dict):
        assert list(found) == list(truth)
        for key, value in truth.items():
            assert_same(found[key], value)
    elif isinstance(truth, list | tuple):
        assert len(found) == len(truth)
        for one, other in zip(found, truth, strict=True):
            assert_same(one, other)
    else:
        assert repr(found) == repr(truth)


class Table:
    """Rows of a table spread over the ranks, the last of them shorter or empty."""

    def __init__(self, group: Group, num_rows: int, value: float = -1.0) -> None:
        each = -(-num_rows // group.size)
        self.start, stop = min(group.rank * each, num_rows), min((group.rank + 1) * each, num_rows)
        self.num_rows = num_rows
        self.rows = torch.full((stop - self.start, 3), value)
        self.epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return {"table": LocalRows(self.rows, self.start, self.num_rows), "epoch": self.epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        rows = state_dict["table"]
        assert (rows.start, rows.global_rows) == (self.start, self.num_rows)
        self.rows, self.epoch = rows.local, state_dict["epoch"]


@pytest.mark.parametrize("num_rows", [10, 3, 0])
@pytest.mark.parametrize("sizes", [(2, 3), (4, 1), (1, 4)])
def test_rows_are_owned_anew_at_another_world_size(
    sizes: tuple[int, int], num_rows: int, tmp_path: Path
) -> None:
    """Twice: the second save, by the other world, is a link to what the first wrote."""
    truth = torch.arange(3.0 * num_rows).reshape(num_rows, 3)

    def save(group: Group) -> None:
        table, run = Table(group, num_rows), Run()
        table.rows.copy_(truth[table.start : table.start + len(table.rows)])
        table.epoch = 4
        with Checkpointer(tmp_path, lossless(), group=group) as checkpointer:
            checkpointer.save(1, run.model, stateful={"table": table})

    def load(group: Group) -> Table:
        table, run = Table(group, num_rows), Run(seed=9)
        with Checkpointer(tmp_path, lossless(), group=group) as checkpointer:
            checkpointer.load(run.model, stateful={"table": table})
            loaded = table.rows.clone()
            table.rows = table.rows + 1
            saved = checkpointer.save(2, run.model, stateful={"table": table})
            assert saved.result.kind == "link"
            checkpointer.load(run.model, stateful={"table": table})
            assert torch.equal(table.rows, loaded + 1)
        return table

    run_ranks(sizes[0], save)
    tables = run_ranks(sizes[1], load)
    assert torch.equal(torch.cat([table.rows for table in tables]), truth + 1)
    assert all(table.epoch == 4 for table in tables)
    assert not verify_folder(tmp_path).findings
