"""FSDP1 (``torch.distributed.fsdp.FullyShardedDataParallel``): which elements of which parameters its
flat tensors hold.

FSDP1 lays the parameters of a unit one behind the other and cuts the row into ranges of equal length,
without regard to where a parameter begins. An optimizer gets the range (``use_orig_params=False``) or
a 1-D view of it per parameter (``use_orig_params=True``), and neither tells what it is a piece of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.distributed.fsdp._flat_param import FlatParamHandle

from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import (
    Group,
    Held,
    ShardMap,
    TorchGroup,
    WholeTensor,
    pieces_of_flat_range,
    pieces_of_tensor,
)


def shard_map(model: nn.Module) -> Callable[[Sequence[torch.Tensor]], ShardMap]:
    """What tells an optimizer where the parameters of ``model`` lie::

        opt = CautiousAdamW(model.parameters(), shard_map=fsdp1.shard_map(model))

    ``model`` is, or has in it, FullyShardedDataParallel units of any sharding strategy, wrapped before
    the optimizer is made. Under HYBRID_SHARD a parameter is spread over its shard group, and under
    NO_SHARD it is whole on each rank. Wholes are named as in the unwrapped model. The shape of one that
    is not contiguous is its number of elements: FSDP flattens it in the order in which it lies in memory.
    Parameters that no unit holds (ignored modules) are DTensors or whole on this rank.

    The returned function takes any of the parameters in any order, the same on every rank, and is
    called while they are sharded, as they are between a backward pass and the next forward. It raises
    LayoutMismatchError, naming the parameter, where FSDP holds it whole at the time, where a unit
    outside of ``model`` holds it, or where it is a tensor-parallel piece, of which FSDP does not tell
    the whole. No communication is performed.
    """

    def draw(params: Sequence[torch.Tensor]) -> ShardMap:
        flattened = dict(_flattened(model))
        names: dict[torch.Tensor, str] = {
            param: clean_tensor_name(name) for name, param in model.named_parameters()
        }
        held = [
            flattened[param]
            if param in flattened
            else _outside(names.get(param, f"parameter {index}"), param)
            for index, param in enumerate(params)
        ]
        return ShardMap(
            [whole for local in held for whole, _ in local],
            [tuple(piece for _, pieces in local for piece in pieces) for local in held],
        )

    return draw


def _flattened(model: nn.Module) -> Iterator[tuple[torch.Tensor, list[Held]]]:
    """What each parameter that a unit of ``model`` gives to optimizers holds."""
    for prefix, module in model.named_modules():
        handle = module._handle if isinstance(module, FullyShardedDataParallel) else None
        if handle is None:
            continue
        held = list(_held(prefix, handle))
        flat_param = handle.flat_param
        if flat_param._params is None:
            _check_is_sharded(held, flat_param.numel(), flat_param._sharded_size.numel())
            yield flat_param, held
            continue
        for param, one in zip(flat_param._params, held, strict=True):
            numel_here = sum(piece.numel for piece in one[1])
            _check_is_sharded([one], param.numel(), numel_here)
            yield param, [one]


def _held(prefix: str, handle: FlatParamHandle) -> Iterator[Held]:
    """For each original parameter of a unit, where it lies in the local tensor, if anywhere."""
    flat_param = handle.flat_param
    is_flat = handle.uses_sharded_strategy or flat_param._params is None
    groups: tuple[Group, ...] = ()
    if handle.uses_sharded_strategy:
        groups = (TorchGroup(handle.process_group),)
    for fqn, shape, numel, is_contiguous, extension, here in zip(
        flat_param._fqns,
        flat_param._shapes,
        flat_param._numels,
        flat_param._contiguities,
        flat_param._param_extensions,
        flat_param._shard_param_infos,
        strict=True,
    ):
        name = clean_tensor_name(f"{prefix}.{fqn}" if prefix else fqn)
        if extension is not None:
            raise LayoutMismatchError(
                f"{name}: FullyShardedDataParallel flattens a tensor-parallel part of it, so that the "
                "mean over the whole cannot be told; use fully_shard with tensor parallelism"
            )
        lies_in_rows = is_contiguous or not is_flat
        whole = WholeTensor(name, tuple(shape) if lies_in_rows else (numel,), groups)
        if not here.in_shard:
            yield whole, ()
            continue
        start, stop = here.intra_param_start_idx, here.intra_param_end_idx + 1
        local_start = here.offset_in_shard if flat_param._params is None else 0
        yield whole, pieces_of_flat_range(whole, start, stop, local_start)


def _check_is_sharded(held: list[Held], numel: int, sharded_numel: int) -> None:
    if numel != sharded_numel:
        raise LayoutMismatchError(
            f"{', '.join(whole.name for whole, _ in held)}: FullyShardedDataParallel has {numel} "
            f"elements of it on this rank at the moment, {sharded_numel} once it is sharded; step after "
            "a backward pass and outside of summon_full_params"
        )


def _outside(name: str, param: torch.Tensor) -> list[Held]:
    if hasattr(param, "_fsdp_flattened"):
        flattens = ", ".join(getattr(param, "_fqns", ())) or "a piece of a parameter"
        raise LayoutMismatchError(
            f"{name} ({flattens}): a FullyShardedDataParallel unit holds it that is not in the model "
            "of this shard map; call fsdp1.shard_map with the model whose parameters are optimized"
        )
    return [pieces_of_tensor(name, param)]
