"""Megatron-core: weights and optimizer state under the names and shapes of the whole model.

What is saved of a trained parameter is its float32 master weights, in the boxes that this rank holds.
A checkpoint says nothing of tensor-, pipeline- or data-parallel ranks, of buckets or of padding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from effx_dist.checkpoint import Fragment
from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.checkpoint.state.live import LiveState, OptimizerState, StateByName
from effx_dist.checkpoint.state.torch_state import (
    group_options,
    make_empty_state,
    take_group_options,
)
from effx_dist.engines.megatron.cautious import keeps_steps_in_groups
from effx_dist.engines.megatron.job_layout import JobLayout
from effx_dist.engines.megatron.local_tensors import LocalTensor, MainParam
from effx_dist.engines.stepped import STEP, common_value, is_spread, state_leaves
from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Box, Piece, WholeTensor, whole_box


class MegatronState(LiveState):
    """Model chunks and their optimizers. Make a new one for each save and each load.

    Args:
        layout: of the job.
        with_optimizer: whether the optimizers' state is part of it.

    Making one performs no communication, nor does saving from it. A fresh optimizer is made to have a
    state by a step of zero gradients, and :meth:`finish` gathers parameters; both are collective.
    """

    def __init__(self, layout: JobLayout, with_optimizer: bool = True) -> None:
        self._layout = layout
        self.has_optimizer = with_optimizer and any(
            m.group_index >= 0 for m in layout.known_tensors
        )
        self._saved: Mapping[str, TensorFacts] = {}
        self._wider: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fit(self, saved: Mapping[str, TensorFacts]) -> None:
        """Of a padded vocabulary only the rows that both sides have are loaded. Where the model is loaded without
        an optimizer, its 16-bit parameters are rounded from what the checkpoint holds."""
        self._saved = saved

    @property
    def refitted(self) -> frozenset[str]:
        shapes = ((known.name, known.facts.shape) for known in self._layout.known_tensors)
        return frozenset(name for name, own in shapes if self._shape(name, own) != own)

    def model_state(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            known.name: Fragment(
                self._shape(known.name, known.facts.shape),
                self._dtype(known.name, known.facts.dtype),
                [],
            )
            for known in self._layout.known_tensors
        }
        for local in self._layout.local_tensors:
            stepped = self._layout.by_param.get(id(local.tensor))
            if stepped is None:
                found[local.name] = self._as_it_is(local)
            elif stepped[1].main is not None:
                found[local.name] = self._fragment(stepped[1], stepped[1].main)
        return found

    def tied_names(self) -> dict[str, str]:
        return {}  # Megatron's names of a tied tensor are one

    def take_model_values(self, values: Mapping[str, Any]) -> None:
        """Does nothing: Megatron's model has no values that are not tensors."""

    def optimizer_state(self) -> OptimizerState:
        options = group_options(self._layout.param_groups)
        return OptimizerState(self._by_name(), self._layout.group_parameters, options)

    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        told_fresh = self._layout.group.all_gather_object(
            [_is_fresh(optimizer.optimizer) for optimizer in self._layout.optimizers]
        )
        # a rank that an optimizer has nothing of steps along with the others, or not at all
        used = {i for row in told_fresh for i, is_fresh in enumerate(row) if is_fresh is False}
        for index, optimizer in enumerate(self._layout.optimizers):
            if index not in used:
                make_empty_state(optimizer.optimizer)
            _add_steps(optimizer.optimizer)
        state = self._by_name()
        told = self._layout.group.all_gather_object(_dtypes(state))
        dtypes = {key: dtype for row in told for key, dtype in row.items()}
        for known in self._layout.known_tensors:
            if known.group_index >= 0 and known.name not in state:
                state[known.name] = self._nothing_of(known.name, known.facts.shape, dtypes)
        return state, not used

    def take_optimizer_state(self, state: StateByName) -> None:
        for optimizer, params in zip(self._layout.optimizers, self._layout.params, strict=True):
            inner = optimizer.optimizer
            for param in params:
                if param.main is not None:
                    self._take_state_of(inner, param, state.get(param.whole.name, {}))
            if keeps_steps_in_groups(inner):
                _take_steps(inner, params, state)

    @property
    def num_groups(self) -> int:
        return len(self._layout.param_groups)

    def fit_groups(
        self, options: list[dict[str, Any]], parameters: list[list[str]] | None
    ) -> list[dict[str, Any]]:
        """Match the groups by the names of their parameters, because their number and order depend on the
        expert-parallel size."""
        if parameters is None or len(parameters) != len(options):
            return options
        saved_in = {name: number for number, names in enumerate(parameters) for name in names}
        found = []
        for number, names in enumerate(self._layout.group_parameters):
            saved = {saved_in[name] for name in names if name in saved_in}
            given = [options[i] for i in sorted(saved)]
            if any(_chosen(one) != _chosen(given[0]) for one in given[1:]):
                raise LayoutMismatchError(
                    f"parameter group {number} ({', '.join(names[:3])}, ...) holds parameters of groups "
                    f"{sorted(saved)} of the checkpoint, whose options differ; make the same groups"
                )
            own = group_options(self._layout.param_groups[number : number + 1])[0]
            laid_out = {key: own[key] for key in _LAID_OUT & own.keys()}
            found.append({**(given[0] if given else own), **laid_out})
        return found

    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        steps = [group.get(STEP) for group in self._layout.param_groups]
        take_group_options(self._layout.param_groups, options)
        for group, step in zip(self._layout.param_groups, steps, strict=True):
            group.pop(STEP, None)  # the parameters' own are what counts
            if step is not None:
                group[STEP] = step

    def random_states(self) -> dict[str, torch.Tensor]:
        """Megatron's tracker, under names that say for which layout its states are: another one has
        other ranks draw alike."""
        return {
            f"{_layout_name()}:{name}": state
            for name, state in get_cuda_rng_tracker().get_states().items()
            if isinstance(state, torch.Tensor)
        }

    def take_random_states(self, states: Mapping[str, torch.Tensor]) -> None:
        tracker = get_cuda_rng_tracker()
        known = tracker.get_states()
        found = {name: states.get(f"{_layout_name()}:{name}") for name in known}
        tracker.set_states(
            known | {name: state for name, state in found.items() if state is not None}
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Copy the master weights to the parameters that compute, by Megatron's own methods."""
        for parameter, wide in self._wider:
            parameter.copy_(wide)
        gathered = self._layout.gathering_chunks
        for chunk in gathered:
            if chunk.ddp_config.overlap_param_gather:
                # where one is under way, Megatron waits for that one and begins no other
                chunk.start_param_sync(force_sync=True)
        for optimizer in self._layout.optimizers:
            if hasattr(optimizer, "_copy_main_params_to_model_params"):
                optimizer._copy_main_params_to_model_params()
        for chunk in gathered:
            chunk.start_param_sync(force_sync=True)

    def _shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A tensor's own shape, or the checkpoint's where they differ by padding alone."""
        saved = self._saved.get(name)
        if saved is None or name not in self._layout.padded or saved.shape[1:] != shape[1:]:
            return shape
        return saved.shape

    def _dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """A tensor's own dtype, or the checkpoint's where weights alone are loaded and rounded from it; on
        ranks that hold nothing of it as on those that do."""
        saved = self._saved.get(name)
        is_rounded = saved is not None and (dtype, saved.dtype) in _ROUNDED
        return saved.dtype if saved is not None and is_rounded and self._rounds else dtype

    @property
    def _rounds(self) -> bool:
        """Whether nothing is trained, on any rank: then there are no master weights to fill."""
        return not any(known.group_index >= 0 for known in self._layout.known_tensors)

    def _fragment(self, param: MainParam, local: torch.Tensor) -> Fragment:
        return self._of_pieces(param.local, param.pieces, local.detach())

    def _of_pieces(
        self, local: LocalTensor, pieces: Sequence[Piece], tensor: torch.Tensor
    ) -> Fragment:
        held = [(piece.box, piece.view(tensor)) for piece in pieces]
        shape = self._shape(local.name, local.shape)
        if shape != local.shape:
            held = _rows_below(shape[0], held)
        return Fragment(shape, tensor.dtype, held, is_replica=not local.is_main)

    def _as_it_is(self, local: LocalTensor) -> Fragment:
        """A tensor that no optimizer steps."""
        tensor = local.tensor.detach()
        if self._dtype(local.name, tensor.dtype) != tensor.dtype:
            wide = tensor.float()
            self._wider.append((tensor, wide))
            tensor = wide
        whole = WholeTensor(local.name, local.shape)
        pieces = [Piece(whole, box, local_start) for box, local_start in local.boxes]
        return self._of_pieces(local, pieces, tensor)

    def _by_name(self) -> StateByName:
        found: StateByName = {}
        for optimizer, params in zip(self._layout.optimizers, self._layout.params, strict=True):
            inner = optimizer.optimizer
            for param in params:
                state = inner.state.get(param.main) if param.main is not None else None
                if state:
                    found[param.whole.name] = self._state_of(inner, param, state)
        return found

    def _state_of(self, inner: Any, param: MainParam, state: Mapping[str, Any]) -> dict[str, Any]:
        assert param.main is not None, "callers look"
        if keeps_steps_in_groups(inner) and STEP not in state:
            step = inner.param_groups[param.group_index].get(STEP, 0)
            state = {**state, STEP: torch.tensor(float(step))}

        def single(_: str, value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            number = value.detach().float().cpu()
            held = [(whole_box(()), number)]
            return Fragment((), number.dtype, held, is_replica=not param.local.is_main)

        return state_leaves(state, param.main, partial(self._fragment, param), single)

    def _nothing_of(
        self, name: str, shape: tuple[int, ...], dtypes: Mapping[str, tuple[torch.dtype, bool]]
    ) -> dict[str, Any]:
        """The state of a parameter that other ranks hold."""
        return {
            key: Fragment(self._shape(name, shape) if is_spread else (), dtype, [])
            for key, (dtype, is_spread) in dtypes.items()
        }

    def _take_state_of(self, inner: Any, param: MainParam, saved: Mapping[str, Any]) -> None:
        assert param.main is not None, "callers look"
        own = inner.state[param.main]
        is_clipped = self._shape(param.whole.name, param.whole.shape) != param.whole.shape
        for key, value in own.items():
            if is_spread(key, value, param.main):
                if key not in saved:
                    value.zero_()
                elif is_clipped:
                    _zero_rows_from(self._saved[param.whole.name].shape[0], param, value)
            elif isinstance(value, torch.Tensor):
                value.fill_(_number(saved.get(key)))


_ROUNDED = frozenset({(torch.bfloat16, torch.float32), (torch.float16, torch.float32)})


def _rows_below(
    num_rows: int, held: Sequence[tuple[Box, torch.Tensor]]
) -> list[tuple[Box, torch.Tensor]]:
    found = []
    for box, values in held:
        rows = min(box.sizes[0], num_rows - box.offsets[0])
        if rows > 0:
            found.append((Box(box.offsets, (rows, *box.sizes[1:])), values[:rows]))
    return found


def _zero_rows_from(num_rows: int, param: MainParam, value: torch.Tensor) -> None:
    for piece in param.pieces:
        first = max(0, num_rows - piece.box.offsets[0])
        piece.view(value)[first:].zero_()


def _number(saved: Any) -> float:
    """What a checkpoint has of a value that a parameter has one of; 0 where it has none."""
    if isinstance(saved, Fragment):
        return float(saved.pieces[0][1]) if saved.pieces else 0.0
    return 0.0 if saved is None else float(saved)


def _take_steps(inner: Any, params: Sequence[MainParam], state: StateByName) -> None:
    """Set the steps of an optimizer that counts them once for each group."""
    for index, group in enumerate(inner.param_groups):
        names = [param.whole.name for param in params if param.group_index == index]
        steps = {name: _number(state[name][STEP]) for name in names if STEP in state.get(name, {})}
        remedy = "here it counts once for a group; load it into the optimizer that saved it"
        group[STEP] = int(common_value(STEP, steps, remedy))


def _dtypes(state: StateByName) -> dict[str, tuple[torch.dtype, bool]]:
    """For each key of the state, its dtype and whether it has a value for every element of its parameter."""
    return {
        key: (value.dtype, value.shape != ())
        for entries in state.values()
        for key, value in entries.items()
        if isinstance(value, Fragment)
    }


def _is_fresh(inner: torch.optim.Optimizer) -> bool | None:
    """Whether an optimizer has no state yet; None where it holds nothing on this rank."""
    holds = any(group["params"] for group in inner.param_groups)
    return not any(inner.state.values()) if holds else None


def _add_steps(inner: torch.optim.Optimizer) -> None:
    """Megatron's own way to make a state before it loads, of moments alone, leaves them out."""
    if not keeps_steps_in_groups(inner):
        for state in inner.state.values():
            if "exp_avg" in state and STEP not in state:
                state[STEP] = torch.tensor(0.0)


_LAID_OUT = frozenset({"is_expert_parallel"})
"""Options of a group that the layout decides, not the user."""


def _chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in options.items() if k != STEP and k not in _LAID_OUT}


def _layout_name() -> str:
    sizes = {
        "tp": parallel_state.get_tensor_model_parallel_world_size(),
        "pp": parallel_state.get_pipeline_model_parallel_world_size(),
        "cp": parallel_state.get_context_parallel_world_size(),
        "ep": parallel_state.get_expert_model_parallel_world_size(),
        "dp": parallel_state.get_data_parallel_world_size(),
    }
    return "-".join(f"{name}{size}" for name, size in sizes.items())
