"""Save and load through planners, writer and reader, with the ranks of any Group.

``torch.distributed.checkpoint.save`` does the same over torch.distributed alone; this drives the
same interfaces also with ranks as threads, names every failed rank in one ordinary exception, and
tells all ranks whether the save was committed.
"""

from __future__ import annotations

from typing import Any

from torch.distributed.checkpoint import Metadata, SavePlan, StorageReader

from effx_dist.checkpoint.format.manifest import Manifest
from effx_dist.checkpoint.saving.planners import ExcpLoadPlanner, ExcpSavePlanner
from effx_dist.checkpoint.saving.writer import ExcpWriter
from effx_dist.shard import Group


def drive_save(state: dict[str, Any], writer: ExcpWriter, group: Group) -> Manifest:
    """Save ``state`` (names to fragments, tensors or DTensors) with ``writer``; returns the
    committed manifest.

    Rank 0 coordinates. Two gathers to it, two broadcasts from it, and the writer's own merging of
    statistics. Raises RankFailedError on all ranks if one of them failed: then nothing was committed
    and the chain stays where it was.
    """
    planner = ExcpSavePlanner(flatten_state_dict=False)
    is_coordinator = group.rank == 0

    def local_plan() -> SavePlan:
        planner.set_up_planner(state, is_coordinator=is_coordinator)
        writer.set_up_storage_writer(is_coordinator, rank=group.rank)
        return writer.prepare_local_plan(planner.create_local_plan())

    try:
        plans = group.gather_to_first(local_plan, keep_own_error=False)

        def global_plan() -> tuple[list[SavePlan], Metadata]:
            coordinated, metadata = planner.create_global_plan(plans or [])
            return writer.prepare_global_plan(coordinated), metadata

        decided, metadata = group.from_first(global_plan, keep_own_error=False)
        plan = planner.finish_plan(decided[group.rank])
        results = group.gather_to_first(
            lambda: writer.write_data(plan, planner).value(), keep_own_error=False
        )

        def finish() -> Manifest:
            writer.finish(metadata, results or [])
            assert writer.manifest is not None
            return writer.manifest

        manifest = group.from_first(finish, keep_own_error=False)
    except BaseException:
        writer.conclude(committed=False)
        raise
    writer.conclude(committed=True)
    return manifest


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
