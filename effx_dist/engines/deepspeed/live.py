"""DeepSpeed: an engine's weights and optimizer state under the names and shapes of its model.

What is saved of a trained parameter is its master weights, never the 16-bit copy, and of a flat moment the
ranges that hold parameters, never the padding between them. Names and shapes are those of the model, so
that a checkpoint says nothing of ZeRO stages, ranks or sub-groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

from effx_dist.checkpoint import Fragment
from effx_dist.checkpoint.state.live import LiveState, OptimizerState, StateByName
from effx_dist.checkpoint.state.names import plain_name, tied_names
from effx_dist.checkpoint.state.torch_state import (
    group_options,
    make_empty_state,
    take_group_options,
)
from effx_dist.engines.deepspeed.partitions import Partition, partition_of_param, partitions
from effx_dist.engines.stepped import common_value, fragment_of, is_spread, state_leaves
from effx_dist.errors import LayoutMismatchError


class ZeroState(LiveState):
    """A DeepSpeedEngine, of any ZeRO stage or none.

    Args:
        engine: the engine.
        with_optimizer: whether the base optimizer's state is part of it.
        with_frozen: whether the parameters that the optimizer does not train are part of it.

    Making one and saving from it performs no communication. A fresh optimizer is made to have a state
    by a step of zero gradients, and :meth:`finish` gathers parameters; both are collective.
    """

    def __init__(self, engine: Any, with_optimizer: bool = True, with_frozen: bool = True) -> None:
        self._engine = engine
        self._partitions = partitions(engine)
        self._base: torch.optim.Optimizer = engine.basic_optimizer
        self._with_frozen = with_frozen
        self.has_optimizer = with_optimizer and bool(self._partitions)

    def model_state(self) -> dict[str, Any]:
        module = self._engine.module
        masters = {
            plain_name(whole.name): fragment_of(whole, pieces, partition.flat)
            for partition in self._partitions
            for whole, pieces in partition.held
        }
        found: dict[str, Any] = {}
        parameters = {plain_name(raw): p for raw, p in module.named_parameters()}
        for name, parameter in parameters.items():
            if name in masters:
                found[name] = masters[name]
            elif self._with_frozen:
                found[name] = _as_it_is(name, parameter)
        known = parameters.keys() | self.tied_names().keys()
        others = {plain_name(raw): value for raw, value in module.state_dict().items()}
        return found | {name: value for name, value in others.items() if name not in known}

    def tied_names(self) -> dict[str, str]:
        return tied_names(self._engine.module, lambda _, raw: plain_name(raw))

    def take_model_values(self, values: Mapping[str, Any]) -> None:
        self._engine.module.load_state_dict(dict(values), strict=False)

    def optimizer_state(self) -> OptimizerState:
        names_by_group: list[list[str]] = [[] for _ in self._base.param_groups]
        for partition in self._partitions:
            names = [plain_name(whole.name) for whole in partition.wholes]
            names_by_group[partition.group_index] += names
        return OptimizerState(
            self._by_name(), names_by_group, group_options(self._base.param_groups)
        )

    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        fresh = [partition for partition in self._partitions if not self._state_of(partition)]
        for partition in fresh:
            _make_state(self._base, partition)
        return self._by_name(), len(fresh) == len(self._partitions)

    def take_optimizer_state(self, state: StateByName) -> None:
        for partition in self._partitions:
            own = self._state_of(partition)
            for key, value in own.items():
                if is_spread(key, value, partition.flat):
                    for piece in partition.pieces:
                        if key not in state.get(plain_name(piece.whole.name), {}):
                            piece.flat_view(value).zero_()
                else:
                    own[key] = _one_value(key, value, partition, state)

    @property
    def num_groups(self) -> int:
        return len(self._base.param_groups)

    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        take_group_options(self._base.param_groups, options)

    @torch.no_grad()
    def finish(self) -> None:
        """Copy the master weights to the parameters that compute, by DeepSpeed's own methods."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            optimizer.checkpoint_event_prologue()  # lets go of whole parameters that it keeps
            for sub_group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            optimizer.checkpoint_event_epilogue()  # and gathers them again
        elif isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
            self._cast_masters()
        elif hasattr(optimizer, "update_lp_params"):
            optimizer.update_lp_params()
            if self.has_optimizer and all(map(self._state_of, self._partitions)):
                # lets DeepSpeed's own readers of the state find it before the first step
                optimizer._lazy_init_hp_params_optimizer_state()

    def _cast_masters(self) -> None:
        """What the 16-bit optimizers without ZeRO do within their steps, and nowhere else."""
        parameters = dict(self._engine.module.named_parameters())
        for partition in self._partitions:
            for piece in partition.pieces:
                parameters[piece.whole.name].data.copy_(piece.view(partition.flat))

    def _state_of(self, partition: Partition) -> dict[str, Any]:
        found: dict[str, Any] = self._base.state.get(partition.flat, {})
        return found

    def _by_name(self) -> StateByName:
        return {
            plain_name(whole.name): state_leaves(
                state,
                partition.flat,
                partial(fragment_of, whole, pieces),
                partial(_shared_value, whole.name),
            )
            for partition in self._partitions
            if (state := self._state_of(partition))
            for whole, pieces in partition.held
        }


def _as_it_is(name: str, parameter: torch.Tensor) -> torch.Tensor | Fragment:
    """A parameter that no optimizer steps: whole on this rank, or its pieces of it (stage 3)."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    whole, pieces = partition_of_param(parameter, name)
    return fragment_of(whole, pieces, parameter.ds_tensor)


def _shared_value(name: str, key: str, value: Any) -> Any:
    """What a partition has one of, such as its number of steps, as each of its parameters has it
    elsewhere: a tensor of its own."""
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise LayoutMismatchError(
            f"{name}: the optimizer's {key} of shape {tuple(value.shape)} is neither one number nor "
            "one for each element of its partition, so that what belongs to which parameter cannot be "
            "told; use another optimizer"
        )
    return torch.tensor(float(value), dtype=torch.float32)


def _one_value(key: str, current: Any, partition: Partition, state: StateByName) -> Any:
    """Undoes :func:`_shared_value`: one value for the partition, in the type that the optimizer uses; 0 where no
    parameter has one."""
    names = [plain_name(whole.name) for whole in partition.wholes]
    found = {name: state[name][key] for name in names if key in state.get(name, {})}
    if isinstance(current, bool | str | None):
        return next(iter(found.values()), current)
    value = common_value(
        key,
        {name: float(value) for name, value in found.items()},
        "DeepSpeed steps these parameters as one tensor, which has one; give them parameter groups of their "
        "own, or load with load_optimizer_states=False",
    )
    return current.fill_(value) if isinstance(current, torch.Tensor) else type(current)(value)


def _make_state(base: torch.optim.Optimizer, partition: Partition) -> None:
    """Let the optimizer make its state of one partition, as DeepSpeed steps it: alone."""
    group = base.param_groups[partition.group_index]
    groups, params = base.param_groups, group["params"]
    try:
        base.param_groups, group["params"] = [group], [partition.flat]
        make_empty_state(base)
    finally:
        base.param_groups, group["params"] = groups, params
