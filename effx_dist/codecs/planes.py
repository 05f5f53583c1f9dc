"""Byte planes: values split into planes of equal byte position, then zstd. Lossless."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zstandard
from numcodecs.abc import Codec
from numcodecs.compat import ensure_bytes, ensure_contiguous_ndarray, ndarray_copy

MAX_WINDOW_BYTES = 1 << 27
"""Frames that need a larger zstd window are refused: it is memory a payload could ask for."""


def zstd_encode(data: bytes, level: int) -> bytes:
    """One zstd frame that states its content size."""
    return zstandard.ZstdCompressor(level=level).compress(data)


def zstd_content_bytes(data: bytes) -> int:
    """The content size a zstd frame states; ValueError where it states none."""
    try:
        stated = zstandard.frame_content_size(data)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: not a frame ({error})") from error
    if stated < 0:
        raise ValueError("zstd: the frame does not state its content size")
    return stated


def zstd_decode(data: bytes, expected_bytes: int) -> bytes:
    """Undoes zstd_encode. Nothing larger than expected_bytes is allocated for the content.

    Raises ValueError where the frame is damaged, is followed by other bytes, or holds any other
    number of bytes than expected_bytes.
    """
    stated = zstd_content_bytes(data)
    if stated != expected_bytes:
        raise ValueError(f"zstd: the frame holds {stated} bytes, must be {expected_bytes}")
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    try:
        out = decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: damaged frame ({error})") from error
    if len(out) != expected_bytes:
        raise ValueError(f"zstd: decoded to {len(out)} bytes, must be {expected_bytes}")
    return out


class BytePlanes(Codec):  # type: ignore[misc]  # numcodecs is untyped
    """numcodecs codec: byte-shuffle of itemsize-byte values, then one zstd frame."""

    codec_id: ClassVar[str] = "effx_planes"

    def __init__(self, itemsize: int = 4, level: int = 3) -> None:
        if itemsize < 1:
            raise ValueError(f"itemsize: {itemsize}, must be >= 1; use 1 for no shuffle")
        self.itemsize = itemsize
        self.level = level

    def encode(self, buf: Any) -> bytes:
        """Encode a buffer whose size is a multiple of itemsize bytes."""
        flat = ensure_contiguous_ndarray(buf).reshape(-1).view(np.uint8)
        if flat.size % self.itemsize:
            raise ValueError(f"buf: {flat.size} bytes, must be a multiple of {self.itemsize=}")
        planes = np.ascontiguousarray(flat.reshape(-1, self.itemsize).T)
        return zstd_encode(planes.tobytes(), self.level)

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Undoes encode, into out if given.

        Without out, the payload decides how much is allocated: for bytes from elsewhere use
        decode_bounded.
        """
        data = ensure_bytes(buf)
        if out is None:
            return self.decode_bounded(data, zstd_content_bytes(data))
        expected_bytes = ensure_contiguous_ndarray(out).nbytes
        return ndarray_copy(self.decode_bounded(data, expected_bytes), out)

    def decode_bounded(self, data: bytes, expected_bytes: int) -> npt.NDArray[np.uint8]:
        """Undoes encode for a payload that must hold expected_bytes; else ValueError."""
        if expected_bytes % self.itemsize:
            raise ValueError(f"{expected_bytes=}: must be a multiple of {self.itemsize=}")
        planes = np.frombuffer(zstd_decode(data, expected_bytes), dtype=np.uint8)
        return np.ascontiguousarray(planes.reshape(self.itemsize, -1).T).reshape(-1)
