"""A wrapped optimizer's own step, and what it must not do there for a mask from outside to be right."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from effx_dist.errors import ConfigError
from effx_dist.shard import local_of

logger = logging.getLogger(__name__)

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CLOSE = 1e-3
"""A fraction of the distance that a parameter has moved. A copy that ends nearer than this to the parameter
follows it."""

_STAYS = 0.75
"""The fraction of the distance between two stand-ins that remains if the optimizer steps the parameter itself; decay
takes some of it.
One that interpolates between the parameter and weights of its own (schedule-free) takes half of it at first."""

_COLLECTIVES = ("c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd")

Mark = tuple[int, int, int | None]


class Moved(NamedTuple):
    """One parameter that the inner step moves."""

    param: torch.Tensor
    local: torch.Tensor
    before: torch.Tensor


class InnerStep:
    """Lets the inner optimizer step, and looks at what it does.

    Versions of the gradients are compared at every step. Not every change counts one (``.data``, foreach
    operations on DTensors), so the bits of the gradients are summed as well, and the inner state looked
    through for weights of its own, at the steps whose number is a power of two.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._num_steps = 0
        self._followers: set[int] = set()

    @property
    def _name(self) -> str:
        return type(self._optimizer).__name__

    def take(self, moves: Sequence[Moved]) -> None:
        """Step. No communication but the inner optimizer's own is performed.

        Raises ConfigError where the inner optimizer has changed a gradient, steps from weights of its
        own, or fails on DTensors.
        """
        self._num_steps += 1
        is_look = self._num_steps & (self._num_steps - 1) == 0
        marks = [_mark(move.param, is_look) for move in moves]
        try:
            self._optimizer.step()
        except Exception as error:
            self._explain(moves, error)
            raise
        for move, mark in zip(moves, marks, strict=True):
            if _mark(move.param, is_look) != mark:
                raise ConfigError(
                    f"optimizer={self._name}: must leave .grad as it is, to be compared with the update; it has "
                    "changed a gradient in place (schedule-free optimizers and some Muons do); let it work on "
                    "a copy"
                )
        if is_look:
            self._refuse_own_weights(moves)

    def _explain(self, moves: Sequence[Moved], error: Exception) -> None:
        is_sharded = any(isinstance(move.param, DTensor) for move in moves)
        if not is_sharded or isinstance(error, torch.OutOfMemoryError | ConfigError):
            return
        raise ConfigError(
            f"optimizer={self._name}: its own step fails on DTensors, as FSDP2 and tensor parallelism make "
            f"them: {type(error).__name__}: {error}. That is this optimizer's limit and not the mask's: it "
            "fails in the same way without effx_dist.cautious. Use one that steps DTensors, or replicate "
            "its parameters (DDP)"
        ) from error

    def _refuse_own_weights(self, moves: Sequence[Moved]) -> None:
        """A master copy or a second sequence of weights, from which the next step starts, does not know
        of the mask."""
        followers = set()
        for index, move in enumerate(moves):
            kept = self._optimizer.state.get(move.param, {})
            found = {key: v for key, v in kept.items() if isinstance(v, torch.Tensor)}
            followed = [key for key, tensor in found.items() if _follows(local_of(tensor), move)]
            if followed and _ignores_parameter(self._optimizer, move):
                self._refuse(f"state {followed[0]!r}")
            for where, tensor in self._listed(index, move.param, len(moves)):
                if not _follows(local_of(tensor), move):
                    continue
                # in the parameter's own dtype it may be a coincidence at one step: an average begins there
                if tensor.dtype != move.param.dtype or id(move.param) in self._followers:
                    self._refuse(where)
                followers.add(id(move.param))
        self._followers = followers

    def _refuse(self, where: str) -> None:
        raise ConfigError(
            f"optimizer={self._name}: keeps weights of its own ({where}) and steps from them, so that the "
            "next step would undo the mask; let it step the parameters themselves (float32, without "
            "master weights), or make the optimizer inside it cautious"
        )

    def _listed(
        self, index: int, param: torch.Tensor, num_params: int
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors for a parameter in lists of as many tensors as there are parameters."""
        for key, value in vars(self._optimizer).items():
            for found in _lists_in(value):
                if len(found) == num_params and found[index] is not param:
                    yield f"attribute {key!r}", found[index]


def _ignores_parameter(optimizer: Optimizer, move: Moved) -> bool:
    """Whether another step brings a parameter that was moved far away back to one that was not.

    Two stand-ins have copies of the local parameter, one of them moved, and of its gradient and state; the
    optimizer itself is left as it is. Where it cannot step local tensors alone, or without the other
    ranks, that cannot be told, and is taken for no. No communication is performed.
    """
    away = move.local.double().abs().max() + 1
    here = move.local.detach().clone().requires_grad_()
    there = (move.local.double() + away).to(move.local.dtype).requires_grad_()
    state: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    for stand_in in (here, there):
        if move.param.grad is not None:
            stand_in.grad = local_of(move.param.grad).detach().clone()
        for key, value in optimizer.state[move.param].items():
            is_tensor = isinstance(value, torch.Tensor)
            copied = local_of(value).detach().clone() if is_tensor else deepcopy(value)
            state[stand_in][key] = copied
    group = next(g for g in optimizer.param_groups if any(p is move.param for p in g["params"]))
    probe = object.__new__(type(optimizer))
    probe.__dict__.update(optimizer.__dict__)
    probe.state, probe.param_groups = state, [{**group, "params": [here, there]}]
    probe._optimizer_step_pre_hooks, probe._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
    try:
        with _Alone():  # type: ignore[no-untyped-call]
            probe.step()
    except Exception:
        logger.warning(
            "optimizer=%s: keeps a copy of a parameter; if its steps start from that, the mask is undone, which "
            "could not be told",
            type(optimizer).__name__,
        )
        return False
    apart = (there.detach().double() - here.detach().double()).abs().min()
    return bool(apart < _STAYS * away)


class _Alone(TorchDispatchMode):
    """Lets no collective be called: a rank tries its optimizer out alone, and would wait for the others."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in _COLLECTIVES:
            raise RuntimeError(f"{func} among ranks of which one is here")
        return func(*args, **(kwargs or {}))


def _lists_in(value: Any, depth: int = 2) -> Iterator[list[torch.Tensor]]:
    """Lists of tensors in an attribute, a little way down."""
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, torch.Tensor) for item in value):
            yield list(value)
        elif depth:
            for item in value:
                yield from _lists_in(item, depth - 1)
    elif isinstance(value, Mapping) and depth and not isinstance(value, torch.nn.Module):
        for key, item in value.items():
            if key != "params":
                yield from _lists_in(item, depth - 1)


def _follows(kept: torch.Tensor, move: Moved) -> bool:
    """Whether a tensor is where the parameter has arrived, rather than where it was."""
    local = move.local
    if kept.shape != local.shape or not kept.dtype.is_floating_point or not local.numel():
        return False
    here = local.double()
    moved = (here - move.before.double()).abs().max()
    there = kept.to(local.dtype).double()  # rounded as a master is
    return bool(moved > 0) and bool((there - here).abs().max() <= _CLOSE * moved)


def _mark(param: torch.Tensor, with_bits: bool) -> Mark:
    """What changes with a parameter's gradient: versions of it and of its local tensor, and its bits."""
    grad = param.grad
    if grad is None:
        return -1, -1, None
    local = local_of(grad)
    if not with_bits:
        return grad._version, local._version, None
    bits = local.detach().view(_BITS[local.element_size()])
    return grad._version, local._version, int(bits.sum(dtype=torch.int64))
