"""zstd frames: whose size is known beforehand, and whose decoding is bounded by it."""

from __future__ import annotations

import threading

import zstandard

MAX_WINDOW_BYTES = 1 << 27
"""Frames that need a larger zstd window are refused: it is memory a payload could ask for."""

LITERALS = -(1 << 20)
"""A level of our own, below all of zstd's: hardly any search for matches, so that what remains is
zstd's Huffman coding. On quantiser symbols it is as small as deflate's, and several times faster."""

_local = threading.local()
_PARAMETERS = {
    LITERALS: zstandard.ZstdCompressionParameters(
        strategy=zstandard.STRATEGY_FAST,
        min_match=7,
        window_log=17,
        hash_log=6,
        chain_log=6,
        search_log=1,
    )
}


def zstd_encode(data: bytes | memoryview, level: int) -> bytes:
    """One zstd frame that states its content size, of contiguous bytes; level is zstd's, or LITERALS."""
    made: dict[int, zstandard.ZstdCompressor] = _local.__dict__.setdefault("compressors", {})
    if level not in made:
        if level in _PARAMETERS:
            made[level] = zstandard.ZstdCompressor(compression_params=_PARAMETERS[level])
        else:
            made[level] = zstandard.ZstdCompressor(level=level)
    frame: bytes = made[level].compress(data)
    return frame


def zstd_content_bytes(data: bytes | memoryview) -> int:
    """The content size a zstd frame states; ValueError where it states none."""
    try:
        stated = int(zstandard.frame_content_size(data))
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: not a frame ({error})") from error
    if stated < 0:
        raise ValueError("zstd: the frame does not state its content size")
    return stated


def zstd_decode(data: bytes | memoryview, expected_bytes: int) -> bytes:
    """Undoes zstd_encode. Nothing larger than expected_bytes is allocated for the content.

    Raises ValueError where the frame is damaged, is followed by other bytes, or holds any other
    number of bytes than expected_bytes.
    """
    stated = zstd_content_bytes(data)
    if stated != expected_bytes:
        raise ValueError(f"zstd: the frame holds {stated} bytes, must be {expected_bytes}")
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    try:
        out: bytes = _local.decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: damaged frame ({error})") from error
    if len(out) != expected_bytes:
        raise ValueError(f"zstd: decoded to {len(out)} bytes, must be {expected_bytes}")
    return out
