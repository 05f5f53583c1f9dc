"""Save and load through planners, writer and reader, with the ranks of any Group.

``torch.distributed.checkpoint.save`` does the same over torch.distributed alone; this drives the
same interfaces also with ranks as threads, names every failed rank in one ordinary exception, and
tells all ranks whether the save was committed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch.distributed.checkpoint import StorageReader

from effx_dist.checkpoint.format.manifest import Manifest
from effx_dist.checkpoint.saving.planners import ExcpLoadPlanner, ExcpSavePlanner
from effx_dist.checkpoint.saving.writer import ExcpWriter
from effx_dist.shard import Group

T = TypeVar("T")


def together(group: Group, body: Callable[[], T]) -> list[T]:
    """:meth:`Group.everywhere`, and then every rank's result by rank. Two gathers; for small
    results."""
    return group.all_gather_object(group.everywhere(body))


def drive_save(state: dict[str, Any], writer: ExcpWriter, group: Group) -> Manifest:
    """Save ``state`` (names to fragments, tensors or DTensors) with ``writer``; returns the
    committed manifest.

    Rank 0 coordinates. Eight gathers, and the writer's own merging of statistics. Raises
    RankFailedError on all ranks if one of them failed: then nothing was committed and the chain
    stays where it was.
    """
    planner = ExcpSavePlanner(flatten_state_dict=False)
    is_coordinator = group.rank == 0

    def local_plan() -> Any:
        planner.set_up_planner(state, is_coordinator=is_coordinator)
        writer.set_up_storage_writer(is_coordinator, rank=group.rank)
        return writer.prepare_local_plan(planner.create_local_plan())

    try:
        plans = together(group, local_plan)

        def global_plan() -> Any:
            if not is_coordinator:
                return None
            coordinated, metadata = planner.create_global_plan(plans)
            return writer.prepare_global_plan(coordinated), metadata

        decided, metadata = together(group, global_plan)[0]
        plan = planner.finish_plan(decided[group.rank])
        results = together(group, lambda: writer.write_data(plan, planner).value())
        manifests = together(
            group, lambda: _finish(writer, metadata, results) if is_coordinator else None
        )
    except BaseException:
        writer.settle(committed=False)
        raise
    writer.settle(committed=True)
    assert manifests[0] is not None
    return manifests[0]


def _finish(writer: ExcpWriter, metadata: Any, results: Any) -> Manifest:
    writer.finish(metadata, results)
    assert writer.manifest is not None
    return writer.manifest


def drive_load(state: dict[str, Any], reader: StorageReader) -> None:
    """Fill ``state``'s fragments, tensors and DTensors in place, resharding as needed. No
    communication is performed."""
    planner = ExcpLoadPlanner(flatten_state_dict=False)
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata)
    plan = planner.create_local_plan()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    [plan] = planner.create_global_plan([plan])
    reader.read_data(planner.finish_plan(plan), planner).wait()
