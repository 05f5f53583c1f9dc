"""Axis-aligned boxes of a whole tensor, and the way between them and flat row-major ranges.

ZeRO and Megatron cut a flattened parameter anywhere; FSDP2 cuts rows. Both become boxes in the
whole tensor's coordinates, which is what torch.distributed.checkpoint reshards between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from effx_dist.errors import LayoutMismatchError


@dataclass(frozen=True, slots=True)
class Box:
    """A box of a whole tensor: ``offsets[i] <= index[i] < offsets[i] + sizes[i]``, in elements.

    A 0-d tensor has the one box ``Box((), ())``. A box with a zero size is empty.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.sizes):
            raise LayoutMismatchError(
                f"{self.offsets=} and {self.sizes=}: a box needs one offset and one size per dimension"
            )
        if any(value < 0 for value in (*self.offsets, *self.sizes)):
            raise LayoutMismatchError(f"{self.offsets=}, {self.sizes=}: must not be negative")

    @property
    def numel(self) -> int:
        """Elements inside the box."""
        return math.prod(self.sizes)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the box in the whole tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.sizes, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The box that both have in common, or None. Both are boxes of one whole tensor."""
        low = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        high = tuple(
            min(a + x, b + y)
            for a, x, b, y in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        sizes = tuple(h - lo for lo, h in zip(low, high, strict=True))
        return Box(low, sizes) if all(size > 0 for size in sizes) else None

    def relative_to(self, outer: Box) -> Box:
        """This box in the coordinates of ``outer``, which must contain it."""
        if not self.is_inside(outer):
            raise LayoutMismatchError(f"{self} does not lie inside {outer}")
        offsets = tuple(a - b for a, b in zip(self.offsets, outer.offsets, strict=True))
        return Box(offsets, self.sizes)

    def moved_by(self, offsets: Sequence[int]) -> Box:
        """The way back from :meth:`relative_to` a box with these offsets."""
        moved = tuple(a + b for a, b in zip(self.offsets, offsets, strict=True))
        return Box(moved, self.sizes)

    def is_inside(self, outer: Box) -> bool:
        """Whether every element of this box lies in ``outer``."""
        return len(self.offsets) == len(outer.offsets) and all(
            b <= a and a + x <= b + y
            for a, x, b, y in zip(self.offsets, self.sizes, outer.offsets, outer.sizes, strict=True)
        )


def whole_box(shape: Sequence[int]) -> Box:
    """The box that is all of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


def flat_range_to_boxes(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The row-major elements ``[start, stop)`` of a tensor of ``shape`` as boxes, in flat order.

    At most ``2 * dim - 1`` boxes (a part row, whole rows, a part row, recursively); none for an
    empty range.
    """
    numel = math.prod(shape)
    if not 0 <= start <= stop <= numel:
        raise LayoutMismatchError(
            f"flat range [{start}, {stop}) must lie in [0, {numel}), the elements of {tuple(shape)}"
        )
    if start == stop:
        return ()
    return tuple(_split(tuple(shape), start, stop))


def _split(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    if not shape:
        return [Box((), ())]
    if len(shape) == 1:
        return [Box((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first_whole, end_whole = -(-start // row), stop // row
    if first_whole > end_whole:  # the range lies inside one row
        return _in_row(shape, end_whole, start - end_whole * row, stop - end_whole * row)
    boxes = []
    if start < first_whole * row:
        boxes += _in_row(shape, first_whole - 1, start - (first_whole - 1) * row, row)
    if first_whole < end_whole:
        zeros = (0,) * (len(shape) - 1)
        boxes.append(Box((first_whole, *zeros), (end_whole - first_whole, *shape[1:])))
    if stop > end_whole * row:
        boxes += _in_row(shape, end_whole, 0, stop - end_whole * row)
    return boxes


def _in_row(shape: tuple[int, ...], row_index: int, start: int, stop: int) -> list[Box]:
    return [
        Box((row_index, *box.offsets), (1, *box.sizes)) for box in _split(shape[1:], start, stop)
    ]


def flat_start(shape: Sequence[int], box: Box) -> int:
    """Row-major position in the whole tensor of the first element of ``box``."""
    position = 0
    for size, offset in zip(shape, box.offsets, strict=True):
        position = position * size + offset
    return position


def boxes_to_flat_range(shape: Sequence[int], boxes: Sequence[Box]) -> tuple[int, int]:
    """The way back: the flat row-major range that ``boxes``, in flat order, tile without a gap.

    Raises LayoutMismatchError where they are not the boxes of one flat range.
    """
    if not boxes:
        return (0, 0)
    start = flat_start(shape, boxes[0])
    stop = start + sum(box.numel for box in boxes)
    if flat_range_to_boxes(shape, start, stop) != tuple(boxes):
        raise LayoutMismatchError(
            f"{list(boxes)} are not the boxes of one flat range of a tensor of shape {tuple(shape)}"
        )
    return (start, stop)
