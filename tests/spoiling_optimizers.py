"""Optimizers that do what a mask from outside cannot be right under, as some of other people's do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import Optimizer


class Plain(Optimizer):
    """Momentum, so that there is something to mask."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def direction(self, param: torch.Tensor) -> torch.Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        state["momentum"].mul_(0.9).add_(param.grad)  # type: ignore[arg-type]
        found: torch.Tensor = state["momentum"]
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update(param, group["lr"] * self.direction(param))

    def update(self, param: torch.Tensor, by: torch.Tensor) -> None:
        param.sub_(by)


class WritesGrad(Plain):
    """As schedule-free AdamW and some Muons: the gradient is overwritten by what is derived from it."""

    def __init__(self, params: Any, how: str = "in place") -> None:
        super().__init__(params)
        self.how = how

    def update(self, param: torch.Tensor, by: torch.Tensor) -> None:
        assert param.grad is not None
        if self.how == "in place":
            param.grad.mul_(2)
        elif self.how == "foreach":
            torch._foreach_mul_([param.grad], 2.0)
        elif self.how == "data":
            param.grad.data.mul_(2)
        else:
            param.grad = param.grad * 2
        super().update(param, by)


class Masters(Plain):
    """Weights of its own, from which it steps."""

    def __init__(
        self, params: Any, where: str = "state", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(params)
        self.where, self.dtype = where, dtype
        self.masters: list[torch.Tensor] = []
        if where == "attribute":
            own = (p for g in self.param_groups for p in g["params"])
            self.masters = [p.detach().clone().to(dtype) for p in own]

    def update(self, param: torch.Tensor, by: torch.Tensor) -> None:
        if self.where == "attribute":
            own = [p for g in self.param_groups for p in g["params"]]
            master = next(m for m, p in zip(self.masters, own, strict=True) if p is param)
        else:
            state = self.state[param]
            if "copy" not in state:
                state["copy"] = param.detach().clone().to(self.dtype)
            master = state["copy"]
        master.sub_(by.to(master.dtype))
        param.copy_(master)


class Interpolates(Plain):
    """As schedule-free SGD: the parameter is drawn towards a second sequence of weights, less with each step."""

    def update(self, param: torch.Tensor, by: torch.Tensor) -> None:
        state = self.state[param]
        if "z" not in state:
            state["z"], state["k"] = param.detach().clone(), 0
        state["k"] += 1
        state["z"].sub_(by)
        param.lerp_(state["z"], 1 / state["k"])


class Averages(Plain):
    """An average that begins at the parameter, and from which nothing is taken: allowed."""

    def update(self, param: torch.Tensor, by: torch.Tensor) -> None:
        super().update(param, by)
        state = self.state[param]
        if "ema" not in state:
            state["ema"] = param.detach().clone()
        state["ema"].lerp_(param, 0.5)


class AsksOthers(Averages):
    """Sums updates over the ranks in its step, as distributed Muons do, and averages on the last of them only."""

    def update(self, param: torch.Tensor, by: torch.Tensor) -> None:
        by = by.clone()
        dist.all_reduce(by)
        if dist.get_rank() == dist.get_world_size() - 1:
            super().update(param, by)
        else:
            Plain.update(self, param, by)


class FailsOnDTensors(Plain):
    """As torch's Muon and others: an operator that DTensor has not."""

    def update(self, param: torch.Tensor, by: torch.Tensor) -> None:
        raise NotImplementedError("Operator aten.special.default does not have a sharding strategy")
