"""Whole chunks, block by block, into a data file and back out of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from effx_dist.checkpoint.format import coding
from effx_dist.checkpoint.format.block_files import MOMENTS, VALUES, BlockReader, RankFiles
from effx_dist.checkpoint.format.manifest import (
    BLOCK_NUMEL,
    MAX_INLINE_BYTES,
    ChunkRecord,
    Delta,
    JointMoment,
    JointSecondMoment,
    JointWeight,
    Planes,
    Seeded,
    TensorRecord,
)
from effx_dist.core.excp import JointArrays, JointQuantiser
from effx_dist.errors import CorruptCheckpointError
from effx_dist.shard import Box, flat_range_to_boxes, flat_start

T = TypeVar("T")
Argument = TypeVar("Argument")


def block_ranges(numel: int) -> Iterator[slice]:
    """The flat ranges of a chunk's blocks, in order."""
    for start in range(0, numel, BLOCK_NUMEL):
        yield slice(start, min(start + BLOCK_NUMEL, numel))


@dataclass(frozen=True, eq=False)
class JointPieces:
    """One local box of a weight, of its reference and of its moments: flat host tensors of one
    length."""

    box: Box
    weight: torch.Tensor
    reference: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor | None

    def arrays(self, cut: slice) -> JointArrays:
        """One block, given its flat range; residual taken."""
        second = None if self.exp_avg_sq is None else self.exp_avg_sq[cut]
        return coding.joint_arrays(self.weight[cut], self.reference[cut], self.exp_avg[cut], second)


def in_order(
    function: Callable[[Argument], T], arguments: Iterable[Argument], threads: int
) -> Iterator[T]:
    """``function`` of each argument, in order, on ``threads`` threads; on this one if that is 1.

    At most ``threads`` + 1 results are begun and not yet taken.
    """
    if threads == 1:
        yield from map(function, arguments)
        return
    with ThreadPoolExecutor(threads, "effx-encode") as pool:
        begun: deque[Future[T]] = deque()
        try:
            for argument in arguments:
                begun.append(pool.submit(function, argument))
                if len(begun) > threads:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()


class ChunkEncoder:
    """Encodes chunks into the blocks of one rank's data files. Moments go to a file of their own,
    which a step may lose when it is kept for its weights alone.

    Blocks of a chunk are coded on up to ``threads`` threads and written in order: the files do not
    depend on how many.
    """

    def __init__(self, files: RankFiles, threads: int = 1) -> None:
        self._files = files
        self._threads = threads

    def planes(self, box: Box, values: torch.Tensor, is_moment: bool = False) -> ChunkRecord:
        """A chunk losslessly; in the manifest itself where it is small or one value throughout."""
        bits = coding.to_bits(values)
        if bits.nbytes <= MAX_INLINE_BYTES:
            return _chunk(box, inline=bits.tobytes().hex())
        words = bits.size // box.numel
        if (fill := coding.repeated(bits, words)) is not None:
            return _chunk(box, fill=fill.hex())

        def encode(cut: slice) -> bytes:
            return coding.encode_planes(bits[cut.start * words : cut.stop * words])

        return self._blocks(box, encode, MOMENTS if is_moment else VALUES)

    def delta(self, box: Box, values: torch.Tensor, reference: torch.Tensor) -> ChunkRecord:
        """A chunk losslessly, as the difference to its reference; one mark in the manifest where
        there is none."""
        bits, old = coding.to_bits(values), coding.to_bits(reference)
        words = bits.size // box.numel
        if coding.is_same(bits, old):
            return _chunk(box, fill=bytes(values.element_size()).hex())

        def encode(cut: slice) -> bytes:
            inside = slice(cut.start * words, cut.stop * words)
            return coding.encode_delta(bits[inside], old[inside])

        return self._blocks(box, encode, VALUES)

    def _blocks(self, box: Box, encode: Callable[[slice], bytes], file: int) -> ChunkRecord:
        payloads = self._each_block(box, encode)
        blocks = [self._files.append(payload, file) for payload in payloads]
        return _chunk(box, file=file, blocks=blocks)

    def _each_block(self, box: Box, encode: Callable[[slice], T]) -> Iterator[T]:
        threads = self._threads if box.numel > BLOCK_NUMEL else 1
        return in_order(encode, block_ranges(box.numel), threads)

    def joint(
        self, pieces: JointPieces, quantiser: JointQuantiser, reconstruction: torch.Tensor
    ) -> tuple[ChunkRecord, ChunkRecord, ChunkRecord]:
        """Chunks of a weight, exp_avg and exp_avg_sq (empty if there is none).

        Fills the flat ``reconstruction`` (which may be the weight itself) with what a reader will
        decode.
        """

        def encode(cut: slice) -> coding.JointPayloads:
            payloads, residual = coding.quantise(quantiser, pieces.arrays(cut))
            reconstruction[cut] = coding.add_residual(pieces.reference[cut], residual)
            return payloads

        weight, first, second = [], [], []
        for payloads in self._each_block(pieces.box, encode):
            weight.append(self._files.append(payloads.weight, VALUES))
            if payloads.exp_avg is not None:
                first.append(self._files.append(payloads.exp_avg, MOMENTS))
            if payloads.exp_avg_sq is not None:
                second.append(self._files.append(payloads.exp_avg_sq, MOMENTS))
        return (
            _chunk(pieces.box, blocks=weight),
            _chunk(pieces.box, file=MOMENTS, blocks=first),
            _chunk(pieces.box, file=MOMENTS, blocks=second),
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

    def block(
        self, name: str, chunk_index: int, index: int, old: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The flat values of one block.

        ``old``: the parent checkpoint's values of the same block, for a tensor stored as a
        difference; may be overwritten.
        """
        record = self._tensors[name]
        chunk = record.chunks[chunk_index]
        numel = min(BLOCK_NUMEL, chunk.box.numel - index * BLOCK_NUMEL)
        try:
            if chunk.inline is not None:
                raw = bytearray(bytes.fromhex(chunk.inline))
                return torch.frombuffer(raw, dtype=record.torch_dtype)
            if chunk.fill is not None:
                return _filled(record, bytes.fromhex(chunk.fill), numel, old)
            match record.coding:
                case Planes():
                    payload = self._payload(name, chunk_index, index)
                    bits = coding.decode_planes(payload, record.torch_dtype.itemsize, numel)
                    return coding.from_bits(bits, record.torch_dtype)
                case Delta():
                    payload = self._payload(name, chunk_index, index)
                    values = _required(old, name)
                    coding.undo_delta_(values, payload)
                    return values
                case JointWeight():
                    payload = self._payload(name, chunk_index, index)
                    values = _required(old, name)
                    coding.add_residual_(values, payload, self._quantisers[name])
                    return values
                case JointMoment(weight=weight, exp_avg_sq=second):
                    arrays = self._joint((weight, name, second), chunk_index, index, numel)
                    return torch.from_numpy(_required(arrays.m, name))
                case JointSecondMoment(weight=weight, exp_avg=first):
                    arrays = self._joint((weight, first, name), chunk_index, index, numel)
                    return torch.from_numpy(_required(arrays.v, name))
                case Seeded():
                    return _required(old, name)
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


def _filled(
    record: TensorRecord, element: bytes, numel: int, old: torch.Tensor | None
) -> torch.Tensor:
    """The values of a block whose elements, or differences to the parent's, are all alike."""
    bits = coding.repeat(element, numel)
    if not isinstance(record.coding, Delta):
        return coding.from_bits(bits, record.torch_dtype)
    values = _required(old, "fill")
    if any(element):
        coding.undo_difference_(values, bits)
    return values


def _required(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"{name}: is stored as a part of something that is not there")
    return value


Slices = tuple[slice, ...]


@dataclass(frozen=True, slots=True)
class _Overlap:
    """A box of a block that meets the wanted box: its flat range in the block, its sizes, and the
    common elements inside it and inside the wanted box."""

    flat: slice
    sizes: tuple[int, ...]
    inside: Slices
    in_wanted: Slices


@dataclass(frozen=True, slots=True)
class BlockInBox:
    """Block ``index`` of a chunk, ``numel`` elements, of which some lie in a wanted box."""

    index: int
    numel: int
    overlaps: tuple[_Overlap, ...]

    def load(self, wanted: torch.Tensor) -> torch.Tensor:
        """The block's values, flat, out of those of the wanted box; 0 where they lie outside it. Shares
        their memory where the block is one contiguous stretch of it."""
        if (shared := self._shared(wanted)) is not None:
            return shared
        flat = torch.zeros(self.numel, dtype=wanted.dtype)
        for common in self.overlaps:
            flat[common.flat].view(common.sizes)[common.inside] = wanted[common.in_wanted]
        return flat

    def store(self, flat: torch.Tensor, wanted: torch.Tensor) -> None:
        """The way back."""
        shared = self._shared(wanted)
        if shared is not None and shared.data_ptr() == flat.data_ptr():
            return
        for common in self.overlaps:
            wanted[common.in_wanted] = flat[common.flat].view(common.sizes)[common.inside]

    def _shared(self, wanted: torch.Tensor) -> torch.Tensor | None:
        if len(self.overlaps) > 1:
            return None
        found = wanted[self.overlaps[0].in_wanted]
        is_stretch = found.numel() == self.numel and found.is_contiguous()
        return found.view(-1) if is_stretch else None


def blocks_in_box(chunk: Box, wanted: Box) -> Iterator[BlockInBox]:
    """The blocks of a chunk that meet a wanted box, which lies inside the chunk."""
    wanted = wanted.relative_to(chunk)
    for index, cut in enumerate(block_ranges(chunk.numel)):
        overlaps = []
        for box in flat_range_to_boxes(chunk.sizes, cut.start, cut.stop):
            common = box.intersect(wanted)
            if common is not None:
                start = flat_start(chunk.sizes, box) - cut.start
                inside, in_wanted = common.relative_to(box), common.relative_to(wanted)
                flat = slice(start, start + box.numel)
                overlaps.append(_Overlap(flat, box.sizes, inside.slices, in_wanted.slices))
        if overlaps:
            yield BlockInBox(index, cut.stop - cut.start, tuple(overlaps))
