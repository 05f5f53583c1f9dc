"""Tensors to write that are parts of stored ones, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effx_dist.checkpoint.tools.convert.content import Content
from effx_dist.shard import Box, whole_box


@dataclass(frozen=True)
class Weight:
    """A tensor to write: boxes of a tensor of the model, joined along the first dimension.

    Attributes:
        source: name of the model's tensor.
        source_shape: what it must be.
        boxes: at least one.
        is_zero: zeros of the boxes' sizes and the source's dtype are meant, not its values.
    """

    source: str
    source_shape: tuple[int, ...]
    boxes: tuple[Box, ...]
    is_zero: bool = False

    @classmethod
    def whole(cls, source: str, shape: Sequence[int]) -> Weight:
        """All of a tensor of the model."""
        return cls(source, tuple(shape), (whole_box(shape),))

    @classmethod
    def rows(cls, source: str, shape: Sequence[int], ranges: Sequence[range]) -> Weight:
        """Some rows of a tensor of the model, one range below the other."""
        rest = tuple(shape[1:])
        zeros = (0,) * len(rest)
        boxes = tuple(Box((rows.start, *zeros), (len(rows), *rest)) for rows in ranges)
        return cls(source, tuple(shape), boxes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor to write."""
        if not self.source_shape:
            return ()
        return (sum(box.sizes[0] for box in self.boxes), *self.boxes[0].sizes[1:])

    @property
    def numel(self) -> int:
        """Elements of the tensor to write."""
        return sum(box.numel for box in self.boxes)


class WeightReader:
    """Reads weights; one that is taken from many places is cut from its whole source.

    The last such source is kept, as its other parts are asked for next: that is one tensor of
    memory beside what is returned. No communication is performed.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self._kept: tuple[str, torch.Tensor] | None = None

    def num_bytes(self, weight: Weight) -> int:
        """Of the tensor to write."""
        return weight.numel * self._dtype(weight).itemsize

    def read(self, weight: Weight) -> torch.Tensor:
        """The tensor to write, contiguous, in the stored dtype. Raises CorruptCheckpointError."""
        if weight.is_zero:
            return torch.zeros(weight.shape, dtype=self._dtype(weight))
        stored = self._content.model[weight.source]
        if weight.boxes == (whole_box(weight.source_shape),):
            return self._content.read(stored)
        if len(weight.boxes) == 1:
            return self._content.read_box(stored, weight.boxes[0])
        whole = self._whole(stored)
        return torch.cat([whole[box.slices] for box in weight.boxes])

    def _whole(self, stored: str) -> torch.Tensor:
        if self._kept is None or self._kept[0] != stored:
            self._kept = None  # before the next one takes its memory
            self._kept = (stored, self._content.read(stored))
        return self._kept[1]

    def _dtype(self, weight: Weight) -> torch.dtype:
        return self._content.record(self._content.model[weight.source]).torch_dtype
