"""Looking into a checkpoint folder: what is there, and whether every byte is what was written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from effx_dist.checkpoint.folder import (
    committed_steps,
    local_folder,
    require_committed,
    step_name,
    uncommitted_steps,
)
from effx_dist.checkpoint.manifest import Manifest
from effx_dist.checkpoint.reader import StepReader, read_manifest
from effx_dist.errors import CheckpointNotFoundError, EffxError


@dataclass(frozen=True)
class StepSummary:
    """One checkpoint in a folder; sizes in bytes, ratios raw over stored. All but ``step`` is empty
    where uncommitted."""

    step: int
    kind: str = ""
    parent: str | None = None
    profile: str = ""
    world_size: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    ratio: float = 0.0
    run_ratio: float = 0.0
    error: float | None = None
    saved_at: str = ""
    num_tensors: int = 0
    committed: bool = False


def inspect_folder(folder: str | Path) -> list[StepSummary]:
    """Every checkpoint of a folder by step, also saves that were cut off. Reads manifests only.

    Raises CheckpointNotFoundError for a folder that is none, CorruptCheckpointError for a damaged
    manifest.
    """
    path = _existing(folder)
    committed = [_summary(read_manifest(path / step_name(s))[0]) for s in committed_steps(path)]
    cut_off = [StepSummary(step) for step in uncommitted_steps(path)]
    return sorted(committed + cut_off, key=lambda summary: summary.step)


def _summary(manifest: Manifest) -> StepSummary:
    figures = manifest.figures
    return StepSummary(
        step=manifest.step,
        kind=manifest.kind,
        parent=None if manifest.parent is None else manifest.parent.name,
        profile=manifest.profile,
        world_size=manifest.world_size,
        raw_bytes=figures.raw_bytes,
        stored_bytes=figures.stored_bytes,
        ratio=figures.ratio,
        run_ratio=figures.run_ratio,
        error=figures.error,
        saved_at=manifest.saved_at,
        num_tensors=len(manifest.tensors),
        committed=True,
    )


@dataclass
class VerifyReport:
    """What was read and what is wrong with it; no findings means that every committed byte is as
    written."""

    num_steps: int = 0
    num_blocks: int = 0
    num_bytes: int = 0
    findings: list[str] = field(default_factory=list)


def verify_folder(folder: str | Path, step: int | None = None) -> VerifyReport:
    """Check manifests, parents, files and the checksum of every block of all committed steps, or of
    one and its parents.

    Findings are collected, not raised. Raises CheckpointNotFoundError where there is nothing to
    verify.
    """
    path = _existing(folder)
    steps = committed_steps(path)
    if step is not None:
        steps = [require_committed(path, step)]
    if not steps:
        raise CheckpointNotFoundError(f"{path}: holds no committed checkpoint")
    report = VerifyReport()
    names = [step_name(s) for s in steps]
    seen: set[str] = set()
    while names:
        name = names.pop(0)
        if name not in seen:
            seen.add(name)
            names += _verify_step(path / name, report)
    return report


def _verify_step(folder: Path, report: VerifyReport) -> list[str]:
    """Verify one step into ``report``; returns the name of its parent, to be verified too."""
    report.num_steps += 1
    try:
        reader = StepReader(folder)
    except EffxError as error:
        report.findings.append(str(error))
        return []
    for file in reader.files:
        try:
            file.open()
        except EffxError as error:
            report.findings.append(str(error))
    for name, record in reader.manifest.tensors.items():
        for chunk in record.chunks:
            for index, block in enumerate(chunk.blocks):
                report.num_blocks += 1
                report.num_bytes += block.length
                try:
                    reader.files[chunk.file].read(block, name, index)
                except EffxError as error:
                    if str(error) not in report.findings:
                        report.findings.append(str(error))
    for file in reader.files:
        file.close()
    return _verify_parent(folder, reader.manifest, report)


def _verify_parent(folder: Path, manifest: Manifest, report: VerifyReport) -> list[str]:
    parent = manifest.parent
    if parent is None:
        return []
    try:
        _, checksum = read_manifest(folder.parent / parent.name)
    except EffxError as error:
        report.findings.append(f"{folder}: its parent cannot be read: {error}")
        return []
    if checksum != parent.xxh3:
        report.findings.append(
            f"{folder}: its parent {parent.name} is not the checkpoint it was made against; it was replaced"
        )
    return [parent.name]


def _existing(folder: str | Path) -> Path:
    path = local_folder(folder)
    if not path.is_dir():
        raise CheckpointNotFoundError(f"{path}: is not a folder")
    return path
