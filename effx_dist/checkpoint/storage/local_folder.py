"""Checkpoint folders on file systems that this machine has mounted, shared ones (NFS) included.

A crash at any moment leaves whole files under their names or none: content, then name, then the
folder's entry are made durable in this order. Nothing rests on locks, which shared file systems do
not all have: what must happen at once is a rename. Links are never followed for a file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from effx_dist.checkpoint.storage.location import REMEDY, WRITING, Location, NewFile
from effx_dist.errors import CorruptCheckpointError

T = TypeVar("T")

STAGED = ".part"
"""The ending of a file's name while the file is being written."""
_ABSENT = (FileNotFoundError, NotADirectoryError)
_WAITS_S = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Pauses between looks for a folder that another node says it has made."""


class LocalFolder(Location):
    """A folder of this machine or of a file system that it has mounted."""

    has_rename = True

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def parent(self) -> LocalFolder:
        return LocalFolder(self.path.parent)

    def __truediv__(self, name: str) -> LocalFolder:
        return LocalFolder(self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    def is_link(self) -> bool:
        return self.path.is_symlink()

    def is_folder(self, follow_link: bool = False) -> bool:
        status = _status(self.path, follow_link)
        return status is not None and stat.S_ISDIR(status.st_mode)

    def folders(self) -> list[str]:
        try:
            with os.scandir(self.path) as entries:
                return [e.name for e in entries if e.is_dir(follow_symlinks=False)]
        except _ABSENT:
            return []

    def files(self) -> dict[str, int]:
        return {} if self.is_link() else self._files()

    def _files(self) -> dict[str, int]:
        found = {}
        with contextlib.suppress(*_ABSENT), os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    if entry.is_file(follow_symlinks=False):
                        found[entry.name] = entry.stat(follow_symlinks=False).st_size
        return found

    def size_of(self, name: str) -> int | None:
        status = _status(self.path / name)
        return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None

    def open_file(self, name: str) -> tuple[io.BufferedReader, int]:
        path = self.path / name
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # without waiting for a pipe
        try:
            descriptor = _looking_again(path, lambda: os.open(path, flags))
        except OSError as error:
            what = "; the checkpoint is incomplete" if isinstance(error, _ABSENT) else ""
            raise CorruptCheckpointError(
                f"{path}: cannot be opened ({error.strerror}){what}. {REMEDY}"
            ) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise CorruptCheckpointError(
                f"{path}: is not a regular file; it was replaced. {REMEDY}"
            )
        return os.fdopen(descriptor, "rb"), status.st_size

    def create_file(self, name: str) -> NewFile:
        return _LocalNewFile(self.path / name)

    def replace_file(self, name: str, content: bytes) -> None:
        new = _LocalNewFile(self.path / name)
        try:
            new.write(content)
            new.commit()
        finally:
            new.discard()
        self.sync()

    def remove_file(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()
            self.sync()

    def staging(self, identity: str) -> LocalFolder:
        return self.parent / f"{WRITING}{identity[:8]}-{self.name}"

    def publish(self, to: Location) -> None:
        assert isinstance(to, LocalFolder)
        try:
            self.path.rename(to.path)  # fails where there is a folder that is not empty
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise FileExistsError(
                error.errno, f"{to}: another job has just put a checkpoint here"
            ) from error
        try:
            to.parent.sync()
        except BaseException:
            # a checkpoint whose name may not survive a crash must not be visible
            to.path.rename(self.path)
            raise

    def make(self) -> None:
        if not self.path.parent.is_dir():  # each new folder's name is made durable in the one above
            with contextlib.suppress(FileExistsError):
                self.parent.make()
        self.path.mkdir()
        self.parent.sync()

    def remove(self) -> None:
        shutil.rmtree(self.path)

    def move(self, to: Location, last: str) -> None:
        assert isinstance(to, LocalFolder)
        self.path.rename(to.path)
        self.parent.sync()

    def sync(self) -> None:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # some file systems in user space do not offer fsync of a folder
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)

    def remove_unfinished(self) -> None:
        for name in self._files():  # of a run's folder, which may well be a link
            if name.endswith(STAGED):
                self.remove_file(name)


def _status(path: Path, follow_link: bool = False) -> os.stat_result | None:
    try:
        return _looking_again(path, lambda: os.stat(path, follow_symlinks=follow_link))
    except _ABSENT:
        return None


def _looking_again(path: Path, look: Callable[[], T]) -> T:
    """``look()``, twice where it finds nothing: NFS remembers for up to a minute that a name was not
    there, or which file it was; listing the folder makes it ask the server."""
    try:
        return look()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):
            raise
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        return look()


class _LocalNewFile(NewFile):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._staged = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{STAGED}")
        self._file = self._open()

    def _open(self) -> BinaryIO:
        """The staged file. Its folder is waited for, not made: where another job has moved it away,
        this save must fail instead of becoming half a checkpoint."""
        for wait_s in _WAITS_S:
            time.sleep(wait_s)
            with contextlib.suppress(FileNotFoundError):
                return _looking_again(self._path.parent, lambda: open(self._staged, "xb"))
        raise FileNotFoundError(
            errno.ENOENT, "the folder of this save is gone or not visible here", str(self._path)
        )

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def commit(self) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        os.replace(self._staged, self._path)

    def discard(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._staged.unlink()
