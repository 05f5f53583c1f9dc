"""Faults of a disk, and deaths, at a chosen operation inside one folder: by wrapping what Python
asks of the operating system, so that no library code knows of it."""

from __future__ import annotations

import builtins
import errno
import io
import os
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, NoReturn

import pytest

ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Operation:
    """One change asked of the file system. Names that are drawn at random are shown as ``*``, so
    that the operations of two equal runs are equal.

    Attributes:
        kind: "create", "write", "fsync", "rename", "mkdir", "unlink" or "rmdir".
        path: what it changes, relative to the watched folder; the new name of a rename.
        nth: the how many-th of this kind on this path it is, from 0.
    """

    kind: str
    path: str
    nth: int

    def __str__(self) -> str:
        return f"{self.kind} {self.path} #{self.nth}"

    @property
    def rank(self) -> int | None:
        """Whose data file it is about; None where it is about no data file."""
        match = re.search(r"rank-(\d{5})", self.path)
        return int(match[1]) if match else None


Fault = Callable[[Operation], None]
"""Told of every operation before it is done; whatever it raises fails the operation."""


def fails_once(chosen: Operation, number: int) -> Fault:
    """The chosen operation fails with this errno."""

    def fault(operation: Operation) -> None:
        if operation == chosen:
            raise OSError(number, os.strerror(number))

    return fault


def kills_at(chosen: Operation) -> Fault:
    """The process is killed in the place of the chosen operation."""

    def fault(operation: Operation) -> None:
        if operation == chosen:
            die()

    return fault


def die() -> NoReturn:
    """SIGKILL to this process."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()
    raise AssertionError("survived SIGKILL")


@contextmanager
def watched(folder: Path, fault: Fault) -> Iterator[None]:
    """Call ``fault`` before each operation of this process inside ``folder``.

    Nothing is made durable meanwhile: what SIGKILL leaves behind does not depend on it. A failing
    write has written half.
    """
    with pytest.MonkeyPatch.context() as patch:
        watch(folder, fault, patch)
        yield


def watch(folder: Path, fault: Fault, patch: pytest.MonkeyPatch) -> None:
    """:func:`watched`, until ``patch`` is undone; for a process that is to end with it."""
    root, seen, lock = str(folder.resolve()), Counter[tuple[str, str]](), Lock()

    def announce(kind: str, path: str) -> bool:
        if path != root and not path.startswith(f"{root}/"):
            return False
        name = re.sub(r"(?<=[.-])[0-9a-f]{8}\b", "*", os.path.relpath(path, root))
        with lock:
            nth = seen[kind, name]
            seen[kind, name] += 1
        fault(Operation(kind, name, nth))
        return True

    class WatchedFile(io.FileIO):
        def write(self, content: Any, /) -> int:
            try:
                announce("write", str(self.name))
            except OSError:
                super().write(memoryview(content)[: len(content) // 2])
                raise
            return super().write(content)

    real_open, real_fsync = builtins.open, os.fsync

    def watched_open(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode in ("xb", "wb") and announce("create", os.fspath(file)):
            # small enough that every block reaches the file by a write of its own
            return io.BufferedWriter(WatchedFile(file, mode), buffer_size=16)
        return real_open(file, mode, *args, **options)

    def watched_fsync(descriptor: int) -> None:
        if not announce("fsync", _path_of(descriptor)):
            real_fsync(descriptor)

    patch.setattr(builtins, "open", watched_open)
    patch.setattr(os, "fsync", watched_fsync)
    for kind, names in {"rename": ("rename", "replace", "link"), "mkdir": ("mkdir",)}.items():
        for name in names:
            patch.setattr(os, name, _announcing(announce, kind, getattr(os, name)))
    for name in ("unlink", "rmdir"):
        patch.setattr(os, name, _announcing(announce, name, getattr(os, name)))


def _announcing(
    announce: Callable[[str, str], bool], kind: str, real: Callable[..., None]
) -> Callable[..., None]:
    def call(*args: Any, dir_fd: int | None = None, **options: Any) -> None:
        path = os.fspath(args[-1] if kind == "rename" else args[0])
        if dir_fd is not None:
            options["dir_fd"] = dir_fd
            path = os.path.join(_path_of(dir_fd), path)
        announce(kind, os.path.abspath(path))
        real(*args, **options)

    return call


def _path_of(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")
