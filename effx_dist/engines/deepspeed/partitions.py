"""DeepSpeed: which elements of which parameters lie where in the tensors that its optimizers step.

ZeRO lays the parameters of a group one behind the other and cuts the row (stages 1 and 2), or cuts every
parameter and lays the pieces of a sub-group one behind the other (stage 3). Either way the base
optimizer gets flat tensors without names, with padding in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import (
    Group,
    Held,
    Piece,
    ShardMap,
    TorchGroup,
    WholeTensor,
    pieces_of_flat_range,
)


@dataclass(frozen=True)
class Partition:
    """One tensor that the base optimizer steps.

    Attributes:
        flat: the master weights: 1-D, float32 unless DeepSpeed is told to keep 16-bit masters; the key
            of the base optimizer's state. Without ZeRO it may be a parameter, in its own shape.
        group_index: its group in the base optimizer's ``param_groups``, which stage 3 keeps empty
            between steps.
        held: every parameter that is spread over this partition and those of the same place on the
            other ranks, in the same order on all of them, each with its pieces in ``flat``; this rank
            may hold nothing of one. Elements that no piece covers are padding.
    """

    flat: torch.Tensor
    group_index: int
    held: list[Held]

    @property
    def wholes(self) -> tuple[WholeTensor, ...]:
        """The whole parameters."""
        return tuple(whole for whole, _ in self.held)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of all wholes that lie in ``flat``."""
        return tuple(piece for _, of_whole in self.held for piece in of_whole)


def partitions(engine: Any) -> list[Partition]:
    """The partitions of a DeepSpeedEngine, in the same order on every rank; none where it has no
    optimizer. No communication is performed.

    Parameters are named as in ``engine.module.named_parameters()``: a tied one once, by its first name.
    Without ZeRO each parameter is a partition of its own (one per group where DeepSpeed flattens them,
    under its FP16_Optimizer), and is spread over no group.

    Raises:
        LayoutMismatchError: the optimizer holds a parameter that is not the model's.
    """
    return list(_partitions(engine))


def shard_map_source(engine: Any) -> Callable[[Sequence[torch.Tensor]], ShardMap]:
    """What tells an optimizer which parameters lie in the partitions that it is stepped with.

    The returned function takes the partitions of any groups or sub-groups, in any order, the same on
    every rank; it raises LayoutMismatchError for a tensor that is none. No communication is performed.
    """
    known: dict[int, Partition] = {}

    def draw(params: Sequence[torch.Tensor]) -> ShardMap:
        if not all(id(param) in known for param in params):
            known.update({id(found.flat): found for found in partitions(engine)})
        held = [_known(known, index, param) for index, param in enumerate(params)]
        return ShardMap(
            [whole for partition in held for whole in partition.wholes],
            [partition.pieces for partition in held],
        )

    return draw


def _known(known: dict[int, Partition], index: int, param: torch.Tensor) -> Partition:
    if id(param) not in known:
        raise LayoutMismatchError(
            f"parameter {index} of the optimizer, of shape {tuple(param.shape)}, is no partition of this "
            "DeepSpeed engine; step it through engine.step() alone, and make one engine per optimizer"
        )
    return known[id(param)]


def _partitions(engine: Any) -> Iterator[Partition]:
    optimizer = engine.optimizer
    name_of = _Names(engine)
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        yield from _of_sub_groups(optimizer, name_of)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        # Not their _hp_mapping, which DeepSpeed draws as if round_robin_gradients were off.
        flats, groups = (
            optimizer.single_partition_of_fp32_groups,
            optimizer.round_robin_bit16_groups,
        )
        yield from _of_cut_rows(
            optimizer, flats, groups, optimizer.round_robin_bit16_offsets, name_of
        )
    elif isinstance(optimizer, BF16_Optimizer):
        flats, groups = optimizer.fp32_groups_flat_partition, optimizer.bf16_groups
        offsets = [list(accumulate([p.numel() for p in params], initial=0)) for params in groups]
        yield from _of_cut_rows(optimizer, flats, groups, offsets, name_of)
    elif isinstance(optimizer, FP16_Optimizer):
        rows = zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True)
        for index, (flat, params) in enumerate(rows):
            yield Partition(flat, index, _one_behind_the_other(params, name_of))
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        groups = zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True)
        for index, (masters, params) in enumerate(groups):
            for master, param in zip(masters, params, strict=True):
                yield Partition(master, index, _one_behind_the_other([param], name_of))
    elif isinstance(optimizer, torch.optim.Optimizer):
        for index, group in enumerate(optimizer.param_groups):
            for param in group["params"]:
                if param.requires_grad:
                    yield Partition(param, index, _one_behind_the_other([param], name_of))


def _of_cut_rows(
    zero: Any,
    flats: Sequence[torch.Tensor],
    groups: Sequence[Sequence[torch.Tensor]],
    offsets: Sequence[Sequence[int]],
    name_of: _Names,
) -> Iterator[Partition]:
    """Stages 1 and 2, and BF16_Optimizer: rows of parameters, each ``offsets`` into its row, that are cut
    into one range per rank.
    """
    rows = zip(flats, groups, offsets, zero.real_dp_process_group, strict=True)
    for index, (flat, params, starts, process_group) in enumerate(rows):
        spread_over = _spread_over(process_group)
        here = flat.numel() * dist.get_rank(process_group)
        held: list[Held] = []
        for param, at in zip(params, starts, strict=False):
            whole = WholeTensor(name_of[param], tuple(param.shape), spread_over)
            start = min(max(here - at, 0), whole.numel)
            stop = min(max(here + flat.numel() - at, 0), whole.numel)
            local_start = at + start - here
            held.append((whole, pieces_of_flat_range(whole, start, stop, local_start)))
        yield Partition(flat, index, held)


def _of_sub_groups(zero: Any, name_of: _Names) -> Iterator[Partition]:
    """Stage 3: each rank has an equal range of every parameter, the last ones with padding at their end."""
    rows = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
    for sub_group, (flat, params) in enumerate(rows):
        held: list[Held] = []
        local_start = 0
        for param in params:
            held.append(partition_of_param(param, name_of[param], local_start))
            local_start += param.partition_numel()
        yield Partition(flat, zero.sub_group_to_group_id[sub_group], held)


def partition_of_param(param: Any, name: str, local_start: int = 0) -> Held:
    """A parameter that stage 3 has cut, and this rank's pieces of it, which lie from
    ``local_start`` on in some tensor. No communication is performed.
    """
    process_group = param.ds_process_group
    whole = WholeTensor(name, tuple(param.ds_shape), _spread_over(process_group))
    length = param.partition_numel()
    start = min(length * dist.get_rank(process_group), whole.numel)
    stop = min(start + length, whole.numel)
    return whole, pieces_of_flat_range(whole, start, stop, local_start)


def _one_behind_the_other(params: Sequence[torch.Tensor], name_of: _Names) -> list[Held]:
    """Whole parameters, without padding."""
    held: list[Held] = []
    local_start = 0
    for param in params:
        whole = WholeTensor(name_of[param], tuple(param.shape))
        held.append((whole, pieces_of_flat_range(whole, 0, whole.numel, local_start)))
        local_start += whole.numel
    return held


def _spread_over(process_group: dist.ProcessGroup) -> tuple[Group, ...]:
    group = TorchGroup(process_group)
    return (group,) if group.size > 1 else ()


class _Names:
    """Parameters' names, as the engine has them from the model that it was given."""

    def __init__(self, engine: Any) -> None:
        self._names: dict[torch.Tensor, str] = engine.param_names

    def __getitem__(self, param: torch.Tensor) -> str:
        if param not in self._names:
            shape = tuple(getattr(param, "ds_shape", param.shape))
            raise LayoutMismatchError(
                f"a parameter of shape {shape} is optimized that model.named_parameters() has not; "
                "give deepspeed.initialize a model that holds all of model_parameters"
            )
        return self._names[param]
