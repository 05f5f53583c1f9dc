"""A rank's data file: a magic number, then blocks one after another, each found and checked through
the manifest."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import xxhash

from effx_dist.checkpoint.manifest import BlockRecord, FileRecord
from effx_dist.errors import CorruptCheckpointError

MAGIC = b"EFFXBLK1"
REMEDY = "Restore the file from a copy, or load an older step"


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, never through a link and without waiting for a pipe.

    Raises CorruptCheckpointError where there is no such file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise CorruptCheckpointError(
            f"{path}: cannot be opened ({error.strerror}); the checkpoint is incomplete. {REMEDY}"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CorruptCheckpointError(f"{path}: is not a regular file; it was replaced. {REMEDY}")
    return os.fdopen(descriptor, "rb")


class BlockWriter:
    """Appends blocks to one new file. Not durable before :meth:`close` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = open(path, "xb")  # noqa: SIM115 - closed by close() or by leaving the context
        self._file.write(MAGIC)
        self.num_bytes = len(MAGIC)

    def append(self, payload: bytes) -> BlockRecord:
        """Write one block's payload; say where it lies and what it hashes to."""
        record = BlockRecord(
            offset=self.num_bytes, length=len(payload), xxh3=xxhash.xxh3_128_hexdigest(payload)
        )
        self._file.write(payload)
        self.num_bytes += len(payload)
        return record

    def close(self) -> None:
        """Flush, fsync and close. Raises OSError (a full disk, say) if anything did not reach the
        disk."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class BlockReader:
    """Reads blocks of one file whose size the manifest states. The file is opened when first
    needed.

    Opens regular files only, never through a link.
    """

    def __init__(self, folder: Path, record: FileRecord) -> None:
        self.path = folder / record.name
        self._num_bytes = record.bytes
        self._file: BinaryIO | None = None

    def open(self) -> BinaryIO:
        """The open file. Raises CorruptCheckpointError where it is missing, of another size or of
        another kind."""
        if self._file is None:
            self._file = open_regular(self.path)
            self._check(self._file)
        return self._file

    def _check(self, file: BinaryIO) -> None:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != self._num_bytes:
            raise CorruptCheckpointError(
                f"{self.path}: has {num_bytes} bytes, the manifest says {self._num_bytes}; "
                f"it was cut off or replaced. {REMEDY}"
            )
        if file.read(len(MAGIC)) != MAGIC:
            raise CorruptCheckpointError(
                f"{self.path}: does not begin with {MAGIC!r}; it was damaged. {REMEDY}"
            )

    def read(self, block: BlockRecord, tensor: str, index: int) -> bytes:
        """One block's payload, its checksum verified. Raises CorruptCheckpointError naming file,
        tensor and block."""
        file = self.open()
        file.seek(block.offset)
        payload = file.read(block.length)
        if xxhash.xxh3_128_hexdigest(payload) != block.xxh3:
            raise CorruptCheckpointError(
                f"{self.path}: block {index} of {tensor} (bytes {block.offset} to {block.offset + block.length}) "
                f"does not match its checksum; the file was damaged. {REMEDY}"
            )
        return payload

    def close(self) -> None:
        """Close the file, if it was opened."""
        if self._file is not None:
            self._file.close()
            self._file = None
