"""Tensors that are made of others, as torchao's quantised bases and 8-bit states are: saved by their parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.errors import LayoutMismatchError
from tests.runs import lossless


class Quantised(torch.Tensor):
    """Packed int8 and one scale a row, as if it were a float tensor."""

    packed: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, packed: torch.Tensor, scale: torch.Tensor) -> Quantised:
        made = torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=scale.dtype)
        made.packed, made.scale = packed, scale
        return made

    @classmethod
    def of(cls, values: torch.Tensor) -> Quantised:
        scale = values.abs().amax(1, keepdim=True) / 127
        return cls((values / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["packed", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Quantised:
        return Quantised(inner["packed"], inner["scale"])

    def whole(self) -> torch.Tensor:
        return self.packed.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].packed.detach(), args[0].scale.detach())
        plain = pytree.tree_map(lambda a: a.whole() if isinstance(a, Quantised) else a, args)
        return func(*plain, **(kwargs or {}))


def model_of(seed: int, is_tied: bool = False) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Module()
    model.base = nn.Parameter(Quantised.of(torch.randn(40, 30, generator=generator)), False)
    model.head = nn.Parameter(torch.randn(8, 40, generator=generator))
    if is_tied:
        model.other = model.base
    return model


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_quantised_base_is_saved_by_its_parts(is_tied: bool, tmp_path: Path) -> None:
    model, other = model_of(1, is_tied), model_of(2, is_tied)
    held = other.base.packed
    with Checkpointer(tmp_path, lossless(base_every=5)) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, model)
        checkpointer.load(other)
    assert torch.equal(other.base.packed, model.base.packed)
    assert torch.equal(other.base.scale, model.base.scale)
    assert other.base.packed is held, "filled where it lies"
    assert torch.equal(other.head, model.head)
    manifest, _ = read_manifest(tmp_path / step_name(2))
    assert manifest.tensors["model.base.packed"].dtype == "int8"
    assert len(manifest.aliases) == 2 * is_tied
    assert verify_folder(tmp_path, decode=True).findings == []


def test_optimizer_states_of_parts(tmp_path: Path) -> None:
    """As 8-bit AdamW keeps them."""

    def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(30, 20)
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            values = torch.randn((parameter.shape[0], 4), generator=generator)
            optimizer.state[parameter]["momentum_buffer"] = Quantised.of(values)
        return model, optimizer

    (model, optimizer), (other, its_optimizer) = made(1), made(2)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, model, optimizer)
        checkpointer.load(other, its_optimizer)
    states = zip(optimizer.state.values(), its_optimizer.state.values(), strict=True)
    for old, new in states:
        assert torch.equal(old["momentum_buffer"].packed, new["momentum_buffer"].packed)


def test_a_base_that_is_not_quantised_here_is_refused_by_name(tmp_path: Path) -> None:
    plain = model_of(1)
    plain.base = nn.Parameter(torch.zeros(40, 30))
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, model_of(1))
        with pytest.raises(LayoutMismatchError, match=r"model.base: not in the checkpoint"):
            checkpointer.load(plain)


def test_elsewhere_it_is_refused_by_name(tmp_path: Path) -> None:
    value = Quantised.of(torch.ones(3, 3))
    with (
        Checkpointer(tmp_path, lossless()) as checkpointer,
        pytest.raises(
            TypeError, match=r"extra.base: is a Quantised, which is made of other tensors"
        ),
    ):
        checkpointer.save(1, nn.Linear(2, 2), extra={"base": value})


def test_adapters_alone(tmp_path: Path) -> None:
    """A state and nothing else: the model that it belongs to is not saved."""

    class Adapters:
        def __init__(self, value: float) -> None:
            self.state = {"lora_A": torch.full((4, 300), value)}

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.state

        def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
            self.state = state_dict

    other = Adapters(2)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        pending = checkpointer.save(1, nn.Module(), stateful={"adapter": Adapters(1)})
        checkpointer.load(nn.Module(), stateful={"adapter": other})
    assert other.state["lora_A"].unique().tolist() == [1]
    assert pending.raw_bytes < 50_000, "the adapters and the random states"
