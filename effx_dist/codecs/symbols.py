"""uint8 symbols with many zeros: a bitmask of the non-zero ones, then those, entropy coded.

Payload = layout byte, [stream: packed bitmask], [stream: non-zero symbols minus 1, as nibble pairs],
[number of large symbols, stream: the large ones]. A nibble of 15 stands for a symbol of 16 or more,
which is found in the last stream. Pairs let a byte-wise Huffman code come within 2 to 5 % of the
entropy where one symbol is far more frequent than the others.

The number of symbols is not in the payload of pack: the decoder is told, and allocates no more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec
from numcodecs.compat import ensure_bytes, ensure_contiguous_ndarray, ndarray_copy

from effx_dist.codecs.streams import U8, Reader, decode_stream, encode_stream, write_varint
from effx_dist.native import kernels as native

_ALL_ZERO, _NONE_ZERO, _MIXED = range(3)
_LARGE = 15
_DEFAULT_LEVEL = 1


@dataclass(frozen=True, eq=False)
class SymbolStreams:
    """A payload of pack, entropy decoded and checked: its streams fit each other."""

    mask: U8 | None
    """Packed bits of the symbols that are not 0; None where none is 0."""
    num_values: int
    """Number of symbols that are not 0."""
    pairs: U8
    """Their nibbles."""
    large: U8
    """The symbols above 15, in order."""


def pack(symbols: U8, level: int = _DEFAULT_LEVEL) -> bytes:
    """Encode a flat uint8 array; its length must be known to the decoder."""
    mask, values = _split(np.ascontiguousarray(symbols))
    if values.size == 0:
        return bytes([_ALL_ZERO])
    if values.size == symbols.size:
        return bytes([_NONE_ZERO]) + _pack_values(values, level)
    return bytes([_MIXED]) + encode_stream(mask, level) + _pack_values(values, level)


def _split(symbols: U8) -> tuple[U8, U8]:
    """The packed mask of the symbols that are not 0, and those."""
    if (compiled := native.kernels()) is not None:
        return compiled.split_symbols(symbols)
    non_zero = symbols != 0
    index = np.flatnonzero(non_zero)  # several times faster to use than the mask
    return np.packbits(non_zero, bitorder="little"), symbols[index]


def unpack(data: bytes, num_values: int, num_symbols: int | None = None) -> U8:
    """Undoes pack for num_values symbols, all below num_symbols if given.

    Raises ValueError for any other bytes; allocates a small multiple of num_values at most.
    """
    out = _join(unpack_streams(data, num_values), num_values)
    if num_symbols is not None and out.size and int(out.max()) >= num_symbols:
        raise ValueError(f"symbol {int(out.max())}: must be < {num_symbols=}")
    return out


def unpack_streams(data: bytes, num_values: int) -> SymbolStreams | None:
    """What unpack reads before it joins the streams; None where all symbols are 0."""
    reader = Reader(data)
    streams = _read(reader, num_values)
    reader.finish()
    return streams


def _read(reader: Reader, num_values: int) -> SymbolStreams | None:
    layout = reader.byte()
    if layout == _ALL_ZERO:
        return None
    if layout == _NONE_ZERO:
        return _read_values(reader, None, num_values)
    if layout != _MIXED:
        raise ValueError(f"layout: {layout}, must be one of 0, 1, 2")
    mask = decode_stream(reader, (num_values + 7) // 8)
    if num_values % 8 and int(mask[-1]) >> num_values % 8:
        raise ValueError(f"mask: marks symbols beyond {num_values=}")
    return _read_values(reader, mask, _count_bits(mask))


def _count_bits(mask: U8) -> int:
    if (compiled := native.kernels()) is not None:
        return compiled.count_bits(mask)
    return int(np.unpackbits(mask).sum(dtype=np.int64))


def _join(streams: SymbolStreams | None, num_symbols: int) -> U8:
    """All symbols from a payload's streams."""
    if streams is None:
        return np.zeros(num_symbols, dtype=np.uint8)
    if (compiled := native.kernels()) is not None:
        return compiled.join_symbols(
            num_symbols, streams.mask, streams.pairs, streams.num_values, streams.large
        )
    values = _nibbles(streams.pairs)[: streams.num_values] + np.uint8(1)
    if streams.large.size:
        values[values > _LARGE] = streams.large
    if streams.mask is None:
        return values
    out = np.zeros(num_symbols, dtype=np.uint8)
    bits = np.unpackbits(streams.mask, bitorder="little", count=num_symbols)
    out[np.flatnonzero(bits)] = values
    return out


def _pack_values(values: U8, level: int) -> bytes:
    """Non-zero symbols as nibble pairs, and the large ones after them."""
    pairs, large = _pair(values)
    tail = encode_stream(large, level) if large.size else b""
    return encode_stream(pairs, level) + write_varint(large.size) + tail


def _pair(values: U8) -> tuple[U8, U8]:
    """Nibble pairs of non-zero symbols, and the large ones."""
    if (compiled := native.kernels()) is not None:
        return compiled.pair_nibbles(values)
    nibbles = np.zeros(values.size + values.size % 2, dtype=np.uint8)
    np.minimum(values - np.uint8(1), np.uint8(_LARGE), out=nibbles[: values.size])
    return nibbles[0::2] | (nibbles[1::2] << np.uint8(4)), values[values > _LARGE]


def _nibbles(pairs: U8) -> U8:
    """Undoes _pair but for the large ones."""
    nibbles = np.empty(2 * pairs.size, dtype=np.uint8)
    nibbles[0::2] = pairs & 15
    nibbles[1::2] = pairs >> 4
    return nibbles


def _read_values(reader: Reader, mask: U8 | None, num_values: int) -> SymbolStreams:
    """Undoes _pack_values."""
    pairs = decode_stream(reader, (num_values + 1) // 2)
    if num_values % 2 and pairs[-1] >> 4:
        raise ValueError("values: the last half pair must be 0")
    num_large, num_marked = reader.varint(), _count_large(pairs, num_values)
    if num_marked != num_large:
        raise ValueError(f"values: {num_large} large symbols stated, {num_marked} marked")
    large = np.empty(0, dtype=np.uint8)
    if num_large:
        large = decode_stream(reader, num_large)
        if int(large.min()) <= _LARGE:
            found = f"{int(large.min())} among the large symbols"
            raise ValueError(f"values: {found}, must be > {_LARGE}")
    return SymbolStreams(mask, num_values, pairs, large)


def _count_large(pairs: U8, num_values: int) -> int:
    """How many nibbles of the first num_values stand for a large symbol."""
    if (compiled := native.kernels()) is not None:
        return compiled.count_large(pairs, num_values)
    return int(np.count_nonzero(_nibbles(pairs)[:num_values] == _LARGE))


def pack_inside(symbols: U8, support: npt.NDArray[np.bool_], level: int = _DEFAULT_LEVEL) -> bytes:
    """Encode only the symbols where support is true; all others must be 0."""
    inside: U8 | None
    if (compiled := native.kernels()) is not None:
        inside = compiled.take_inside(np.ascontiguousarray(symbols), np.ascontiguousarray(support))
    else:
        inside = symbols[np.flatnonzero(support)]
        if np.count_nonzero(symbols) != np.count_nonzero(inside):
            inside = None
    if inside is None:
        raise ValueError("symbols: a non-zero symbol lies outside the support")
    return pack(inside, level)


def unpack_inside(
    data: bytes, support: npt.NDArray[np.bool_], num_symbols: int | None = None
) -> U8:
    """Undoes pack_inside, given the same support. Raises ValueError for any other bytes."""
    values = unpack(data, int(np.count_nonzero(support)), num_symbols)
    if (compiled := native.kernels()) is not None:
        return compiled.put_inside(values, np.ascontiguousarray(support))
    out = np.zeros(support.size, dtype=np.uint8)
    out[np.flatnonzero(support)] = values
    return out


class SparseSymbols(Codec):  # type: ignore[misc]  # numcodecs is untyped
    """numcodecs codec of pack: the number of symbols (varint), then pack's payload."""

    codec_id: ClassVar[str] = "effx_symbols"

    def __init__(self, level: int = _DEFAULT_LEVEL) -> None:
        self.level = level

    def encode(self, buf: Any) -> bytes:
        """Encode the bytes of a buffer as symbols."""
        symbols = ensure_contiguous_ndarray(buf).reshape(-1).view(np.uint8)
        return write_varint(symbols.size) + pack(symbols, self.level)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Undoes encode, into out if given.

        Without out, the payload decides how much is allocated: for bytes from elsewhere use
        decode_bounded.
        """
        data = ensure_bytes(buf)
        if out is None:
            return self.decode_bounded(data, Reader(data).varint())
        expected_bytes = ensure_contiguous_ndarray(out).nbytes
        return ndarray_copy(self.decode_bounded(data, expected_bytes), out)

    def decode_bounded(self, data: bytes, num_values: int, num_symbols: int | None = None) -> U8:
        """Undoes encode for a payload that must hold num_values symbols; else ValueError."""
        reader = Reader(data)
        stated = reader.varint()
        if stated != num_values:
            raise ValueError(f"payload: states {stated} symbols, must be {num_values}")
        return unpack(data[len(write_varint(stated)) :], num_values, num_symbols)
