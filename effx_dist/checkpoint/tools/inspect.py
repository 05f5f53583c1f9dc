"""Looking into a checkpoint folder: what is there."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.places import Folder, Location, location
from effx_dist.checkpoint.storage.steps import (
    MANIFEST,
    MERGED,
    MOMENTS_REMOVED,
    PINNED,
    committed_folders,
    unfinished_steps,
)
from effx_dist.checkpoint.storage.tags import tags_of
from effx_dist.errors import CheckpointNotFoundError


@dataclass(frozen=True)
class StepSummary:
    """One checkpoint in a folder; sizes in bytes, ratios raw over stored. All but ``step`` is empty
    where uncommitted."""

    step: int
    name: str = ""
    """Name of its folder."""
    tags: tuple[str, ...] = ()
    """Its other names."""
    kind: str = ""
    parent: str | None = None
    base: str | None = None
    """The base at the end of its chain of parents, which may be itself; None where that is gone."""
    profile: str = ""
    world_size: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    ratio: float = 0.0
    run_ratio: float = 0.0
    error: float | None = None
    saved_at: str = ""
    writer: str = ""
    num_tensors: int = 0
    committed: bool = False
    pinned: bool = False
    moments_removed: bool = False
    """Kept for later steps that are differences to it: its weights can be read, its moments not."""
    merged: bool = False
    """Whether it also holds its weights as a base, made from the chain that was below it."""


def inspect_folder(folder: Folder) -> list[StepSummary]:
    """Every checkpoint of a folder by step, also saves that were cut off. Reads manifests only.

    Raises CheckpointNotFoundError where there is no such folder, CorruptCheckpointError for a damaged
    manifest.
    """
    path = existing_folder(folder)
    tags = tags_of(path)
    committed = _with_bases(
        [
            _summary(own, tuple(tag for tag, tagged in tags.items() if tagged == step))
            for step, own in committed_folders(path).items()
        ]
    )
    cut_off = [StepSummary(step) for step in unfinished_steps(path)]
    return sorted(committed + cut_off, key=lambda summary: summary.step)


def _with_bases(steps: list[StepSummary]) -> list[StepSummary]:
    """The steps, oldest first, with the base of each."""
    base_of: dict[str | None, str | None] = {}
    found = []
    for summary in steps:
        name = summary.name
        is_base = summary.kind == "base" or summary.merged
        base_of[name] = name if is_base else base_of.get(summary.parent)
        found.append(replace(summary, base=base_of[name]))
    return found


def _summary(place: Location, tags: tuple[str, ...]) -> StepSummary:
    manifest, _ = read_manifest(place)
    own = ("step", "kind", "profile", "world_size", "saved_at", "writer")
    sizes = ("raw_bytes", "stored_bytes", "ratio", "run_ratio", "error")
    facts: dict[str, Any] = {name: getattr(manifest, name) for name in own}
    facts |= {name: getattr(manifest.figures, name) for name in sizes}
    return StepSummary(
        name=place.name,
        tags=tags,
        parent=None if manifest.parent is None else manifest.parent.name,
        num_tensors=len(manifest.tensors),
        committed=True,
        pinned=place.has_file(PINNED),
        moments_removed=place.has_file(MOMENTS_REMOVED),
        merged=(place / MERGED).has_file(MANIFEST),
        **facts,
    )


def existing_folder(folder: Folder) -> Location:
    """The folder of checkpoints; raises CheckpointNotFoundError where there is none."""
    path = location(folder)
    if not path.is_folder(follow_link=True) and not committed_folders(path):
        raise CheckpointNotFoundError(f"{path}: is not a folder")
    return path
