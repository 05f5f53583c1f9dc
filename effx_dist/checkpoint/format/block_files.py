"""A rank's data file: a magic number, then blocks one after another, each found and checked through
the manifest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import BinaryIO

import xxhash

from effx_dist.checkpoint.format.manifest import BlockRecord, FileRecord
from effx_dist.checkpoint.storage.places import REMEDY, Location
from effx_dist.checkpoint.storage.steps import (
    MOMENTS_REMOVED,
    is_moments_file,
    moments_file_name,
    rank_file_name,
)
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError

MAGIC = b"EFFXBLK1"
MAX_OPEN_FILES = 128


class BlockWriter:
    """Appends blocks to one new file. Not durable before :meth:`commit` returns."""

    def __init__(self, folder: Location, name: str) -> None:
        self.name = name
        self._file = folder.create_file(name)
        try:
            self._file.write(MAGIC)
        except BaseException:
            self._file.discard()
            raise
        self.num_bytes = len(MAGIC)

    def append(self, payload: bytes) -> BlockRecord:
        """Write one block's payload; say where it lies and what it hashes to."""
        record = BlockRecord(
            offset=self.num_bytes, length=len(payload), xxh3=xxhash.xxh3_128_hexdigest(payload)
        )
        self._file.write(payload)
        self.num_bytes += len(payload)
        return record

    def commit(self) -> None:
        """Make the file durable under its name. Raises OSError (a full disk, say) if anything did
        not get through."""
        self._file.commit()

    def discard(self) -> None:
        """Give up what was not committed."""
        self._file.discard()


VALUES, MOMENTS = 0, 1
"""Which of a rank's data files a block is in."""


class RankFiles:
    """The data files of one rank in one save. That of the moments is only made if there are any.

    Leaving the context makes them durable, or discards them if an error is under way.
    """

    def __init__(self, folder: Location, rank: int) -> None:
        self._folder = folder
        self._names = (rank_file_name(rank), moments_file_name(rank))
        self._files = {VALUES: BlockWriter(folder, self._names[VALUES])}

    def append(self, payload: bytes, file: int) -> BlockRecord:
        """Write one block's payload to the file VALUES or MOMENTS."""
        if file not in self._files:
            self._files[file] = BlockWriter(self._folder, self._names[file])
        return self._files[file].append(payload)

    def records(self) -> dict[int, FileRecord]:
        """Name and size of what was written, by VALUES and MOMENTS."""
        return {
            key: FileRecord(name=file.name, bytes=file.num_bytes)
            for key, file in self._files.items()
        }

    def __enter__(self) -> RankFiles:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                for file in self._files.values():
                    file.commit()
                self._folder.sync()
        finally:
            for file in self._files.values():
                file.discard()


class OpenFiles:
    """Keeps the number of open files bounded: a chain of many links of many ranks has thousands."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit = limit
        self._readers: OrderedDict[BlockReader, None] = OrderedDict()
        self._lock = threading.Lock()

    def used(self, reader: BlockReader) -> None:
        """``reader`` has just been read from; close the one that was not for longest."""
        with self._lock:
            self._readers[reader] = None
            self._readers.move_to_end(reader)
            is_full = len(self._readers) > self._limit
            oldest = self._readers.popitem(last=False)[0] if is_full else None
        if oldest is not None:
            oldest.close()


class BlockReader:
    """Reads blocks of one file whose size the manifest states. The file is opened when first
    needed.

    Opens regular files only, never through a link.
    """

    def __init__(
        self, folder: Location, record: FileRecord, open_files: OpenFiles | None = None
    ) -> None:
        self._open_files = open_files
        self.path = folder / record.name
        self._folder = folder
        self._name = record.name
        self._num_bytes = record.bytes
        self._file: BinaryIO | None = None
        self._lock = threading.Lock()

    def open(self) -> BinaryIO:
        """The open file. Raises CorruptCheckpointError where it is missing, of another size or of
        another kind."""
        if self._file is None:
            self._refuse_removed()
            file, num_bytes = self._folder.open_file(self._name)
            try:
                self._check(file, num_bytes)
            except BaseException:
                file.close()
                raise
            self._file = file
        return self._file

    def _refuse_removed(self) -> None:
        if is_moments_file(self._name) and self._folder.has_file(MOMENTS_REMOVED):
            raise CheckpointNotFoundError(
                f"{self._folder}: is kept only because later steps build upon its weights; its moments "
                "were removed. Load a newer step, or the weights alone (without an optimizer)"
            )

    def _check(self, file: BinaryIO, num_bytes: int) -> None:
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
        with self._lock:  # tensors are read by several threads
            file = self.open()
            file.seek(block.offset)
            payload = file.read(block.length)
        if self._open_files is not None:
            self._open_files.used(self)
        if xxhash.xxh3_128_hexdigest(payload) != block.xxh3:
            raise CorruptCheckpointError(
                f"{self.path}: block {index} of {tensor} (bytes {block.offset} to {block.offset + block.length}) "
                f"does not match its checksum; the file was damaged. {REMEDY}"
            )
        return payload

    def close(self) -> None:
        """Close the file, if it was opened; it opens again when it is needed."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
