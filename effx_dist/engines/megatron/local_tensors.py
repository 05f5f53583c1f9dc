"""Megatron-core: which elements of which parameters lie where in the tensors that its optimizers step.

Tensor parallelism cuts a parameter into boxes, and the DistributedOptimizer cuts what a rank has of it
once more, as a flat range, over the data-parallel ranks. What the boxes are, Megatron's own
``sharded_state_dict`` says: fused QKV, gated FC1, vocabulary, pipeline stages and experts included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import (
    Box,
    Group,
    Piece,
    PlacedBox,
    ShardMap,
    TorchGroup,
    WholeTensor,
    pieces_of_boxes,
    whole_box,
)
from effx_dist.shard.group import group_of_ranks

_METADATA = {"non_homogeneous_layers": True}
"""Keys then hold the number that a layer has in the whole model, at every pipeline layout."""


@dataclass(frozen=True)
class LocalTensor:
    """A tensor of the model's state on this rank.

    Attributes:
        name: as in Megatron's checkpoints, with the layer's number in the whole model.
        shape: of the whole tensor.
        tensor: the local one: a parameter or a buffer.
        boxes: all of it, by boxes of the whole.
        is_main: whether this rank is the first of those that hold it for other reasons than data
            parallelism: duplicates over tensor-parallel ranks, tied embeddings of the last stage.
        is_first: whether it is the first of the data-parallel ranks that hold it.
        is_padded: whether the whole tensor's rows are padded, so that their number depends on the layout.
    """

    name: str
    shape: tuple[int, ...]
    tensor: torch.Tensor
    boxes: tuple[PlacedBox, ...]
    is_main: bool
    is_first: bool
    is_padded: bool

    @property
    def is_cut(self) -> bool:
        """Whether tensor-parallel ranks hold different boxes of it."""
        return self.tensor.numel() < whole_box(self.shape).numel


@dataclass(frozen=True)
class MainParam:
    """What an optimizer holds of one parameter.

    Attributes:
        local: the parameter.
        whole: the parameter as all ranks know it, spread over its data- and tensor-parallel ranks.
        main: what the inner optimizer steps, and the key of its state: float32; None where this rank has
            no part in it.
        group_index: the inner optimizer's group that ``main`` is in; -1 where there is none.
        pieces: what of the whole lies in ``main``.
    """

    local: LocalTensor
    whole: WholeTensor
    main: torch.Tensor | None
    group_index: int
    pieces: tuple[Piece, ...]


def find_local_tensors(model_chunks: Sequence[Any]) -> list[LocalTensor]:
    """Parameters and buffers of the model chunks on this rank. No communication is performed.

    Raises LayoutMismatchError for a tensor whose boxes are not contiguous here.
    """
    return [local for chunk in model_chunks for local in _of_module(unwrapped(chunk))]


def unwrapped(model_chunk: Any) -> Any:
    """The model behind DistributedDataParallel and Float16Module, which has Megatron's own names."""
    while hasattr(model_chunk, "module"):
        model_chunk = model_chunk.module
    return model_chunk


def inner_optimizers(optimizer: Any) -> list[Any]:
    """The Megatron optimizers behind a ChainedOptimizer that hold parameters on this rank."""
    is_chain = isinstance(optimizer, ChainedOptimizer)
    found_in = optimizer.chained_optimizers if is_chain else [optimizer]
    return [found for found in found_in if not getattr(found, "is_stub_optimizer", False)]


def check_local(optimizers: Sequence[Any], local_tensors: Sequence[LocalTensor]) -> None:
    """Raises LayoutMismatchError for a parameter of the optimizers that no model chunk has. No
    communication is performed."""
    known = {id(local.tensor) for local in local_tensors}
    for param, *_ in (owned for optimizer in optimizers for owned in _owned(optimizer)):
        if id(param) not in known:
            raise LayoutMismatchError(
                f"a parameter of shape {tuple(param.shape)} is optimized that no model chunk's "
                "sharded_state_dict() has; give attach all the chunks that the optimizer was made with"
            )


def main_params(optimizer: Any, local_tensors: Sequence[LocalTensor]) -> list[MainParam]:
    """Every parameter of one Megatron optimizer, in an order that its data-parallel ranks share, also
    those that this rank holds nothing of.

    Collective over the parameters' data- and tensor-parallel ranks, once for each kind of parameter.
    :func:`check_local` comes first.
    """
    by_id = {id(local.tensor): local for local in local_tensors}
    spread = _Spread(optimizer)
    found = []
    for param, main, group_index, (start, stop) in _owned(optimizer):
        local = by_id[id(param)]
        groups = spread.groups_of(param, local.is_cut)
        whole = WholeTensor(local.name, local.shape, groups)
        pieces = pieces_of_boxes(whole, local.boxes, start, stop) if main is not None else ()
        found.append(MainParam(local, whole, main, group_index, pieces))
    return found


def shard_map_source(params: Sequence[MainParam]) -> Callable[[Sequence[torch.Tensor]], ShardMap]:
    """What tells an optimizer which parameters lie in the tensors that it steps. The returned function
    raises LayoutMismatchError for a tensor that is none of them. No communication is performed."""
    pieces_of = {id(param.main): param.pieces for param in params if param.main is not None}

    def draw(tensors: Sequence[torch.Tensor]) -> ShardMap:
        unknown = [index for index, tensor in enumerate(tensors) if id(tensor) not in pieces_of]
        if unknown:
            raise LayoutMismatchError(
                f"parameter {unknown[0]} of the optimizer, of shape {tuple(tensors[unknown[0]].shape)}, was "
                "not there when effx_dist.megatron.attach was called; call it after get_megatron_optimizer"
            )
        return ShardMap([param.whole for param in params], [pieces_of[id(t)] for t in tensors])

    return draw


def _of_module(module: Any) -> Iterator[LocalTensor]:
    for local_name, entry in module.sharded_state_dict(metadata=dict(_METADATA)).items():
        if isinstance(entry, ShardedTensor | ShardedTensorFactory):
            yield _local_tensor(local_name, entry)


def _local_tensor(local_name: str, entry: Any) -> LocalTensor:
    """Describe one entry of a sharded state dict. How a factory cuts a tensor is found by letting it cut a
    meta tensor."""
    tensor = entry.data
    outline = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    cut = replace(entry, data=outline)
    shards = [cut] if isinstance(cut, ShardedTensor) else list(_leaves(cut.build()))
    names = {_name(local_name, shard) for shard in shards}
    shapes = {tuple(shard.global_shape[shard.prepend_axis_num :]) for shard in shards}
    boxes = tuple(
        PlacedBox(
            Box(tuple(shard.global_offset[shard.prepend_axis_num :]), tuple(shard.local_shape)),
            shard.data.storage_offset(),
        )
        for shard in shards
    )
    is_whole = sum(box.numel for box, _ in boxes) == tensor.numel()
    if len(names) != 1 or len(shapes) != 1 or not is_whole or not _all_contiguous(shards, tensor):
        raise LayoutMismatchError(
            f"{local_name}: Megatron's sharded_state_dict cuts it into {len(shards)} boxes of "
            f"{sorted(names)} that are no contiguous ranges of one tensor; such layers are not supported"
        )
    replica = shards[0].replica_id
    *others, data_rank = (replica,) if isinstance(replica, int) else replica
    return LocalTensor(
        names.pop(),
        shapes.pop(),
        tensor,
        boxes,
        is_main=not any(others),
        is_first=data_rank == 0,
        is_padded=any(shard.allow_shape_mismatch for shard in shards),
    )


def _leaves(built: Any) -> Iterator[ShardedTensor]:
    if isinstance(built, Mapping):
        built = list(built.values())
    if isinstance(built, list | tuple):
        for inner in built:
            yield from _leaves(inner)
    else:
        yield built


def _all_contiguous(shards: Sequence[ShardedTensor], tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and all(shard.data.is_contiguous() for shard in shards)


def _name(local_name: str, shard: ShardedTensor) -> str:
    """A name of its own for each tensor that Megatron stacks with others along axes put before its own,
    as it does with experts: with its place among them, where the local name has a local one."""
    places = [str(place) for place in shard.global_offset[: shard.prepend_axis_num]]
    if not places:
        return str(shard.key)
    components = local_name.split(".")
    numbers = [at for at, component in enumerate(components) if component.isdigit()]
    tail = "." + ".".join(components[numbers[-1] + 1 :]) if numbers else ""
    if len(places) == 1 and tail and shard.key.endswith(tail):
        return f"{shard.key.removesuffix(tail)}.{places[0]}{tail}"
    return ".".join([shard.key, *places])


def _owned(
    optimizer: Any,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, int, tuple[int, int]]]:
    """Model parameter, what is stepped of it here, its group, and which flat range of it that is."""
    mains = {
        id(param): (main, group_index)
        for group_index, pairs in enumerate(_pairs_by_group(optimizer))
        for param, main in pairs
    }
    if isinstance(optimizer, DistributedOptimizer):
        for buffer in optimizer.buffers:
            for param in buffer.params:
                main, group_index = mains.get(id(param), (None, -1))
                owned = (0, 0)
                if main is not None:
                    found = optimizer._get_model_param_range_map(param)["param"]
                    owned = (found.start, found.end)
                yield param, main, group_index, owned
        return
    for pairs in _pairs_by_group(optimizer):
        for param, main in pairs:
            yield param, main, mains[id(param)][1], (0, param.numel())


def _pairs_by_group(optimizer: Any) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Model parameters and what is stepped of them, for each group of the inner optimizer."""
    halves: tuple[tuple[Any, Any], ...]
    if isinstance(optimizer, DistributedOptimizer):
        halves = (
            (optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups),
            (optimizer.model_fp32_groups, optimizer.shard_fp32_groups),
        )
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        wide = optimizer.fp32_from_fp32_groups
        halves = ((optimizer.float16_groups, optimizer.fp32_from_float16_groups), (wide, wide))
    else:
        whole = [group["params"] for group in optimizer.optimizer.param_groups]
        halves = ((whole, whole),)
    return [
        [pair for params, mains in halves for pair in zip(params[index], mains[index], strict=True)]
        for index in range(len(halves[0][0]))
    ]


class _Spread:
    """The ranks that the parameters of one optimizer are spread over."""

    def __init__(self, optimizer: Any) -> None:
        is_cut_by_optimizer = isinstance(optimizer, DistributedOptimizer)
        self._data = optimizer.data_parallel_group if is_cut_by_optimizer else None
        self._dense_tensor: dist.ProcessGroup = optimizer.tp_group
        self._known: dict[tuple[bool, bool], tuple[Group, ...]] = {}

    def groups_of(self, param: torch.Tensor, is_cut: bool) -> tuple[Group, ...]:
        """One group at most. Collective when a kind of parameter is asked for first."""
        is_expert = not getattr(param, "allreduce", True)
        kind = (is_expert, is_cut)
        if kind not in self._known:
            self._known[kind] = self._groups(*kind)
        return self._known[kind]

    def _groups(self, is_expert: bool, is_cut: bool) -> tuple[Group, ...]:
        tensor = self._dense_tensor
        if is_expert:
            tensor = parallel_state.get_expert_tensor_parallel_group()
        data_size = 1 if self._data is None else dist.get_world_size(self._data)
        tensor_size = dist.get_world_size(tensor) if is_cut else 1
        if data_size > 1 and tensor_size > 1:
            rows: list[list[int]] = TorchGroup(tensor).all_gather_object(
                dist.get_process_group_ranks(self._data)
            )
            return (group_of_ranks([rank for row in rows for rank in row]),)
        if data_size > 1:
            return (TorchGroup(self._data),)
        return (TorchGroup(tensor),) if tensor_size > 1 else ()
