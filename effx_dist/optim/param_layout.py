"""Which elements of an optimizer's local tensors belong to which whole parameter."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from effx_dist.core.cautious import fraction_from_count
from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.shard import Group, Piece, ShardMap, local_of

ShardMapSource = ShardMap | Callable[[Sequence[torch.Tensor]], ShardMap]
"""A shard map of the parameters, or what draws one from them whenever their list changes."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""dtypes of parameters and gradients."""

_HIDDEN_CUTS = {
    "_fsdp_flattened": (
        "FullyShardedDataParallel",
        "give shard_map=effx_dist.engines.fsdp1.shard_map(model), or use fully_shard",
    ),
    "ds_id": (
        "DeepSpeed ZeRO-3",
        'let effx_dist.deepspeed.initialize make the engine, with a "cautious" section in its "effx" block',
    ),
}
"""Attributes by which engines mark the parameters that they cut, who does, and what to do."""


@dataclass(frozen=True, slots=True)
class FlatPiece:
    """A piece of a whole as elements ``[start, start + length)`` of a flat local tensor; all if ``start`` is None."""

    whole_index: int
    start: int | None = None
    length: int = 0

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """This piece of ``local``, sharing its memory."""
        if self.start is None:
            return local
        return local.view(-1).narrow(0, self.start, self.length)


class CountedPiece(NamedTuple):
    """A piece and where its count goes.

    ``is_whole``: it is all of its whole, which is spread over no ranks.
    """

    piece: FlatPiece
    slot: int
    bucket: int
    is_whole: bool


@dataclass(frozen=True, slots=True)
class Bucket:
    """Wholes that are spread over the same groups: slots ``[start, stop)`` of the counts.

    Slot ``stop`` is the bucket's too: there ranks tell each other of an overflow.
    """

    groups: tuple[Group, ...]
    start: int
    stop: int

    @property
    def num_ranks(self) -> int:
        """Ranks that each of its wholes is spread over."""
        return math.prod(group.size for group in self.groups)


class ParamLayout:
    """The pieces of a fixed list of parameters, and what the last step counted in them.

    Counts lie in slots, bucket by bucket, so that each bucket's are summed where they lie.

    Attributes:
        params: the parameters, in the order of the groups, each once.
        shard_map: the wholes behind them; one local tensor per parameter.
        labels: what a caller calls each whole: its name, or the index of its unnamed parameter.
        flat_pieces: for each parameter, its pieces. Elements in none of them are padding.
        of_tensors: whether each parameter is a whole tensor or a DTensor, so that every rank of its groups
            holds it, be it an empty one.
        buckets: the wholes by the groups they are spread over, in an order that all ranks share.
        slots: the slot of each whole.
        last_counts: int64 [num slots], agreeing elements of each whole at the last step.
        idle: indices of the wholes that had no gradient on this rank at the last step.
        late_marks: what an accelerator has yet to tell of missing gradients; see whole_counts.py.
    """

    def __init__(
        self,
        params: Sequence[torch.Tensor],
        shard_map: ShardMap,
        labels: Sequence[str | int],
        flat_pieces: Sequence[tuple[FlatPiece, ...]],
        of_tensors: bool = False,
    ) -> None:
        self.of_tensors = of_tensors
        self.params = tuple(params)
        self.shard_map = shard_map
        self.labels = tuple(labels)
        self.flat_pieces = tuple(flat_pieces)
        self.last_counts: torch.Tensor | None = None
        self.idle: frozenset[int] = frozenset()
        self.slots, self.buckets = _slots(shard_map)
        self.late_marks: deque[tuple[torch.Tensor, Any]] = deque()
        self._numels: dict[torch.device, torch.Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the counts are summed: the device of the first parameter."""
        return self.params[0].device if self.params else torch.device("cpu")

    @property
    def num_slots(self) -> int:
        """One per whole and one per bucket."""
        return len(self.slots) + len(self.buckets)

    @cached_property
    def bucket_of(self) -> list[int]:
        """Index of each whole's bucket."""
        starts = [bucket.start for bucket in self.buckets]
        return [bisect_right(starts, slot) - 1 for slot in self.slots]

    def num_ranks_of(self, whole_index: int) -> int:
        """Ranks that a whole is spread over."""
        return self.buckets[self.bucket_of[whole_index]].num_ranks

    @cached_property
    def counted_pieces(self) -> list[list[CountedPiece]]:
        """For each parameter its pieces, with where their counts go."""
        wholes = self.shard_map.wholes
        times = Counter(piece.whole_index for cut in self.flat_pieces for piece in cut)
        found: list[list[CountedPiece]] = []
        for param, cut in zip(self.params, self.flat_pieces, strict=True):
            found.append([])
            for piece in cut:
                index = piece.whole_index
                numel = local_of(param).numel() if piece.start is None else piece.length
                is_all = times[index] == 1 and numel == wholes[index].numel
                is_whole = is_all and not wholes[index].groups
                target = CountedPiece(piece, self.slots[index], self.bucket_of[index], is_whole)
                found[-1].append(target)
        return found

    def numels(self, device: torch.device) -> torch.Tensor:
        """Elements of the whole in each slot: int64 [num slots]. Copied to a device once, not in
        each step.
        """
        if device not in self._numels:
            numels = torch.zeros(self.num_slots, dtype=torch.int64)
            for whole, slot in zip(self.shard_map.wholes, self.slots, strict=True):
                numels[slot] = whole.numel
            self._numels[device] = numels.to(device)
        return self._numels[device]

    def alignment(self) -> dict[str | int, float]:
        """Fraction that agreed at the last step by label, of the wholes that were stepped. Waits for
        the device.
        """
        if self.last_counts is None:
            return {}
        numels = self.numels(self.last_counts.device)
        fractions = fraction_from_count(self.last_counts, numels).tolist()
        labelled = enumerate(zip(self.labels, self.slots, strict=True))
        return {label: fractions[slot] for i, (label, slot) in labelled if i not in self.idle}

    def describe(self, index: int) -> str:
        """Parameter ``index`` in words, for an error: the wholes that it holds elements of."""
        wholes = self.shard_map.wholes
        names = [wholes[piece.whole_index].name for piece in self.flat_pieces[index]]
        return ", ".join(names) or f"parameter {index}"

    def local_grad(self, index: int) -> torch.Tensor | None:
        """The local gradient of parameter ``index``, or None. No communication is performed.

        Raises:
            LayoutMismatchError: the gradient is sparse, complex, or of another shape or sharding.
        """
        param = self.params[index]
        grad = param.grad
        if grad is None:
            return None
        local_grad, local = local_of(grad), local_of(param)
        if local_grad.dtype != local.dtype or local_grad.layout != torch.strided:
            self._check_kind(index, local_grad)
        if local_grad is not grad or local is not param:
            self._check_sharding(index, grad, param)
        if grad.shape != param.shape or local_grad.shape != local.shape:
            raise LayoutMismatchError(
                f"{self.describe(index)}: the gradient's shape is {tuple(grad.shape)}, on this "
                f"rank {tuple(local_grad.shape)}; must be {tuple(param.shape)} and {tuple(local.shape)}"
            )
        # Flat pieces are ranges of memory: the gradient's elements must lie as the parameter's do.
        if local_grad.is_contiguous() and local.is_contiguous():
            return local_grad
        if local_grad.stride() == local.stride():
            return local_grad
        return torch.empty_like(local).copy_(local_grad)

    def _check_kind(self, index: int, local_grad: torch.Tensor) -> None:
        if local_grad.layout != torch.strided or local_grad.dtype not in DTYPES:
            raise LayoutMismatchError(
                f"{self.describe(index)}: the gradient's layout is {local_grad.layout} and its dtype "
                f"{local_grad.dtype}, must be torch.strided and one of "
                f"{', '.join(map(str, DTYPES))}; use sparse=False in an embedding"
            )

    def _check_sharding(self, index: int, grad: torch.Tensor, param: torch.Tensor) -> None:
        if _sharding(grad) != _sharding(param):
            raise LayoutMismatchError(
                f"{self.describe(index)}: the gradient is laid out as {_sharding(grad)} and the "
                f"parameter as {_sharding(param)}; redistribute the gradient first"
            )


def _slots(shard_map: ShardMap) -> tuple[tuple[int, ...], tuple[Bucket, ...]]:
    slots = [0] * len(shard_map.wholes)
    buckets: list[Bucket] = []
    start = 0
    for groups, indices in shard_map.by_groups.items():
        for offset, index in enumerate(indices):
            slots[index] = start + offset
        buckets.append(Bucket(groups, start, start + len(indices)))
        start += len(indices) + 1
    return tuple(slots), tuple(buckets)


def draw_layout(groups: Iterable[dict[str, Any]], source: ShardMapSource | None) -> ParamLayout:
    """The layout of the parameters in ``groups``. No communication is performed.

    Without a ``source``, a DTensor is a shard as its placements say and any other tensor is whole
    on this rank.

    Raises:
        LayoutMismatchError: the shard map does not fit the parameters, a DTensor has a pending
        reduction, or an engine has cut a parameter in a way that it does not tell.
    """
    params, labels = _unique_params(groups)
    if source is None:
        for param, label in zip(params, labels, strict=True):
            _refuse_hidden_cut(_name(label), param)
        named = [_name(label) for label in labels]
        shard_map = ShardMap.of_tensors(list(zip(named, params, strict=True)))
        each = [(FlatPiece(i),) for i in range(len(params))]
        return ParamLayout(params, shard_map, labels, each, of_tensors=True)
    shard_map = source if isinstance(source, ShardMap) else source(params)
    if len(shard_map.pieces) != len(params):
        raise LayoutMismatchError(
            f"the shard map describes {len(shard_map.pieces)} local tensors, the optimizer holds "
            f"{len(params)} parameters; give one tuple of pieces per parameter, in their order"
        )
    flat_pieces = [
        _flat_pieces_of(f"parameter {i}", local_of(param).detach(), pieces, shard_map)
        for i, (param, pieces) in enumerate(zip(params, shard_map.pieces, strict=True))
    ]
    return ParamLayout(params, shard_map, [whole.name for whole in shard_map.wholes], flat_pieces)


def _refuse_hidden_cut(name: str, param: torch.Tensor) -> None:
    """A plain tensor counts as whole; one that is known not to be must not be taken for it."""
    for mark, (engine, remedy) in _HIDDEN_CUTS.items():
        if hasattr(param, mark):
            raise LayoutMismatchError(
                f"{name}: {engine} holds an unnamed piece of it on this rank, so that the mean over "
                f"the whole cannot be told; {remedy}"
            )


def _sharding(tensor: torch.Tensor) -> tuple[Any, ...]:
    if isinstance(tensor, DTensor):
        return (tensor.device_mesh, tensor.placements)
    return ("a plain tensor",)


def _unique_params(groups: Iterable[dict[str, Any]]) -> tuple[list[torch.Tensor], list[str | int]]:
    found: dict[torch.Tensor, str | int] = {}
    index = 0
    for group in groups:
        names = group.get("param_names")
        for position, param in enumerate(group["params"]):
            found.setdefault(param, names[position] if names else index)
            index += 1
    return list(found), list(found.values())


def _name(label: str | int) -> str:
    return label if isinstance(label, str) else f"parameter {label}"


def _flat_pieces_of(
    name: str, local: torch.Tensor, pieces: tuple[Piece, ...], shard_map: ShardMap
) -> tuple[FlatPiece, ...]:
    """Merge the adjacent pieces of a whole: the boxes of a flat range lie one after the other."""
    merged: list[tuple[int, int, int]] = []
    for piece in sorted(pieces, key=lambda piece: piece.local_start):
        whole_index = shard_map.index[piece.whole.name]
        start, stop = piece.local_start, piece.local_start + piece.numel
        last_stop = merged[-1][2] if merged else 0
        if start < last_stop or stop > local.numel():
            raise LayoutMismatchError(
                f"{name}: {piece.box} of {piece.whole.name} takes the local elements "
                f"[{start}, {stop}), which must lie in [{last_stop}, {local.numel()}), behind the last piece"
            )
        if merged and merged[-1][0] == whole_index and start == last_stop:
            merged[-1] = (whole_index, merged[-1][1], stop)
        else:
            merged.append((whole_index, start, stop))
    if len(merged) == 1 and merged[0][2] - merged[0][1] == local.numel():
        return (FlatPiece(merged[0][0]),)
    if merged and not local.is_contiguous():
        raise LayoutMismatchError(
            f"{name}: strides {local.stride()} of a local tensor of shape {tuple(local.shape)} "
            "must be contiguous, since it holds several pieces; call .contiguous() on it first"
        )
    return tuple(FlatPiece(index, start, stop - start) for index, start, stop in merged)


def check_dtypes(group: Mapping[str, Any]) -> None:
    """Raise ConfigError for a parameter of ``group`` that no cautious step can be taken on."""
    for index, param in enumerate(group["params"]):
        if param.dtype not in DTYPES:
            name = group["param_names"][index] if "param_names" in group else f"parameter {index}"
            raise ConfigError(
                f"{name}: dtype {param.dtype} must be one of {', '.join(map(str, DTYPES))}; "
                "view a complex parameter as real, leave an integer one out"
            )
