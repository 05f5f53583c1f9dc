"""Whole chunks, block by block, into a data file and back out of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from effx_dist.checkpoint import coding
from effx_dist.checkpoint.blockfile import BlockReader, BlockWriter
from effx_dist.checkpoint.manifest import (
    BLOCK_NUMEL,
    MAX_INLINE_BYTES,
    ChunkRecord,
    Delta,
    JointMoment,
    JointSecondMoment,
    JointWeight,
    Planes,
    TensorRecord,
)
from effx_dist.core.excp import JointArrays, JointQuantiser
from effx_dist.errors import CorruptCheckpointError
from effx_dist.shard import Box, flat_start

T = TypeVar("T")


def block_ranges(numel: int) -> Iterator[slice]:
    """The flat ranges of a chunk's blocks, in order."""
    for start in range(0, numel, BLOCK_NUMEL):
        yield slice(start, min(start + BLOCK_NUMEL, numel))


@dataclass(frozen=True, eq=False)
class JointParts:
    """One local box of a weight, of its reference and of its moments: flat host tensors of one
    length."""

    box: Box
    weight: torch.Tensor
    reference: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor | None

    def blocks(self) -> Iterator[tuple[slice, JointArrays]]:
        """Each block's flat range and its arrays, residual taken."""
        for cut in block_ranges(self.box.numel):
            second = None if self.exp_avg_sq is None else self.exp_avg_sq[cut]
            yield (
                cut,
                coding.joint_arrays(
                    self.weight[cut], self.reference[cut], self.exp_avg[cut], second
                ),
            )


class ChunkEncoder:
    """Encodes chunks into the blocks of one rank's data file."""

    def __init__(self, file: BlockWriter) -> None:
        self._file = file

    def planes(self, box: Box, part: torch.Tensor) -> ChunkRecord:
        """A chunk losslessly; inline in the manifest where it is small."""
        bits = coding.to_bits(part)
        if bits.nbytes <= MAX_INLINE_BYTES:
            return _chunk(box, inline=bits.tobytes().hex())
        words = bits.size // box.numel
        payloads = (
            coding.encode_planes(bits[cut.start * words : cut.stop * words])
            for cut in block_ranges(box.numel)
        )
        return _chunk(box, blocks=[self._file.append(payload) for payload in payloads])

    def delta(self, box: Box, part: torch.Tensor, reference: torch.Tensor) -> ChunkRecord:
        """A chunk losslessly, as the difference to its reference."""
        bits, old = coding.to_bits(part), coding.to_bits(reference)
        words = bits.size // box.numel
        payloads = (
            coding.encode_delta(
                bits[cut.start * words : cut.stop * words],
                old[cut.start * words : cut.stop * words],
            )
            for cut in block_ranges(box.numel)
        )
        return _chunk(box, blocks=[self._file.append(payload) for payload in payloads])

    def joint(
        self, parts: JointParts, quantiser: JointQuantiser, reconstruction: torch.Tensor
    ) -> tuple[ChunkRecord, ChunkRecord, ChunkRecord]:
        """Chunks of a weight, exp_avg and exp_avg_sq (empty if there is none).

        Fills the flat ``reconstruction`` (which may be the weight itself) with what a reader will
        decode.
        """
        weight, first, second = [], [], []
        for cut, arrays in parts.blocks():
            payloads, residual = coding.quantise(quantiser, arrays)
            reconstruction[cut] = coding.add_residual(parts.reference[cut], residual)
            weight.append(self._file.append(payloads.weight))
            if payloads.exp_avg is not None:
                first.append(self._file.append(payloads.exp_avg))
            if payloads.exp_avg_sq is not None:
                second.append(self._file.append(payloads.exp_avg_sq))
        return (
            _chunk(parts.box, blocks=weight),
            _chunk(parts.box, blocks=first),
            _chunk(parts.box, blocks=second),
        )


def _chunk(box: Box, **content: object) -> ChunkRecord:
    return ChunkRecord.model_validate(
        {"offsets": list(box.offsets), "sizes": list(box.sizes), **content}
    )


class ChunkDecoder:
    """Decodes boxes of one checkpoint's tensors from its data files. Every block read is verified.

    Args:
        files: the checkpoint's readers, by index in its manifest.
        tensors: the manifest's tensors.
        quantisers: of the weights that have one.
    """

    def __init__(
        self,
        files: Sequence[BlockReader],
        tensors: Mapping[str, TensorRecord],
        quantisers: Mapping[str, JointQuantiser],
    ) -> None:
        self._files = files
        self._tensors = tensors
        self._quantisers = quantisers

    def decode(
        self, name: str, chunk_index: int, box: Box, reference: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The values of ``box``, which lies inside the chunk.

        ``reference``: the parent checkpoint's values of the same box, for a tensor stored as a
        difference. Takes memory for the whole chunk, twice where there is a reference.
        """
        record = self._tensors[name]
        chunk = record.chunks[chunk_index].box
        inside = box.relative_to(chunk).slices
        flat = torch.empty(chunk.numel, dtype=record.torch_dtype)
        old = None
        if reference is not None:
            old = torch.zeros(chunk.sizes, dtype=reference.dtype)
            old[inside] = reference
            old = old.reshape(-1)
        for index, cut in enumerate(block_ranges(chunk.numel)):
            if _touches(cut, chunk, box):
                flat[cut] = self._block(name, chunk_index, index, None if old is None else old[cut])
        return flat.view(chunk.sizes)[inside]

    def _block(
        self, name: str, chunk_index: int, index: int, old: torch.Tensor | None
    ) -> torch.Tensor:
        record = self._tensors[name]
        chunk = record.chunks[chunk_index]
        numel = min(BLOCK_NUMEL, chunk.box.numel - index * BLOCK_NUMEL)
        try:
            if chunk.inline is not None:
                raw = bytearray(bytes.fromhex(chunk.inline))
                return torch.frombuffer(raw, dtype=record.torch_dtype)
            match record.coding:
                case Planes():
                    payload = self._payload(name, chunk_index, index)
                    bits = coding.decode_planes(payload, record.torch_dtype.itemsize, numel)
                    return coding.from_bits(bits, record.torch_dtype)
                case Delta():
                    payload = self._payload(name, chunk_index, index)
                    bits = coding.to_bits(_required(old, name))
                    itemsize = record.torch_dtype.itemsize
                    return coding.from_bits(
                        coding.decode_delta(payload, itemsize, bits), record.torch_dtype
                    )
                case JointWeight():
                    payload = self._payload(name, chunk_index, index)
                    residual = coding.decode_residual(payload, numel, self._quantisers[name])
                    return coding.add_residual(_required(old, name), residual)
                case JointMoment(weight=weight, exp_avg_sq=second):
                    arrays = self._joint((weight, name, second), chunk_index, index, numel)
                    return torch.from_numpy(_required(arrays.m, name))
                case JointSecondMoment(weight=weight, exp_avg=first):
                    arrays = self._joint((weight, first, name), chunk_index, index, numel)
                    return torch.from_numpy(_required(arrays.v, name))
        except ValueError as error:
            raise CorruptCheckpointError(
                f"{self._where(record, chunk_index)}: block {index} of {name} cannot be decoded: {error}"
            ) from error

    def _joint(
        self, names: tuple[str, str, str | None], chunk_index: int, index: int, numel: int
    ) -> JointArrays:
        weight, first, second = (
            None if name is None else self._payload(name, chunk_index, index) for name in names
        )
        payloads = coding.JointPayloads(_required(weight, names[0]), first, second)
        return coding.decode_joint(payloads, numel, self._quantisers[names[0]])

    def _payload(self, name: str, chunk_index: int, index: int) -> bytes:
        chunk = self._tensors[name].chunks[chunk_index]
        return self._files[chunk.file].read(chunk.blocks[index], name, index)

    def _where(self, record: TensorRecord, chunk_index: int) -> str:
        return str(self._files[record.chunks[chunk_index].file].path)


def _required(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"{name}: is stored as a part of something that is not there")
    return value


def _touches(cut: slice, chunk: Box, box: Box) -> bool:
    """Whether the flat range of a block holds elements between the first and the last of
    ``box``."""
    inner = box.relative_to(chunk)
    last = tuple(o + s - 1 for o, s in zip(inner.offsets, inner.sizes, strict=True))
    first_index = flat_start(chunk.sizes, inner)
    last_index = flat_start(chunk.sizes, Box(last, inner.sizes))
    return bool(cut.start <= last_index and cut.stop > first_index)
