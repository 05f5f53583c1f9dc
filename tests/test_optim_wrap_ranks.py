"""A wrapped optimizer on several ranks equals one process: threads with flat pieces, FSDP2 for real."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from effx_dist.optim import CautiousWrapper, cautious
from effx_dist.shard import Group, Piece, ShardMap, WholeTensor, pieces_of_flat_range
from tests.conformance import cautious as conformance
from tests.conformance.cautious import SHAPES, Engine, Scenario, TensorSession
from tests.inner_optimizers import NormalisedMomentum, PlainLion
from tests.ranks import spawn
from tests.thread_ranks import ThreadGroup, run_ranks

FSDP2_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "scalar"}


def wrapped(make: Callable[..., Optimizer], is_decoupled: bool | None = None) -> Any:
    """What a scenario builds its optimizer with."""

    def build(groups: Any, shard_map: Any = None) -> CautiousWrapper:
        return cautious(make(groups), decoupled_weight_decay=is_decoupled, shard_map=shard_map)

    return build


SCENARIOS = [
    Scenario(
        name="lion, decoupled decay",
        optimizer=wrapped(PlainLion, is_decoupled=True),
        defaults={"lr": 0.02, "weight_decay": 0.5},
        num_steps=20,
    ),
    Scenario(
        name="normalised momentum, L2, two groups, maximize",
        optimizer=wrapped(NormalisedMomentum),
        defaults={"lr": 0.05, "weight_decay": 0.3},
        second_group=("few_rows", "vector"),
        second_options={"lr": 0.1, "maximize": True},
    ),
    Scenario(
        name="bfloat16",
        optimizer=wrapped(NormalisedMomentum),
        defaults={"lr": 0.3},
        dtype=torch.bfloat16,
    ),
    Scenario(
        name="steps without a gradient",
        optimizer=wrapped(NormalisedMomentum),
        without_grad=frozenset({(0, "large"), (2, "vector"), (1, "one")}),
    ),
]
FLAT_SCENARIOS = [scenario for scenario in SCENARIOS if not scenario.without_grad]


class FlatSession(conformance.Session):
    """All parameters in one flat tensor per group, cut anywhere: the inner optimizer sees that."""

    def __init__(
        self,
        group: Group,
        scenario: Scenario,
        wholes: Mapping[str, torch.Tensor],
        is_local_mean: bool = False,
    ) -> None:
        self._group = group
        self._names = scenario.groups(list(wholes))
        self._shapes = {name: whole.shape for name, whole in wholes.items()}
        self._grads: dict[str, torch.Tensor] = {}
        spread = () if is_local_mean else (group,)
        described = [WholeTensor(n, tuple(w.shape), spread) for n, w in wholes.items()]
        by_name = {whole.name: whole for whole in described}
        pieces = [self._pieces([by_name[name] for name in names]) for names in self._names]
        self.locals = [self._cut(names, wholes).requires_grad_() for names in self._names]
        named = [[(f"flat {i}", local)] for i, local in enumerate(self.locals)]
        self.optimizer = scenario.build(named, ShardMap(described, pieces))

    def _bounds(self, numel: int) -> tuple[int, int]:
        """Unequal cuts, at odd places."""
        ends = [numel * (i + 1) ** 2 // self._group.size**2 for i in range(self._group.size)]
        return ([0, *ends][self._group.rank], ends[self._group.rank])

    def _cut(self, names: list[str], wholes: Mapping[str, torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([wholes[name].reshape(-1) for name in names])
        first, last = self._bounds(len(flat))
        return flat[first:last].clone()

    def _pieces(self, wholes: list[WholeTensor]) -> tuple[Piece, ...]:
        first, last = self._bounds(sum(whole.numel for whole in wholes))
        found: list[Piece] = []
        position = 0
        for whole in wholes:
            start = min(max(first - position, 0), whole.numel)
            stop = min(max(last - position, 0), whole.numel)
            found += pieces_of_flat_range(whole, start, stop, position + start - first)
            position += whole.numel
        return tuple(found)

    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        assert whole_grad is not None
        self._grads[name] = whole_grad
        for names, local in zip(self._names, self.locals, strict=True):
            if all(name in self._grads for name in names):
                local.grad = self._cut(names, self._grads)

    def whole_values(self, name: str) -> dict[str, torch.Tensor]:
        index = next(i for i, names in enumerate(self._names) if name in names)
        local = self.locals[index]
        values = {"param": local.detach(), **self.optimizer.state[local]}
        return {key: self._gather(name, index, value) for key, value in values.items()}

    def _gather(self, name: str, index: int, local: torch.Tensor) -> torch.Tensor:
        flat = torch.cat(self._group.all_gather_object(local))
        numels = [self._shapes[other].numel() for other in self._names[index]]
        parts = dict(zip(self._names[index], flat.split(numels), strict=True))
        return parts[name].view(self._shapes[name])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_flat_cuts_equal_one_process(world: int) -> None:
    def body(group: Group) -> None:
        conformance.check(lambda s, w: FlatSession(group, s, w), FLAT_SCENARIOS)

    run_ranks(world, body)


def test_a_local_mean_is_noticed() -> None:
    def body(group: Group) -> None:
        engine = lambda s, w: FlatSession(group, s, w, is_local_mean=True)  # noqa: E731
        conformance.check(engine, FLAT_SCENARIOS[:1])

    with pytest.raises(AssertionError, match=r"lion, decoupled decay: .*large\.param"):
        run_ranks(2, body)


class CountingGroup(ThreadGroup):
    """Alone, and keeping what it was asked to reduce; fails on request."""

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.reduced: list[list[int]] = []
        self.fails = False

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:  # type: ignore[override]
        assert tensor.dtype == torch.int64
        if self.fails:
            raise ConnectionError("a rank has left")
        self.reduced.append(tensor.tolist())
        return tensor


def test_one_all_reduce_of_all_counts_per_step_and_its_failure() -> None:
    group = CountingGroup()
    wholes = [WholeTensor(name, (4,), (group,)) for name in "abc"]
    params = [torch.zeros(4, requires_grad=True) for _ in wholes]
    params[0].grad = torch.tensor([1.0, 2.0, 0.0, -1.0])
    shard_map = ShardMap(wholes, [pieces_of_flat_range(whole, 0, 4) for whole in wholes])
    inner = torch.optim.AdamW(params, weight_decay=0.3)
    opt = cautious(inner, shard_map=shard_map)
    opt.step()
    assert group.reduced == [[3, 0, 0]], "also those without a gradient take part"
    assert opt.alignment == {"a": 0.75}
    before = params[0].detach().clone()
    group.fails = True
    with pytest.raises(ConnectionError):
        opt.step()
    assert torch.equal(params[0], before)
    assert inner.param_groups[0]["weight_decay"] == 0.3


def fsdp2(mesh: DeviceMesh) -> Engine:
    def build(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> TensorSession:
        model = nn.Module()
        for name, whole in wholes.items():
            model.register_parameter(name, nn.Parameter(whole.clone()))
        fully_shard(model, mesh=mesh)
        return TensorSession(scenario, dict(model.named_parameters()))

    return build


# What DTensors can do with it: fused SGD and Adagrad have no sharding rule in torch, nor has Rprop.
TORCH_OPTIMIZERS: list[tuple[Callable[..., Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"weight_decay": 0.2, "foreach": False}),
    (torch.optim.AdamW, {"weight_decay": 0.2, "foreach": True}),
    (torch.optim.AdamW, {"weight_decay": 0.2, "fused": True}),
    (torch.optim.Adam, {"weight_decay": 0.2}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"momentum": 0.9}),
    (torch.optim.NAdam, {"weight_decay": 0.2, "decoupled_weight_decay": True}),
    (torch.optim.Adagrad, {"weight_decay": 0.2}),
]


def check_torch_optimizers(mesh: DeviceMesh) -> None:
    """Counts are equal; values to what torch's own vectorised loops leave open, in float64."""
    for make, options in TORCH_OPTIMIZERS:
        scenario = Scenario(
            name=make.__name__,  # type: ignore[attr-defined]
            optimizer=wrapped(make),
            defaults={"lr": 0.05, **options},
            dtype=torch.float64,
        )
        found = conformance.run(fsdp2(mesh), scenario, FSDP2_SHAPES)
        expected = conformance.run(conformance.one_process, scenario, FSDP2_SHAPES)
        assert found.pop("alignment") == expected.pop("alignment"), scenario
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-13, atol=1e-13)


def check_a_local_mean(mesh: DeviceMesh) -> None:
    """The same, but for a shard map that calls each rank's shard whole: it must differ."""

    def build(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> TensorSession:
        session = fsdp2(mesh)(scenario, wholes)
        named = [(name, param.to_local()) for name, param in session._params.items()]
        session.optimizer.shard_map = ShardMap.of_tensors(named)
        return session

    with pytest.raises(AssertionError, match=r"lion, decoupled decay: .*large\.param"):
        conformance.check(build, SCENARIOS[:1], FSDP2_SHAPES)


def sharded_model() -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    fully_shard(model)
    return model


def train(model: nn.Module, opt: Optimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        model(torch.randn(4, 6, generator=generator)).square().sum().backward()
        opt.step()


def whole_params(model: nn.Module) -> list[torch.Tensor]:
    return [param.detach().full_tensor() for param in model.parameters()]  # type: ignore[attr-defined]


def check_state_dict(options: StateDictOptions) -> None:
    """Saved wrapped, loaded into a bare optimizer, saved from there, loaded wrapped."""
    model, bare_model, other = (sharded_model() for _ in range(3))
    opt = cautious(torch.optim.AdamW(model.parameters(), lr=0.02))
    bare = torch.optim.AdamW(bare_model.parameters(), lr=0.9)
    other_opt = cautious(torch.optim.AdamW(other.parameters(), lr=0.9))
    train(model, opt, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    assert isinstance(saved["state"]["0.weight"]["exp_avg"], DTensor) != options.full_state_dict
    set_optimizer_state_dict(bare_model, bare, saved, options=options)
    saved = copy.deepcopy(get_optimizer_state_dict(bare_model, bare, options=options))
    before = whole_params(other)
    set_optimizer_state_dict(other, other_opt, saved, options=options)
    assert all(map(torch.equal, whole_params(other), before)), "loading must not move a parameter"
    with torch.no_grad():
        for param, value in zip(other.parameters(), model.parameters(), strict=True):
            param.copy_(value)
    train(model, opt, range(2, 4))
    train(other, other_opt, range(2, 4))
    assert all(map(torch.equal, whole_params(other), whole_params(model)))
    assert other_opt.alignment == opt.alignment


def check_overflow_on_one_rank() -> None:
    """DTensors tell each other of an overflow, so that no rank steps alone."""
    model = sharded_model()
    opt = cautious(torch.optim.AdamW(model.parameters(), lr=0.02))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = whole_params(model)
    scaler.scale(model(torch.ones(2, 6)).square().sum()).backward()
    if dist.get_rank() == 1:
        next(model.parameters()).grad.to_local().fill_(float("inf"))  # type: ignore[union-attr]
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 4
    assert all(map(torch.equal, whole_params(model), before))


def on_two_ranks() -> None:
    mesh = init_device_mesh("cpu", (2,))
    conformance.check(fsdp2(mesh), SCENARIOS, FSDP2_SHAPES)
    check_torch_optimizers(mesh)
    check_a_local_mean(mesh)
    check_state_dict(StateDictOptions())
    check_state_dict(StateDictOptions(full_state_dict=True))
    check_overflow_on_one_rank()


@pytest.mark.ranks
def test_fsdp2_equals_one_process(tmp_path: Path) -> None:
    assert spawn(2, on_two_ranks, tmp_path) == [None] * 2
