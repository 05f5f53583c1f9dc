"""A torch model and its optimizer as a checkpoint sees them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from effx_dist.checkpoint.state.live import LiveState, OptimizerState, StateByName
from effx_dist.checkpoint.state.matching import listed
from effx_dist.checkpoint.state.names import tied_names, torch_name
from effx_dist.errors import ConfigError, LayoutMismatchError


def live_state(
    model: nn.Module | LiveState, optimizer: torch.optim.Optimizer | None = None
) -> LiveState:
    """What callers hand over, as one thing. Raises ConfigError for an optimizer beside a LiveState."""
    if not isinstance(model, LiveState):
        return TorchState(model, optimizer)
    if optimizer is not None:
        raise ConfigError(
            f"optimizer={type(optimizer).__name__}: a {type(model).__name__} holds its own; leave it out"
        )
    return model


class TorchState(LiveState):
    """A plain, DDP or FSDP model and a torch optimizer, as torch.distributed.checkpoint names them."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self._model = model
        self._optimizer = optimizer
        self.has_optimizer = optimizer is not None

    @property
    def is_replicated(self) -> bool:
        """So it is under DDP over all ranks, with an optimizer that keeps its whole state everywhere."""
        model = getattr(self._model, "_orig_mod", self._model)  # torch.compile's wrapper
        # not imported to be asked for: that compiles TorchScript
        kinds = {kind.__name__ for kind in type(self._optimizer).__mro__}
        return (
            isinstance(model, DistributedDataParallel)
            and "ZeroRedundancyOptimizer" not in kinds
            and model.process_group.size() == dist.get_world_size()
            and not any(isinstance(p, DTensor) for p in model.parameters())
        )

    @property
    def _required_optimizer(self) -> torch.optim.Optimizer:
        assert self._optimizer is not None, "has_optimizer"
        return self._optimizer

    def model_state(self) -> dict[str, Any]:
        if not self._model.state_dict().keys():  # which torch takes for a mistake
            return {}
        try:
            return cast(dict[str, Any], get_model_state_dict(self._model))
        except (AttributeError, AssertionError) as error:
            raise ConfigError(
                f"torch's get_model_state_dict cannot name the tensors of this {type(self._model).__name__}: {error}. "
                "Call no child as torch's own wrappers call theirs (_checkpoint_wrapped_module)"
            ) from error

    def tied_names(self) -> dict[str, str]:
        return tied_names(self._model)

    def take_model_values(self, values: Mapping[str, Any]) -> None:
        set_model_state_dict(self._model, dict(values), options=StateDictOptions(strict=False))

    def optimizer_state(self) -> OptimizerState:
        optimizer = self._required_optimizer
        _check_saveable(self._model, optimizer)
        options = group_options(optimizer.param_groups)
        if optimizer.state:
            full = get_optimizer_state_dict(self._model, optimizer)
            groups = cast(list[dict[str, Any]], full["param_groups"])
            parameters = [list(group["params"]) for group in groups]
            return OptimizerState(cast(StateByName, full["state"]), parameters, options)
        names = {id(p): torch_name(self._model, raw) for raw, p in self._model.named_parameters()}
        parameters = [
            [names[id(p)] for p in group["params"] if id(p) in names]
            for group in optimizer.param_groups
        ]
        return OptimizerState({}, parameters, options)

    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        """torch makes an empty state, by a step of zero gradients at learning rate zero, only where
        there are no gradients."""
        optimizer = self._required_optimizer
        _check_saveable(self._model, optimizer)
        is_fresh = not optimizer.state
        with _gradients_set_aside(optimizer) if is_fresh else nullcontext():
            state = get_optimizer_state_dict(self._model, optimizer)["state"]
        return cast(StateByName, state), is_fresh

    def take_optimizer_state(self, state: StateByName) -> None:
        optimizer = self._required_optimizer
        if not state:
            optimizer.state.clear()
            return
        groups = get_optimizer_state_dict(self._model, optimizer)["param_groups"]
        full: dict[str, Any] = {"state": state, "param_groups": groups}
        # a parameter that has had no gradient yet has no state
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(self._model, optimizer, full, options=options)

    @property
    def num_groups(self) -> int:
        return len(self._required_optimizer.param_groups)

    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        take_group_options(self._required_optimizer.param_groups, options)


def _check_saveable(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise ConfigError for an optimizer whose state cannot be named by the model's parameters."""
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS keeps one state for all parameters together, which no layout but its own can take; "
            'save it as it is: stateful={"optimizer": optimizer}, without optimizer='
        )
    known = {id(parameter) for parameter in model.parameters()}
    outside = [
        f"parameter {index} of group {number}, shape {tuple(parameter.shape)}"
        for number, group in enumerate(optimizer.param_groups)
        for index, parameter in enumerate(group["params"])
        if id(parameter) not in known
    ]
    if outside:
        raise ConfigError(
            f"the optimizer holds {len(outside)} parameters that are not the model's, so that their state has no "
            f"name ({listed(outside)}); hand over a module that holds them all, or save an optimizer of "
            "their own as stateful"
        )


@contextmanager
def _gradients_set_aside(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


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
