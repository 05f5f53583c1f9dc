"""ExcpReader: a torch.distributed.checkpoint storage reader of compressed, chained checkpoints."""

from __future__ import annotations

import io
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    DefaultLoadPlanner,
    LoadPlan,
    LoadPlanner,
    Metadata,
    StorageReader,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.metadata import STORAGE_TYPES, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from effx_dist.checkpoint.format.manifest import TensorRecord
from effx_dist.checkpoint.format.reader import ChainReader, open_checkpoint
from effx_dist.checkpoint.state.matching import listed
from effx_dist.checkpoint.state.tree import payload_of, read_tree
from effx_dist.checkpoint.storage.places import Folder, location
from effx_dist.shard import Box

logger = logging.getLogger(__name__)


class ExcpReader(StorageReader):
    """Reads checkpoints of :class:`ExcpWriter` for torch.distributed.checkpoint, into any layout.

    Tensors of another dtype are cast, as torch's own reader does, with a warning that names them;
    ``Checkpointer.load`` refuses them. Works with ExcpLoadPlanner and with torch's stock planner.

    Args:
        path: one checkpoint's folder (``.../step-N``), or a folder of them for the newest committed
            one.
        allow_opaque_bytes: hand a planner the bytes that another planner put there for non-tensors.
            Nothing here looks into them; the stock load planner unpickles them, which runs whatever
            code they name. False: refuse them.
    """

    def __init__(self, path: Folder, *, allow_opaque_bytes: bool = False) -> None:
        super().__init__()
        self._allow_opaque_bytes = allow_opaque_bytes
        self.path = location(path)
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
            self.path = location(checkpoint_id)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        manifest = self.chain.top.manifest
        entries: dict[str, STORAGE_TYPES] = {
            name: _tensor_metadata(record) for name, record in manifest.tensors.items()
        }
        entries |= {alias: entries[name] for alias, name in manifest.aliases.items()}
        entries |= {name: BytesStorageMetadata() for name in manifest.values}
        # where each entry stood in the nested state dict, for clients that bring none of their own
        paths = {name: tuple(manifest.paths.get(name, (name,))) for name in entries}
        meta = StorageMeta(checkpoint_id=str(self.path))
        return Metadata(entries, planner_data=paths, storage_meta=meta)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up: the chain opens what it needs."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's tensors, on as many threads as torch has (launchers share the cores out
        by that). No communication is performed. Raises CorruptCheckpointError."""
        values = [item for item in plan.items if item.type == LoadItemType.BYTE_IO]
        tensors = [item for item in plan.items if item.type != LoadItemType.BYTE_IO]
        tensors.sort(key=lambda item: -item.lengths.numel())  # the longest must not come last
        try:
            for item in values:
                self._read_value(item, planner)
            targets = [planner.resolve_tensor(item).detach() for item in tensors]
            self._warn_of_casts(tensors, targets)
            reads = [
                partial(self._read_tensor, *pair) for pair in zip(tensors, targets, strict=True)
            ]
            _run_all(reads, torch.get_num_threads())
            for item, target in zip(tensors, targets, strict=True):
                planner.commit_tensor(item, target)
        finally:
            self.chain.close()  # files open again when they are needed
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _warn_of_casts(self, items: Sequence[ReadItem], targets: Sequence[torch.Tensor]) -> None:
        """Values are cast to what the caller's tensors are, as torch's own reader does; not silently."""
        found = {}
        for item, target in zip(items, targets, strict=True):
            record = self.chain.record(item.storage_index.fqn)
            if record is not None and record.torch_dtype != target.dtype:
                found[item.storage_index.fqn] = f"{record.torch_dtype} to {target.dtype}"
        if found:
            shown = listed([f"{name} from {how}" for name, how in sorted(found.items())])
            logger.warning("%s: %d tensors are cast: %s", self.path, len(found), shown)

    def _read_value(self, item: ReadItem, planner: LoadPlanner) -> None:
        name = item.storage_index.fqn
        value = self.chain.top.manifest.values[name]
        reads_json = type(planner).load_bytes is not DefaultLoadPlanner.load_bytes
        payload = payload_of(name, value, self._allow_opaque_bytes, reads_json, _pickled)
        planner.load_bytes(item, io.BytesIO(payload))

    def _read_tensor(self, item: ReadItem, target: torch.Tensor) -> None:
        name, box = item.storage_index.fqn, _whole_box_of(item)
        dtype = self.chain.top.manifest.tensors[self.chain.resolve(name)].torch_dtype
        is_plain = not (target.is_conj() or target.is_neg())
        if is_plain and (target.device.type, target.dtype) == ("cpu", dtype):
            self.chain.read_into(name, box, target)
            return
        # A seeded base's differences build upon what is there.
        seeded = self.chain.holds_seed
        values = target.to("cpu", dtype) if seeded else torch.empty(target.shape, dtype=dtype)
        self.chain.read_into(name, box, values)
        target.copy_(values)

    def close(self) -> None:
        """Close all files."""
        if self._chain is not None:
            self._chain.close()
            self._chain = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return bool(os.fspath(checkpoint_id))


def _pickled(name: str, value: Any) -> bytes:
    """A JSON value in the form that torch's stock planner unpickles. Made here, of plain values alone:
    no bytes of the checkpoint come near an unpickler."""
    buffer = io.BytesIO()
    torch.save(read_tree(value, {}, name), buffer)
    return buffer.getvalue()


def _run_all(calls: Sequence[Callable[[], None]], threads: int) -> None:
    """Make the calls on ``threads`` threads, this one among them: a new thread's memory is given back to
    the system after every block, and faulted in again."""
    left = deque(calls)

    def work() -> None:
        try:
            while (call := _next_of(left)) is not None:
                call()
        except BaseException:
            left.clear()
            raise

    with ThreadPoolExecutor(max(threads - 1, 1), "effx-read") as pool:
        others = [pool.submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            other.result()


def _next_of(left: deque[Callable[[], None]]) -> Callable[[], None] | None:
    try:
        return left.popleft()
    except IndexError:
        return None


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
