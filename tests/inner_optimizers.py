"""Optimizers to be wrapped, each written as a user would: none knows of masks or of shards.

Each operation has two operands, so that an element does not depend on where its shard is cut.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer


class ElementwiseOptimizer(Optimizer):
    """Kernels over the parameters; a subclass says what happens to each."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert closure is None, "the wrapper has run it"
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    grad = -param.grad if group["maximize"] else param.grad
                    self._move(param, grad, group)
        return None

    @abstractmethod
    def _move(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None: ...

    def _moment(self, param: torch.Tensor, name: str) -> torch.Tensor:
        state = self.state[param]
        if name not in state:
            state[name] = torch.zeros_like(param)
        moment: torch.Tensor = state[name]
        return moment


class PlainLion(ElementwiseOptimizer):
    """Lion with decoupled weight decay, without a flag that says so."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": False}
        super().__init__(params, defaults)

    def _move(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        moment = self._moment(param, "exp_avg")
        param.mul_(1 - group["lr"] * group["weight_decay"])
        update = (moment * 0.95 + grad * (1 - 0.95)).sign()
        param.sub_(update * group["lr"])
        moment.copy_(moment * 0.98 + grad * (1 - 0.98))


class NormalisedMomentum(ElementwiseOptimizer):
    """Adam with the mean of |g| for the root of the mean of g^2, with L2 weight decay."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": False}
        super().__init__(params, defaults)

    def _move(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        mean, size = self._moment(param, "mean"), self._moment(param, "size")
        grad = grad + param * group["weight_decay"]
        mean.copy_(mean * 0.95 + grad * (1 - 0.95))
        size.copy_(size * 0.95 + grad.abs() * (1 - 0.95))
        param.sub_(mean / (size + 1e-6) * group["lr"])
