"""Names inside a checkpoint folder: ``step-N/`` with its manifest and rank files, and ``latest``.

A checkpoint exists when ``step-N/manifest.json`` exists, or ``global_stepN/manifest.json``: a step's
folder has one of the two names, and one run's may be mixed. ``latest`` is a convenience for people and
scripts; what is newest is decided by the manifests, so a crash between the two renames changes
nothing. A step that is kept only because later ones are differences to it may have let go of its
moments; the file ``moments-removed`` then says so.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Literal, get_args

from effx_dist.checkpoint.storage.local_folder import STAGED
from effx_dist.checkpoint.storage.places import WRITING, Folder, Location, location
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError

MANIFEST = "manifest.json"
MANIFEST_SHA256 = "manifest.json.sha256"
LATEST = "latest"
MOMENTS_REMOVED = "moments-removed"
PINNED = "pinned"
TAG = "tag.json"
"""The file, in a folder that has a tag's name, that says which step the tag stands for."""
MERGED = "merged"
"""The folder inside a step that also holds its weights as a base, made from the chain below it; the chain
may then be removed."""
WRITING_NAME = re.compile(WRITING + r"[0-9a-f]{8}-(.+)")
REMOVING = "removing-"
"""The beginning of a folder's name while the folder is being removed."""
SUPERSEDED = "superseded-"
"""The beginning of a checkpoint's name after it was set aside because the run went back to an older one."""
StepPrefix = Literal["step-", "global_step"]
"""The beginning of a step folder's name: this library's own, and DeepSpeed's."""
STEP_PREFIXES: tuple[StepPrefix, ...] = get_args(StepPrefix)
_STEP_NAME = re.compile(rf"(?:{'|'.join(STEP_PREFIXES)})(0|[1-9][0-9]{{0,17}})")
_SIBLING = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_RANK_FILE = re.compile(r"rank-[0-9]{5}(\.moments)?\.effx")
_OWN_FILES = frozenset({MANIFEST, MANIFEST_SHA256, MOMENTS_REMOVED, PINNED})
_MOMENTS = ".moments.effx"


def step_name(step: int, prefix: StepPrefix = "step-") -> str:
    """Folder name of a new checkpoint of ``step``. Raises ConfigError for what is no step or prefix."""
    if step < 0:
        raise ConfigError(f"{step=}: must be >= 0, the number of optimizer steps taken")
    if prefix not in STEP_PREFIXES:
        raise ConfigError(f"step_prefix={prefix!r}: must be one of {list(STEP_PREFIXES)}")
    return f"{prefix}{step}"


def step_of(name: str) -> int | None:
    """The step of a folder's name, either of the two, or None where it is not one."""
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


def is_own_file(name: str) -> bool:
    """Whether a save here writes files of this name into a step's folder, whole or half written."""
    is_whole = name in _OWN_FILES or _RANK_FILE.fullmatch(name) is not None
    return is_whole or name.endswith(STAGED)


_MAX_TAG_BYTES = 4096


def committed_folders(folder: Folder) -> dict[int, Location]:
    """The folders of all committed checkpoints by step, oldest first; none where there is no
    folder."""
    place = location(folder)
    names = {name for name in place.folders() if step_of(name) is not None}
    names |= _named_by_latest(place)  # a store's listing may not show yet what was just written
    steps = {step_of(name): place / name for name in sorted(names) if _is_committed(place / name)}
    return {step: steps[step] for step in sorted(step for step in steps if step is not None)}


def committed_steps(folder: Folder) -> list[int]:
    """Steps of all committed checkpoints, oldest first; none where there is no folder."""
    return list(committed_folders(folder))


def step_folder(folder: Folder, step: int) -> Location:
    """The folder of a step's committed checkpoint, whichever of its names it has. Raises
    CheckpointNotFoundError naming the steps there are."""
    place = location(folder)
    found = [place / step_name(step, prefix) for prefix in STEP_PREFIXES if step >= 0]
    committed = [own for own in found if _is_committed(own)]
    if committed:
        return committed[0]
    raise CheckpointNotFoundError(
        f"{folder}: step {step} is not a committed checkpoint; there are "
        f"{committed_steps(place) or 'none'}"
    )


def uncommitted_folders(folder: Folder) -> list[Location]:
    """Folders of steps without a manifest. Those that hold somebody else's files do not
    count: DeepSpeed gives its own checkpoints the same names."""
    place = location(folder)
    found = [place / name for name in place.folders() if step_of(name) is not None]
    return [own for own in found if not _is_committed(own) and not holds_foreign_files(own)]


def uncommitted_steps(folder: Folder) -> list[int]:
    """Steps with a folder but without a manifest."""
    return sorted(
        {step for own in uncommitted_folders(folder) if (step := step_of(own.name)) is not None}
    )


def holds_foreign_files(step: Location) -> bool:
    """Whether a step's folder holds files that no save here writes."""
    return not all(is_own_file(name) for name in step.files())


def refuse_foreign_files(step: Location) -> None:
    """Raise ConfigError where a checkpoint cannot be put in a folder without removing them."""
    if holds_foreign_files(step):
        raise ConfigError(
            f"{step}: holds files that this library does not write, such as DeepSpeed's own checkpoint "
            "of that step, which stays; save another step, or to another folder"
        )


def tagged_step(folder: Folder, tag: str) -> int | None:
    """The step that a tag stands for, committed or not; None where there is no such tag. Raises
    CorruptCheckpointError for one that names none."""
    place = location(folder) / checked_sibling_name(tag, f"{folder}: tag")
    if not place.has_file(TAG):
        return None
    try:
        step = json.loads(place.read_file(TAG, _MAX_TAG_BYTES))["step"]
    except (ValueError, TypeError, LookupError, RecursionError):
        step = None
    if type(step) is not int or step < 0:
        raise CorruptCheckpointError(
            f"{place / TAG}: does not name a step; save under this tag again"
        )
    return step


def unfinished_steps(folder: Folder) -> list[int]:
    """Steps of saves that are under way, or were cut off before they were committed."""
    place = location(folder)
    writing = (WRITING_NAME.fullmatch(name) for name in place.folders())
    named = {step for match in writing if match and (step := step_of(match[1])) is not None}
    return sorted(named.union(uncommitted_steps(place)) - committed_folders(place).keys())


def newest_step(folder: Folder) -> int:
    """Step of the newest committed checkpoint that holds all of a run's state. Raises
    CheckpointNotFoundError where there is none."""
    place = location(folder)
    for step, own in reversed(committed_folders(place).items()):
        if not own.has_file(MOMENTS_REMOVED):
            return step
    raise CheckpointNotFoundError(f"{folder}: holds no committed checkpoint (step-N/{MANIFEST})")


def require_committed(folder: Folder, step: int) -> int:
    """``step`` itself; raises CheckpointNotFoundError naming the steps there are."""
    step_folder(folder, step)
    return step


def _named_by_latest(place: Location) -> set[str]:
    """Names that the step's folder may have."""
    try:
        name = place.read_file(LATEST, 256).decode("ascii", "replace").strip()
        if step_of(name) is not None:
            return {name}
        step = tagged_step(place, name)
    except (OSError, CorruptCheckpointError):
        return set()
    return set() if step is None else {step_name(step, prefix) for prefix in STEP_PREFIXES}


def _is_committed(step: Location) -> bool:
    return step.has_file(MANIFEST) and not step.is_link()


def claim_step_folder(folder: Location) -> None:
    """See to it that a new checkpoint can be put there: what an earlier save left half done is
    removed.

    Raises ConfigError where a committed checkpoint already stands there.
    """
    step = step_of(folder.name)
    names = {folder.name} if step is None else {step_name(step, p) for p in STEP_PREFIXES}
    for other in (folder.parent / name for name in sorted(names)):
        if other.has_file(MANIFEST):
            raise ConfigError(
                f"{other}: holds a committed checkpoint, which is never overwritten; save under another "
                "step, or remove it first if nothing needs it"
            )
    refuse_foreign_files(folder)
    remove_uncommitted(folder)
    for name in folder.parent.folders():
        if (match := WRITING_NAME.fullmatch(name)) and match[1] == folder.name:
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
    path = step_folder(folder, step)
    if path.has_rename:
        away = _way_out(path)
        path.move(away, MANIFEST)
        away.remove()
    else:
        path.remove_file(MANIFEST)
        path.remove()


def _way_out(folder: Location) -> Location:
    return folder.parent / f"{REMOVING}{uuid.uuid4().hex[:8]}"
