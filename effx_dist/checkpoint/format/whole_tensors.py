"""Whole stored tensors, a bounded number of rows at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch

from effx_dist.checkpoint.format.manifest import TensorRecord, short
from effx_dist.checkpoint.format.reader import ChainReader
from effx_dist.errors import ConfigError, CorruptCheckpointError
from effx_dist.shard import Box

DEFAULT_MAX_DECODED_BYTES = 2**46
"""64 TiB: the fp32 weights and moments of four trillion parameters."""
_bound = DEFAULT_MAX_DECODED_BYTES


def set_max_decoded_bytes(num_bytes: int) -> None:
    """Set the bound of this process, in bytes. Raises ConfigError for less than 1."""
    global _bound
    if num_bytes < 1:
        raise ConfigError(f"max_decoded_bytes={num_bytes}: must be >= 1")
    _bound = num_bytes


def check_declared(declared: int, where: object) -> None:
    """Raise CorruptCheckpointError for a checkpoint whose tensors come to more bytes than the bound."""
    if declared > _bound:
        raise CorruptCheckpointError(
            f"{where}: declares tensors of {declared} bytes, at most {_bound} are decoded. If the "
            f"checkpoint is that large: effx --max-decoded-bytes {declared}, or set_max_decoded_bytes()"
        )


def empty_for(name: str, record: TensorRecord) -> torch.Tensor:
    """Host memory for a whole tensor that a manifest describes and no live object has.

    Raises CorruptCheckpointError where that is more than the bound, or than this machine has.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bound = min(_bound, memory)
    if record.raw_bytes > bound:
        raise CorruptCheckpointError(
            f"{name}: declares {record.raw_bytes} bytes; at most {bound} are taken for a tensor that "
            f"only the checkpoint knows of (this machine's memory, or what set_max_decoded_bytes() says)"
        )
    try:
        return torch.empty(record.shape, dtype=record.torch_dtype)
    except RuntimeError as error:
        raise CorruptCheckpointError(
            f"{name}: no memory for a tensor of shape {record.shape}: {short(str(error))}"
        ) from None


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
