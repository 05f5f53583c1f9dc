"""Helpers of the test_checkpoint files: a small training run in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effx_dist.checkpoint.storage.steps import committed_steps
from effx_dist.config import ExcpConfig

MakeOptimizer = Callable[..., torch.optim.Optimizer]
committed = committed_steps


def lossless(**settings: Any) -> ExcpConfig:
    """Exact checkpoints, saved inside the call."""
    defaults = {"profile": "lossless", "async_mode": "sync", "keep_latest_k": 0}
    return ExcpConfig.model_validate({**defaults, **settings})


def small_model() -> nn.Module:
    """Two linear layers and a normalisation with buffers."""
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 4, bias=False))


def two_groups(parameters: Any, lr: float = 1e-2) -> torch.optim.Optimizer:
    """AdamW with a group for the first parameter and one for the others."""
    first, *rest = parameters
    return torch.optim.AdamW([{"params": [first], "lr": lr}, {"params": rest, "betas": (0.5, 0.6)}])


class Run:
    """A model and its optimizer, fed with random gradients that depend on the step alone."""

    def __init__(
        self,
        make_model: Callable[[], nn.Module] = small_model,
        make_optimizer: MakeOptimizer = torch.optim.AdamW,
        seed: int = 0,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = make_model()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.optimizer = make_optimizer(self.model.parameters(), **options)

    def train(self, num_steps: int, seed: int = 0) -> None:
        """Take steps with the gradients of ``seed``, the first ones each time."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_steps):
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    grad = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = grad.to(parameter.dtype)
            self.optimizer.step()

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors of the model and the optimizer, by name."""
        found = {f"model.{n}": t.detach().clone() for n, t in self.model.state_dict().items()}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for parameter, entries in self.optimizer.state.items():
            for key, value in entries.items():
                tensor = torch.as_tensor(value).detach().clone()
                found[f"optimizer.{names[parameter]}.{key}"] = tensor
        return found
