"""ExcpWriter: a torch.distributed.checkpoint storage writer of compressed, chained checkpoints."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata, SavePlan, StorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from effx_dist.checkpoint.format.block_files import BlockReader, RankFiles
from effx_dist.checkpoint.format.chunks import ChunkEncoder, JointPieces
from effx_dist.checkpoint.format.manifest import (
    ChunkRecord,
    Delta,
    FileRecord,
    Manifest,
    ParentRecord,
    manifest_checksum,
    sha256_line,
    stated_checksum,
)
from effx_dist.checkpoint.format.manifest_checks import (
    check_chunk,
    refused_by_readers,
    write_manifest,
)
from effx_dist.checkpoint.saving.chain import Chain, Key
from effx_dist.checkpoint.saving.decision import LOSSLESS, Decision, LocalState, decide
from effx_dist.checkpoint.saving.manifest_building import SaveFacts, Written, build_manifest
from effx_dist.checkpoint.saving.old_torch import SafeStaging
from effx_dist.checkpoint.saving.quantisers import Measured, measure
from effx_dist.checkpoint.state.fragment import checked_dtype
from effx_dist.checkpoint.state.joints import TensorFacts, is_chained, is_moment
from effx_dist.checkpoint.state.tree import parse_value
from effx_dist.checkpoint.storage.places import Location, location
from effx_dist.checkpoint.storage.steps import (
    LATEST,
    MANIFEST,
    MANIFEST_SHA256,
    claim_step_folder,
    step_of,
)
from effx_dist.checkpoint.storage.tags import point_to
from effx_dist.config import ExcpConfig
from effx_dist.core.excp import PROFILES
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from effx_dist.shard import Box, Group, SoloGroup, as_group, separate_group

logger = logging.getLogger(__name__)

LocalPieces = dict[Key, tuple[Box, torch.Tensor]]


class ExcpWriter(SafeStaging, StorageWriter):
    """Writes one checkpoint per save: a base (everything losslessly) or a link (differences to the
    last one).

    Use one writer for a run's saves and name each save's folder by ``checkpoint_id``, all beside
    each other; or make one writer per save and hand the same :class:`Chain` to all of them. Without
    a chain every save is a base.

    Args:
        path: the checkpoint's own folder, ``.../step-N``: a local path or an fsspec URL.
        config: profile, base_every, max_error.
        chain: what the next save is a difference against; updated by saves that were committed.
        group: the ranks that save, for the merging of statistics while the data are written, in
            the thread that saves. None: a group of all ranks made here that nothing else uses
            (collective: make the writer on every rank).
        facts: step (default: from the folder's name), JSON ``extra`` and name aliases for the
            manifest; the tag that is to name it, and whether ``latest`` does.
        before_commit: called by the coordinator when all else is done; what it raises fails the save.
        owns_tensors: the tensors are copies that the writer may overwrite with their
            reconstruction.
        allow_opaque_bytes: keep what a planner hands over for non-tensors, such as the pickles of the
            stock one, unread and marked in the manifest, 16 MiB an entry at most. False: refuse what
            is not JSON.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: ExcpConfig | None = None,
        *,
        chain: Chain | None = None,
        group: Group | None = None,
        facts: SaveFacts | None = None,
        before_commit: Callable[[], None] | None = None,
        owns_tensors: bool = False,
        allow_opaque_bytes: bool = False,
    ) -> None:
        super().__init__()
        self.config = config or ExcpConfig()
        self.chain = chain if chain is not None else Chain()
        self.manifest: Manifest | None = None
        self._group: Group | None = group or separate_group()
        self._facts = facts
        self._before_commit = before_commit
        self._owns_tensors = owns_tensors
        self._allow_opaque_bytes = allow_opaque_bytes
        self._measured: dict[str, Measured] = {}
        self._decision: Decision | None = None
        self.path = location(path)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.path = location(checkpoint_id)
        self._measured, self._decision, self.manifest = {}, None, None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            claim_step_folder(self.path)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.tensor_data is not None:
                checked_dtype(item.index.fqn, item.tensor_data.properties.dtype)
        unreferenced = frozenset(
            (item.index.fqn, _box(item).offsets)
            for item in plan.items
            if _is_chained(item) and not self._has_reference(item)
        )
        state = LocalState((self.chain.id, self.chain.pending_id), unreferenced)
        return dataclasses.replace(plan, storage_data=state)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        decisions = decide(plans, self.chain if self._has_parent() else Chain(), self.config)
        self._staging(decisions[0]).make()
        return [
            dataclasses.replace(plan, storage_data=decision)
            for plan, decision in zip(plans, decisions, strict=True)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Encode and write this rank's items, durably. Statistics are merged over the group
        (collective)."""
        decision = self._decision = plan.storage_data
        _refuse_stock_caching(planner)
        group = as_group(self._group) if self._merges(decision) else SoloGroup()
        pieces, results = group.everywhere(  # a rank whose planner fails must not be waited for
            lambda: self._resolve(plan.items, planner, decision), keep_own_error=False
        )
        self.chain.conclude(decision.parent_id if decision.is_link else self.chain.id)
        joint_pieces = self._joint_pieces(decision, pieces)
        self._measured = self._measure(decision, joint_pieces)
        reconstruction: dict[Key, torch.Tensor] = {}
        with RankFiles(self._staging(decision), decision.rank) as files:
            encoder = ChunkEncoder(files, self.config.encoder_threads)
            for key, chunk in self._encode(encoder, decision, pieces, joint_pieces, reconstruction):
                results.append(_result(key, decision.rank, chunk))
        self._check_written(decision, results, files.records())
        results.append(_result(("", ()), decision.rank, files.records()))
        self.chain.begin(decision.id, reconstruction)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _check_written(
        self, decision: Decision, results: list[WriteResult], files: dict[int, FileRecord]
    ) -> None:
        """What a reader checks of this rank's chunks and files. Raises UnreadableSaveError."""
        staging, records = self._staging(decision), [files[key] for key in sorted(files)]
        index_of = {key: index for index, key in enumerate(sorted(files))}
        with refused_by_readers(staging):
            for record in records:
                with closing(BlockReader(staging, record)) as file:
                    file.open()
            for result in results:
                content = result.storage_data.content
                if isinstance(content, ChunkRecord):
                    name = result.index.fqn
                    dtype = str(decision.facts[name].dtype).removeprefix("torch.")
                    coding = decision.coding_of(name, self._measured)
                    of_file = records[index_of.get(content.file, 0)]
                    check_chunk(f"tensor {name!r}", dtype, coding, content, of_file)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit: the manifest, the folder by rename, then ``latest``. Called on the coordinator
        after every rank succeeded."""
        assert self._decision is not None
        facts = self._facts or SaveFacts(step=step_of(self.path.name) or 0)
        self.manifest, content = build_manifest(
            self._decision,
            self._measured,
            results,
            self.chain,
            self.config,
            facts,
            metadata.planner_data,
        )
        staging = self._staging(self._decision)
        if self.config.manifest_sha256:
            staging.replace_file(MANIFEST_SHA256, sha256_line(content))
        if self._before_commit is not None:
            self._before_commit()
        if self._decision.is_link and not self._has_parent():
            raise CheckpointNotFoundError(
                f"{self.path}: the checkpoint that it is a difference to was removed by another job; "
                "the next save stores everything"
            )
        write_manifest(staging, content, self.manifest)
        staging.publish(self.path)
        checksum = manifest_checksum(content, self.path / MANIFEST)
        self.chain.parent = ParentRecord(name=self.path.name, xxh3=checksum)
        self.chain.figures = self.manifest.figures
        self.chain.conclude(self._decision.id)
        try:
            point_to(self.path, facts.tag, facts.moves_latest)
        except OSError:  # the checkpoint stands; what is newest is decided by the manifests
            names = f"{facts.tag}, {LATEST}" if facts.tag else LATEST
            logger.exception("%s is committed, but not named by %s yet", self.path, names)

    def _has_parent(self) -> bool:
        """Whether the checkpoint that a link builds upon still stands; another job on the folder may
        have retired it or put another one in its place. Coordinator only."""
        parent = self.chain.parent
        try:
            return (
                parent is not None
                and stated_checksum(self.path.parent / parent.name) == parent.xxh3
            )
        except CorruptCheckpointError:
            return False

    def _staging(self, decision: Decision) -> Location:
        """A folder of this save alone, so that no other job ever writes into it."""
        return self.path.staging(decision.id)

    def conclude(self, committed: bool) -> None:
        """Tell this rank whether the save was committed, where the caller knows. No communication
        is performed."""
        if self._decision is not None:
            self.chain.conclude(self._decision.id if committed else None)

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=str(self.path))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))

    def __getstate__(self) -> dict[str, Any]:
        """A writer handed to another process merges its statistics over that process's own default
        group."""
        return {**self.__dict__, "_group": None}

    def _has_reference(self, item: WriteItem) -> bool:
        assert item.tensor_data is not None
        dtype = item.tensor_data.properties.dtype
        return self.chain.has_reference(item.index.fqn, _box(item), dtype)

    def _resolve(
        self, items: Sequence[WriteItem], planner: SavePlanner, decision: Decision
    ) -> tuple[LocalPieces, list[WriteResult]]:
        """The items' tensors in host memory, contiguous; and the results of those that are JSON
        values."""
        pieces: LocalPieces = {}
        results = []
        for item in items:
            data = planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                assert isinstance(data, io.BytesIO)
                value = parse_value(item.index.fqn, data.getvalue(), self._allow_opaque_bytes)
                results.append(_result((item.index.fqn, ()), decision.rank, value))
            elif (box := _box(item)).numel:
                assert isinstance(data, torch.Tensor)
                pieces[item.index.fqn, box.offsets] = (box, _plain(data))
        return pieces, results

    def _joint_pieces(
        self, decision: Decision, pieces: LocalPieces
    ) -> dict[str, list[JointPieces]]:
        found: dict[str, list[JointPieces]] = {}
        joints = {spec.joint.weight: spec.joint for spec in decision.specs}
        for (name, offsets), (box, weight) in pieces.items():
            if (joint := joints.get(name)) is None:
                continue
            reference = self.chain.reference(name, box, weight.dtype)
            assert reference is not None
            second = pieces[joint.exp_avg_sq, offsets][1].view(-1) if joint.exp_avg_sq else None
            first = pieces[joint.exp_avg, offsets][1].view(-1)
            found.setdefault(name, []).append(
                JointPieces(box, weight.view(-1), reference.view(-1), first, second)
            )
        return found

    def _merges(self, decision: Decision) -> bool:
        """Whether statistics are merged over the group; the same on every rank."""
        return self.config.profile != LOSSLESS and bool(decision.specs)

    def _measure(
        self, decision: Decision, joint_pieces: dict[str, list[JointPieces]]
    ) -> dict[str, Measured]:
        if not self._merges(decision):
            return {}
        profile = PROFILES[self.config.profile]
        group, threads = as_group(self._group), self.config.encoder_threads
        found = measure(decision.specs, joint_pieces, profile, group, threads)
        bound = self.config.max_error
        return {name: m for name, m in found.items() if bound is None or m.error <= bound}

    def _encode(
        self,
        encoder: ChunkEncoder,
        decision: Decision,
        pieces: LocalPieces,
        joint_pieces: dict[str, list[JointPieces]],
        reconstruction: dict[Key, torch.Tensor],
    ) -> list[tuple[Key, ChunkRecord]]:
        """Encode everything; fill ``reconstruction`` with what a reader will get of the chained
        tensors."""
        records: list[tuple[Key, ChunkRecord]] = []
        done: set[str] = set()
        for spec in decision.specs:
            weight = spec.joint.weight
            if weight not in self._measured:
                continue
            done.update(spec.joint.names)
            for joint in joint_pieces.get(weight, ()):
                offsets = joint.box.offsets
                kept = reconstruction[weight, offsets] = self._own(pieces[weight, offsets][1])
                chunks = encoder.joint(joint, self._measured[weight].quantiser, kept.view(-1))
                named = zip(spec.joint.names, chunks, strict=False)
                records += [((name, offsets), chunk) for name, chunk in named]
        for key, (box, values) in pieces.items():
            name = key[0]
            if name in done:
                continue
            coding = decision.coding_of(name, self._measured)
            if isinstance(coding, Delta):
                reference = self.chain.reference(name, box, values.dtype)
                assert reference is not None
                records.append((key, encoder.delta(box, values, reference)))
            else:
                records.append((key, encoder.planes(box, values, is_moment(name))))
            if is_chained(name, decision.facts[name]):
                reconstruction[key] = self._own(values)
        return records

    def _own(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor itself where the writer owns it, else a copy: the caller's tensors are never
        written to."""
        return values if self._owns_tensors else values.clone()


def _refuse_stock_caching(planner: SavePlanner) -> None:
    """Refuse torch's caching planner, which from the second save on hands over the decision of the first one again."""
    if getattr(planner, "_enable_plan_caching", False):
        raise ConfigError(
            f"{type(planner).__name__}(enable_plan_caching=True) does not tell a writer what was decided for "
            "a save; pass planner=effx_dist.checkpoint.ExcpSavePlanner(enable_plan_caching=True), or leave it off"
        )


def _plain(data: torch.Tensor) -> torch.Tensor:
    """The values in contiguous host memory, also of a view that is conjugated or negated lazily."""
    return data.detach().cpu().resolve_conj().resolve_neg().contiguous()


def _box(item: WriteItem) -> Box:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return Box(tuple(chunk.offsets), tuple(chunk.sizes))


def _is_chained(item: WriteItem) -> bool:
    data = item.tensor_data
    if data is None:
        return False
    facts = TensorFacts(data.properties.dtype, tuple(data.size))
    return is_chained(item.index.fqn, facts)


def _result(key: Key, rank: int, content: Any) -> WriteResult:
    return WriteResult(
        index=MetadataIndex(key[0], torch.Size(key[1])),
        size_in_bytes=0,
        storage_data=Written(rank, content),
    )
