"""Pieces are views of the right elements, and statistics of pieces add up to those of the whole."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)

from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import (
    Box,
    Group,
    LocalRows,
    Piece,
    PlacedBox,
    ShardMap,
    SoloGroup,
    WholeTensor,
    local_of,
    pieces_of_boxes,
    pieces_of_flat_range,
    pieces_of_tensor,
    start_sum,
    whole_box,
)
from tests.ranks import spawn
from tests.thread_ranks import ThreadGroup, run_ranks

Shape = tuple[int, ...]


@st.composite
def flat_ranges(draw: st.DrawFn) -> tuple[Shape, int, int, int]:
    shape = draw(st.lists(st.integers(0, 5), max_size=4).map(tuple))
    numel = math.prod(shape)
    start, stop = sorted(draw(st.tuples(st.integers(0, numel), st.integers(0, numel))))
    return shape, start, stop, draw(st.integers(0, 3))


@given(flat_ranges())
def test_pieces_of_a_flat_range_are_views_of_the_slices(case: tuple[Shape, int, int, int]) -> None:
    shape, start, stop, padding = case
    whole = np.arange(math.prod(shape)).reshape(shape)
    flat = torch.from_numpy(whole.reshape(-1)[start:stop].copy())
    local = torch.cat([torch.full((padding,), -1), flat, torch.full((2,), -1)])
    pieces = pieces_of_flat_range(WholeTensor("w", shape), start, stop, local_start=padding)
    for piece in pieces:
        view = piece.view(local)
        assert tuple(view.shape) == piece.box.sizes
        assert np.array_equal(view.numpy(), whole[piece.box.slices])
        assert np.array_equal(piece.flat_view(local).numpy(), whole[piece.box.slices].reshape(-1))
        assert view.untyped_storage().data_ptr() == local.untyped_storage().data_ptr()
        view.add_(1000)
    assert sum(piece.numel for piece in pieces) == stop - start
    assert (local[padding : padding + stop - start] >= 1000).all()
    assert (local[:padding] == -1).all()
    assert (local[padding + stop - start :] == -1).all()


def cuts(draw: st.DrawFn, length: int, num_parts: int) -> list[tuple[int, int]]:
    """``[0, length)`` in so many ranges, some of them perhaps empty."""
    inner = st.lists(st.integers(0, length), min_size=num_parts - 1, max_size=num_parts - 1)
    ends = [0, *sorted(draw(inner)), length]
    return list(pairwise(ends))


@st.composite
def cut_twice(draw: st.DrawFn) -> tuple[Shape, list[tuple[list[PlacedBox], list[tuple[int, int]]]]]:
    """A shape; for each tensor-parallel rank its parts, and the flat ranges that the data-parallel ranks
    have of them. Rows are cut in one or, as with gated layers, two stretches, or columns are."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple))
    num_ranks = draw(st.integers(1, 3))
    axis = draw(st.integers(0, len(shape) - 1))
    half = draw(st.integers(0, shape[axis])) if axis == 0 else 0
    stretches = [(0, half), (half, shape[axis])]
    by_stretch = [
        [(start + a, start + b) for a, b in cuts(draw, stop - start, num_ranks)]
        for start, stop in stretches
    ]
    found = []
    for ranges in zip(*by_stretch, strict=True):
        parts, local_start = [], 0
        for start, stop in ranges:
            offsets = tuple(start if at == axis else 0 for at in range(len(shape)))
            sizes = tuple(stop - start if at == axis else n for at, n in enumerate(shape))
            parts.append(PlacedBox(Box(offsets, sizes), local_start))
            local_start += parts[-1].box.numel
        found.append((parts, cuts(draw, local_start, draw(st.integers(1, 4)))))
    return shape, found


@given(cut_twice())
def test_parts_cut_into_flat_ranges_tile_the_whole_once(
    case: tuple[Shape, list[tuple[list[PlacedBox], list[tuple[int, int]]]]],
) -> None:
    shape, ranks = case
    whole = torch.arange(math.prod(shape)).reshape(shape)
    times = torch.zeros(shape, dtype=torch.int64)
    for parts, ranges in ranks:
        local = torch.cat([whole[part.box.slices].reshape(-1) for part in parts])
        for start, stop in ranges:
            stepped = local[start:stop].clone()
            pieces = pieces_of_boxes(WholeTensor("w", shape), parts, start, stop)
            assert sum(piece.numel for piece in pieces) == stop - start
            for piece in pieces:
                assert torch.equal(piece.view(stepped), whole[piece.box.slices])
                times[piece.box.slices] += 1
    assert times.eq(1).all()


@given(cut_twice())
def test_moving_a_box_undoes_what_relative_to_does(
    case: tuple[Shape, list[tuple[list[PlacedBox], list[tuple[int, int]]]]],
) -> None:
    shape, ranks = case
    for outer in (part.box for parts, _ in ranks for part in parts):
        assert outer.relative_to(outer) == whole_box(outer.sizes)
        for inner in pieces_of_flat_range(WholeTensor("w", shape), 0, outer.numel, within=outer):
            assert inner.box.is_inside(outer)
            assert inner.box.relative_to(outer).moved_by(outer.offsets) == inner.box


def test_a_shard_map_of_plain_tensors_has_one_whole_piece_each() -> None:
    shapes = {"a": (3, 4), "b": (), "c": (0, 2), "d": (5,)}
    shards = ShardMap.of_tensors([(name, torch.zeros(shape)) for name, shape in shapes.items()])
    assert [(w.name, w.shape, w.groups) for w in shards.wholes] == [
        (name, shape, ()) for name, shape in shapes.items()
    ]
    assert [[p.box for p in local] for local in shards.pieces] == [
        [Box((0, 0), (3, 4))],
        [Box((), ())],
        [],
        [Box((0,), (5,))],
    ]
    assert shards.index == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert [whole.numel for whole in shards.wholes] == [12, 1, 0, 5]


def sum_over_holders(shards: ShardMap, values: torch.Tensor) -> torch.Tensor:
    """Sum a statistic of this rank's pieces of each whole over its holders, in place."""
    for groups, index in shards.by_groups.items():
        packed = values[index]
        start_sum(groups, packed)()
        values[index] = packed
    return values


def test_nothing_is_summed_where_nothing_is_sharded() -> None:
    shards = ShardMap.of_tensors([("a", torch.zeros(3)), ("b", torch.zeros(2))])
    values = torch.tensor([4, 2**53 + 1])
    assert sum_over_holders(shards, values) is values
    assert values.tolist() == [4, 2**53 + 1]


def test_two_whole_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="share a name"):
        ShardMap.of_tensors([("a", torch.zeros(3)), ("a", torch.zeros(2))])


@pytest.mark.parametrize("box", [Box((2, 0), (2, 4)), Box((0, 4), (1, 1)), Box((0,), (3,))])
def test_a_piece_outside_its_whole_tensor_is_refused_by_name(box: Box) -> None:
    whole = WholeTensor("layer.w", (3, 4))
    with pytest.raises(LayoutMismatchError, match=r"layer\.w.*\(3, 4\)"):
        ShardMap([whole], [(Piece(whole, box),)])


@pytest.mark.parametrize(("start", "num_rows", "global_rows"), [(-1, 2, 5), (4, 2, 5), (6, 0, 5)])
def test_local_rows_outside_the_whole_are_refused(
    start: int, num_rows: int, global_rows: int
) -> None:
    with pytest.raises(LayoutMismatchError, match=rf"\[{start}, {start + num_rows}\)"):
        LocalRows(torch.zeros(num_rows, 3), start, global_rows)


def test_local_rows_know_their_place() -> None:
    rows = LocalRows(torch.zeros(2, 3), 4, 9)
    assert rows.global_shape == (9, 3)
    assert rows.box == Box((4, 0), (2, 3))
    assert LocalRows(torch.zeros(0), 5, 5).box == Box((5,), (0,))


class CountingGroup(Group):
    """Passes all-reduces on and counts them. Equal where it wraps the same group, as TorchGroup is."""

    def __init__(self, inner: Group) -> None:
        self.inner = inner
        self.rank, self.size = inner.rank, inner.size
        self.num_calls = 0

    def all_reduce(self, tensor: torch.Tensor, op: Any = "sum") -> torch.Tensor:
        self.num_calls += 1
        return self.inner.all_reduce(tensor, op)

    def all_to_all(self, send: Any) -> list[torch.Tensor]:
        return self.inner.all_to_all(send)

    def all_gather_object(self, value: Any) -> list[Any]:
        return self.inner.all_gather_object(value)


def run_grid(
    num_rows: int, num_columns: int, body: Callable[[int, int, Group, Group], Any]
) -> None:
    """Ranks as threads on a grid: ``body(row, column, its row's group, its column's group)``."""

    def line(size: int) -> tuple[list[Any], threading.Barrier]:
        return [None] * size, threading.Barrier(size, timeout=30)

    rows = [line(num_columns) for _ in range(num_rows)]
    columns = [line(num_rows) for _ in range(num_columns)]

    def on_rank(group: Group) -> None:
        row, column = divmod(group.rank, num_columns)
        body(row, column, ThreadGroup(column, *rows[row]), ThreadGroup(row, *columns[column]))

    run_ranks(num_rows * num_columns, on_rank)


def test_one_all_reduce_where_all_tensors_are_spread_alike() -> None:
    def body(group: Group) -> None:
        counting = CountingGroup(group)
        wholes = [WholeTensor(name, (4,), (counting,)) for name in "abc"]
        values = torch.tensor([group.rank, 2**53 + 1, -group.rank])
        assert sum_over_holders(ShardMap(wholes, []), values) is values
        assert values.tolist() == [3, 3 * (2**53 + 1), -3]
        assert counting.num_calls == 1

    run_ranks(3, body)


def test_replicated_tensors_beside_sharded_ones_are_not_summed() -> None:
    def body(group: Group) -> None:
        counting = CountingGroup(group)
        wholes = [
            WholeTensor("a", (4,), (counting,)),
            WholeTensor("replica", (4,)),
            WholeTensor("c", (4,), (counting,)),
        ]
        values = torch.tensor([1, 10, 100])
        sum_over_holders(ShardMap(wholes, []), values)
        assert values.tolist() == [3, 10, 300]
        assert counting.num_calls == 1

    run_ranks(3, body)


def test_mixed_sets_of_groups_take_one_all_reduce_per_set_and_axis() -> None:
    def body(row: int, column: int, row_group: Group, column_group: Group) -> None:
        across, down = CountingGroup(row_group), CountingGroup(column_group)
        wholes = [
            WholeTensor("both", (4,), (across, down)),
            WholeTensor("across", (4,), (across,)),
            WholeTensor("replica", (4,)),
            WholeTensor("both too", (4,), (across, down)),
            WholeTensor("down", (4,), (down,)),
        ]
        values = torch.tensor([10 * row + column, 10 * row + column, 7, 1, 10 * row + column])
        sum_over_holders(ShardMap(wholes, []), values)
        assert values.tolist() == [
            sum(10 * r + c for r in range(2) for c in range(3)),
            sum(10 * row + c for c in range(3)),
            7,
            6,
            sum(10 * r + column for r in range(2)),
        ]
        assert (across.num_calls, down.num_calls) == (2, 2)

    run_grid(2, 3, body)


class SecondHandle(CountingGroup):
    """Equal to all others of its kind, as the TorchGroups that DTensors make of one process group."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecondHandle)

    def __hash__(self) -> int:
        return hash(SecondHandle)


def test_tensors_spread_over_one_group_by_two_handles_share_an_all_reduce() -> None:
    handles = [SecondHandle(SoloGroup()), SecondHandle(SoloGroup())]
    wholes = [
        WholeTensor(name, (1,), (handle,)) for name, handle in zip("ab", handles, strict=True)
    ]
    sum_over_holders(ShardMap([*wholes, WholeTensor("c", (1,))], []), torch.tensor([1, 2, 3]))
    assert sum(handle.num_calls for handle in handles) == 1


# DTensors, in real processes

CASES: list[tuple[str, Shape, tuple[Placement, ...], Shape]] = [
    # name, mesh shape, placements, tensor shape
    ("even", (4,), (Shard(0),), (8, 3)),
    ("uneven", (4,), (Shard(0),), (7, 3)),
    ("few rows", (4,), (Shard(0),), (2, 3)),
    ("vector", (4,), (Shard(0),), (5,)),
    ("columns", (4,), (Shard(1),), (3, 6)),
    ("last of three", (4,), (Shard(2),), (2, 3, 5)),
    ("replicated", (4,), (Replicate(),), (3, 2)),
    ("scalar", (4,), (Replicate(),), ()),
    ("nothing", (4,), (Shard(0),), (0, 3)),
    ("HSDP", (2, 2), (Replicate(), Shard(0)), (5, 3)),
    ("HSDP of one row", (2, 2), (Replicate(), Shard(0)), (1, 3)),
    ("FSDP and columns", (2, 2), (Shard(0), Shard(1)), (5, 3)),
    ("FSDP and replicated", (2, 2), (Shard(0), Replicate()), (5, 3)),
    ("rows twice", (2, 2), (Shard(0), Shard(0)), (7, 3)),
    ("replicated twice", (2, 2), (Replicate(), Replicate()), (2,)),
    ("axis of one rank", (4, 1), (Shard(0), Shard(1)), (6, 2)),
    ("three ranks", (3,), (Shard(0),), (7, 2)),
]


def _dtensor_body() -> list[Any]:
    rank = torch.distributed.get_rank()
    meshes = {shape: init_device_mesh("cpu", shape) for shape in [(4,), (2, 2), (4, 1)]}
    meshes[3,] = torch.distributed.device_mesh.DeviceMesh("cpu", [0, 1, 2])
    found, tensors = [], []
    for name, mesh_shape, placements, shape in CASES:
        whole = torch.arange(math.prod(shape), dtype=torch.int64).reshape(shape)
        if mesh_shape == (3,) and rank == 3:
            found.append(None)
            continue
        tensor = distribute_tensor(whole, meshes[mesh_shape], placements)
        tensors.append((name, tensor))
        described, pieces = pieces_of_tensor(name, tensor)
        local = local_of(tensor)
        assert described.shape == shape
        for piece in pieces:
            assert torch.equal(piece.view(local), whole[piece.box.slices]), name
            assert piece.view(local).data_ptr() >= tensor.to_local().data_ptr()
        assert sum(piece.numel for piece in pieces) == local.numel(), name
        found.append(([piece.box for piece in pieces], len(described.groups)))
    _check_sums(tensors)
    _check_partial(meshes[4,])
    return found


def _check_sums(tensors: list[tuple[str, DTensor]]) -> None:
    """A count of the local elements, summed over the holders, is that of the whole tensor."""
    shards = ShardMap.of_tensors(tensors)
    counts = torch.tensor([sum(p.numel for p in local) for local in shards.pieces])
    sum_over_holders(shards, counts)
    assert counts.tolist() == [whole.numel for whole in shards.wholes]


def _check_partial(mesh: Any) -> None:
    pending = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    with pytest.raises(LayoutMismatchError, match=r"layer\.w.*pending reduction"):
        pieces_of_tensor("layer.w", pending)


@pytest.mark.ranks
def test_dtensors_of_every_layout_tile_their_whole_tensor(tmp_path: Path) -> None:
    by_rank = spawn(4, _dtensor_body, tmp_path)
    for index, (name, mesh_shape, placements, shape) in enumerate(CASES):
        times_held = np.zeros(shape, dtype=np.int64)
        outcomes = [found[index] for found in by_rank if found[index] is not None]
        for boxes, _ in outcomes:
            for box in boxes:
                times_held[box.slices] += 1
        axes = list(zip(mesh_shape, placements, strict=True))
        assert (times_held == math.prod(n for n, p in axes if p.is_replicate())).all(), name
        is_spread = any(not p.is_replicate() and n > 1 for n, p in axes)
        assert {num_groups for _, num_groups in outcomes} == {int(is_spread)}, name
