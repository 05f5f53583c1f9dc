"""Planners that handle fragments, and carry non-tensors as JSON: the stock ones ``torch.save`` them and
read them back with ``weights_only=False``, which runs whatever code a hostile file names.
"""

from __future__ import annotations

import dataclasses
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    Metadata,
    SavePlan,
    WriteItem,
)
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem, WriteItemType

from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.joints import TensorFacts, find_joints, is_spread
from effx_dist.checkpoint.state.tree import tree_from_json, tree_to_json

Place = tuple[str, tuple[int, ...]]
"""A joint's weight (or a tensor of no joint), and a box's offsets."""


def colocate_joints(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """Let one rank write each piece that several hold, and the pieces of a weight and its moments
    together.

    Which one depends on the weight's name alone, so that the rank that has the reference of a
    replicated weight writes it again next time, whatever else is saved; what has few dimensions (buffers)
    and what is no tensor is the first holder's. Returns new plans; no
    communication is performed.
    """
    facts = facts_of_plans(plans)
    joint_of = {name: joint.weight for joint in find_joints(facts) for name in joint.names}
    holders: dict[Place, list[int]] = {}
    for rank, plan in enumerate(plans):
        for place in {_place(item, joint_of) for item in plan.items}:
            holders.setdefault(place, []).append(rank)
    return [
        dataclasses.replace(
            plan,
            items=[
                i for i in plan.items if _writer_of(_place(i, joint_of), holders, facts) == rank
            ],
        )
        for rank, plan in enumerate(plans)
    ]


def _writer_of(
    place: Place, holders: Mapping[Place, Sequence[int]], facts: Mapping[str, TensorFacts]
) -> int:
    ranks, found = holders[place], facts.get(place[0])
    if found is None or not is_spread(found):
        return ranks[0]
    return ranks[zlib.crc32(place[0].encode()) % len(ranks)]


def _place(item: WriteItem, joint_of: Mapping[str, str]) -> Place:
    fqn = item.index.fqn
    return joint_of.get(fqn, fqn), tuple(item.index.offset or ())


def facts_of_plans(plans: Sequence[SavePlan]) -> dict[str, TensorFacts]:
    """dtype and shape of every whole tensor that any rank's plan names."""
    return {
        item.index.fqn: TensorFacts(item.tensor_data.properties.dtype, tuple(item.tensor_data.size))
        for plan in plans
        for item in plan.items
        if item.tensor_data is not None
    }


class ExcpSavePlanner(DefaultSavePlanner):
    """Plans fragments beside tensors and DTensors; writes non-tensors as JSON and refuses what is
    not JSON.

    Args:
        flatten_state_dict, flatten_sharded_tensors, dedup_replicated_tensors, dedup_save_to_lowest_rank:
            as of torch's DefaultSavePlanner.
        enable_plan_caching: accepted, and a plan is made for every save all the same: what a save is
            (base or link) is decided anew each time.
    """

    def __init__(
        self,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        dedup_replicated_tensors: bool | None = None,
        dedup_save_to_lowest_rank: bool = False,
        enable_plan_caching: bool = False,
    ) -> None:
        super().__init__(
            flatten_state_dict,
            flatten_sharded_tensors,
            dedup_replicated_tensors,
            dedup_save_to_lowest_rank,
        )

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return super().create_global_plan(colocate_joints(all_plans))

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if isinstance(found, Fragment):
            return found.__get_tensor_shard__(index)
        return super().lookup_object(index)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type != WriteItemType.BYTE_IO:
            return object
        value = tree_to_json(object, write_item.index.fqn, {})
        return io.BytesIO(json.dumps(value, allow_nan=False).encode())


class ExcpLoadPlanner(DefaultLoadPlanner):
    """Fills fragments, tensors and DTensors in place; reads non-tensors as JSON, never as
    pickles."""

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # The stock planner maps objects it does not know to None; fragments are handed to it one by one instead.
        fragments = {name: v for name, v in state_dict.items() if isinstance(v, Fragment)}
        rest = {name: v for name, v in state_dict.items() if name not in fragments}
        if not dist.is_initialized():  # torch asks the group for the device
            rest |= {
                name: torch.empty_like(v, device="cpu") for name, v in rest.items() if _is_meta(v)
            }
        super().set_up_planner(rest, metadata, is_coordinator)
        state_dict.update(rest)  # tensors on the meta device have been replaced by real ones
        self.original_state_dict = state_dict
        self.state_dict = {**self.state_dict, **fragments}

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        found = self.state_dict[index.fqn]
        if isinstance(found, Fragment):
            return found.__get_tensor_shard__(index)
        return super().lookup_tensor(index)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        fqn = read_item.dest_index.fqn
        try:
            loaded = tree_from_json(json.loads(value.getvalue()), _no_tensor)
        except ValueError as error:
            raise TypeError(
                f"{fqn}: is no JSON but the bytes of another planner, which this one never "
                "unpickles; load it with the planner that wrote it, or leave it out of the state dict"
            ) from error
        if self.flatten_state_dict:
            from torch.distributed.checkpoint._nested_dict import set_element

            set_element(self.original_state_dict, self.mappings[fqn], loaded)
        else:
            self.original_state_dict[fqn] = loaded


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _no_tensor(path: str) -> torch.Tensor:
    raise ValueError(f"{path}: a JSON value of a state dict cannot hold a tensor")
