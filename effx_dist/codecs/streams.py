"""Bounded entropy-coded byte streams: the best of a few coders, told apart by a tag byte.

Stream = tag, length of the body (varint), body. The decoder is always told how many bytes a stream
must hold, and never allocates more than that for it.
"""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from effx_dist.codecs.zstd import LITERALS, zstd_content_bytes, zstd_decode, zstd_encode

U8 = npt.NDArray[np.uint8]

RAW, ZSTD, HUFFMAN, REPEAT = range(4)
_MAX_VARINT_BYTES = 9
_CLOSE = 1.01


def write_varint(value: int) -> bytes:
    """Little-endian base 128 of a number >= 0."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Reader:
    """Reads a payload from the front; ValueError where it ends too early."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._position = 0

    def take(self, num_bytes: int) -> memoryview:
        """The next num_bytes bytes."""
        end = self._position + num_bytes
        if end > len(self._data):
            raise ValueError(f"payload: {len(self._data)} bytes, ends before byte {end}")
        out = self._data[self._position : end]
        self._position = end
        return out

    def byte(self) -> int:
        """The next byte."""
        return self.take(1)[0]

    def varint(self) -> int:
        """Undoes write_varint."""
        value = 0
        for shift in range(0, 7 * _MAX_VARINT_BYTES, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError(f"payload: a varint of more than {_MAX_VARINT_BYTES} bytes")

    def finish(self) -> None:
        """ValueError where bytes are left."""
        if self._position != len(self._data):
            raise ValueError(f"payload: {len(self._data) - self._position} bytes too many")


def _huffman_encode(data: memoryview) -> bytes:
    # Matches do not pay in quantiser symbols: Huffman alone is smaller here, and faster.
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(data) + coder.flush()


def _huffman_decode(body: memoryview, expected_bytes: int) -> bytes:
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        out = coder.decompress(body, expected_bytes + 1)
    except zlib.error as error:
        raise ValueError(f"deflate: damaged stream ({error})") from error
    if len(out) != expected_bytes or not coder.eof or coder.unused_data:
        raise ValueError(f"deflate: the stream does not hold {expected_bytes} bytes")
    return out


def encode_stream(data: U8, level: int) -> bytes:
    """About the shortest of the codings of a contiguous byte stream; level is zstd's.

    Deflate is by far the slowest both ways: only where it makes a sample more than 1 % smaller.
    """
    if data.size and np.all(data == data[0]):
        return bytes([REPEAT, 1, data[0]])
    sample, raw = _sample(data, 1 << 14).data, data.data
    bodies: list[tuple[int, bytes | memoryview]] = [(ZSTD, zstd_encode(raw, LITERALS)), (RAW, raw)]
    if len(zstd_encode(sample, LITERALS)) > _CLOSE * len(_huffman_encode(sample)):
        bodies += [(ZSTD, zstd_encode(raw, level)), (HUFFMAN, _huffman_encode(raw))]
    return _stream(*min(bodies, key=lambda body: len(body[1])))


def encode_plane(data: U8, level: int) -> bytes:
    """A contiguous byte stream in the coding that suits a sample of it; level is zstd's.

    Raw unless the sample becomes 1 % smaller: mantissas do not.
    """
    if data.size and np.all(data == data[0]):
        return bytes([REPEAT, 1, data[0]])
    sample = _sample(data, 1 << 17).data
    sizes = {each: len(zstd_encode(sample, each)) for each in (LITERALS, level)}
    chosen = LITERALS if sizes[LITERALS] <= _CLOSE * sizes[level] else level
    if sizes[chosen] * _CLOSE >= sample.nbytes:
        return _stream(RAW, data.data)
    return _stream(ZSTD, zstd_encode(data.data, chosen))


def _sample(data: U8, num_bytes: int) -> U8:
    """All of ``data`` as one stretch, or four stretches of it."""
    if data.size <= num_bytes:
        return data
    starts = (index * data.size // 4 for index in range(4))
    return np.concatenate([data[start : start + num_bytes // 4] for start in starts])


def _stream(tag: int, body: bytes | memoryview) -> bytes:
    return b"".join([bytes([tag]), write_varint(len(body)), body])


def check_stream(reader: Reader, expected_bytes: int) -> None:
    """Raise ValueError unless the next stream states that it holds expected_bytes. Nothing is
    decoded."""
    tag = reader.byte()
    body = reader.take(reader.varint())
    stated = {RAW: len(body), HUFFMAN: expected_bytes, REPEAT: expected_bytes}.get(tag)
    if tag == ZSTD:
        stated = zstd_content_bytes(body)
    if stated != expected_bytes or (tag == REPEAT and len(body) != 1):
        raise ValueError(f"stream: tag {tag} of {len(body)} bytes, must hold {expected_bytes}")


def decode_stream(reader: Reader, expected_bytes: int) -> U8:
    """Undoes encode_stream for a stream that must hold expected_bytes; else ValueError."""
    tag = reader.byte()
    body = reader.take(reader.varint())
    out: bytes | memoryview
    match tag:
        case 0:
            out = body
        case 1:
            out = zstd_decode(body, expected_bytes)
        case 2:
            out = _huffman_decode(body, expected_bytes)
        case 3 if len(body) == 1:
            return np.full(expected_bytes, body[0], dtype=np.uint8)
        case _:
            raise ValueError(f"stream: tag {tag} with {len(body)} bytes, not a known coding")
    if len(out) != expected_bytes:
        raise ValueError(f"stream: {len(out)} bytes, must be {expected_bytes}")
    return np.frombuffer(out, dtype=np.uint8)
