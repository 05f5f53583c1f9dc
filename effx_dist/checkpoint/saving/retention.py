"""Which checkpoints stay, and the removal of the rest without ever breaking a chain."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from effx_dist.checkpoint.format.manifest import FileRecord, ParentRecord, stated_checksum
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.places import WRITING, Folder, Location, location
from effx_dist.checkpoint.storage.steps import (
    MANIFEST,
    MERGED,
    MOMENTS_REMOVED,
    PINNED,
    REMOVING,
    SUPERSEDED,
    committed_folders,
    holds_foreign_files,
    is_moments_file,
    remove_staged,
    remove_step,
    remove_uncommitted,
    step_folder,
    step_of,
    uncommitted_folders,
)
from effx_dist.checkpoint.storage.tags import tags_of
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError

logger = logging.getLogger(__name__)


def wanted_steps(
    restorable: Iterable[int], whole: Collection[int], pinned: Iterable[int], config: ExcpConfig
) -> set[int]:
    """The steps that are kept for their own sake.

    Args:
        restorable: steps that a run could go on from if they are undamaged.
        whole: those of them that are.
        pinned: kept whatever the settings say.
        config: ``keep_latest_k`` counts back over whole steps only, and all steps from there on are
            kept: the last good one does not go for the sake of a damaged one. ``keep_every_n``
            keeps every multiple.
    """
    ordered, good = sorted(restorable), sorted(whole)
    num_latest = config.keep_latest_k
    oldest = good[-num_latest] if num_latest and num_latest <= len(good) else 0
    latest = [s for s in ordered if s >= oldest]
    every = [s for s in ordered if config.keep_every_n and s % config.keep_every_n == 0]
    return {*latest, *every, *pinned}


def with_parents(steps: Iterable[int], parent_of: Mapping[int, int | None]) -> set[int]:
    """The steps, and every one that they are differences to."""
    found: set[int] = set()
    for step in steps:
        needed: int | None = step
        while needed is not None and needed not in found:
            found.add(needed)
            needed = parent_of.get(needed)
    return found


def retire(folder: Folder, config: ExcpConfig) -> list[int]:
    """Remove the committed checkpoints that nothing keeps, newest first, so that none outlives its
    parent; and the moments of those that are kept for their weights alone.

    Called by the coordinator after a commit, when no save is under way. Every deletion leaves a
    folder in which all that stays can be read; the next call goes on where a crash cut this one
    off. Where a manifest is damaged, that step and all older ones stay: what it needs is not known.
    Returns the removed steps. Raises OSError.
    """
    if not config.keep_latest_k:
        return []
    place = location(folder)
    steps = _look(place)
    parent_of = {step: known.parent for step, known in steps.items()}
    unreadable = max((step for step, known in steps.items() if not known.is_readable), default=-1)
    wanted = wanted_steps(
        [step for step, known in steps.items() if known.has_moments],
        [step for step, known in steps.items() if known.is_whole],
        [step for step, known in steps.items() if known.is_pinned or step <= unreadable],
        config,
    )
    kept = with_parents(wanted, parent_of)
    removed: list[int] = []
    for step in sorted(steps.keys() - kept, reverse=True):
        if step_folder(place, step).has_file(PINNED):
            return removed  # pinned just now: the next call counts its parents
        remove_step(place, step)
        removed.append(step)
    for step in sorted(kept - wanted):
        _remove_moments(step_folder(place, step))
    _finish_removals(place, max(steps, default=0))
    return removed


def pin(folder: Folder, step: int, is_pinned: bool = True) -> None:
    """Keep a committed step whatever the settings say, or no longer. Raises
    CheckpointNotFoundError, also if the step was removed in the meantime."""
    place = step_folder(folder, step)
    if not is_pinned:
        place.remove_file(PINNED)
        return
    try:
        place.replace_file(PINNED, b"kept until this file is removed (effx unpin)\n")
        if place.has_file(MANIFEST):
            return
        place.remove_file(PINNED)  # a store holds it without the rest
    except FileNotFoundError:
        pass
    raise CheckpointNotFoundError(f"{place}: was removed before it could be pinned")


@dataclass(frozen=True)
class _Facts:
    """What retention needs of a manifest."""

    checksum: str
    parent: ParentRecord | None
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class _Step:
    """What there is of one committed step. ``parent``: the step whose weights it builds upon."""

    parent: int | None
    is_readable: bool
    is_pinned: bool
    """Or has a tag."""
    has_moments: bool
    has_weights: bool
    """Whether its weights can be read, those of its parents included, as far as names and sizes tell."""
    is_whole: bool
    """A run can go on from it."""


def _look(place: Location) -> dict[int, _Step]:
    """All committed steps, oldest first: parents are known when their children are looked at."""
    found: dict[int, _Step] = {}
    checksums: dict[str, str] = {}
    tagged = set(tags_of(place).values())
    for step, own in committed_folders(place).items():
        facts = _facts(own)
        if facts is not None:
            checksums[own.name] = facts.checksum
        known = _look_at(own, facts, found, checksums)
        found[step] = replace(known, is_pinned=True) if step in tagged else known
    return found


def _look_at(
    own: Location, facts: _Facts | None, older: Mapping[int, _Step], checksums: Mapping[str, str]
) -> _Step:
    # a listing that lags behind shows too few of the marks, which only makes this call keep more
    listed = own.files()
    is_pinned, has_moments = PINNED in listed, MOMENTS_REMOVED not in listed
    if facts is None:
        return _Step(None, False, is_pinned, has_moments, False, False)
    missing = _missing(own, facts, listed)
    has_weights = all(is_moments_file(name) for name in missing)
    parent = None
    if facts.parent is not None and not _is_merged(own):
        parent = step_of(facts.parent.name)
        is_same = checksums.get(facts.parent.name) == facts.parent.xxh3
        below = older.get(parent) if parent is not None else None
        has_weights = has_weights and is_same and below is not None and below.has_weights
    is_whole = has_weights and has_moments and not missing
    return _Step(parent, True, is_pinned, has_moments, has_weights, is_whole)


def _is_merged(own: Location) -> bool:
    """Whether the step also holds its weights as a base, so that the chain below it is not needed."""
    if MERGED not in own.folders() or not (own / MERGED).has_file(MANIFEST):
        return False
    merged = own / MERGED
    facts = _facts(merged)
    return facts is not None and not _missing(merged, facts, merged.files())


def _missing(place: Location, facts: _Facts, listed: Mapping[str, int]) -> list[str]:
    """Data files that are not there in their sizes. Those that the listing does not show are looked
    for by name."""
    unlisted = [file for file in facts.files if listed.get(file.name) != file.bytes]
    return [file.name for file in unlisted if place.size_of(file.name) != file.bytes]


def _facts(place: Location) -> _Facts | None:
    """What retention needs of a step's manifest; None where that is damaged."""
    try:
        return _facts_of(place, stated_checksum(place))
    except CorruptCheckpointError as error:
        logger.warning("nothing up to this checkpoint is removed: %s", error)
        return None


@lru_cache(maxsize=4096)
def _facts_of(place: Location, _checksum: str) -> _Facts:
    """Manifests do not change, and parsing one holds the interpreter lock: each is parsed once."""
    manifest, checksum = read_manifest(place)
    return _Facts(checksum, manifest.parent, tuple(manifest.files))


def _remove_moments(place: Location) -> None:
    """Only this step's own restore needs its moments, and nothing will restore it any more. What
    says so appears first."""
    names = [name for name in place.files() if is_moments_file(name)]
    if not names or place.has_file(PINNED):
        return
    if not place.has_file(MOMENTS_REMOVED):
        place.remove_unfinished()  # a mark that was cut off
        place.replace_file(MOMENTS_REMOVED, b"kept for the weights that later steps build upon\n")
    for name in names:
        place.remove_file(name)


def _finish_removals(place: Location, newest: int) -> None:
    """Remove what removals that were cut off left."""
    for name in place.folders():
        step = step_of(name)
        if name.startswith(REMOVING):
            (place / name).remove()
        elif (
            step is not None
            and step < newest  # saves only ever make newer steps
            and not place.has_rename  # a store's removal begins with the manifest
            and not (place / name).has_file(MANIFEST)
            and not holds_foreign_files(place / name)
        ):
            remove_uncommitted(place / name)


def remove_leftovers(folder: Folder) -> None:
    """Remove what saves and removals that were cut off left behind. Called by the coordinator
    before a run's first save and after a failed one, when no save is under way."""
    place = location(folder)
    for own in uncommitted_folders(place):
        remove_uncommitted(own)
    for name in place.folders():
        if name.startswith(WRITING):
            remove_staged(place / name)
        elif name.startswith(REMOVING) or _is_half_moved(place, name):
            (place / name).remove()
    place.remove_unfinished()


def _is_half_moved(place: Location, name: str) -> bool:
    """Whether a store was cut off while it copied a step that was set aside; the step is still where
    it was."""
    is_aside = name.startswith(SUPERSEDED) and not place.has_rename
    return is_aside and not (place / name).has_file(MANIFEST)


def set_aside_newer(folder: Folder, step: int) -> list[str]:
    """Rename committed checkpoints newer than ``step``, which the run went back to, out of the way
    of its new saves.

    They are kept as ``superseded-<id>-step-N``, never deleted; newest first, so that a crash in
    between leaves a whole chain. Those that have a tag stay where they are, with what they build
    upon, and are logged. Returns the new names.
    """
    place = location(folder)
    steps = _look(place)
    newer = {s for s in steps if s > step}
    tagged = newer & set(tags_of(place).values())
    staying = newer & with_parents(tagged, {s: known.parent for s, known in steps.items()})
    if staying:
        logger.warning(
            "%s: went back to step %d; newer steps with a tag stay, and what they build upon: %s",
            place,
            step,
            sorted(staying),
        )
    mark = uuid.uuid4().hex[:8]
    names = []
    for s in sorted(newer - staying, reverse=True):
        own = step_folder(place, s)
        name = f"{SUPERSEDED}{mark}-{own.name}"
        own.move(place / name, MANIFEST)
        names.append(name)
    return names
