"""Where the blocks of a chunk lie in a region of the same tensor: what a reader walks through.

A chunk is cut into blocks in its own flat order; a region is any box. Values go from the region
into a block and back one block at a time, so that reading takes the region's memory and a block's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from effx_dist.checkpoint.format.chunks import block_ranges
from effx_dist.shard import Box, flat_range_to_boxes, flat_start

Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class _Part:
    """A box of a block that meets the region: its flat range in the block, its sizes, and the
    common elements inside it and inside the region."""

    flat: slice
    sizes: tuple[int, ...]
    inside: Slices
    in_region: Slices


@dataclass(frozen=True, slots=True)
class BlockInRegion:
    """Block ``index`` of a chunk, ``numel`` elements, of which some lie in a region."""

    index: int
    numel: int
    parts: tuple[_Part, ...]

    def load(self, region: torch.Tensor) -> torch.Tensor:
        """The block's values, flat; 0 where they lie outside the region. Shares the region's memory
        where the block is one contiguous stretch of it."""
        if (shared := self._shared(region)) is not None:
            return shared
        flat = torch.zeros(self.numel, dtype=region.dtype)
        for part in self.parts:
            flat[part.flat].view(part.sizes)[part.inside] = region[part.in_region]
        return flat

    def store(self, flat: torch.Tensor, region: torch.Tensor) -> None:
        """The way back."""
        shared = self._shared(region)
        if shared is not None and shared.data_ptr() == flat.data_ptr():
            return
        for part in self.parts:
            region[part.in_region] = flat[part.flat].view(part.sizes)[part.inside]

    def _shared(self, region: torch.Tensor) -> torch.Tensor | None:
        if len(self.parts) > 1:
            return None
        found = region[self.parts[0].in_region]
        is_stretch = found.numel() == self.numel and found.is_contiguous()
        return found.view(-1) if is_stretch else None


def blocks_in_region(chunk: Box, region: Box) -> Iterator[BlockInRegion]:
    """The blocks of a chunk that meet a region, which lies inside the chunk."""
    wanted = region.relative_to(chunk)
    for index, cut in enumerate(block_ranges(chunk.numel)):
        parts = []
        for box in flat_range_to_boxes(chunk.sizes, cut.start, cut.stop):
            common = box.intersect(wanted)
            if common is not None:
                start = flat_start(chunk.sizes, box) - cut.start
                inside, in_region = common.relative_to(box), common.relative_to(wanted)
                flat = slice(start, start + box.numel)
                parts.append(_Part(flat, box.sizes, inside.slices, in_region.slices))
        if parts:
            yield BlockInRegion(index, cut.stop - cut.start, tuple(parts))
