"""Helpers of the test_engines_deepspeed files: small engines on ranks, and whole tensors out of what their
optimizers hold.

Nothing here imports DeepSpeed before a function is called: only ranks do.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.conformance.cautious import SCENARIOS, SHAPES, Scenario, Session
from tests.optim_runs import GivenGrads

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)

BASE: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "steps_per_print": 10**9}
BLOCK: dict[str, Any] = {"effx": {"cautious": {}}}


def be_a_rank() -> None:
    """What a launcher tells DeepSpeed, on a rank whose group is there already. Called first."""
    gc.freeze()  # stage 3 collects garbage, which takes a second with all that torch has
    os.environ |= {
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    get_accelerator().is_fp16_supported = lambda: True  # as torch is, if slowly


def merged(*configs: Mapping[str, Any]) -> dict[str, Any]:
    """One configuration of several: later ones win, tables are merged."""
    found: dict[str, Any] = {}
    for config in configs:
        for key, value in config.items():
            is_table = isinstance(value, Mapping)
            found[key] = merged(found.get(key, {}), value) if is_table else value
    return found


class Model(nn.Module):
    """Sizes that no number of ranks divides; a tied, a frozen and an unused parameter. The same values
    wherever it is made. DeepSpeed refuses 0-d parameters.
    """

    def __init__(self) -> None:
        torch.manual_seed(7)
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 6)
        self.cube = nn.Parameter(torch.randn(2, 3, 5))
        self.norm = nn.Parameter(torch.randn(6))
        self.gain = nn.Parameter(torch.randn(1))
        self.frozen = nn.Linear(6, 6)
        self.unused = nn.Parameter(torch.randn(7))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        x = self.embed(tokens) * self.norm
        x = torch.tanh(self.hidden(x)) + self.frozen(x)
        x = x + self.cube.sum((0, 1)).sum() * self.gain
        logits = self.head(x).float() * scale  # a large one makes the loss overflow
        targets = tokens.roll(1, -1).flatten()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets)


def tokens_of(step: int) -> torch.Tensor:
    """A micro-batch of this rank's own, int64 [2, 5]."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    return torch.randint(11, (2, 5), generator=generator)


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Matrices, and the rest without weight decay."""
    matrices: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for param in model.parameters():
        shape = getattr(param, "ds_shape", param.shape)  # zero.Init has taken its elements away
        if param.requires_grad:
            (matrices if len(shape) > 1 else rest).append(param)
    return [{"params": matrices}, {"params": rest, "weight_decay": 0.0}]


def whole_tensors(
    engine: Any, of_partition: Callable[[Any], torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """By name, what ``of_partition`` gives of each partition, put together from all ranks. Every element is
    on one rank alone, or on all of them where nothing is spread. Collective.
    """
    from effx_dist.engines.deepspeed.partitions import partitions

    held: list[tuple[str, Any, torch.Tensor]] = []
    wholes: list[Any] = []
    for partition in partitions(engine):
        wholes += partition.wholes
        flat = of_partition(partition)
        if flat is not None:
            held += [(p.whole.name, p.box, p.view(flat.detach()).clone()) for p in partition.pieces]
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, held)
    found: dict[str, torch.Tensor] = {}
    times: dict[str, torch.Tensor] = {}
    for whole in wholes:
        found[whole.name] = torch.full(whole.shape, torch.nan)
        times[whole.name] = torch.zeros(whole.shape)
    for name, box, values in [piece for of_rank in of_ranks for piece in of_rank]:
        place = tuple(
            slice(start, start + size) for start, size in zip(box.offsets, box.sizes, strict=True)
        )
        found[name] = found[name].to(values.dtype)
        found[name][place] = values
        times[name][place] += 1
    for whole in wholes:
        expected = 1 if whole.groups else dist.get_world_size()
        given = times[whole.name]
        assert given.eq(expected).all() or not given.any(), f"{whole.name}: held {given} times"
    return {name: whole for name, whole in found.items() if times[name].any()}


class DeepSpeedSession(Session):
    """Gradients that come by ZeRO's own backward pass and reduction."""

    def __init__(self, stage: int, scenario: Scenario, wholes: Mapping[str, torch.Tensor]) -> None:
        from effx_dist import deepspeed

        params = {name: nn.Parameter(whole.clone()) for name, whole in wholes.items()}
        groups = [[(n, params[n]) for n in group] for group in scenario.groups(list(params))]
        self.optimizer = scenario.build(groups)
        self._engine, *_ = deepspeed.initialize(
            model=GivenGrads(params),
            optimizer=self.optimizer,
            config=merged(
                BASE, BLOCK, {"zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
            ),
        )
        self._grads: dict[str, torch.Tensor] = {}

    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        assert whole_grad is not None, "ZeRO steps with zeros then"
        self._grads[name] = whole_grad

    def step(self) -> None:
        # The same on both ranks: their mean is exact.
        self._engine.backward(self._engine(self._grads))
        self._engine.step()

    def alignment(self) -> dict[str | int, float]:
        return dict(self._engine.effx.alignment)

    def whole_values(self, name: str) -> dict[str, torch.Tensor]:
        states: Any = self.optimizer.state
        found = {"param": whole_tensors(self._engine, lambda partition: partition.flat)[name]}
        for key, value in next(iter(states.values())).items():
            if value.dim():
                wholes = whole_tensors(self._engine, lambda part, key=key: states[part.flat][key])  # type: ignore[misc]
                found[key] = wholes[name]
            else:
                found[key] = value
        return found


# What DeepSpeed can hold: parameters of one dtype with dimensions and elements, all with a gradient.
ZERO_SHAPES = {name: shape for name, shape in SHAPES.items() if name not in ("scalar", "nothing")}
ZERO_SCENARIOS = [
    scenario
    for scenario in SCENARIOS
    if scenario.dtype == torch.float32
    and scenario.second_dtype is None
    and not scenario.without_grad
]
