"""A plain torch.distributed.checkpoint folder, which its stock reader and planners load."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, WriteItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType

from effx_dist.checkpoint.convert.content import Content
from effx_dist.checkpoint.pieces import piece_boxes
from effx_dist.shard import Box


def write_dcp(content: Content, folder: Path, weights_only: bool) -> None:
    """Write what ``dcp.load({"model": get_model_state_dict(...), "optim":
    get_optimizer_state_dict(...)}, checkpoint_id=folder)`` reads, at any number of ranks.

    Entries are ``model.<name>``, ``optim.state.<name>.<key>``, ``optim.param_groups.<i>.<option>``,
    ``step``, ``extra.*`` and ``stateful.*``. Tensors are read as they are written, some rows at a
    time. What is no tensor lies in the folder as torch.distributed.checkpoint has it: pickled.
    Raises ConfigError, CorruptCheckpointError, OSError.
    """
    stored_names: dict[str, str] = {}

    def placeholder(name: str, stored: str) -> torch.Tensor:
        stored_names[name] = stored
        record = content.record(stored)
        return torch.empty(record.shape, dtype=record.torch_dtype, device="meta")

    model = {name: placeholder(f"model.{name}", s) for name, s in content.model.items()}
    whole: dict[str, Any] = {"model": model, "step": content.manifest.step}
    model |= content.tree(content.values.model_values, "model_values")
    if not weights_only:
        state: dict[str, dict[str, Any]] = {
            parameter: {
                key: placeholder(f"optim.state.{parameter}.{key}", stored)
                for key, stored in entries.items()
            }
            for parameter, entries in content.optimizer.items()
        }
        for parameter in content.values.optimizer_values:
            state.setdefault(parameter, {}).update(content.optimizer_values(parameter))
        whole["optim"] = {"state": state, "param_groups": content.param_groups()}
        whole["stateful"] = content.tree(content.values.stateful, "stateful")
        whole["extra"] = content.tree(content.values.extra, "extra")
    content.will_read(iter(stored_names.values()))
    writer = FileSystemWriter(folder)
    planner = _Planner(content, stored_names)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # it may well be
        try:
            dcp.save(whole, storage_writer=writer, planner=planner, no_dist=True)
        except dcp.CheckpointException as error:
            reason, _ = error.failures[0]  # it is no Exception, and wraps the one that we raised
            raise reason from None


class _Planner(DefaultSavePlanner):
    """Plans tensors that are not there yet in boxes of some rows, and reads each when it is written."""

    def __init__(self, content: Content, stored_names: dict[str, str]) -> None:
        super().__init__()
        self._content = content
        self._stored = stored_names

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        plan.items[:] = [part for item in plan.items for part in self._parts(item)]
        return plan

    def _parts(self, item: WriteItem) -> list[WriteItem]:
        stored = self._stored.get(item.index.fqn)
        if stored is None or item.tensor_data is None:
            return [item]
        boxes = list(piece_boxes(self._content.record(stored)))
        if len(boxes) < 2:
            return [item]
        return [_part(item.index.fqn, item.tensor_data, box) for box in boxes]

    def resolve_data(self, write_item: WriteItem) -> Any:
        stored = self._stored.get(write_item.index.fqn)
        if stored is None or write_item.tensor_data is None:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        return self._content.read_box(stored, Box(tuple(chunk.offsets), tuple(chunk.sizes)))


def _part(fqn: str, whole: TensorWriteData, box: Box) -> WriteItem:
    offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
    return WriteItem(
        index=MetadataIndex(fqn, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes), properties=whole.properties, size=whole.size
        ),
    )
