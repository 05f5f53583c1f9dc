"""What a save will be: a base or a link, and which weights are quantised. Decided once, by the coordinator."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.distributed.checkpoint import SavePlan

from effx_dist.checkpoint.format.manifest import (
    Coding,
    Delta,
    Figures,
    JointMoment,
    JointSecondMoment,
    JointWeight,
    Planes,
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
    """Whether a base is due: ``base_every`` saves after the last one, or as soon as the links since then take
    up ``base_every_size`` times its bytes."""
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
