"""Helpers of the test_optim files: a small model trained on ranks, its twin in one process, and
what a step sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from effx_dist.optim import CautiousAdamW, CautiousLion
from effx_dist.optim.base import CautiousOptimizer


def small_model(width: int = 5) -> nn.Sequential:
    """The same values wherever it is made."""
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


class GivenGrads(nn.Module):
    """Parameters whose gradients are what forward is given, and modules of the same kind."""

    def __init__(self, params: Mapping[str, nn.Parameter], inner: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        for name, param in params.items():
            self.register_parameter(name, param)
        self.names = tuple(params)
        self.inner = nn.ModuleList(inner)

    def forward(self, grads: Mapping[str, torch.Tensor]) -> torch.Tensor:
        terms = [(getattr(self, n) * grads[n]).sum().double() for n in self.names if n in grads]
        return sum([*terms, *(module(grads) for module in self.inner)], torch.zeros(()).double())


def backward(model: nn.Module, step: int, ranks_per_sample: int = 1) -> None:
    """A backward pass on data of this rank's own, or of its tensor-parallel peers' and its own."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank() // ranks_per_sample)
    inputs = torch.randn(4, 6, generator=generator).to(next(model.parameters()).dtype)
    model(inputs).square().sum().backward()


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    """A copy of a tensor or of the whole of a DTensor, on every rank."""
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def whole_grads_to(twin: nn.Module, model: nn.Module) -> None:
    """Give an unsharded model the gradients of a sharded one."""
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = None if param.grad is None else whole(param.grad)


def assert_same_params(found: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, also where ``found`` is sharded."""
    for param, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(whole(param), other)


def check_training(
    shard: Callable[[nn.Module], nn.Module], width: int = 5, ranks_per_sample: int = 1
) -> None:
    """Real backward passes; the engine's averaged gradients are also fed to one process."""
    for optimizer in (CautiousAdamW, CautiousLion):
        model, twin = shard(small_model(width)), small_model(width)
        opt, reference = (
            optimizer(model.parameters(), lr=0.02),
            optimizer(twin.parameters(), lr=0.02),
        )
        for step in range(3):
            opt.zero_grad()
            backward(model, step, ranks_per_sample)
            whole_grads_to(twin, model)
            opt.step()
            reference.step()
        assert opt.alignment == reference.alignment
        assert_same_params(model, twin)


class Traffic(TorchDispatchMode):
    """Notes the bytes of each collective that is started in it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func.namespace in ("c10d", "_c10d_functional"):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            num_bytes = sum(t.numel() * t.element_size() for t in tensors)
            self.sent.append((func.__name__.split(".")[0].strip("_"), num_bytes))
        return func(*args, **(kwargs or {}))


def traffic_of_steps(model: nn.Module, opt: CautiousOptimizer) -> list[tuple[str, int]]:
    """What the second step sends; the first makes groups and states."""
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    opt.step()
    with Traffic() as traffic:
        opt.step()
    return sorted(traffic.sent)
