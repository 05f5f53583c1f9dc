"""Checkpoint folders behind fsspec URLs: object stores first of all.

An object appears whole when its upload is completed, and nothing can be renamed, so what makes a
checkpoint exist is uploaded last. Nothing rests on listings, which may lag behind what was written
or removed: what matters is looked for by its name. Whatever was written is looked at again, since a
write that was cut short, or whose answer was lost, may have gone either way.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from effx_dist.checkpoint.storage.location import REMEDY, Location, NewFile
from effx_dist.errors import CorruptCheckpointError, EffxError
from effx_dist.shard import Worker

T = TypeVar("T")

logger = logging.getLogger(__name__)

UPLOAD_BYTES = 32 * 2**20
"""Size of an upload's parts. Stores take up to 10,000 of them, 320 GiB for one rank's file."""
READ_BYTES = 4 * 2**20
"""Least read at once, a few blocks: the files of a whole chain may be open at a time."""
ANSWER_S = 600.0
"""Longest wait for one answer of a store, the retries of its client included."""
_WITHOUT_FOLDERS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"}
"""Schemes whose folders need not be made; making one may make a bucket of a mistyped name."""


class RemoteFolder(Location):
    """A folder of an fsspec file system, named by its URL.

    The file system object is asked for at every use: fsspec keeps one for each process and, where
    needed, for each thread.
    """

    def __init__(self, url: str) -> None:
        self._scheme, _, path = url.partition("://")
        self._parts = tuple(path.rstrip("/").split("/"))

    @property
    def _filesystem(self) -> _Bounded:
        # a listing must show what other processes have just written
        return _Bounded(url_to_fs(str(self), use_listings_cache=False)[0])

    @property
    def _path(self) -> str:
        """What the file system calls this folder."""
        return str(url_to_fs(str(self), use_listings_cache=False)[1])

    def _path_of(self, name: str) -> str:
        return f"{self._path}/{name}"

    @property
    def name(self) -> str:
        return self._parts[-1]

    @property
    def parent(self) -> RemoteFolder:
        return RemoteFolder(f"{self._scheme}://{'/'.join(self._parts[:-1])}")

    def __truediv__(self, name: str) -> RemoteFolder:
        return RemoteFolder(f"{self}/{name}")

    def __str__(self) -> str:
        return f"{self._scheme}://{'/'.join(self._parts)}"

    def is_link(self) -> bool:
        return False

    def is_folder(self, follow_link: bool = False) -> bool:
        with _errors_named(self):
            try:
                return bool(self._filesystem.info(self._path)["type"] == "directory")
            except FileNotFoundError:
                return False

    def _entries(self, kind: str) -> dict[str, int]:
        with _errors_named(self):
            filesystem, own = self._filesystem, PurePosixPath(self._path)
            filesystem.invalidate_cache()
            try:
                found = filesystem.ls(self._path, detail=True)
            except FileNotFoundError:
                return {}
            paths = [(PurePosixPath(entry["name"]), entry) for entry in found]
            # some stores list a folder's own marker in it
            return {p.name: e["size"] or 0 for p, e in paths if p != own and e["type"] == kind}

    def folders(self) -> list[str]:
        return list(self._entries("directory"))

    def files(self) -> dict[str, int]:
        return self._entries("file")

    def size_of(self, name: str) -> int | None:
        with _errors_named(self / name):
            try:  # not isfile(), to which a store that does not answer is a missing file
                info = self._filesystem.info(self._path_of(name))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info["type"] == "file" else None

    def open_file(self, name: str) -> tuple[io.BufferedReader, int]:
        num_bytes = self.size_of(name)
        if num_bytes is None:
            raise self._is_missing(name)
        return io.BufferedReader(_RemoteReader(self, name, num_bytes), READ_BYTES), num_bytes

    def read_start(self, name: str, num_bytes: int) -> bytes:
        with _errors_named(self / name):
            try:
                path = self._path_of(name)
                return bytes(self._filesystem.cat_file(path, start=0, end=num_bytes))
            except FileNotFoundError as error:
                raise self._is_missing(name) from error

    def _is_missing(self, name: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self / name}: is missing; the checkpoint is incomplete. {REMEDY}"
        )

    def create_file(self, name: str) -> NewFile:
        return _RemoteNewFile(self, name)

    def replace_file(self, name: str, content: bytes) -> None:
        with _errors_named(self / name):
            try:
                self._filesystem.pipe_file(self._path_of(name), content)
                self.check_size(name, len(content))
            except Exception:
                if not self._holds(name, content):  # else only the store's answer was lost
                    raise

    def _holds(self, name: str, content: bytes) -> bool:
        with contextlib.suppress(OSError, CorruptCheckpointError):
            return self.read_file(name, len(content)) == content
        return False

    def check_size(self, name: str, num_bytes: int) -> None:
        """Raise OSError unless the store holds ``num_bytes`` bytes under a name."""
        stored = self.size_of(name)
        if stored != num_bytes:
            raise OSError(
                errno.EIO, f"{self / name}: {stored} bytes are stored of {num_bytes} written"
            )

    def remove_file(self, name: str) -> None:
        with _errors_named(self / name), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm_file(self._path_of(name))

    def staging(self, identity: str) -> RemoteFolder:
        return self

    def publish(self, to: Location) -> None:
        """The manifest, uploaded last, has done it."""

    def make(self) -> None:
        if self._scheme not in _WITHOUT_FOLDERS:
            with _errors_named(self):
                self._filesystem.makedirs(self._path, exist_ok=True)

    def remove(self) -> None:
        with _errors_named(self), contextlib.suppress(FileNotFoundError):
            self._filesystem.rm(self._path, recursive=True)

    def move(self, to: Location, last: str) -> None:
        assert isinstance(to, RemoteFolder)
        with _errors_named(self):
            filesystem, own = self._filesystem, self._path
            names = [path.removeprefix(own).lstrip("/") for path in filesystem.find(own)]
            for name in sorted(names, key=lambda name: name == last):
                filesystem.cp_file(self._path_of(name), to._path_of(name))
        self.remove_file(last)
        self.remove()

    def sync(self) -> None:
        """An object is durable when its upload has been acknowledged."""

    def remove_unfinished(self) -> None:
        filesystem = self._filesystem
        if not hasattr(filesystem, "list_multipart_uploads"):
            return
        try:
            with _errors_named(self):
                bucket, key, _ = filesystem.split_path(self._path)
                for upload in filesystem.list_multipart_uploads(bucket):
                    if upload["Key"].startswith(f"{key}/"):
                        filesystem.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        except OSError as error:  # it costs money, not safety, and may not be allowed
            logger.warning("uploads that were never completed may remain: %s", error)

    def __reduce__(self) -> Any:
        return RemoteFolder, (str(self),)


def _bounded(call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """The call's result, or TimeoutError: the timeouts of a store's own client do not cover every
    way in which a store can fall silent."""
    worker = Worker("effx-store-call")
    answer = worker.submit(partial(call, *args, **kwargs))
    worker.close()
    try:
        return answer.result(ANSWER_S)
    except TimeoutError:
        if answer.done():
            raise
        raise TimeoutError(
            errno.ETIMEDOUT, f"no answer from the store within {ANSWER_S:g} s"
        ) from None


class _Bounded:
    """A file system of which every call ends."""

    def __init__(self, filesystem: fsspec.AbstractFileSystem) -> None:
        self._filesystem = filesystem

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._filesystem, name)
        return partial(_bounded, found) if callable(found) else found


@contextlib.contextmanager
def _errors_named(place: Location) -> Iterator[None]:
    """Raise what a store's library raises, of whatever type, as OSError naming the object."""
    try:
        yield
    except (FileExistsError, EffxError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and str(place) in str(error):
            raise
        number = getattr(error, "errno", None) or errno.EIO
        if isinstance(error, FileNotFoundError):
            number = errno.ENOENT
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise OSError(number, f"{place}: {said}") from error


class _RemoteReader(io.RawIOBase):
    """One object, read range by range."""

    def __init__(self, folder: RemoteFolder, name: str, num_bytes: int) -> None:
        super().__init__()
        self._folder, self._name, self._num_bytes = folder, name, num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}
        self._position = starts[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._num_bytes)
        if end <= self._position:
            return 0
        path = self._folder._path_of(self._name)
        with _errors_named(self._folder / self._name):
            content = self._folder._filesystem.cat_file(path, start=self._position, end=end)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


class _RemoteNewFile(NewFile):
    def __init__(self, folder: RemoteFolder, name: str) -> None:
        self._folder, self._name = folder, name
        self._num_bytes = 0
        self._is_committed = False
        with _errors_named(folder / name):
            path = folder._path_of(name)
            self._file = folder._filesystem.open(path, "wb", block_size=UPLOAD_BYTES)

    def write(self, content: bytes) -> None:
        with _errors_named(self._folder / self._name):
            _bounded(self._file.write, content)
        self._num_bytes += len(content)

    def commit(self) -> None:
        with _errors_named(self._folder / self._name):
            _bounded(self._file.close)
        self._folder.check_size(self._name, self._num_bytes)
        self._is_committed = True

    def discard(self) -> None:
        if self._is_committed:
            return
        with contextlib.suppress(Exception):
            _bounded(self._file.discard)
        with contextlib.suppress(AttributeError):
            self._file.closed = True  # else it would be completed when it is collected
