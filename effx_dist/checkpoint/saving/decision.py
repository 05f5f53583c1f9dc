"""What a save will be, decided once by the coordinator; and the manifest that all ranks' results
add up to."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from effx_dist import __version__
from effx_dist.checkpoint.format.manifest import (
    ChunkRecord,
    Coding,
    Delta,
    Figures,
    FileRecord,
    JointMoment,
    JointSecondMoment,
    JointWeight,
    Manifest,
    Planes,
    TensorRecord,
    manifest_to_bytes,
)
from effx_dist.checkpoint.saving.chain import Chain, Key
from effx_dist.checkpoint.saving.planners import facts_of_plans
from effx_dist.checkpoint.saving.quantisers import JointSpec, Measured
from effx_dist.checkpoint.state.joints import Joint, TensorFacts, find_joints, is_chained
from effx_dist.config import ExcpConfig

LOSSLESS = "lossless"


@dataclass(frozen=True)
class LocalState:
    """What one rank could go on from: checkpoints it has references of, and the boxes it lacks them
    for."""

    ids: tuple[str | None, ...]
    unreferenced: frozenset[Key]


@dataclass(frozen=True)
class Decision:
    """What this save is, the same on every rank but for ``rank``, the index of the rank's data
    file."""

    id: str
    parent_id: str | None
    unreferenced: frozenset[str]
    specs: tuple[JointSpec, ...]
    facts: Mapping[str, TensorFacts]
    rank: int
    num_ranks: int

    @property
    def is_link(self) -> bool:
        """Whether weights are stored as differences to a parent."""
        return self.parent_id is not None

    @cached_property
    def _joint_of(self) -> dict[str, Joint]:
        return {name: spec.joint for spec in self.specs for name in spec.joint.names}

    def coding_of(self, name: str, measured: Mapping[str, Measured]) -> Coding:
        """How a whole tensor is stored: as part of a quantised joint, as a lossless difference, or
        as it is."""
        joint = self._joint_of.get(name)
        if joint is not None and joint.weight in measured:
            return _joint_coding(name, joint, measured[joint.weight])
        chained = is_chained(name, self.facts[name]) and name not in self.unreferenced
        return Delta() if self.is_link and chained else Planes()


def _joint_coding(name: str, joint: Joint, measured: Measured) -> Coding:
    if name == joint.weight:
        return JointWeight(quantiser=measured.quantiser.to_json(), error=measured.error)
    if name == joint.exp_avg:
        return JointMoment(weight=joint.weight, exp_avg_sq=joint.exp_avg_sq)
    return JointSecondMoment(weight=joint.weight, exp_avg=joint.exp_avg)


def decide(plans: Sequence[SavePlan], chain: Chain, config: ExcpConfig) -> list[Decision]:
    """One decision per rank, from all ranks' plans, whose ``storage_data`` is their LocalState.
    Coordinator only.

    The save is a link if every rank holds references of the coordinator's last committed checkpoint
    and the base is not due; else a base.
    """
    states: list[LocalState] = [plan.storage_data for plan in plans]
    shared = chain.id is not None and all(chain.id in state.ids for state in states)
    parent_id = chain.id if shared and not _is_base_due(chain.figures, config) else None
    unreferenced = frozenset(
        item.index.fqn
        for plan in plans
        for item in plan.items  # of replicas, only the rank that writes needs a reference
        if (item.index.fqn, tuple(item.index.offset or ())) in plan.storage_data.unreferenced
    )
    facts = facts_of_plans(plans)
    specs: tuple[JointSpec, ...] = ()
    if parent_id is not None and config.profile != LOSSLESS:
        boxes_by_rank = [_boxes_by_name(plan) for plan in plans]
        specs = tuple(
            JointSpec(joint, math.prod(facts[joint.weight].shape))
            for joint in find_joints(facts)
            if joint.weight not in unreferenced and _is_together(joint, boxes_by_rank)
        )
    identity = uuid.uuid4().hex
    return [
        Decision(identity, parent_id, unreferenced, specs, facts, rank, len(plans))
        for rank in range(len(plans))
    ]


def _is_base_due(before: Figures | None, config: ExcpConfig) -> bool:
    """By the number of saves since the last base, or by what they take up in units of it."""
    if before is None or before.saves_since_base + 1 >= config.base_every:
        return True
    size = config.base_every_size
    return size is not None and before.links_bytes >= size * before.base_bytes


def _boxes_by_name(plan: SavePlan) -> dict[str, set[tuple[torch.Size, torch.Size]]]:
    """Offsets and sizes of the boxes that a rank writes of each tensor."""
    found: dict[str, set[tuple[torch.Size, torch.Size]]] = {}
    for item in plan.items:
        if item.tensor_data is not None:
            chunk = item.tensor_data.chunk
            found.setdefault(item.index.fqn, set()).add((chunk.offsets, chunk.sizes))
    return found


def _is_together(joint: Joint, boxes_by_rank: Sequence[Mapping[str, object]]) -> bool:
    """Whether each rank writes the same boxes of the weight and of its moments.

    A planner that spreads replicated tensors without regard to their partners does not; such joints
    stay lossless.
    """
    return all(
        boxes.get(name) == boxes.get(joint.weight)
        for boxes in boxes_by_rank
        for name in joint.names
    )


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
