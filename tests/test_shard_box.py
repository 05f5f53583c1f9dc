"""Boxes against what they mean: sets of indices, and the flat order of the elements."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Box, boxes_to_flat_range, flat_range_to_boxes, flat_start, whole_box

Shape = tuple[int, ...]
SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def shapes_and_ranges(draw: st.DrawFn) -> tuple[Shape, int, int]:
    shape = draw(SHAPES)
    numel = math.prod(shape)
    start, stop = sorted(draw(st.tuples(st.integers(0, numel), st.integers(0, numel))))
    return shape, start, stop


@st.composite
def boxes_of(draw: st.DrawFn, num_dims: int) -> Box:
    offsets = tuple(draw(st.integers(0, 4)) for _ in range(num_dims))
    return Box(offsets, tuple(draw(st.integers(0, 4)) for _ in range(num_dims)))


@st.composite
def pairs_of_boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    num_dims = draw(st.integers(0, 3))
    return draw(boxes_of(num_dims)), draw(boxes_of(num_dims))


def indices(box: Box) -> set[tuple[int, ...]]:
    ranges = [range(o, o + s) for o, s in zip(box.offsets, box.sizes, strict=True)]
    return set(itertools.product(*ranges))


def flat_positions(shape: Shape) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


@given(shapes_and_ranges())
def test_boxes_list_a_flat_range_once_and_in_order(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    positions = flat_positions(shape)
    boxes = flat_range_to_boxes(shape, start, stop)
    listed = [int(p) for box in boxes for p in positions[box.slices].reshape(-1)]
    assert listed == list(range(start, stop))
    assert all(box.numel for box in boxes)
    assert all(box.is_inside(whole_box(shape)) for box in boxes)


@given(shapes_and_ranges())
def test_there_are_at_most_two_boxes_per_dimension_less_one(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    assert len(flat_range_to_boxes(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


def test_the_bound_on_the_number_of_boxes_is_reached() -> None:
    assert len(flat_range_to_boxes((4, 4, 4), 1, 63)) == 5


@given(shapes_and_ranges())
def test_the_way_back_finds_the_flat_range(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    found = boxes_to_flat_range(shape, flat_range_to_boxes(shape, start, stop))
    assert found == ((start, stop) if start < stop else (0, 0))


@given(SHAPES, st.data())
def test_boxes_of_consecutive_cuts_tile_the_whole_tensor_once(
    shape: Shape, data: st.DataObject
) -> None:
    numel = math.prod(shape)
    inner = data.draw(st.lists(st.integers(0, numel), max_size=5).map(sorted))
    times_covered = np.zeros(shape, dtype=np.int64)
    for start, stop in itertools.pairwise([0, *inner, numel]):
        for box in flat_range_to_boxes(shape, start, stop):
            times_covered[box.slices] += 1
    assert (times_covered == 1).all()


@given(shapes_and_ranges())
def test_flat_start_is_the_position_of_the_first_element(case: tuple[Shape, int, int]) -> None:
    shape, start, stop = case
    positions = flat_positions(shape)
    for box in flat_range_to_boxes(shape, start, stop):
        assert flat_start(shape, box) == positions[box.offsets]


@given(pairs_of_boxes())
def test_intersect_is_that_of_the_sets_of_indices(pair: tuple[Box, Box]) -> None:
    a, b = pair
    common = a.intersect(b)
    expected = indices(a) & indices(b)
    assert (set() if common is None else indices(common)) == expected
    assert (common is None) == (not expected)
    assert b.intersect(a) == common


@given(pairs_of_boxes())
def test_is_inside_is_that_of_the_sets_of_indices(pair: tuple[Box, Box]) -> None:
    inner, outer = pair
    if inner.is_inside(outer):
        assert indices(inner) <= indices(outer)
    else:  # an empty box may stand outside although it holds no element that does
        assert inner.numel == 0 or not indices(inner) <= indices(outer)


@given(pairs_of_boxes())
def test_relative_to_moves_every_index_by_the_outer_offsets(pair: tuple[Box, Box]) -> None:
    inner, outer = pair
    if not inner.is_inside(outer):
        with pytest.raises(LayoutMismatchError, match="does not lie inside"):
            inner.relative_to(outer)
        return
    moved = {
        tuple(i - o for i, o in zip(index, outer.offsets, strict=True)) for index in indices(inner)
    }
    assert indices(inner.relative_to(outer)) == moved
    assert inner.relative_to(outer).is_inside(whole_box(outer.sizes))


def test_boxes_of_other_dimensions_are_not_inside() -> None:
    assert not Box((0,), (1,)).is_inside(Box((0, 0), (1, 1)))
    assert not Box((), ()).is_inside(Box((0,), (1,)))


def test_a_scalar_has_one_box() -> None:
    assert whole_box(()) == Box((), ())
    assert Box((), ()).numel == 1
    assert flat_range_to_boxes((), 0, 1) == (Box((), ()),)
    assert flat_range_to_boxes((), 0, 0) == ()
    assert flat_start((), Box((), ())) == 0


def test_a_tensor_without_elements_has_no_boxes() -> None:
    assert flat_range_to_boxes((3, 0, 2), 0, 0) == ()
    assert whole_box((3, 0, 2)).numel == 0


@pytest.mark.parametrize(
    ("offsets", "sizes"),
    [((0,), ()), ((), (1,)), ((0, 0), (1,)), ((-1,), (1,)), ((0,), (-1,)), ((0, 0), (2, -3))],
)
def test_an_impossible_box_is_refused(offsets: Shape, sizes: Shape) -> None:
    with pytest.raises(LayoutMismatchError):
        Box(offsets, sizes)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13), (13, 13), (-2, -1)])
def test_a_flat_range_outside_the_tensor_is_refused_by_its_bounds(start: int, stop: int) -> None:
    with pytest.raises(LayoutMismatchError, match=rf"\[{start}, {stop}\).*\[0, 12\)"):
        flat_range_to_boxes((3, 4), start, stop)


@pytest.mark.parametrize(
    "boxes",
    [
        [Box((0, 0), (1, 4)), Box((2, 0), (1, 4))],  # a gap
        [Box((1, 0), (1, 4)), Box((0, 0), (1, 4))],  # out of order
        [Box((0, 0), (2, 2))],  # a column is no flat range
        [Box((0, 0), (1, 4)), Box((1, 0), (1, 4))],  # one range, but not cut as it would be
        [Box((2, 0), (2, 4))],  # past the end
    ],
)
def test_boxes_that_are_no_flat_range_are_refused(boxes: list[Box]) -> None:
    with pytest.raises(LayoutMismatchError):
        boxes_to_flat_range((3, 4), boxes)
