"""A Megatron job as a whole: its optimizers, what each rank holds, and what others hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.engines.megatron.local_tensors import (
    LocalTensor,
    MainParam,
    check_local,
    find_local_tensors,
    inner_optimizers,
    main_params,
)
from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Group, as_group


class KnownTensor(NamedTuple):
    """A tensor of the model as its first holder tells of it."""

    name: str
    facts: TensorFacts
    group_index: int
    """Its group, counted over the parameter groups of all optimizers one after another; -1 where none steps it."""
    is_padded: bool


@dataclass(frozen=True)
class JobLayout:
    """What :func:`survey` has found.

    Attributes:
        model_chunks: as given.
        optimizers: the Megatron optimizers that step something on this rank.
        params: their parameters, optimizer by optimizer.
        local_tensors: all of the model's state on this rank.
        group: all ranks.
        known_tensors: the state of them all, each tensor once, in an order that they share.
    """

    model_chunks: Sequence[Any]
    optimizers: Sequence[Any]
    params: Sequence[Sequence[MainParam]]
    local_tensors: Sequence[LocalTensor]
    group: Group
    known_tensors: Sequence[KnownTensor] = ()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all inner optimizers, one after another."""
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
            id(param.local.tensor): (optimizer, param)
            for optimizer, params in zip(self.optimizers, self.params, strict=True)
            for param in params
        }

    @cached_property
    def padded(self) -> set[str]:
        """Names of tensors whose number of rows depends on the layout."""
        return {tensor.name for tensor in self.known_tensors if tensor.is_padded}

    @cached_property
    def group_parameters(self) -> list[list[str]]:
        """Names of each parameter group's parameters, of all ranks."""
        found: list[list[str]] = [[] for _ in self.param_groups]
        for tensor in self.known_tensors:
            if tensor.group_index >= 0:
                found[tensor.group_index].append(tensor.name)
        return found


def survey(optimizer: Any, model_chunks: Sequence[Any]) -> JobLayout:
    """Find out who holds what. ``optimizer`` may be None: nothing is trained. Collective over all ranks.

    Raises LayoutMismatchError, on all ranks, for a model that does not tell what lies where, and where
    all ranks together do not make up the whole.
    """
    group = as_group(None)
    optimizers = [] if optimizer is None else inner_optimizers(optimizer)
    local_tensors = group.everywhere(lambda: find_local_tensors(model_chunks))
    group.everywhere(lambda: check_local(optimizers, local_tensors))
    params = [main_params(found, local_tensors) for found in optimizers]
    layout = JobLayout(model_chunks, optimizers, params, local_tensors, group)
    told = group.all_gather_object(_told_here(layout))
    known_tensors = sorted({tensor for row in told for tensor in row}, key=str)
    names = [tensor.name for tensor in known_tensors]
    for first, second in pairwise(known_tensors):
        if first.name == second.name:
            raise LayoutMismatchError(
                f"{first.name}: is {first.facts} in group {first.group_index} on one rank and {second.facts} in "
                f"group {second.group_index} on another; one name must mean one tensor"
            )
    lost = sorted({local.name for local in local_tensors} - set(names))
    group.everywhere(lambda: _refuse_lost(lost))
    return replace(layout, known_tensors=known_tensors)


def _refuse_lost(lost: Sequence[str]) -> None:
    if lost:
        raise LayoutMismatchError(
            f"{', '.join(lost[:4])}: no rank is the first holder of it by its replica_id, so that no rank "
            "would save it"
        )


def _told_here(layout: JobLayout) -> list[KnownTensor]:
    """The tensors that this rank tells the others of, because it is their first holder."""
    found = []
    sizes = [len(optimizer.optimizer.param_groups) for optimizer in layout.optimizers]
    offset_of = dict(zip(map(id, layout.optimizers), accumulate(sizes, initial=0), strict=False))
    for local in layout.local_tensors:
        known = layout.by_param.get(id(local.tensor))
        if known is None:
            if local.is_main and local.is_first:
                facts = TensorFacts(local.tensor.dtype, local.shape)
                found.append(KnownTensor(local.name, facts, -1, local.is_padded))
            continue
        optimizer, param = known
        if param.main is not None and local.is_main and _begins_whole(param):
            facts = TensorFacts(param.main.dtype, local.shape)
            group_index = offset_of[id(optimizer)] + param.group_index
            found.append(KnownTensor(local.name, facts, group_index, local.is_padded))
    return found


def _begins_whole(param: MainParam) -> bool:
    """Whether this rank holds the first element of the whole."""
    return any(not any(piece.box.offsets) for piece in param.pieces)
