"""A model and its optimizer as a checkpoint sees them: what an engine with tensors of its own layout
implements to be saved and loaded."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    _get_fqns,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.checkpoint.state.matching import listed
from effx_dist.errors import ConfigError, LayoutMismatchError

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""What only a wrapper calls its child. DDP's ``module`` is not among them: users call theirs so too."""
_NO_OPTIONS = frozenset({"params", "param_names"})

StateByName = dict[str, dict[str, Any]]
"""An optimizer's state, tensors and other values, by parameter name and key."""


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as it stands.

    Attributes:
        by_name: its state; empty where it is fresh.
        group_parameters: names of each group's parameters, in its own order.
        group_options: lr, betas and the like of each group, as a scheduler may have left them.
    """

    by_name: StateByName = field(default_factory=dict)
    group_parameters: list[list[str]] = field(default_factory=list)
    group_options: list[dict[str, Any]] = field(default_factory=list)


class LiveState(ABC):
    """A model, and its optimizer if that is part of it.

    Tensors are given as leaves (:data:`effx_dist.checkpoint.state.tree.Leaf`) that share the live memory:
    a save copies from them, a load fills them in place. Every rank gives the same names, also those of
    tensors that it holds nothing of. No method communicates unless it says so.
    """

    has_optimizer: bool
    has_random_state: bool = True
    """Whether the random states of this process are part of it: not where the state is another's."""

    def fit(self, saved: Mapping[str, TensorFacts]) -> None:  # noqa: B027  most shapes are given
        """Told before a load what the checkpoint holds of the model, by name. Where shapes depend on
        the layout, or dtypes on how the model is used, what is given from then on may fit it."""

    @property
    def refitted(self) -> frozenset[str]:
        """Names in the model's state that :meth:`fit` has changed the shape of: what a load fills of them
        is nothing that a save of their own shape could be a difference against."""
        return frozenset()

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all of the state, whole and alike, so that each may save a share."""
        return False

    @abstractmethod
    def model_state(self) -> dict[str, Any]:
        """Parameters and buffers by name, and what else the model's state holds. A tied parameter's
        other names may be in it or not."""

    @abstractmethod
    def tied_names(self) -> dict[str, str]:
        """``{other name: first name}`` of parameters that the model holds under several names."""

    @abstractmethod
    def take_model_values(self, values: Mapping[str, Any]) -> None:
        """Hand over what of the model's state is no tensor."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The optimizer as it stands."""

    @abstractmethod
    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        """The optimizer's state to be filled, and whether it had to be made first, which is collective
        where the optimizer's step is."""

    @abstractmethod
    def take_optimizer_state(self, state: StateByName) -> None:
        """Hand over the state of :meth:`made_optimizer_state` once it is filled. Parameters that are
        not in it lose theirs."""

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """Number of the optimizer's parameter groups."""

    def fit_groups(
        self, options: list[dict[str, Any]], parameters: list[list[str]] | None
    ) -> list[dict[str, Any]]:
        """The saved options of each of the optimizer's own groups, given those of the saved groups and
        the names of their parameters (None where a checkpoint does not say). By number, unless the
        number of groups depends on the layout."""
        return options

    @abstractmethod
    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        """Hand over the groups' options. Raises LayoutMismatchError for another number of groups."""

    def random_states(self) -> dict[str, torch.Tensor]:
        """States of random generators of this rank that torch, NumPy and Python do not know of. Names
        have no dots."""
        return {}

    def take_random_states(self, states: Mapping[str, torch.Tensor]) -> None:  # noqa: B027
        """The way back; may hold states of others, and lack some."""

    def finish(self) -> None:  # noqa: B027  most hold nothing beside the tensors themselves
        """Called on every rank once all of a checkpoint has been taken. May communicate."""


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


def plain_name(raw: str) -> str:
    """A parameter's name, as a file holds it or below the module that an engine wraps, without the
    names by which wrappers that may lie in between call their child."""
    return ".".join(part for part in raw.split(".") if part not in _WRAPPERS)


def torch_name(model: nn.Module, raw: str) -> str:
    """A live parameter's name as torch's ``get_model_state_dict`` gives it: without the wrappers that
    are there, and with every child of that name that is not one's."""
    found = _get_fqns(model, raw)  # several only for flat parameters, which stand for several
    return next(iter(found)) if len(found) == 1 else plain_name(raw)


def tied_names(
    model: nn.Module, name_of: Callable[[nn.Module, str], str] = torch_name
) -> dict[str, str]:
    """``{other name: first name}`` of parameters that a model holds under several names.

    ``name_of``: from the model and a name of ``named_parameters`` to that of the checkpoint.
    """
    first: dict[int, str] = {}
    tied = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = name_of(model, raw)
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


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
