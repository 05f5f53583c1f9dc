"""What a place for checkpoints can do, whether it is a local folder or lies in an object store."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod

from effx_dist.errors import CorruptCheckpointError

WRITING = "writing-"
"""The beginning of a local folder's name while its content is being put together."""
REMEDY = "Restore the file from a copy, or load an older step"


class NewFile(ABC):
    """A file being written; it is there under its name once :meth:`commit` has returned."""

    @abstractmethod
    def write(self, content: bytes) -> None:
        """Append. Raises OSError (a full disk, say)."""

    @abstractmethod
    def commit(self) -> None:
        """Make the content durable and let the name appear. Raises OSError if any of it did not
        get through."""

    @abstractmethod
    def discard(self) -> None:
        """Give up what was not committed; nothing appears. Raises nothing."""


class Location(os.PathLike[str], ABC):
    """One folder: its files, its sub-folders.

    Cheap to make; nothing is opened or created. It holds no connection, so it may be handed to
    other threads and, by pickle, to other processes. Whatever goes wrong in a file system is raised
    as OSError, never taken for "is not there".
    """

    has_rename = False
    """Whether :meth:`move` is one atomic operation."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The folder's own name."""

    @property
    @abstractmethod
    def parent(self) -> Location:
        """The folder that this one lies in."""

    @abstractmethod
    def __truediv__(self, name: str) -> Location:
        """A sub-folder, or the place of a file for a message."""

    @abstractmethod
    def __str__(self) -> str:
        """Path or URL."""

    def __fspath__(self) -> str:
        return str(self)

    @abstractmethod
    def is_link(self) -> bool:
        """Whether it is a symbolic link. Object stores have none."""

    @abstractmethod
    def is_folder(self, follow_link: bool = False) -> bool:
        """Whether it is there, and no link. An object store has a folder if its listing shows
        objects in it."""

    @abstractmethod
    def folders(self) -> list[str]:
        """Names of the sub-folders (a link does not count), in any order; empty if the folder is not there."""

    @abstractmethod
    def files(self) -> dict[str, int]:
        """Names and bytes of the files in it (a link does not count); empty if it is not there or a link.
        The listing of an object store may lag behind: what must not be missed is to be looked for
        by name."""

    @abstractmethod
    def size_of(self, name: str) -> int | None:
        """Bytes of the regular file of that name, or None if there is no such file."""

    def has_file(self, name: str) -> bool:
        """Whether there is a regular file of that name."""
        return self.size_of(name) is not None

    @abstractmethod
    def open_file(self, name: str) -> tuple[io.BufferedReader, int]:
        """A regular file for reading anywhere in it, and its bytes. Raises CorruptCheckpointError
        where there is none, never follows a link."""

    @abstractmethod
    def create_file(self, name: str) -> NewFile:
        """Begin a new file."""

    @abstractmethod
    def replace_file(self, name: str, content: bytes) -> None:
        """Write a whole file that appears at once or not at all, in place of another, durably."""

    @abstractmethod
    def remove_file(self, name: str) -> None:
        """Remove a file if it is there, durably."""

    @abstractmethod
    def staging(self, identity: str) -> Location:
        """Where the content of this folder is put together. Where folders can be renamed that is
        another one beside it; else the folder itself."""

    @abstractmethod
    def publish(self, to: Location) -> None:
        """Give what was put together here its place, at once and durably. Raises FileExistsError
        where something is there."""

    @abstractmethod
    def make(self) -> None:
        """Make the folder, durably. Raises FileExistsError if it is there; stores cannot tell."""

    @abstractmethod
    def remove(self) -> None:
        """Remove the folder and all that is in it."""

    @abstractmethod
    def move(self, to: Location, last: str) -> None:
        """Give the folder another place beside it. Where that is many operations, the file called
        ``last`` is the last to appear there and the first to vanish here."""

    @abstractmethod
    def sync(self) -> None:
        """Make the names in it durable."""

    @abstractmethod
    def remove_unfinished(self) -> None:
        """Remove what writes that were cut off left: staged files in this folder, unfinished
        uploads anywhere below it. No write may be under way."""

    def read_file(self, name: str, max_bytes: int) -> bytes:
        """A whole small file. Raises CorruptCheckpointError where it is missing or larger."""
        file, num_bytes = self.open_file(name)
        with file:
            if num_bytes > max_bytes:
                raise CorruptCheckpointError(
                    f"{self / name}: has {num_bytes} bytes, more than the {max_bytes} that one may have"
                )
            return file.read(max_bytes)

    def read_start(self, name: str, num_bytes: int) -> bytes:
        """The first bytes of a file, without reading more. Raises CorruptCheckpointError where it
        is missing."""
        file, _ = self.open_file(name)
        with file:
            return file.raw.read(num_bytes) or b""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Location) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))
