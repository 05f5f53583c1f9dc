"""Reading checkpoints back: the chain from a checkpoint down to its base, and the DCP storage
reader over it."""

from __future__ import annotations

import io
import itertools
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    LoadPlan,
    LoadPlanner,
    Metadata,
    StorageReader,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from effx_dist.checkpoint.blockfile import REMEDY, BlockReader, open_regular
from effx_dist.checkpoint.chunks import ChunkDecoder
from effx_dist.checkpoint.folder import (
    MANIFEST,
    local_folder,
    newest_step,
    require_committed,
    step_name,
)
from effx_dist.checkpoint.manifest import (
    MAX_MANIFEST_BYTES,
    Delta,
    JointWeight,
    Manifest,
    TensorRecord,
    manifest_checksum,
    manifest_from_bytes,
)
from effx_dist.checkpoint.manifest_checks import check_manifest
from effx_dist.core.excp import JointQuantiser
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError
from effx_dist.shard import Box


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """A committed checkpoint's manifest, checked, and its checksum.

    Raises CheckpointNotFoundError where there is none, CorruptCheckpointError where it is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise CheckpointNotFoundError(
            f"{folder}: holds no {MANIFEST}; it is not a committed checkpoint"
        )
    with open_regular(path) as file:
        content = file.read(MAX_MANIFEST_BYTES + 1)
    if len(content) > MAX_MANIFEST_BYTES:
        raise CorruptCheckpointError(
            f"{path}: is larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is"
        )
    manifest = manifest_from_bytes(content, path)
    check_manifest(manifest, path)
    return manifest, manifest_checksum(content, path)


class StepReader:
    """One checkpoint without its parents.

    Raises CorruptCheckpointError where it is damaged, or is not the one with the
    ``expected_checksum``.
    """

    def __init__(self, folder: Path, expected_checksum: str | None = None) -> None:
        self.folder = folder
        self.manifest, self.checksum = read_manifest(folder)
        if expected_checksum is not None and self.checksum != expected_checksum:
            raise CorruptCheckpointError(
                f"{folder}: is not the checkpoint that a later one was made against (manifest "
                f"{self.checksum}, needed {expected_checksum}); it was replaced. Load an older step"
            )
        self.files = [BlockReader(folder, record) for record in self.manifest.files]
        self._decoder = ChunkDecoder(self.files, self.manifest.tensors, self._quantisers())

    def _quantisers(self) -> dict[str, JointQuantiser]:
        found = {}
        for name, record in self.manifest.tensors.items():
            if isinstance(record.coding, JointWeight):
                try:
                    found[name] = JointQuantiser.from_json(record.coding.quantiser)
                except ValueError as error:
                    raise CorruptCheckpointError(
                        f"{self.folder / MANIFEST}: quantiser of {name}: {error}"
                    ) from error
        return found

    def read(self, name: str, box: Box, reference: torch.Tensor | None) -> torch.Tensor:
        """Values of a box, given the parent's values of it where the tensor is stored as a
        difference."""
        record = self.manifest.tensors[name]
        values = torch.empty(box.sizes, dtype=record.torch_dtype)
        for index, chunk in enumerate(record.chunks):
            region = box.intersect(chunk.box)
            if region is not None:
                inside = region.relative_to(box).slices
                old = None if reference is None else reference[inside]
                values[inside] = self._decoder.decode(name, index, region, old)
        return values


class ChainReader:
    """A checkpoint and the parents that its differences refer to, down to the base; opened as they
    are needed."""

    def __init__(self, folder: Path) -> None:
        self.steps = [StepReader(folder)]

    @property
    def top(self) -> StepReader:
        """The checkpoint itself."""
        return self.steps[0]

    def read(self, name: str, box: Box) -> torch.Tensor:
        """The values of one box of one whole tensor, as its writer's references held them. Verifies
        what it reads."""
        needed = self._down_to_base(self.resolve(name))
        values = None
        for step in reversed(needed):
            values = step.read(self.resolve(name), box, values)
        assert values is not None
        return values

    def resolve(self, name: str) -> str:
        """The stored name of an alias (a tied weight), or the name itself."""
        return self.top.manifest.aliases.get(name, name)

    def record(self, name: str) -> TensorRecord | None:
        """The manifest's record of a tensor or alias, or None."""
        return self.top.manifest.tensors.get(self.resolve(name))

    def _down_to_base(self, name: str) -> list[StepReader]:
        needed = []
        for depth in itertools.count():
            step = self._step(depth)
            record = step.manifest.tensors.get(name)
            wanted = self.top.manifest.tensors[name]
            if record is None or (record.shape, record.dtype) != (wanted.shape, wanted.dtype):
                raise CorruptCheckpointError(
                    f"{step.folder}: does not hold {name} as a later checkpoint refers to it"
                )
            needed.append(step)
            if not isinstance(record.coding, Delta | JointWeight):
                break
        return needed

    def _step(self, depth: int) -> StepReader:
        while depth >= len(self.steps):
            below = self.steps[-1]
            parent = below.manifest.parent
            if parent is None:
                raise CorruptCheckpointError(
                    f"{below.folder}: refers to a parent that it does not name"
                )
            self.steps.append(self._open_parent(self._sibling(parent.name), parent.xxh3))
        return self.steps[depth]

    def _sibling(self, name: str) -> Path:
        folder = self.top.folder.parent / name
        if any(step.folder == folder for step in self.steps):
            raise CorruptCheckpointError(f"{folder}: its chain of parents is a circle")
        if not folder.is_dir() or folder.is_symlink():
            raise CorruptCheckpointError(
                f"{folder}: is missing (or a link), and {self.top.folder.name} is stored as differences to it. "
                "Restore it from a copy, or load an older step"
            )
        return folder

    def _open_parent(self, folder: Path, checksum: str) -> StepReader:
        try:
            return StepReader(folder, checksum)
        except CheckpointNotFoundError as error:
            raise CorruptCheckpointError(
                f"{folder}: has no manifest, and {self.top.folder.name} is stored as differences to "
                f"it. {REMEDY}"
            ) from error

    def close(self) -> None:
        """Close all files."""
        for step in self.steps:
            for file in step.files:
                file.close()

    def __enter__(self) -> ChainReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_checkpoint(path: str | os.PathLike[str], step: int | None = None) -> ChainReader:
    """The checkpoint at ``path`` (``.../step-N``), or that of ``step`` (default: the newest) in a
    folder of them. Raises as :class:`StepReader` does, and CheckpointNotFoundError."""
    folder = local_folder(path)
    if step is not None:
        folder = folder / step_name(require_committed(folder, step))
    elif not (folder / MANIFEST).exists():
        folder = folder / step_name(newest_step(folder))
    return ChainReader(folder)


class ExcpReader(StorageReader):
    """Reads checkpoints of :class:`ExcpWriter` for torch.distributed.checkpoint, into any layout.

    Args:
        path: one checkpoint's folder (``.../step-N``), or a folder of them for the newest committed
            one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = local_folder(path)
        self._chain: ChainReader | None = None

    @property
    def chain(self) -> ChainReader:
        """The open chain. Raises as :class:`StepReader` does."""
        if self._chain is None:
            self._chain = open_checkpoint(self.path)
        return self._chain

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self.close()
        if checkpoint_id is not None:
            self.path = local_folder(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        manifest = self.chain.top.manifest
        entries: dict[str, STORAGE_TYPES] = {
            name: _tensor_metadata(record) for name, record in manifest.tensors.items()
        }
        entries |= {alias: entries[name] for alias, name in manifest.aliases.items()}
        entries |= {name: BytesStorageMetadata() for name in manifest.values}
        return Metadata(entries, storage_meta=StorageMeta(checkpoint_id=str(self.path)))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up: the chain opens what it needs."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors. No communication is performed. Raises
        CorruptCheckpointError."""
        try:
            for item in plan.items:
                self._read_item(item, planner)
        finally:
            self.chain.close()  # files open again when they are needed
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read_item(self, item: ReadItem, planner: LoadPlanner) -> None:
        if item.type == LoadItemType.BYTE_IO:
            value = self.chain.top.manifest.values[item.storage_index.fqn]
            planner.load_bytes(item, io.BytesIO(json.dumps(value).encode()))
        else:
            target = planner.resolve_tensor(item).detach()
            target.copy_(self.chain.read(item.storage_index.fqn, _whole_box_of(item)))
            planner.commit_tensor(item, target)

    def close(self) -> None:
        """Close all files."""
        if self._chain is not None:
            self._chain.close()
            self._chain = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return "://" not in os.fspath(checkpoint_id)


def _tensor_metadata(record: TensorRecord) -> TensorStorageMetadata:
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=record.torch_dtype),
        size=torch.Size(record.shape),
        chunks=[
            ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            for chunk in record.chunks
        ],
    )


def _whole_box_of(item: ReadItem) -> Box:
    """The box that a read item asks for, in the whole tensor's coordinates."""
    starts = tuple(item.storage_index.offset or ())
    offsets = tuple(a + b for a, b in zip(starts, item.storage_offsets, strict=True))
    return Box(offsets, tuple(item.lengths))
