"""What one step walks over: the parameters that have a gradient, cut to items and sorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from effx_dist.core.update_rules import UpdateRule
from effx_dist.optim.kernels import EagerWalks, Implementation, Item, Walks, walks_class
from effx_dist.optim.layout import Layout
from effx_dist.optim.rows import Rows
from effx_dist.optim.state import start_state
from effx_dist.shard import local_of

Group = dict[str, Any]
RuleOf = Callable[[Mapping[str, Any]], UpdateRule]
_PlacedWalks = list[tuple[torch.device, Walks]]
_Kind = tuple[int, torch.device, str, bool, bool]
"""Bucket, device, rule, whether they lie flat and are wholes: of items that are walked over together."""


class Member(NamedTuple):
    """A parameter with a gradient."""

    param: torch.Tensor
    place: int
    """In the layout."""
    grad: torch.Tensor
    """Local, checked."""


@dataclass(slots=True)
class StepPlan:
    """The walks of one step, and the counters of steps that it advances.

    Attributes:
        walks: by bucket, those whose counts are to be summed between the two walks.
        whole_walks: those over parameters that are whole here.
        host_steps: counters on the host, device_steps: those of capturable groups.
        idle: indices of the wholes that have no gradient on this rank.
    """

    walks: list[_PlacedWalks]
    whole_walks: _PlacedWalks = field(default_factory=list)
    host_steps: list[torch.Tensor] = field(default_factory=list)
    device_steps: list[torch.Tensor] = field(default_factory=list)
    idle: frozenset[int] = frozenset()

    def advance_steps(self, skip: torch.Tensor | None) -> None:
        """Count the step, unless ``skip`` (0-d) is given and not zero: on the host only if a counter
        there asks for it.
        """
        if self.device_steps:
            torch._foreach_add_(self.device_steps, 1.0)
            if skip is not None:
                skipped = skip.to(dtype=torch.float32)
                torch._foreach_sub_(self.device_steps, [skipped] * len(self.device_steps))
        if self.host_steps and not (skip is not None and bool(skip)):
            torch._foreach_add_(self.host_steps, 1.0)


def members_by_group(
    layout: Layout, groups: Sequence[Group]
) -> tuple[list[tuple[Group, list[Member]]], frozenset[int]]:
    """Parameters that have a gradient by group, and the wholes (by index) that have none here.

    All gradients are checked before the caller changes anything.
    """
    found: list[tuple[Group, list[Member]]] = []
    idle: set[int] = set()
    index = 0
    seen: set[int] = set()
    for group in groups:
        members: list[Member] = []
        for param in group["params"]:
            if id(param) in seen:  # tied: one parameter, listed twice
                continue
            seen.add(id(param))
            grad = layout.local_grad(index)
            if grad is None:
                idle.update(segment.whole_index for segment in layout.segments[index])
            else:
                members.append(Member(param, index, grad))
            index += 1
        found.append((group, members))
    return found, frozenset(idle)


def plan_step(
    layout: Layout,
    groups: Sequence[Group],
    states: Mapping[torch.Tensor, dict[str, Any]],
    rule_of: RuleOf,
    implementation: Implementation,
    grad_factor: torch.Tensor | None,
    may_skip: bool = False,
) -> StepPlan:
    """Check gradients, make states, compute coefficients, sort items. No communication is
    performed.

    Where the step ``may_skip``, there are no ``whole_walks``, since these count and write at once.
    """
    by_group, idle = members_by_group(layout, groups)
    plan = StepPlan(walks=[[] for _ in layout.buckets], idle=idle)
    rows = Rows()
    batches: dict[_Kind, tuple[UpdateRule, list[Item]]] = {}
    for group, members in by_group:
        if not members:
            continue
        rule = rule_of(group)
        of_group = [states[member.param] for member in members]
        keys = (*rule.moment_names, "step") if rule.counts_steps else rule.moment_names
        for member, state in zip(members, of_group, strict=True):
            if any(state.get(key) is None for key in keys):
                start_state(state, rule, member.param, group["capturable"])
        row_of = _add_rows(plan, rows, rule, group, of_group)
        _add_items(batches, layout, rule, group, members, of_group, row_of)
    on_device: dict[torch.device, torch.Tensor] = {}
    for (bucket, device, _, lies_flat, is_whole), (rule, items) in batches.items():
        if device not in on_device:
            on_device[device] = rows.on(device, grad_factor)
        chosen = walks_class(implementation, device) if lies_flat else EagerWalks
        target = plan.whole_walks if is_whole and not may_skip else plan.walks[bucket]
        target.append((device, chosen(rule, items, on_device[device])))
    return plan


def _add_rows(
    plan: StepPlan, rows: Rows, rule: UpdateRule, group: Group, states: Sequence[dict[str, Any]]
) -> list[int]:
    """The row of each state's parameter; its counter is noted for the end of the step."""
    settings = _settings(group)
    if not rule.counts_steps:
        return rows.add(rule, settings, [1.0] * len(states))
    counters: list[torch.Tensor] = [state["step"] for state in states]
    if group["capturable"]:
        plan.device_steps += counters
        return rows.add_on_device(rule, settings, torch.stack(counters) + 1)
    plan.host_steps += counters
    return rows.add(rule, settings, [float(counter) + 1 for counter in counters])


def _settings(group: Group) -> Group:
    """A group's settings as numbers, but for a learning rate that lies on a device."""
    names = ("weight_decay", "eps", "momentum")
    settings = {**group, **{name: float(group[name]) for name in names if name in group}}
    if "betas" in group:
        settings["betas"] = tuple(float(beta) for beta in group["betas"])
    return settings


def _add_items(
    batches: dict[_Kind, tuple[UpdateRule, list[Item]]],
    layout: Layout,
    rule: UpdateRule,
    group: Group,
    members: Sequence[Member],
    states: Sequence[Mapping[str, Any]],
    row_of: Sequence[int],
) -> None:
    """Sort the segments of a group's parameters that have elements into ``batches``.

    They are cut anew in every step: tensors that stay referred to from here could not be freed by
    those who move an optimiser's state to the host in between.
    """
    decays_cautiously = bool(group["cautious_weight_decay"])
    names, targets = rule.moment_names, layout.targets
    for (member_param, place, grad), state, row in zip(members, states, row_of, strict=True):
        param = local_of(member_param)
        if not param.numel():
            continue
        moments = tuple([local_of(state[name]) for name in names])
        device = param.device
        for segment, slot, bucket, is_whole in targets[place]:
            if segment.start is None:
                item = Item(param, grad, moments, row, slot, decays_cautiously)
            else:
                cut = tuple([segment.of(moment) for moment in moments])
                part, grad_part = segment.of(param), segment.of(grad)
                item = Item(part, grad_part, cut, row, slot, decays_cautiously)
            kind = (bucket, device, rule.name, item.lies_flat, is_whole)
            known = batches.get(kind)
            if known is None:
                known = batches[kind] = (rule, [])
            known[1].append(item)
