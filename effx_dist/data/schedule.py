"""Learning rate by data progress: under pruning, epochs have different numbers of steps."""

from __future__ import annotations

import math
from typing import Any

import torch

from effx_dist.core.schedule import warmup_cosine
from effx_dist.errors import ConfigError, LayoutMismatchError


class ProgressLR:
    """Linear warm-up, then a half cosine down to ``min_ratio`` times each group's learning rate.

    Both are functions of the data consumed, in epochs, not of the step number, so that the rate reaches its end
    exactly when the data does. Call ``step(sampler.progress)`` after ``sampler.weigh`` and before the optimizer's step:
    the batch in flight then counts as consumed and the first step of a warm-up is not taken at rate 0.

    The base rate of a group is its ``"initial_lr"`` where it has one, else its ``"lr"``, as in torch.optim. Rates held
    as tensors are filled in place. No communication is performed.

    Args:
        optimizer: Anything with ``param_groups``.
        total_epochs: Length of the run in epochs, above 0.
        warmup_epochs: Length of the warm-up in epochs, at least 0 and below ``total_epochs``.
        min_ratio: The rate at the end over the base rate, in [0, 1].

    Raises:
        ConfigError: A value is out of its range.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total_epochs: float,
        warmup_epochs: float = 0.0,
        min_ratio: float = 0.1,
    ) -> None:
        if not 0 < total_epochs < math.inf:
            raise ConfigError(
                f"total_epochs={total_epochs}: must be a finite number of epochs above 0"
            )
        if not 0 <= warmup_epochs < total_epochs:
            raise ConfigError(
                f"warmup_epochs={warmup_epochs}: must be in [0, {total_epochs}), the length of the run in epochs"
            )
        if not 0 <= min_ratio <= 1:
            raise ConfigError(
                f"min_ratio={min_ratio}: must be in [0, 1]; use 1 for a constant rate"
            )
        self.optimizer = optimizer
        self.total_epochs = total_epochs
        self.warmup_epochs = warmup_epochs
        self.min_ratio = min_ratio
        self.base_lrs = [
            float(group.setdefault("initial_lr", float(group["lr"])))
            for group in optimizer.param_groups
        ]
        self.step(0.0)

    def step(self, progress: float) -> None:
        """Set every group's rate for ``progress``, the data consumed so far, in epochs.

        Raises:
            ConfigError: ``progress`` is negative or not a number.
        """
        if not progress >= 0:
            raise ConfigError(f"progress={progress}: must be at least 0; pass sampler.progress")
        self.progress = float(progress)
        factor = warmup_cosine(progress, self.total_epochs, self.warmup_epochs, self.min_ratio)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(base_lr * factor)
            else:
                group["lr"] = base_lr * factor

    def get_last_lr(self) -> list[float]:
        """The rate of each group as it stands."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The progress and the base rates, as JSON values."""
        return {"progress": self.progress, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the progress and the base rates, and set the groups' rates from them.

        Raises:
            LayoutMismatchError: The optimizer has another number of groups.
        """
        base_lrs = [float(lr) for lr in state["base_lrs"]]
        if len(base_lrs) != len(self.optimizer.param_groups):
            raise LayoutMismatchError(
                f"base_lrs of {len(base_lrs)} groups: the optimizer has {len(self.optimizer.param_groups)}"
            )
        self.base_lrs = base_lrs
        for group, base_lr in zip(self.optimizer.param_groups, base_lrs, strict=True):
            group["initial_lr"] = base_lr
        self.step(float(state["progress"]))
