"""What would make a mask silently wrong is refused by name: strangers in the parameters' place, inner optimizers with
weights or gradients of their own, a gradient on some ranks only. And the arguments that other people pass."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from effx_dist.core.infobatch import roles
from effx_dist.errors import ConfigError, EffxError, LayoutMismatchError
from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD, cautious
from effx_dist.optim.base import _slots_on
from tests.ranks import spawn
from tests.spoiling_optimizers import (
    AsksOthers,
    Averages,
    FailsOnDTensors,
    Interpolates,
    Masters,
    Plain,
    WritesGrad,
)

ROOT = Path(__file__).parents[1]


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(6, 5).to(dtype)), nn.Parameter(torch.randn(7).to(dtype))]


def give_grads(params: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements)
        param.grad = grad


def steps(optimizer: Any, params: list[Any], num_steps: int = 4) -> None:
    for step in range(num_steps):
        give_grads(params, step)
        optimizer.step()


# What an engine puts in the parameters' place


class TestStrangers:
    def replaced(self, optimizer: Any) -> None:
        """As ZeRO does: one flat partition for all."""
        for group in optimizer.param_groups:
            flat = torch.cat([p.detach().reshape(-1) for p in group["params"]])[
                :20
            ].requires_grad_()
            flat.grad = torch.ones_like(flat)
            group["params"] = [flat]

    @pytest.mark.parametrize("make", [torch.optim.NAdam, torch.optim.RMSprop, Plain])
    def test_the_wrapper_refuses_them(self, make: Any) -> None:
        optimizer = cautious(make(parameters(), lr=0.1))
        self.replaced(optimizer)
        before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        with pytest.raises(LayoutMismatchError, match="an engine has put it in their place"):
            optimizer.step()
        after = [p for g in optimizer.param_groups for p in g["params"]]
        assert all(map(torch.equal, before, after))

    def test_those_that_were_added_are_none(self) -> None:
        params = parameters()
        optimizer = cautious(Plain(params[:1]))
        optimizer.add_param_group({"params": params[1:]})
        steps(optimizer, params, 1)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_a_copy_has_parameters_of_its_own(self, copied: Any) -> None:
        optimizer = copied(cautious(torch.optim.NAdam(parameters())))
        own = [p for g in optimizer.param_groups for p in g["params"]]
        steps(optimizer, own, 2)
        self.replaced(optimizer)
        with pytest.raises(LayoutMismatchError, match="an engine"):
            optimizer.step()

    def test_a_loaded_state_changes_nothing_of_it(self) -> None:
        params = parameters()
        optimizer = cautious(torch.optim.NAdam(params))
        steps(optimizer, params, 1)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        steps(optimizer, params, 1)


# What an inner optimizer does


@pytest.mark.parametrize("how", ["in place", "foreach", "data", "replaced"])
def test_an_inner_optimizer_that_writes_gradients_is_refused(how: str) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    with pytest.raises(ConfigError, match=r"optimizer=WritesGrad: must leave \.grad as it is"):
        steps(cautious(WritesGrad(params, how)), params)
    assert all(map(torch.equal, before, params)), "put back"


def test_one_that_begins_later_is_found_too() -> None:
    params = parameters()
    optimizer = cautious(WritesGrad(params, "nothing yet"))
    optimizer.optimizer.how = "in place"  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="must leave"):
        steps(optimizer, params)


@pytest.mark.parametrize(
    ("where", "dtype", "own"),
    [
        ("state", torch.bfloat16, torch.float32),
        ("state", torch.float32, torch.float32),
        ("attribute", torch.bfloat16, torch.float32),
        ("attribute", torch.float32, torch.float32),
        ("state", torch.float32, torch.float64),
    ],
)
def test_an_inner_optimizer_with_weights_of_its_own_is_refused(
    where: str, dtype: torch.dtype, own: torch.dtype
) -> None:
    params = parameters(dtype)
    with pytest.raises(ConfigError, match=r"optimizer=Masters: keeps weights of its own"):
        steps(cautious(Masters(params, where, own)), params)


def test_one_that_interpolates_with_weights_of_its_own_is_refused() -> None:
    params = parameters()
    with pytest.raises(ConfigError, match=r"optimizer=Interpolates: keeps weights of its own"):
        steps(cautious(Interpolates(params)), params)


@pytest.mark.parametrize(
    "make", [Averages, torch.optim.ASGD, torch.optim.Rprop, torch.optim.Adagrad]
)
def test_averages_and_moments_are_none(make: Any) -> None:
    params = parameters()
    steps(cautious(make(params, lr=0.01)), params, 9)


def test_parameters_of_zeros_are_no_masters() -> None:
    params = [nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.zeros(0, 3))]
    steps(cautious(torch.optim.NAdam(params)), params, 3)


# Decoupled decay only where update and parameter agree


@pytest.mark.parametrize("maximize", [False, True])
def test_cautious_decay_from_outside_is_that_of_the_fast_form(maximize: bool) -> None:
    ours, theirs = parameters(), parameters()
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3, "maximize": maximize}
    fast = CautiousAdamW(ours, cautious_weight_decay=True, **options)
    wrapped = cautious(torch.optim.AdamW(theirs, **options), cautious_weight_decay=True)
    plain = parameters()
    undecayed = cautious(torch.optim.AdamW(plain, **options))
    for step in range(6):
        for params in (ours, theirs, plain):
            give_grads(params, step)
        for optimizer in (fast, wrapped, undecayed):
            optimizer.step()
    for one, other, without in zip(ours, theirs, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(one, without)


def test_cautious_decay_of_a_gradients_part_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cautious_weight_decay=True: SGD adds weight_decay=0.1"):
        cautious(torch.optim.SGD(parameters(), weight_decay=0.1), cautious_weight_decay=True)
    optimizer = cautious(torch.optim.SGD(parameters()), cautious_weight_decay=True)
    with pytest.raises(ConfigError, match=r"weight_decay=0\.2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.2})
    optimizer.param_groups[0]["weight_decay"] = 0.3
    with pytest.raises(ConfigError, match=r"weight_decay=0\.3"):
        optimizer.step()


# Arguments as torchtitan, Trainer and accelerate pass them

USUAL = {"lr": 1e-3, "foreach": False, "fused": True}


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (CautiousAdamW, {**USUAL, "amsgrad": False, "differentiable": False, "capturable": False}),
        (CautiousAdamW, {"foreach": None, "fused": None, "decoupled_weight_decay": True}),
        (CautiousAdamW, {"weight_decay": 0.0, "decoupled_weight_decay": False}),
        (CautiousLion, USUAL),
        (CautiousSGD, {**USUAL, "dampening": 0, "nesterov": True}),
    ],
)
def test_harmless_options_are_taken(make: Any, options: dict[str, Any]) -> None:
    params = parameters()
    steps(make(params, **options), params, 1)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (CautiousAdamW, {"amsgrad": True}),
        (CautiousAdamW, {"differentiable": True}),
        (CautiousAdamW, {"decoupled_weight_decay": False, "weight_decay": 0.1}),
        (CautiousAdamW, {"fused": "yes"}),
        (CautiousSGD, {"dampening": 0.5}),
        (CautiousLion, {"differentiable": True}),
    ],
)
def test_others_are_refused_by_name(make: Any, options: dict[str, Any]) -> None:
    name, value = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name}={value!r}: must be"):
        make(parameters(), **options)


def test_options_of_a_group_are_looked_at_too() -> None:
    with pytest.raises(ConfigError, match="amsgrad=True"):
        CautiousAdamW([{"params": parameters(), "amsgrad": True}])


def test_nothing_is_given_by_its_place_that_torch_has_elsewhere() -> None:
    """AdamW's sixth argument is amsgrad, SGD's fourth dampening."""
    with pytest.raises(TypeError):
        CautiousAdamW(parameters(), 1e-3, (0.9, 0.999), 1e-8, 1e-2, False)  # type: ignore[misc]
    with pytest.raises(TypeError):
        CautiousSGD(parameters(), 1e-3, 0.9, 0.5)  # type: ignore[misc]


COMPILED = """
import torch
import effx_dist as effx
models = [torch.nn.Linear(8, 8) for _ in range(2)]
models[1].load_state_dict(models[0].state_dict())
made = [{make} for model in models]
compiled = torch.compile(made[0].step)
for step in range(3):
    x = torch.randn(4, 8)
    for model, take in zip(models, (compiled, made[1].step)):
        model(x).sum().backward()
        take()
        model.zero_grad()
assert torch.equal(models[0].weight, models[1].weight)
"""


@pytest.mark.parametrize(
    "make",
    [
        "effx.CautiousAdamW(model.parameters())",
        "effx.cautious(torch.optim.NAdam(model.parameters()))",
    ],
)
def test_a_compiled_step_is_right_and_silent(make: str) -> None:
    source = COMPILED.replace("{make}", make)
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# Small ones


def test_slots_of_other_buckets_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are under way to other ranks meanwhile, where parameters lie on two devices."""
    counts = torch.arange(6)
    there = torch.zeros(6, dtype=torch.int64)  # stands in for memory of the other device
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: there)
    with _slots_on(torch.device("meta"), counts, slice(2, 4)) as here:
        here += 10
        counts[0] = -5  # what another rank's counts have been added to
    assert counts.tolist() == [-5, 1, 12, 13, 4, 5]


def test_a_threshold_is_compared_as_it_is() -> None:
    """In float64 also where NumPy would take a scalar's value for float32 (before NumPy 2)."""
    score = np.float32(0.1)
    just_above = float(score) + 1e-12
    scores = np.full(64, score, dtype=np.float32)
    below = roles(scores, 0, just_above, 0.5, 7)
    assert set(below.tolist()) == {0, 2}, "all lie below it"
    assert set(roles(scores, 0, float(score), 0.5, 7).tolist()) == {1}


# DTensors


def dtensors(mesh: Any) -> list[Any]:
    return [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in parameters()]


def outcome(make: Any, params: list[Any], num_steps: int = 4) -> str:
    try:
        steps(cautious(make(params)), params, num_steps)
    except EffxError as error:
        return f"{type(error).__name__}: {error}"
    return "right"


def lacking(make: Any, mesh: Any, lacks: Any) -> tuple[str, bool]:
    """A step for which ``lacks(rank)`` parameters have no gradient; whether anything moved."""
    params = dtensors(mesh)
    optimizer = make(params)
    give_grads(params, 0)
    for index in lacks(dist.get_rank()):
        params[index].grad = None
    before = [p.to_local().detach().clone() for p in params]
    try:
        optimizer.step()
    except LayoutMismatchError as error:
        moved = any(not torch.equal(b, p.to_local()) for b, p in zip(before, params, strict=True))
        return str(error), moved
    return "", True


def on_two_ranks() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for how in ("in place", "foreach", "data", "replaced"):
        found[how] = outcome(lambda params, how=how: WritesGrad(params, how), dtensors(mesh))
    found["masters"] = outcome(Masters, dtensors(mesh))
    found["plain"] = outcome(Plain, dtensors(mesh))
    found["average"] = outcome(Averages, dtensors(mesh))
    found["asks others"] = outcome(AsksOthers, parameters())
    found["fails"] = outcome(FailsOnDTensors, dtensors(mesh))
    for name, make in (("adamw", CautiousAdamW), ("wrapped", lambda p: cautious(Plain(p)))):
        found[f"{name}, one rank"] = lacking(make, mesh, lambda rank: [0] if rank == 1 else [])
        found[f"{name}, each another"] = lacking(make, mesh, lambda rank: [rank])
        found[f"{name}, both"] = lacking(make, mesh, lambda rank: [1])
    return found


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(2, on_two_ranks, tmp_path_factory.mktemp("ranks"))


@pytest.mark.ranks
@pytest.mark.parametrize("how", ["in place", "foreach", "data", "replaced"])
def test_gradients_of_dtensors_are_watched(ran: list[dict[str, Any]], how: str) -> None:
    for of_rank in ran:
        assert "optimizer=WritesGrad: must leave .grad as it is" in of_rank[how]


@pytest.mark.ranks
def test_masters_of_dtensors_are_found(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        assert "keeps weights of its own" in of_rank["masters"]
        assert (of_rank["plain"], of_rank["average"]) == ("right", "right")


@pytest.mark.ranks
def test_one_rank_tries_nothing_out_that_others_would_have_to_join(
    ran: list[dict[str, Any]],
) -> None:
    assert [of_rank["asks others"] for of_rank in ran] == ["right", "right"]


@pytest.mark.ranks
def test_an_optimizers_own_limit_is_called_so(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        assert "optimizer=FailsOnDTensors: its own step fails on DTensors" in of_rank["fails"]
        assert "NotImplementedError" in of_rank["fails"]
        assert "not the mask's" in of_rank["fails"]


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["adamw", "wrapped"])
def test_a_gradient_that_one_rank_lacks_is_told_on_all(
    ran: list[dict[str, Any]], name: str
) -> None:
    for of_rank in ran:
        message, moved = of_rank[f"{name}, one rank"]
        assert "parameter 0 (1 of 2 ranks)" in message
        assert not moved
        message, moved = of_rank[f"{name}, each another"]
        assert "parameter 0 (1 of 2 ranks), parameter 1 (1 of 2 ranks)" in message
        assert not moved
        assert of_rank[f"{name}, both"] == ("", True), "frozen, or unused everywhere"
