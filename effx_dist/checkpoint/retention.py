"""Which checkpoints stay, and the removal of the rest without ever breaking a chain."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from effx_dist.checkpoint.folder import (
    MANIFEST,
    committed_steps,
    remove_step,
    step_name,
    step_of,
    sync_folder,
    uncommitted_steps,
)
from effx_dist.checkpoint.reader import read_manifest
from effx_dist.config import ExcpConfig


def steps_to_keep(
    steps: Iterable[int], parent_of: dict[int, int | None], config: ExcpConfig
) -> set[int]:
    """The newest ``keep_latest_k`` steps, every multiple of ``keep_every_n``, and every parent that
    one of them needs."""
    ordered = sorted(steps)
    latest = ordered[-config.keep_latest_k :] if config.keep_latest_k else ordered
    every = [s for s in ordered if config.keep_every_n and s % config.keep_every_n == 0]
    kept: set[int] = set()
    for step in (*latest, *every):
        needed: int | None = step
        while needed is not None and needed not in kept:
            kept.add(needed)
            needed = parent_of.get(needed)
    return kept


def retire(folder: Path, config: ExcpConfig) -> list[int]:
    """Remove the committed checkpoints that nothing keeps, newest first, so that none outlives its
    parent.

    Called by the coordinator after a commit, when no save is under way. Returns the removed steps.
    """
    if not config.keep_latest_k:
        return []
    steps = committed_steps(folder)
    parent_of = {step: _parent_step(folder, step) for step in steps}
    kept = steps_to_keep(steps, parent_of, config)
    removed = [step for step in reversed(steps) if step not in kept]
    for step in removed:
        remove_step(folder, step)
    return removed


def _parent_step(folder: Path, step: int) -> int | None:
    status = (folder / step_name(step) / MANIFEST).stat()
    return _read_parent_step(folder / step_name(step), status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4096)
def _read_parent_step(path: Path, _mtime_ns: int, _size: int) -> int | None:
    """Manifests do not change, and parsing one holds the interpreter lock: each is read once."""
    manifest, _ = read_manifest(path)
    return None if manifest.parent is None else step_of(manifest.parent.name)


def remove_leftovers(folder: Path) -> None:
    """Remove what saves that were cut off left behind. Called by the coordinator before a run's
    first save."""
    for step in uncommitted_steps(folder):
        shutil.rmtree(folder / step_name(step))


def set_aside_newer(folder: Path, step: int) -> list[str]:
    """Rename committed checkpoints newer than ``step``, which the run went back to, out of the way
    of its new saves.

    They are kept as ``superseded-<id>-step-N``, never deleted; newest first, so that a crash in
    between leaves a whole chain. Returns the new names.
    """
    mark = uuid.uuid4().hex[:8]
    names = []
    for newer in reversed([s for s in committed_steps(folder) if s > step]):
        name = f"superseded-{mark}-{step_name(newer)}"
        (folder / step_name(newer)).rename(folder / name)
        names.append(name)
    if names:
        sync_folder(folder)
    return names
