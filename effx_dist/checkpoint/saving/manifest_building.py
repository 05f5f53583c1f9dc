"""The manifest of a save, built from what all ranks report to have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from torch.distributed.checkpoint.storage import WriteResult

from effx_dist.checkpoint.format.manifest import (
    ChunkRecord,
    Figures,
    FileRecord,
    JointWeight,
    Manifest,
    TensorRecord,
    manifest_to_bytes,
)
from effx_dist.checkpoint.saving.chain import Chain
from effx_dist.checkpoint.saving.decision import Decision
from effx_dist.checkpoint.saving.quantisers import Measured
from effx_dist.config import ExcpConfig
from effx_dist.version import __version__


@dataclass(frozen=True)
class Written:
    """One rank's report of one thing written: a chunk of a tensor (its ``file`` is VALUES or
    MOMENTS), a JSON value, or the data files themselves."""

    rank: int
    content: ChunkRecord | dict[int, FileRecord] | Any


@dataclass(frozen=True)
class SaveFacts:
    """What the caller says of the save beyond the tensors."""

    step: int
    extra: Any = None
    aliases: Mapping[str, str] | None = None
    tag: str | None = None
    moves_latest: bool = True


def build_manifest(
    decision: Decision,
    measured: Mapping[str, Measured],
    results: Sequence[Sequence[WriteResult]],
    chain: Chain,
    config: ExcpConfig,
    facts: SaveFacts,
    paths: Mapping[str, Sequence[str | int]] | None = None,
) -> tuple[Manifest, bytes]:
    """The manifest of what all ranks wrote, and its bytes. Coordinator only; writes nothing.

    ``paths``: of a planner that flattens nested state dicts, where each entry stood.
    """
    reports = [r for results_of_rank in results for r in results_of_rank]
    files = _files(reports)
    index_of = {place: index for index, place in enumerate(files)}
    chunks: dict[str, list[ChunkRecord]] = {name: [] for name in decision.facts}
    values: dict[str, Any] = {}
    for result in reports:
        match result.storage_data:
            case Written() if not result.index.fqn:
                continue
            case Written(rank=rank, content=ChunkRecord() as chunk):
                file = index_of[rank, chunk.file]
                chunks[result.index.fqn].append(chunk.model_copy(update={"file": file}))
            case Written(content=value):
                values[result.index.fqn] = value
    tensors = {
        name: TensorRecord(
            dtype=str(found.dtype).removeprefix("torch."),
            shape=list(found.shape),
            coding=decision.coding_of(name, measured),
            chunks=sorted(chunks[name], key=lambda chunk: chunk.offsets),
        )
        for name, found in sorted(decision.facts.items())
    }
    errors = [t.coding.error for t in tensors.values() if isinstance(t.coding, JointWeight)]
    manifest = new_manifest(
        tensors,
        saves_since_base=_saves_since_base(decision, chain),
        error=max(errors, default=0.0),
        step=facts.step,
        kind="link" if decision.is_link else "base",
        parent=chain.parent if decision.is_link else None,
        profile=config.profile,
        world_size=decision.num_ranks,
        files=list(files.values()),
        aliases=dict(facts.aliases or {}),
        paths={name: list(path) for name, path in (paths or {}).items() if tuple(path) != (name,)},
        values=values,
        extra=facts.extra,
    )
    return with_sizes(manifest, chain.figures)


def new_manifest(
    tensors: Mapping[str, TensorRecord],
    *,
    saves_since_base: int = 0,
    error: float = 0,
    **fields: Any,
) -> Manifest:
    """A manifest of this moment and this version, whose stored sizes are still to be counted by
    :func:`with_sizes`. ``fields``: the others of :class:`Manifest`."""
    return Manifest(
        saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        writer=f"effx-dist {__version__}",
        figures=Figures(
            raw_bytes=sum(tensor.raw_bytes for tensor in tensors.values()),
            stored_bytes=0,
            run_raw_bytes=0,
            run_stored_bytes=0,
            saves_since_base=saves_since_base,
            error=error,
        ),
        tensors=dict(tensors),
        **fields,
    )


def _files(reports: Sequence[WriteResult]) -> dict[tuple[int, int], FileRecord]:
    """All data files, by rank and by VALUES or MOMENTS, in that order."""
    found = {
        (report.storage_data.rank, key): record
        for report in reports
        if not report.index.fqn
        for key, record in report.storage_data.content.items()
    }
    return dict(sorted(found.items()))


def _saves_since_base(decision: Decision, chain: Chain) -> int:
    if not decision.is_link or chain.figures is None:
        return 0
    return chain.figures.saves_since_base + 1


def _bytes_since_base(
    manifest: Manifest, stored_bytes: int, before: Figures | None
) -> dict[str, int]:
    if manifest.kind == "base" or before is None:
        return {"base_bytes": stored_bytes, "links_bytes": 0}
    return {"base_bytes": before.base_bytes, "links_bytes": before.links_bytes + stored_bytes}


def with_sizes(manifest: Manifest, before: Figures | None) -> tuple[Manifest, bytes]:
    """Fill in the stored sizes, which count the manifest itself: repeated until its length stands
    still."""
    data_bytes = sum(file.bytes for file in manifest.files)
    content = manifest_to_bytes(manifest)
    while True:
        stored_bytes = data_bytes + len(content)
        figures = manifest.figures.model_copy(
            update={
                "stored_bytes": stored_bytes,
                "run_raw_bytes": manifest.figures.raw_bytes
                + (before.run_raw_bytes if before else 0),
                "run_stored_bytes": stored_bytes + (before.run_stored_bytes if before else 0),
                **_bytes_since_base(manifest, stored_bytes, before),
            }
        )
        manifest = manifest.model_copy(update={"figures": figures})
        again = manifest_to_bytes(manifest)
        if len(again) == len(content):
            return manifest, again
        content = again
