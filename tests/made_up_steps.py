"""Committed checkpoints without tensors: what retention and the names in a folder are tested on."""

from __future__ import annotations

from collections.abc import Mapping

from effx_dist.checkpoint.format.manifest import (
    Figures,
    FileRecord,
    Manifest,
    ParentRecord,
    manifest_checksum,
    manifest_to_bytes,
)
from effx_dist.checkpoint.format.manifest_checks import write_manifest
from effx_dist.checkpoint.storage.places import Folder, location
from effx_dist.checkpoint.storage.steps import MANIFEST, step_name

WEIGHTS, MOMENTS = "rank-00000.effx", "rank-00000.moments.effx"
FILES = {WEIGHTS: 5, MOMENTS: 7}


def make_step(
    folder: Folder,
    step: int,
    parent: int | None = None,
    files: Mapping[str, int] = FILES,
    at: str | None = None,
) -> None:
    """A committed step with data files of so many bytes; ``at``: its folder's name if not step-N."""
    place = location(folder)
    above = None
    if parent is not None:
        path = place / step_name(parent) / MANIFEST
        content = (place / step_name(parent)).read_file(MANIFEST, 2**20)
        above = ParentRecord(name=step_name(parent), xxh3=manifest_checksum(content, path))
    sizes = ("raw_bytes", "stored_bytes", "run_raw_bytes", "run_stored_bytes")
    figures = Figures(**dict.fromkeys(sizes, 0), saves_since_base=0, error=0)
    manifest = Manifest(
        step=step,
        kind="base" if parent is None else "link",
        parent=above,
        profile="balanced",
        world_size=1,
        saved_at="2026-01-01T00:00:00+00:00",
        writer="a test",
        files=[FileRecord(name=name, bytes=size) for name, size in files.items()],
        figures=figures,
        tensors={},
    )
    own = place / (at or step_name(step))
    own.make()
    for name, size in files.items():
        file = own.create_file(name)
        file.write(b"\0" * size)
        file.commit()
    write_manifest(own, manifest_to_bytes(manifest))


def make_chain(folder: Folder, parent_of: Mapping[int, int | None]) -> None:
    """Steps, oldest first, each with its parent or none."""
    for step, parent in parent_of.items():
        make_step(folder, step, parent)
