"""What an optimizer's groups hold."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from effx_dist.errors import LayoutMismatchError

_NO_OPTIONS = frozenset({"params", "param_names"})


def group_options(param_groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What an optimizer's groups hold besides their parameters."""
    return [
        {key: value for key, value in group.items() if key not in _NO_OPTIONS}
        for group in param_groups
    ]


def take_group_options(param_groups: list[dict[str, Any]], options: list[dict[str, Any]]) -> None:
    """The way back. Raises LayoutMismatchError for another number of parameter groups."""
    if len(options) != len(param_groups):
        raise LayoutMismatchError(
            f"the checkpoint has {len(options)} parameter groups, the optimizer has "
            f"{len(param_groups)}; build it with the same groups"
        )
    for group, saved in zip(param_groups, options, strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value


def make_empty_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer make the state of the parameters in its groups, by a step that changes none of
    them; then all of it is zero. Collective where its step is."""
    groups = optimizer.param_groups
    params = [param for group in groups for param in group["params"]]
    rates = [group["lr"] for group in groups]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # engines step views, which are no leaves
        grads = [param.grad for param in params]
    try:
        for param in params:
            param.grad = torch.zeros_like(param)
        for group in groups:
            group["lr"] = group["lr"] * 0
        optimizer.step()
    finally:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
    for state in (optimizer.state.get(param, {}) for param in params):
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, int | float) and not isinstance(value, bool):
                state[key] = type(value)(0)
