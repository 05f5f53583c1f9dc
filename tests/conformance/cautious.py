"""What every engine must show of the cautious optimizers: sharded, they do exactly what one process
does.

An engine's test gives :func:`check` a function that shards parameters its own way (a
:class:`Session`). The same gradients are fed to both, so that it is the optimizer that is compared,
bit for bit, and not a backward pass.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.optim.param_layout import ShardMapSource

NamedParams = list[tuple[str, torch.Tensor]]

SHAPES = {
    "large": (65, 64),
    "few_rows": (3, 65),
    "one_row": (1, 7),
    "vector": (5,),
    "one": (1,),
    "cube": (2, 3, 5),
    "scalar": (),
    "nothing": (0, 4),
}
"""Uneven on 2, 3 and 4 ranks, with ranks left empty. An engine may leave out shapes that it cannot
hold.
"""


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One optimizer, its settings, and which parameters it has in which group."""

    name: str
    optimizer: type[CautiousOptimizer] = CautiousAdamW
    defaults: Mapping[str, Any] = field(default_factory=dict)
    second_group: tuple[str, ...] = ()
    """Parameters of a group with settings of its own."""
    second_options: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    second_dtype: torch.dtype | None = None
    """dtype of the second group, where it is not ``dtype``."""
    without_grad: frozenset[tuple[int, str]] = frozenset()
    """(step, parameter) that gets no gradient, on any rank."""
    num_steps: int = 4

    def dtype_of(self, name: str) -> torch.dtype:
        """dtype of a parameter and of its gradients."""
        return (name in self.second_group and self.second_dtype) or self.dtype

    def groups(self, names: Sequence[str]) -> list[list[str]]:
        """Names by group, empty groups left out."""
        first = [name for name in names if name not in self.second_group]
        second = [name for name in names if name in self.second_group]
        return [group for group in (first, second) if group]

    def build(
        self, groups: Sequence[NamedParams], shard_map: ShardMapSource | None = None
    ) -> CautiousOptimizer:
        """The optimizer over named parameters, given by group as :meth:`groups` has them."""
        options = [self.defaults, {**self.defaults, **self.second_options}]
        described = [
            {"params": list(group), **chosen}
            for group, chosen in zip(groups, options, strict=False)
        ]
        return self.optimizer(described, shard_map=shard_map)


SCENARIOS = (
    Scenario(name="adamw", defaults={"lr": 0.05, "weight_decay": 0.1}),
    Scenario(
        name="adamw, cautious decay, other betas",
        defaults={"betas": (0.5, 0.9), "weight_decay": 0.3, "cautious_weight_decay": True},
    ),
    Scenario(
        name="adamw, two groups, maximize",
        defaults={"lr": 0.01, "maximize": True},
        second_group=("vector", "one", "scalar"),
        second_options={"lr": 0.3, "weight_decay": 0.0, "eps": 1e-3},
    ),
    Scenario(name="adamw, bfloat16", defaults={"lr": 0.05}, dtype=torch.bfloat16),
    Scenario(name="adamw, float64", defaults={"lr": 0.05}, dtype=torch.float64),
    Scenario(
        name="adamw, two dtypes",
        defaults={"lr": 0.05, "weight_decay": 0.1},
        second_group=("large", "one", "cube"),
        second_dtype=torch.bfloat16,
    ),
    Scenario(
        name="adamw, steps without a gradient",
        without_grad=frozenset({(0, "large"), (2, "vector"), (1, "one")}),
    ),
    Scenario(name="lion", optimizer=CautiousLion, defaults={"lr": 0.02}),
    Scenario(
        name="lion, cautious decay",
        optimizer=CautiousLion,
        defaults={"lr": 0.02, "weight_decay": 0.5, "cautious_weight_decay": True},
    ),
    Scenario(
        name="sgd",
        optimizer=CautiousSGD,
        defaults={"lr": 0.1, "weight_decay": 0.2},
        second_group=("large", "cube"),
        second_options={"momentum": 0.5, "maximize": True},
    ),
    Scenario(
        name="sgd, nesterov, cautious decay",
        optimizer=CautiousSGD,
        defaults={"lr": 0.1, "nesterov": True, "weight_decay": 0.5, "cautious_weight_decay": True},
    ),
)


class Session(ABC):
    """A model and its optimizer, as one engine holds them on this rank."""

    optimizer: CautiousOptimizer

    @abstractmethod
    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        """Give this rank its part of a whole gradient. Every rank is given the same one."""

    def step(self) -> None:
        """Step on the gradients that were set."""
        self.optimizer.step()

    def alignment(self) -> dict[str | int, float]:
        """The optimizer's alignment, by the names that the scenario has for the parameters."""
        return self.optimizer.alignment

    @abstractmethod
    def whole_values(self, name: str) -> dict[str, torch.Tensor]:
        """The parameter ("param") and its state by key, whole, on every rank. May communicate."""


Engine = Callable[[Scenario, dict[str, torch.Tensor]], Session]


class TensorSession(Session):
    """Any parameters that a DTensor or a plain tensor describes; its gradients are cut as they are."""

    def __init__(self, scenario: Scenario, params: Mapping[str, torch.Tensor]) -> None:
        self._params = params
        groups = [[(n, params[n]) for n in group] for group in scenario.groups(list(params))]
        self.optimizer = scenario.build(groups)

    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        param = self._params[name]
        if whole_grad is not None and isinstance(param, DTensor):
            whole_grad = distribute_tensor(
                whole_grad, param.device_mesh, param.placements, src_data_rank=None
            )
        param.grad = whole_grad

    def whole_values(self, name: str) -> dict[str, torch.Tensor]:
        param = self._params[name]
        values = {"param": param.detach(), **self.optimizer.state.get(param, {})}
        return {
            key: value.full_tensor() if isinstance(value, DTensor) else value
            for key, value in values.items()
        }


def one_process(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> Session:
    """The engine to compare with: plain tensors."""
    params = {name: whole.clone().requires_grad_() for name, whole in wholes.items()}
    return TensorSession(scenario, params)


def whole_params(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The same values wherever they are asked for."""
    return {name: _values(name, shape).to(dtype) for name, shape in shapes.items()}


def whole_grad(name: str, step: int, like: torch.Tensor) -> torch.Tensor:
    """Random, with exact zeros and with values whose products underflow."""
    grad = _values(f"{name} {step}", like.shape)
    kind = _values(f"{name} {step} kind", like.shape)
    grad = torch.where(kind > 1.5, grad * 1e-30, grad)
    return torch.where(kind < -1.5, 0.0, grad).to(like.dtype)


def run(
    engine: Engine, scenario: Scenario, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """All steps of a scenario; every whole value and the alignment at the end, by name."""
    wholes = whole_params(shapes, scenario.dtype)
    wholes = {name: whole.to(scenario.dtype_of(name)) for name, whole in wholes.items()}
    session = engine(scenario, wholes)
    alignments = []
    for step in range(scenario.num_steps):
        for name, whole in wholes.items():
            lacks_grad = (step, name) in scenario.without_grad
            session.set_grad(name, None if lacks_grad else whole_grad(name, step, whole))
        session.step()
        alignments.append(session.alignment())
    found: dict[str, Any] = {"alignment": alignments}
    for name in wholes:
        found |= {f"{name}.{key}": v.clone() for key, v in session.whole_values(name).items()}
    return found


def check(
    engine: Engine,
    scenarios: Sequence[Scenario] = SCENARIOS,
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
) -> None:
    """Run every scenario on ``engine`` and in one process, and compare exactly. Called by every
    rank.
    """
    for scenario in scenarios:
        found = run(engine, scenario, shapes)
        expected = run(one_process, scenario, shapes)
        differing = [key for key in expected if not _same(found.get(key), expected[key])]
        assert not differing, f"{scenario.name}: {differing} differ from one process"
        assert found.keys() == expected.keys(), f"{scenario.name}: {found.keys()}"
        assert any(0.2 < value < 0.8 for value in expected["alignment"][-1].values())


def _same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor):
        return bool(found == expected)
    return (
        isinstance(found, torch.Tensor)
        and found.dtype == expected.dtype
        and torch.equal(found, expected)
    )


def _values(key: str, shape: Sequence[int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(tuple(shape), generator=generator)
