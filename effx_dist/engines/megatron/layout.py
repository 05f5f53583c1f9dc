"""A Megatron job as a whole: its optimizers, what each rank holds, and what others hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.engines.megatron.fragments import (
    MainParam,
    Placement,
    check_placed,
    inner_optimizers,
    main_params,
    placements,
)
from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Group, as_group


class Member(NamedTuple):
    """A tensor of the model as its first holder tells of it."""

    name: str
    facts: TensorFacts
    group_index: int
    """In the parameter groups of all optimizers, one behind the other; -1 where none steps it."""
    is_padded: bool


@dataclass(frozen=True)
class Layout:
    """What :func:`survey` has found.

    Attributes:
        model_chunks: as given.
        optimizers: the Megatron optimizers that step something on this rank.
        params: their parameters, optimizer by optimizer.
        placed: all of the model's state on this rank.
        group: all ranks.
        members: the state of them all, each tensor once, in an order that they share.
    """

    model_chunks: Sequence[Any]
    optimizers: Sequence[Any]
    params: Sequence[Sequence[MainParam]]
    placed: Sequence[Placement]
    group: Group
    members: Sequence[Member] = ()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of all inner optimizers, one behind the other."""
        return [g for optimizer in self.optimizers for g in optimizer.optimizer.param_groups]

    @cached_property
    def gathering_chunks(self) -> list[Any]:
        """The DistributedDataParallel modules that gather parameters which an optimizer has cut: the
        optimizers' own, since a caller may have given what they wrap."""
        chunks = [
            chunk
            for optimizer in self.optimizers
            if isinstance(optimizer, DistributedOptimizer)
            for chunk in optimizer.model_chunks
        ]
        return list({id(chunk): chunk for chunk in chunks}.values())

    @cached_property
    def by_param(self) -> dict[int, tuple[Any, MainParam]]:
        """Optimizer and main parameter by the id of the model's own."""
        return {
            id(param.placement.tensor): (optimizer, param)
            for optimizer, params in zip(self.optimizers, self.params, strict=True)
            for param in params
        }

    @cached_property
    def padded(self) -> set[str]:
        """Names of tensors whose number of rows depends on the layout."""
        return {member.name for member in self.members if member.is_padded}

    @cached_property
    def group_parameters(self) -> list[list[str]]:
        """Names of each parameter group's parameters, of all ranks."""
        found: list[list[str]] = [[] for _ in self.param_groups]
        for member in self.members:
            if member.group_index >= 0:
                found[member.group_index].append(member.name)
        return found


def survey(optimizer: Any, model_chunks: Sequence[Any]) -> Layout:
    """Find out who holds what. ``optimizer`` may be None: nothing is trained. Collective over all ranks.

    Raises LayoutMismatchError, on all ranks, for a model whose parts cannot be told, and where the parts
    on all ranks do not make up the whole.
    """
    group = as_group(None)
    optimizers = [] if optimizer is None else inner_optimizers(optimizer)
    placed = group.everywhere(lambda: placements(model_chunks), keep_own_error=True)
    group.everywhere(lambda: check_placed(optimizers, placed), keep_own_error=True)
    params = [main_params(found, placed) for found in optimizers]
    layout = Layout(model_chunks, optimizers, params, placed, group)
    told = [member for row in group.all_gather_object(_own_members(layout)) for member in row]
    members = sorted(set(told), key=str)
    names = [member.name for member in members]
    for first, second in pairwise(members):
        if first.name == second.name:
            raise LayoutMismatchError(
                f"{first.name}: is {first.facts} in group {first.group_index} on one rank and {second.facts} in "
                f"group {second.group_index} on another; one name must mean one tensor"
            )
    lost = sorted({placement.name for placement in placed} - set(names))
    group.everywhere(lambda: _refuse_lost(lost))
    return replace(layout, members=members)


def _refuse_lost(lost: Sequence[str]) -> None:
    if lost:
        raise LayoutMismatchError(
            f"{', '.join(lost[:4])}: no rank is the first holder of it by its replica_id, so that no rank "
            "would save it"
        )


def _own_members(layout: Layout) -> list[Member]:
    """Those that this rank is the one to tell of."""
    found = []
    sizes = [len(optimizer.optimizer.param_groups) for optimizer in layout.optimizers]
    offset_of = dict(zip(map(id, layout.optimizers), accumulate(sizes, initial=0), strict=False))
    for placement in layout.placed:
        known = layout.by_param.get(id(placement.tensor))
        if known is None:
            if placement.is_main and placement.is_first:
                facts = TensorFacts(placement.tensor.dtype, placement.shape)
                found.append(Member(placement.name, facts, -1, placement.is_padded))
            continue
        optimizer, param = known
        if param.main is not None and placement.is_main and _begins_whole(param):
            facts = TensorFacts(param.main.dtype, placement.shape)
            group_index = offset_of[id(optimizer)] + param.group_index
            found.append(Member(placement.name, facts, group_index, placement.is_padded))
    return found


def _begins_whole(param: MainParam) -> bool:
    """Whether this rank holds the first element of the whole."""
    return any(not any(piece.box.offsets) for piece in param.pieces)
