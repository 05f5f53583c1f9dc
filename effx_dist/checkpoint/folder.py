"""Names inside a checkpoint folder: ``step-N/`` with its manifest and rank files, and ``latest``.

A checkpoint exists when ``step-N/manifest.json`` exists. ``latest`` is a convenience for people and
scripts; what is newest is decided by the manifests, so a crash between the two renames changes
nothing. A step that is kept only because later ones are differences to it may have let go of its
moments; the file ``moments-removed`` then says so.
"""

from __future__ import annotations

import re
import uuid

from effx_dist.checkpoint.storage import WRITING, Folder, Location, location
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.json.sha256"
LATEST = "latest"
MOMENTS_REMOVED = "moments-removed"
PINNED = "pinned"
MERGED = "merged"
"""Inside a step: its weights once more as a base, made from the chain below it, which then may go."""
_WRITING_NAME = re.compile(WRITING + r"[0-9a-f]{8}-(.+)")
REMOVING = "removing-"
"""Begins the name of a folder on its way out."""
SUPERSEDED = "superseded-"
"""Begins the name of a checkpoint set aside because the run went back to an older one."""
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
_SIBLING = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RANK_FILE = re.compile(r"rank-[0-9]{5}(\.moments)?\.effx")
_MOMENTS = ".moments.effx"


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


def moments_file_name(rank: int) -> str:
    """Name of the file that one rank writes moments to: what only this step's own restore needs."""
    return f"rank-{rank:05d}{_MOMENTS}"


def is_moments_file(name: str) -> bool:
    """Whether a data file holds moments only."""
    return name.endswith(_MOMENTS)


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
    ``rank-NNNNN.effx`` or ``rank-NNNNN.moments.effx``."""
    if not _RANK_FILE.fullmatch(name):
        raise CorruptCheckpointError(
            f"{where}: {name!r} is not the name of a data file (rank-NNNNN.effx); "
            "the manifest was damaged or made by something else, nothing was opened"
        )
    return name


def committed_steps(folder: Folder) -> list[int]:
    """Steps of all committed checkpoints, oldest first; none where there is no folder."""
    place = location(folder)
    steps = _step_folders(place)
    if (named := _named_by_latest(place)) is not None:
        steps.add(named)  # a store's listing may not show yet what was just written
    return sorted(step for step in steps if _is_committed(place, step))


def uncommitted_steps(folder: Folder) -> list[int]:
    """Steps with a folder but without a manifest."""
    place = location(folder)
    return sorted(step for step in _step_folders(place) if not _is_committed(place, step))


def unfinished_steps(folder: Folder) -> list[int]:
    """Steps of saves that are under way, or were cut off before they were committed."""
    place = location(folder)
    writing = (_WRITING_NAME.fullmatch(name) for name in place.folders())
    named = {step for match in writing if match and (step := step_of(match[1])) is not None}
    steps = {step for step in named if not _is_committed(place, step)}
    return sorted(steps.union(uncommitted_steps(place)))


def newest_step(folder: Folder) -> int:
    """Step of the newest committed checkpoint that holds all of a run's state. Raises
    CheckpointNotFoundError where there is none."""
    place = location(folder)
    for step in reversed(committed_steps(place)):
        if not (place / step_name(step)).has_file(MOMENTS_REMOVED):
            return step
    raise CheckpointNotFoundError(f"{folder}: holds no committed checkpoint (step-N/{MANIFEST})")


def require_committed(folder: Folder, step: int) -> int:
    """``step`` itself; raises CheckpointNotFoundError naming the steps there are."""
    steps = committed_steps(folder)
    if step not in steps:
        raise CheckpointNotFoundError(
            f"{folder}: step {step} is not a committed checkpoint; there are {steps or 'none'}"
        )
    return step


def _step_folders(place: Location) -> set[int]:
    return {step for name in place.folders() if (step := step_of(name)) is not None}


def _named_by_latest(place: Location) -> int | None:
    try:
        return step_of(place.read_file(LATEST, 64).decode("ascii", "replace").strip())
    except (OSError, CorruptCheckpointError):
        return None


def _is_committed(place: Location, step: int) -> bool:
    folder = place / step_name(step)
    return folder.has_file(MANIFEST) and not folder.is_link()


def claim_step_folder(folder: Location) -> None:
    """See to it that a new checkpoint can be put there: what an earlier save left half done is
    removed.

    Raises ConfigError where a committed checkpoint already stands there.
    """
    if folder.has_file(MANIFEST):
        raise ConfigError(
            f"{folder}: holds a committed checkpoint, which is never overwritten; save under another step, "
            "or remove it first if nothing needs it"
        )
    remove_uncommitted(folder)
    for name in folder.parent.folders():
        if (match := _WRITING_NAME.fullmatch(name)) and match[1] == folder.name:
            remove_staged(folder.parent / name)


def remove_staged(folder: Location) -> None:
    """Remove what a save has put together so far. It is moved away first: a writer that is just
    about to publish it has published all of it by then, or never will."""
    away = _way_out(folder)
    try:
        folder.move(away, MANIFEST)
    except FileNotFoundError:
        return
    away.remove()


def remove_uncommitted(folder: Location) -> None:
    """Remove what an unfinished save left, unless it turns out to be a checkpoint after all.

    Where folders can be renamed it is moved away first: a writer that is still at it (another
    job's, say) then finds its folder gone instead of committing a checkpoint that is being emptied.
    """
    if not folder.has_rename:
        folder.remove()
        return
    if not folder.is_folder() or folder.has_file(MANIFEST):
        return
    away = _way_out(folder)
    folder.move(away, MANIFEST)
    if away.has_file(MANIFEST):  # committed between the look and the move
        away.move(folder, MANIFEST)
        raise ConfigError(f"{folder}: another job has just committed a checkpoint here; it stays")
    away.remove()


def remove_step(folder: Folder, step: int) -> None:
    """Remove one checkpoint so that a crash in between leaves no half checkpoint that looks whole:
    it is moved away first, or else its manifest goes first."""
    path = location(folder) / step_name(step)
    if path.has_rename:
        away = _way_out(path)
        path.move(away, MANIFEST)
        away.remove()
    else:
        path.remove_file(MANIFEST)
        path.remove()


def _way_out(folder: Location) -> Location:
    return folder.parent / f"{REMOVING}{uuid.uuid4().hex[:8]}"
