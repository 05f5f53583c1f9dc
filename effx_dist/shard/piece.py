"""The keel: which box of which whole tensor is on this rank, and which ranks hold the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from effx_dist.errors import LayoutMismatchError
from effx_dist.shard.box import Box, flat_range_to_boxes, flat_start, whole_box
from effx_dist.shard.group import Group, group_of_axes


@dataclass(frozen=True, slots=True)
class WholeTensor:
    """A whole (unsharded) tensor as all ranks know it.

    ``groups``: the groups over which its boxes are spread. Summing a statistic of the local pieces
    over each of them in turn gives that of the whole; replicas are in none. A DTensor has one group
    at most, also where several axes of its mesh cut it. Empty where every rank holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    groups: tuple[Group, ...] = field(default=(), compare=False)

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of a whole tensor, held by this rank ``local_start`` elements into one of its local
    tensors."""

    whole: WholeTensor
    box: Box
    local_start: int = 0

    @property
    def numel(self) -> int:
        """Elements of this piece."""
        return self.box.numel

    def flat_view(self, local: torch.Tensor) -> torch.Tensor:
        """This piece of the contiguous ``local`` as a 1-D view that shares its memory."""
        return local.reshape(-1).narrow(0, self.local_start, self.numel)

    def view(self, local: torch.Tensor) -> torch.Tensor:
        """This piece of the contiguous ``local`` in the shape of its box, sharing memory."""
        return self.flat_view(local).view(self.box.sizes)


Held = tuple[WholeTensor, tuple[Piece, ...]]
"""A whole tensor, and this rank's pieces of it in one local tensor."""


class PlacedBox(NamedTuple):
    """A box of a whole tensor that a local one holds, contiguous, from its element ``local_start`` on."""

    box: Box
    local_start: int


def pieces_of_flat_range(
    whole: WholeTensor, start: int, stop: int, local_start: int = 0, within: Box | None = None
) -> tuple[Piece, ...]:
    """The pieces of row-major elements ``[start, stop)`` of ``whole``, or of its box ``within``, laid
    out from ``local_start`` on."""
    outer = whole_box(whole.shape) if within is None else within
    return tuple(
        Piece(
            whole, box.moved_by(outer.offsets), local_start + flat_start(outer.sizes, box) - start
        )
        for box in flat_range_to_boxes(outer.sizes, start, stop)
    )


def pieces_of_boxes(
    whole: WholeTensor, boxes: Sequence[PlacedBox], start: int, stop: int
) -> tuple[Piece, ...]:
    """The pieces of elements ``[start, stop)`` of a local tensor made up of ``boxes``; these elements lie
    in a tensor of their own. For parameters that are cut twice: into boxes, and then anywhere. No
    communication is performed."""
    found: list[Piece] = []
    for box, local_start in boxes:
        first = max(start, local_start) - local_start
        last = min(stop, local_start + box.numel) - local_start
        if first < last:
            at = local_start + first - start
            found += pieces_of_flat_range(whole, first, last, at, within=box)
    return tuple(found)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor behind a DTensor (sharing memory), or the tensor itself. No communication is
    performed."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


Part, pieces_of_parts = PlacedBox, pieces_of_boxes
"""Former names, which the documentation gave to those who write an adapter."""


def pieces_of_tensor(name: str, tensor: torch.Tensor) -> Held:
    """Describe a plain tensor (whole on this rank) or a DTensor (FSDP2, tensor parallel).

    Returns the whole tensor and this rank's pieces of it: none where its shard is empty or it is
    outside the mesh. Raises LayoutMismatchError for a DTensor with a pending (Partial) reduction.
    No communication is performed.
    """
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        whole = WholeTensor(name, shape)
        return whole, (Piece(whole, whole_box(shape)),) if whole.numel else ()
    whole = WholeTensor(name, shape, _sharding_groups(name, tensor))
    if tensor.device_mesh.get_coordinate() is None:
        return whole, ()
    boxes = [Box(tuple(c.offsets), tuple(c.sizes)) for c in tensor.__create_chunk_list__()]
    pieces, local_start = [], 0
    for box in boxes:
        if box.numel:
            pieces.append(Piece(whole, box, local_start))
            local_start += box.numel
    return whole, tuple(pieces)


def _sharding_groups(name: str, tensor: DTensor) -> tuple[Group, ...]:
    mesh = tensor.device_mesh
    if any(placement.is_partial() for placement in tensor.placements):
        raise LayoutMismatchError(
            f"{name}: placements {tensor.placements} hold a pending reduction; "
            "redistribute it to Shard or Replicate first"
        )
    if mesh.get_coordinate() is None:
        return ()
    axes = [
        axis
        for axis, placement in enumerate(tensor.placements)
        if not placement.is_replicate() and mesh.size(axis) > 1
    ]
    return (group_of_axes(mesh, axes),) if axes else ()


class ShardMap:
    """For a list of local tensors: the pieces in each, and all whole tensors in an order that all
    ranks share.

    Args:
        wholes: every whole tensor of the list's ranks, also those that this rank holds nothing of;
            the same names in the same order on every rank.
        pieces: for each local tensor, its pieces. Local elements that no piece covers are padding.
    """

    def __init__(self, wholes: Sequence[WholeTensor], pieces: Sequence[tuple[Piece, ...]]) -> None:
        self.wholes = tuple(wholes)
        self.pieces = tuple(pieces)
        self.index = {whole.name: index for index, whole in enumerate(self.wholes)}
        if len(self.index) != len(self.wholes):
            raise LayoutMismatchError("two whole tensors of one shard map share a name")
        for piece in (piece for local in self.pieces for piece in local):
            if piece.whole.name not in self.index:
                raise LayoutMismatchError(
                    f"{piece.whole.name}: a piece of it is here, but it is not among the whole tensors"
                )
            if not piece.box.is_inside(whole_box(piece.whole.shape)):
                raise LayoutMismatchError(
                    f"{piece.whole.name}: {piece.box} lies outside its shape {piece.whole.shape}"
                )

    @classmethod
    def of_tensors(cls, named: Sequence[tuple[str, torch.Tensor]]) -> ShardMap:
        """One local tensor per plain tensor or DTensor of ``named``. No communication is
        performed."""
        described = [pieces_of_tensor(name, tensor) for name, tensor in named]
        return cls([whole for whole, _ in described], [pieces for _, pieces in described])

    @cached_property
    def by_groups(self) -> dict[tuple[Group, ...], list[int]]:
        """Indices of the whole tensors by the groups they are spread over, in an order that
        all ranks share."""
        found: dict[tuple[Group, ...], list[int]] = {}
        for index, whole in enumerate(self.wholes):
            found.setdefault(whole.groups, []).append(index)
        return found


def start_sum(groups: Sequence[Group], values: torch.Tensor) -> Callable[[], None]:
    """Begin to sum ``values`` in place over each of the groups in turn: one all-reduce per group.

    They may be read once the returned function has been called. No communication is performed
    without a group. Integers are summed exactly, in any order of the ranks.
    """
    if not groups:
        return lambda: None
    wait_for_first = groups[0].start_all_reduce(values)

    def wait() -> None:
        wait_for_first()
        for group in groups[1:]:
            group.all_reduce(values)

    return wait


@dataclass(frozen=True, slots=True, eq=False)
class LocalRows:
    """Rows ``[start, start + len(local))`` of a whole tensor of ``global_rows`` rows.

    A leaf that a ``state_dict()`` may hold: a checkpoint saves each rank's rows and, at another
    world size, fills ``local`` in place with the rows that the new layout asks for.
    """

    local: torch.Tensor
    start: int
    global_rows: int

    def __post_init__(self) -> None:
        stop = self.start + self.local.shape[0]
        if not 0 <= self.start <= stop <= self.global_rows:
            raise LayoutMismatchError(
                f"rows [{self.start}, {stop}) must lie in [0, {self.global_rows})"
            )

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return (self.global_rows, *self.local.shape[1:])

    @property
    def box(self) -> Box:
        """Where the local rows lie in the whole tensor."""
        offsets = (self.start, *(0 for _ in self.local.shape[1:]))
        return Box(offsets, tuple(self.local.shape))


@dataclass(frozen=True, slots=True, eq=False)
class EvenShare(LocalRows):
    """Rows of a tensor that ranks share evenly, however many rows it has: of a saved one with another number of rows
    a rank asks for its share of those.

    Attributes:
        rank: this rank's number among those that share.
        size: their number.
    """

    rank: int = 0
    size: int = 1

    def of(self, global_rows: int) -> tuple[int, int]:
        """First row of this rank's share of ``global_rows``, and the row behind its last."""
        per_rank = -(-global_rows // self.size)
        start = min(self.rank * per_rank, global_rows)
        return start, min(start + per_rank, global_rows)
