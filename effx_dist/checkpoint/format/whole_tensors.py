"""Whole stored tensors, a bounded number of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from effx_dist.checkpoint.format.bounds import check_declared, empty_for
from effx_dist.checkpoint.format.manifest import TensorRecord
from effx_dist.checkpoint.format.reader import ChainReader
from effx_dist.shard import Box

PIECE_NUMEL = 2**24
"""Elements that are read at once: 64 MiB of fp32. One row is read whole, however long it is."""

OnProgress = Callable[[int, int], None]
"""Called now and then with the bytes that are done and the bytes that there are."""


def piece_boxes(record: TensorRecord) -> Iterator[Box]:
    """Boxes of whole rows that tile a tensor, each within one chunk; none where it has no elements."""
    for chunk in record.chunks:
        yield from row_boxes(chunk.box)


def row_boxes(box: Box) -> Iterator[Box]:
    """Boxes of whole rows that tile another; none where that has no elements."""
    if not box.numel:
        return
    if not box.sizes:
        yield box
        return
    num_rows = max(1, PIECE_NUMEL * box.sizes[0] // box.numel)
    first, end = box.offsets[0], box.offsets[0] + box.sizes[0]
    for start in range(first, end, num_rows):
        rows = min(num_rows, end - start)
        yield Box((start, *box.offsets[1:]), (rows, *box.sizes[1:]))


def read_pieces(chain: ChainReader, name: str) -> Iterator[tuple[Box, torch.Tensor]]:
    """The values of a tensor or alias, box by box.

    Raises CorruptCheckpointError, also where the checkpoint declares more than the bound of tools.
    """
    check_declared(chain.top.declared_bytes, chain.top.folder)
    record = chain.top.manifest.tensors[chain.resolve(name)]
    for box in piece_boxes(record):
        yield box, chain.read(name, box)


def read_whole(chain: ChainReader, name: str) -> torch.Tensor:
    """All values of a tensor or alias, in new host memory. Raises CorruptCheckpointError."""
    values = empty_for(name, chain.top.manifest.tensors[chain.resolve(name)])
    for box, piece in read_pieces(chain, name):
        values[box.slices] = piece
    return values
