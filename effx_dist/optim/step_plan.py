"""What one step walks over: the parameters that have a gradient, cut to items and sorted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from effx_dist.core.update_rules import UpdateRule
from effx_dist.optim.coefficients import Coefficients
from effx_dist.optim.kernels import (
    EagerKernels,
    Implementation,
    Item,
    Kernels,
    kernels_class,
    working_dtype,
)
from effx_dist.optim.param_layout import ParamLayout
from effx_dist.shard import local_of

HALF_DTYPES = (torch.float16, torch.bfloat16)


def start_state(
    state: dict[str, Any], rule: UpdateRule, param: torch.Tensor, capturable: bool
) -> None:
    """Make the state of ``param`` on its first step: zeros, sharded as it is."""
    if rule.counts_steps and "step" not in state:
        # On the host unless asked otherwise: reading it must not wait for the device.
        device = param.device if capturable else torch.device("cpu")
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    for name in rule.moment_names:
        if state.get(name) is None:  # torch.optim.SGD keeps None without momentum
            state[name] = torch.zeros_like(param, dtype=working_dtype(param))


def mend_loaded_state(
    state: dict[str, Any],
    saved: dict[str, Any],
    rule: UpdateRule,
    param: torch.Tensor,
    capturable: bool,
) -> None:
    """After torch has loaded ``saved`` into ``state``: moments unrounded, steps where they belong.

    torch rounds each moment to its parameter's dtype and leaves the steps of a fused or capturable
    optimizer on the device.
    """
    if param.dtype in HALF_DTYPES:
        for name in rule.moment_names:
            if isinstance(saved.get(name), torch.Tensor):
                state[name] = saved[name].to(device=param.device, dtype=torch.float32)
    if rule.counts_steps and "step" in state:
        device = param.device if capturable else torch.device("cpu")
        step = torch.as_tensor(state["step"], dtype=torch.float32)
        state["step"] = step.detach().clone().to(device)


ParamGroup = dict[str, Any]
RuleOf = Callable[[Mapping[str, Any]], UpdateRule]
_PlacedKernels = list[tuple[torch.device, Kernels]]
_Kind = tuple[int, torch.device, str, bool, bool]
"""Bucket, device, rule, whether they lie flat and are wholes: of items that are walked over together."""


class GradParam(NamedTuple):
    """A parameter with a gradient."""

    param: torch.Tensor
    place: int
    """Its index in the layout."""
    grad: torch.Tensor
    """Local, checked."""


@dataclass(slots=True)
class StepPlan:
    """The walks of one step, and the counters of steps that it advances.

    Attributes:
        kernels: by bucket, those of items whose counts are to be summed between the two walks.
        whole_kernels: those of parameters that are whole here.
        host_steps: counters on the host, device_steps: those of capturable groups.
        idle: indices of the wholes that have no gradient on this rank.
    """

    kernels: list[_PlacedKernels]
    whole_kernels: _PlacedKernels = field(default_factory=list)
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


def params_by_group(
    layout: ParamLayout, groups: Sequence[ParamGroup]
) -> tuple[list[tuple[ParamGroup, list[GradParam]]], frozenset[int]]:
    """Parameters that have a gradient by group, and the wholes (by index) that have none here.

    All gradients are checked before the caller changes anything.
    """
    found: list[tuple[ParamGroup, list[GradParam]]] = []
    idle: set[int] = set()
    index = 0
    seen: set[int] = set()
    for group in groups:
        params: list[GradParam] = []
        for param in group["params"]:
            if id(param) in seen:  # tied: one parameter, listed twice
                continue
            seen.add(id(param))
            grad = layout.local_grad(index)
            if grad is None:
                idle.update(piece.whole_index for piece in layout.flat_pieces[index])
            else:
                params.append(GradParam(param, index, grad))
            index += 1
        found.append((group, params))
    return found, frozenset(idle)


def plan_step(
    layout: ParamLayout,
    groups: Sequence[ParamGroup],
    states: Mapping[torch.Tensor, dict[str, Any]],
    rule_of: RuleOf,
    implementation: Implementation,
    grad_factor: torch.Tensor | None,
    may_skip: bool = False,
) -> StepPlan:
    """Check gradients, make states, compute coefficients, sort items. No communication is
    performed.

    Where the step ``may_skip``, there are no ``whole_kernels``, since these count and write at once.
    """
    by_group, idle = params_by_group(layout, groups)
    plan = StepPlan(kernels=[[] for _ in layout.buckets], idle=idle)
    rows = Coefficients()
    batches: dict[_Kind, tuple[UpdateRule, list[Item]]] = {}
    for group, params in by_group:
        if not params:
            continue
        rule = rule_of(group)
        of_group = [states[one.param] for one in params]
        keys = (*rule.moment_names, "step") if rule.counts_steps else rule.moment_names
        for one, state in zip(params, of_group, strict=True):
            if any(state.get(key) is None for key in keys):
                start_state(state, rule, one.param, group["capturable"])
        row_of = _add_rows(plan, rows, rule, group, of_group)
        _add_items(batches, layout, rule, group, params, of_group, row_of)
    on_device: dict[torch.device, torch.Tensor] = {}
    for (bucket, device, _, lies_flat, is_whole), (rule, items) in batches.items():
        if device not in on_device:
            on_device[device] = rows.on(device, grad_factor)
        chosen = kernels_class(implementation, device) if lies_flat else EagerKernels
        target = plan.whole_kernels if is_whole and not may_skip else plan.kernels[bucket]
        target.append((device, chosen(rule, items, on_device[device])))
    return plan


def _add_rows(
    plan: StepPlan,
    rows: Coefficients,
    rule: UpdateRule,
    group: ParamGroup,
    states: Sequence[dict[str, Any]],
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


def _settings(group: ParamGroup) -> ParamGroup:
    """A group's settings as numbers, but for a learning rate that lies on a device."""
    names = ("weight_decay", "eps", "momentum")
    settings = {**group, **{name: float(group[name]) for name in names if name in group}}
    if "betas" in group:
        settings["betas"] = tuple(float(beta) for beta in group["betas"])
    return settings


def _add_items(
    batches: dict[_Kind, tuple[UpdateRule, list[Item]]],
    layout: ParamLayout,
    rule: UpdateRule,
    group: ParamGroup,
    params: Sequence[GradParam],
    states: Sequence[Mapping[str, Any]],
    row_of: Sequence[int],
) -> None:
    """Sort the pieces of a group's parameters that have elements into ``batches``.

    They are cut anew in every step: tensors that stay referred to from here could not be freed by
    those who move an optimizer's state to the host in between.
    """
    decays_cautiously = bool(group["cautious_weight_decay"])
    names, counted_pieces = rule.moment_names, layout.counted_pieces
    for (whole_param, place, grad), state, row in zip(params, states, row_of, strict=True):
        param = local_of(whole_param)
        if not param.numel():
            continue
        moments = tuple([local_of(state[name]) for name in names])
        device = param.device
        for piece, slot, bucket, is_whole in counted_pieces[place]:
            if piece.start is None:
                item = Item(param, grad, moments, row, slot, decays_cautiously)
            else:
                cut = tuple([piece.of(moment) for moment in moments])
                item = Item(piece.of(param), piece.of(grad), cut, row, slot, decays_cautiously)
            kind = (bucket, device, rule.name, item.lies_flat, is_whole)
            known = batches.get(kind)
            if known is None:
                known = batches[kind] = (rule, [])
            known[1].append(item)
