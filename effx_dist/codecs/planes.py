"""Byte planes: values split into planes of equal byte position, each coded as suits it. Lossless.

Payload = 1, number of bytes (varint), a stream for each plane (streams.py). Payloads of earlier
versions are one zstd frame of all planes, which begins with another byte; they are read as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec
from numcodecs.compat import ensure_bytes, ensure_contiguous_ndarray, ndarray_copy

from effx_dist.codecs.streams import (
    U8,
    Reader,
    check_stream,
    decode_stream,
    encode_plane,
    write_varint,
)
from effx_dist.codecs.zstd import zstd_content_bytes, zstd_decode
from effx_dist.native import kernels as native

_STREAMS = 1
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_COMPILED_ITEM_BYTES = (1, 2, 4, 8)


class BytePlanes(Codec):  # type: ignore[misc]  # numcodecs is untyped
    """numcodecs codec: byte-shuffle of itemsize-byte values, then each plane raw or in zstd."""

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
        streams = (encode_plane(plane, self.level) for plane in self._split(flat))
        return b"".join([bytes([_STREAMS]), write_varint(flat.size), *streams])

    def decode(self, buf: Any, out: Any = None) -> Any:
        """Undoes encode, into out if given.

        Without out, the payload decides how much is allocated: for bytes from elsewhere use
        decode_bounded.
        """
        data = ensure_bytes(buf)
        if out is None:
            is_frame = data.startswith(_ZSTD_MAGIC)
            stated = zstd_content_bytes(data) if is_frame else _stated_bytes(Reader(data))
            return self.decode_bounded(data, stated)
        expected_bytes = ensure_contiguous_ndarray(out).nbytes
        return ndarray_copy(self.decode_bounded(data, expected_bytes), out)

    def decode_bounded(self, data: bytes, expected_bytes: int) -> npt.NDArray[np.uint8]:
        """Undoes encode for a payload that must hold expected_bytes; else ValueError.

        The result may be written to.
        """
        if expected_bytes % self.itemsize:
            raise ValueError(f"{expected_bytes=}: must be a multiple of {self.itemsize=}")
        if data.startswith(_ZSTD_MAGIC):
            joined = np.frombuffer(zstd_decode(data, expected_bytes), dtype=np.uint8)
            return self._merge(joined.reshape(self.itemsize, -1))
        reader = Reader(data)
        if (stated := _stated_bytes(reader)) != expected_bytes:
            raise ValueError(f"planes: the payload holds {stated} bytes, must be {expected_bytes}")
        length = expected_bytes // self.itemsize
        planes = [decode_stream(reader, length) for _ in range(self.itemsize)]
        reader.finish()
        return self._merge(planes)

    def check(self, data: bytes, expected_bytes: int) -> None:
        """Raise ValueError unless a payload of encode states that it holds expected_bytes.
        Looks at the heads of its streams alone."""
        reader = Reader(data)
        if (stated := _stated_bytes(reader)) != expected_bytes:
            raise ValueError(f"planes: the payload holds {stated} bytes, must be {expected_bytes}")
        for _ in range(self.itemsize):
            check_stream(reader, expected_bytes // self.itemsize)
        reader.finish()

    def _split(self, flat: U8) -> U8:
        """Planes [itemsize, values] of the values' bytes."""
        if self.itemsize in _COMPILED_ITEM_BYTES and (compiled := native.kernels()) is not None:
            words = np.require(flat.view(f"u{self.itemsize}"), requirements="A")
            return compiled.split_planes(words)
        return np.ascontiguousarray(flat.reshape(-1, self.itemsize).T)

    def _merge(self, planes: Sequence[U8] | U8) -> U8:
        """Undoes _split."""
        if self.itemsize in _COMPILED_ITEM_BYTES and (compiled := native.kernels()) is not None:
            return compiled.merge_planes(list(planes), len(planes[0])).view(np.uint8)
        return np.stack(list(planes), axis=1).reshape(-1)


def _stated_bytes(reader: Reader) -> int:
    """How many bytes a payload of streams says that it holds; the streams come next."""
    if (layout := reader.byte()) != _STREAMS:
        raise ValueError(f"planes: the payload begins with {layout}, not a known layout")
    return reader.varint()
