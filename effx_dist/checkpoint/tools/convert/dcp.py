"""A plain torch.distributed.checkpoint folder, which its stock reader and planners load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import (
    DefaultSavePlanner,
    FileSystemWriter,
    Metadata,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from effx_dist.checkpoint.format.whole_tensors import piece_boxes
from effx_dist.checkpoint.tools.convert.content import Content
from effx_dist.checkpoint.tools.sharing import dealt_out
from effx_dist.shard import Box, Group


def write_dcp(content: Content, folder: Path, weights_only: bool, group: Group) -> None:
    """Write what ``dcp.load({"model": get_model_state_dict(...), "optim":
    get_optimizer_state_dict(...)}, checkpoint_id=folder)`` reads, at any number of ranks.

    Entries are ``model.<name>``, ``optim.state.<name>.<key>``, ``optim.param_groups.<i>.<option>``,
    ``step``, ``extra.*`` and ``stateful.*``. Tensors are read as they are written, some rows at a
    time; the ranks share them, each with a file of its own. What is no tensor lies in the first
    rank's as torch.distributed.checkpoint has it: pickled. Five gathers.

    Raises ConfigError, CorruptCheckpointError, OSError; with several ranks RankFailedError on all.
    """
    stored_names = {f"model.{name}": stored for name, stored in content.model.items()}
    if not weights_only:
        for parameter, entries in content.optimizer.items():
            stored_names |= {f"optim.state.{parameter}.{k}": s for k, s in entries.items()}
    planner = _Planner(content, stored_names)
    writer = FileSystemWriter(folder)

    def plan() -> tuple[list[SavePlan], Metadata]:
        planner.set_up_planner(_whole(content, weights_only), is_coordinator=True)
        writer.set_up_storage_writer(is_coordinator=True)
        [whole], metadata = planner.create_global_plan([planner.create_local_plan()])
        plans = [SavePlan(items) for items in planner.dealt_out(whole.items, group.size)]
        return writer.prepare_global_plan(plans), metadata

    is_alone = group.size == 1  # then what fails is raised as it is
    plans, metadata = group.from_first(plan, keep_own_error=is_alone)
    mine = plans[group.rank]

    def write() -> list[WriteResult]:
        content.total_bytes = sum(map(planner.num_bytes, mine.items))
        return writer.write_data(mine, planner).value() if mine.items else []

    results = group.gather_to_first(write, keep_own_error=is_alone)
    group.from_first(lambda: writer.finish(metadata, results or []), keep_own_error=is_alone)


def _whole(content: Content, weights_only: bool) -> dict[str, Any]:
    """Everything that will be written, with meta tensors in the place of those that are still in the checkpoint."""

    def placeholder(stored: str) -> torch.Tensor:
        record = content.record(stored)
        return torch.empty(record.shape, dtype=record.torch_dtype, device="meta")

    model = {name: placeholder(stored) for name, stored in content.model.items()}
    whole: dict[str, Any] = {"model": model, "step": content.manifest.step}
    model |= content.tree(content.values.model_values, "model_values")
    if weights_only:
        return whole
    state: dict[str, dict[str, Any]] = {
        parameter: {key: placeholder(stored) for key, stored in entries.items()}
        for parameter, entries in content.optimizer.items()
    }
    for parameter in content.values.optimizer_values:
        state.setdefault(parameter, {}).update(content.optimizer_values(parameter))
    whole["optim"] = {"state": state, "param_groups": content.param_groups()}
    whole["stateful"] = content.tree(content.values.stateful, "stateful")
    whole["extra"] = content.tree(content.values.extra, "extra")
    return whole


class _Planner(DefaultSavePlanner):
    """Plans tensors that are not there yet in boxes of some rows, and reads each when it is written.

    ``stored_names``: what is read, by the name that it is written under.
    """

    def __init__(self, content: Content, stored_names: Mapping[str, str]) -> None:
        super().__init__()
        self._content = content
        self._stored = stored_names

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        plan.items[:] = [piece for item in plan.items for piece in self._pieces(item)]
        return plan

    def dealt_out(self, items: Sequence[WriteItem], num_ranks: int) -> list[list[WriteItem]]:
        """The items of each rank; those that are not read from the checkpoint are the first's."""
        read = [item for item in items if item.index.fqn in self._stored]
        shares = dealt_out([self.num_bytes(item) for item in read], num_ranks)
        plans = [[read[index] for index in share] for share in shares]
        plans[0] += [item for item in items if item.index.fqn not in self._stored]
        return plans

    def num_bytes(self, item: WriteItem) -> int:
        """What is read from the checkpoint for an item."""
        stored = self._stored.get(item.index.fqn)
        if stored is None or item.tensor_data is None:
            return 0
        numel: int = item.tensor_data.chunk.sizes.numel()
        return numel * self._content.record(stored).torch_dtype.itemsize

    def _pieces(self, item: WriteItem) -> list[WriteItem]:
        stored = self._stored.get(item.index.fqn)
        if stored is None or item.tensor_data is None:
            return [item]
        boxes = list(piece_boxes(self._content.record(stored)))
        if len(boxes) < 2:
            return [item]
        return [_piece(item.index.fqn, item.tensor_data, box) for box in boxes]

    def resolve_data(self, write_item: WriteItem) -> Any:
        stored = self._stored.get(write_item.index.fqn)
        if stored is None or write_item.tensor_data is None:
            return super().resolve_data(write_item)
        chunk = write_item.tensor_data.chunk
        return self._content.read_box(stored, Box(tuple(chunk.offsets), tuple(chunk.sizes)))


def _piece(fqn: str, whole: TensorWriteData, box: Box) -> WriteItem:
    offsets, sizes = torch.Size(box.offsets), torch.Size(box.sizes)
    return WriteItem(
        index=MetadataIndex(fqn, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets, sizes), properties=whole.properties, size=whole.size
        ),
    )
