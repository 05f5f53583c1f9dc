"""uint8 symbols with many zeros: a bitmask of the non-zero ones, then those, entropy coded.

Payload = layout byte, [stream: packed bitmask], [stream: non-zero symbols minus 1, as nibble pairs],
[number of large symbols, stream: the large ones]. A nibble of 15 stands for a symbol of 16 or more,
which is found in the last stream. Pairs let a byte-wise Huffman code come within 2 to 5 % of the
entropy where one symbol is far more frequent than the others.

The number of symbols is not in the payload of pack: the decoder is told, and allocates no more.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec
from numcodecs.compat import ensure_bytes, ensure_contiguous_ndarray, ndarray_copy

from effx_dist.codecs.streams import U8, Reader, decode_stream, encode_stream, write_varint

_ALL_ZERO, _NONE_ZERO, _MIXED = range(3)
_LARGE = 15
_DEFAULT_LEVEL = 1


def pack(symbols: U8, level: int = _DEFAULT_LEVEL) -> bytes:
    """Encode a flat uint8 array; its length must be known to the decoder."""
    non_zero = symbols != 0
    index = np.flatnonzero(non_zero)  # several times faster to use than the mask
    if index.size == 0:
        return bytes([_ALL_ZERO])
    if index.size == symbols.size:
        return bytes([_NONE_ZERO]) + _pack_values(symbols, level)
    mask = encode_stream(np.packbits(non_zero, bitorder="little"), level)
    return bytes([_MIXED]) + mask + _pack_values(symbols[index], level)


def unpack(data: bytes, num_values: int, num_symbols: int | None = None) -> U8:
    """Undoes pack for num_values symbols, all below num_symbols if given.

    Raises ValueError for any other bytes; allocates a small multiple of num_values at most.
    """
    reader = Reader(data)
    out = _unpack(reader, num_values)
    reader.finish()
    if num_symbols is not None and out.size and int(out.max()) >= num_symbols:
        raise ValueError(f"symbol {int(out.max())}: must be < {num_symbols=}")
    return out


def _unpack(reader: Reader, num_values: int) -> U8:
    layout = reader.byte()
    if layout == _ALL_ZERO:
        return np.zeros(num_values, dtype=np.uint8)
    if layout == _NONE_ZERO:
        return _unpack_values(reader, num_values)
    if layout != _MIXED:
        raise ValueError(f"layout: {layout}, must be one of 0, 1, 2")
    mask = decode_stream(reader, (num_values + 7) // 8)
    bits = np.unpackbits(mask, bitorder="little")
    if bits[num_values:].any():
        raise ValueError(f"mask: marks symbols beyond {num_values=}")
    index = np.flatnonzero(bits)
    out = np.zeros(num_values, dtype=np.uint8)
    out[index] = _unpack_values(reader, index.size)
    return out


def _pack_values(values: U8, level: int) -> bytes:
    """Non-zero symbols as nibble pairs, and the large ones after them."""
    nibbles = np.zeros(values.size + values.size % 2, dtype=np.uint8)
    np.minimum(values - np.uint8(1), np.uint8(_LARGE), out=nibbles[: values.size])
    pairs = nibbles[0::2] | (nibbles[1::2] << np.uint8(4))
    large = values[values > _LARGE]
    tail = encode_stream(large, level) if large.size else b""
    return encode_stream(pairs, level) + write_varint(large.size) + tail


def _unpack_values(reader: Reader, num_values: int) -> U8:
    """Undoes _pack_values."""
    pairs = decode_stream(reader, (num_values + 1) // 2)
    nibbles = np.empty(2 * pairs.size, dtype=np.uint8)
    nibbles[0::2] = pairs & 15
    nibbles[1::2] = pairs >> 4
    if nibbles[num_values:].any():
        raise ValueError("values: the last half pair must be 0")
    values = nibbles[:num_values]
    values += 1
    num_large = reader.varint()
    if num_large == 0 and int(values.max(initial=0)) <= _LARGE:
        return values
    index = np.flatnonzero(values > _LARGE)
    if index.size != num_large:
        raise ValueError(f"values: {num_large} large symbols stated, {index.size} marked")
    large = decode_stream(reader, num_large)
    if int(large.min()) <= _LARGE:
        raise ValueError(f"values: {int(large.min())} among the large symbols, must be > {_LARGE}")
    values[index] = large
    return values


def pack_inside(symbols: U8, support: npt.NDArray[np.bool_], level: int = _DEFAULT_LEVEL) -> bytes:
    """Encode only the symbols where support is true; all others must be 0."""
    inside = symbols[np.flatnonzero(support)]
    if np.count_nonzero(symbols) != np.count_nonzero(inside):
        raise ValueError("symbols: a non-zero symbol lies outside the support")
    return pack(inside, level)


def unpack_inside(
    data: bytes, support: npt.NDArray[np.bool_], num_symbols: int | None = None
) -> U8:
    """Undoes pack_inside, given the same support. Raises ValueError for any other bytes."""
    index = np.flatnonzero(support)
    out = np.zeros(support.size, dtype=np.uint8)
    out[index] = unpack(data, index.size, num_symbols)
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
