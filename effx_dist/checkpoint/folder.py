"""Names inside a checkpoint folder: ``step-N/`` with its manifest and rank files, and ``latest``.

A checkpoint exists when ``step-N/manifest.json`` exists. ``latest`` is a convenience for people and
scripts; what is newest is decided by the manifests, so a crash between the two renames changes
nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError

MANIFEST = "manifest.json"
LATEST = "latest"
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_SIBLING = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RANK_FILE = re.compile(r"rank-[0-9]{5}\.effx")


def local_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder as a local path. Raises ConfigError for a URL: only local folders are written so
    far."""
    text = os.fspath(folder)
    if "://" in text:
        raise ConfigError(
            f"checkpoint folder {text!r}: must be a local path in this version, not a URL"
        )
    return Path(text)


def step_name(step: int) -> str:
    """Folder name of the checkpoint of ``step``."""
    if step < 0:
        raise ConfigError(f"{step=}: must be >= 0, the number of optimizer steps taken")
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """The step of a folder name, or None where it is not one."""
    match = _STEP_NAME.fullmatch(name)
    return int(match[1]) if match else None


def rank_file_name(rank: int) -> str:
    """Name of the file that one rank writes."""
    return f"rank-{rank:05d}.effx"


def checked_sibling_name(name: str, where: str) -> str:
    """A checkpoint folder's name read from a file; raises CorruptCheckpointError for what could
    leave the folder."""
    if not _SIBLING.fullmatch(name):
        raise CorruptCheckpointError(
            f"{where}: {name!r} is not the name of a checkpoint beside it; nothing was opened"
        )
    return name


def checked_rank_file_name(name: str, where: str) -> str:
    """A data file's name read from a manifest; raises CorruptCheckpointError for anything but
    ``rank-NNNNN.effx``."""
    if not _RANK_FILE.fullmatch(name):
        raise CorruptCheckpointError(
            f"{where}: {name!r} is not the name of a data file (rank-NNNNN.effx); "
            "the manifest was damaged or made by something else, nothing was opened"
        )
    return name


def committed_steps(folder: Path) -> list[int]:
    """Steps of all committed checkpoints, oldest first; none where there is no folder."""
    return sorted(step for step in _step_folders(folder) if _is_committed(folder, step))


def uncommitted_steps(folder: Path) -> list[int]:
    """Steps whose save was cut off before its manifest appeared."""
    return sorted(step for step in _step_folders(folder) if not _is_committed(folder, step))


def newest_step(folder: Path) -> int:
    """Step of the newest committed checkpoint. Raises CheckpointNotFoundError where there is
    none."""
    steps = committed_steps(folder)
    if not steps:
        raise CheckpointNotFoundError(
            f"{folder}: holds no committed checkpoint (step-N/{MANIFEST})"
        )
    return steps[-1]


def require_committed(folder: Path, step: int) -> int:
    """``step`` itself; raises CheckpointNotFoundError naming the steps there are."""
    steps = committed_steps(folder)
    if step not in steps:
        raise CheckpointNotFoundError(
            f"{folder}: step {step} is not a committed checkpoint; there are {steps or 'none'}"
        )
    return step


def _step_folders(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir(follow_symlinks=False)]
    return [step for name in names if (step := step_of(name)) is not None]


def _is_committed(folder: Path, step: int) -> bool:
    return (folder / step_name(step) / MANIFEST).is_file()


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that it appears at once or not at all: temporary name, fsync, rename,
    fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim_step_folder(path: Path) -> None:
    """Make the empty folder of a new checkpoint, durably; what an earlier save left half done there
    is removed.

    Raises ConfigError where a committed checkpoint already stands there.
    """
    if (path / MANIFEST).exists():
        raise ConfigError(
            f"{path}: holds a committed checkpoint, which is never overwritten; save under another step, "
            "or remove it first if nothing needs it"
        )
    if path.exists():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    sync_folder(path.parent)


def remove_step(folder: Path, step: int) -> None:
    """Remove one checkpoint: its manifest first, so that a crash in between leaves no half
    checkpoint that looks whole."""
    path = folder / step_name(step)
    (path / MANIFEST).unlink(missing_ok=True)
    sync_folder(path)
    shutil.rmtree(path)
