"""The state of a training run as named tensors and JSON, and back into live objects.

Names, the same under every engine and world size: ``model.<parameter>``,
``optimizer.<parameter>.<key>`` and ``rng.<rank>.<generator>``. Tensors inside ``stateful`` and
``extra`` are named by their path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from effx_dist.checkpoint.fragment import Fragment
from effx_dist.checkpoint.manifest import Manifest, TensorRecord, short
from effx_dist.checkpoint.random_state import random_state
from effx_dist.checkpoint.tree import Leaf, leaf_paths, tree_from_json, tree_to_json
from effx_dist.errors import CorruptCheckpointError, LayoutMismatchError
from effx_dist.shard import LocalRows

MODEL = "model"
OPTIMIZER = "optimizer"
_WRAPPERS = frozenset({"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


class Stateful(Protocol):
    """What a sampler, a scheduler or anything else with a state offers."""

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors, LocalRows and what JSON can hold."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take the state back."""


@dataclass(frozen=True)
class TrainingState:
    """Named live tensors; names of tied tensors by the name they are stored under; everything else
    as JSON."""

    leaves: dict[str, Leaf]
    aliases: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def collect(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    stateful: Mapping[str, Stateful],
    extra: Any,
    rank: int,
) -> TrainingState:
    """Everything a checkpoint holds. ``state_dict()`` of ``stateful`` may communicate; nothing else
    does."""
    leaves, aliases, model_values = _model_leaves(model)
    values: dict[str, Any] = {"model_values": model_values}
    if optimizer is not None:
        tensors, values["optimizer_values"] = _optimizer_leaves(model, optimizer)
        leaves |= tensors
        values["param_groups"] = tree_to_json(_group_options(optimizer), "param_groups", leaves)
    states = {name: obj.state_dict() for name, obj in stateful.items()}
    values["stateful"] = tree_to_json(states, "stateful", leaves)
    values["extra"] = tree_to_json(extra, "extra", leaves)
    leaves |= {f"rng.{rank}.{name}": tensor for name, tensor in random_state().items()}
    return TrainingState(leaves, aliases, values)


def _model_leaves(
    model: torch.nn.Module,
) -> tuple[dict[str, Leaf], dict[str, str], dict[str, Any]]:
    tied = tied_names(model)
    leaves: dict[str, Leaf] = {}
    values: dict[str, Any] = {}
    for name, value in get_model_state_dict(model).items():
        if isinstance(value, torch.Tensor):
            if name not in tied:
                leaves[f"{MODEL}.{name}"] = value
        else:
            values[name] = tree_to_json(value, f"{MODEL}.{name}", leaves)
    aliases = {f"{MODEL}.{alias}": f"{MODEL}.{name}" for alias, name in tied.items()}
    return leaves, aliases, values


def tied_names(model: torch.nn.Module) -> dict[str, str]:
    """``{other name: first name}`` of parameters that a model holds under several names."""
    first: dict[int, str] = {}
    tied = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = ".".join(part for part in raw.split(".") if part not in _WRAPPERS)
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def _optimizer_leaves(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """State tensors by name, other state values as JSON; nothing where no step has been taken
    yet."""
    leaves: dict[str, Leaf] = {}
    values: dict[str, Any] = {}
    if not optimizer.state:
        return leaves, values
    for parameter, state in _state_of(model, optimizer).items():
        for key, value in state.items():
            path = f"{OPTIMIZER}.{parameter}.{key}"
            if isinstance(value, torch.Tensor):
                leaves[path] = value
            else:
                values.setdefault(parameter, {})[key] = tree_to_json(value, path, leaves)
    return leaves, values


def _state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """The live optimizer state by parameter name; initialises it where it is empty."""
    if not optimizer.state:
        return _initialised_state_of(model, optimizer)
    return cast(dict[str, dict[str, Any]], get_optimizer_state_dict(model, optimizer)["state"])


def _initialised_state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """torch initialises an empty state only where there are no gradients: they are set aside."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        return cast(dict[str, dict[str, Any]], get_optimizer_state_dict(model, optimizer)["state"])
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def _group_options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """lr, betas and the like of each parameter group, as a scheduler may have left them."""
    skipped = {"params", "param_names"}
    return [
        {key: value for key, value in group.items() if key not in skipped}
        for group in optimizer.param_groups
    ]


def restore_group_options(optimizer: torch.optim.Optimizer, options: list[dict[str, Any]]) -> None:
    """The way back. Raises LayoutMismatchError for another number of parameter groups."""
    if len(options) != len(optimizer.param_groups):
        raise LayoutMismatchError(
            f"the checkpoint has {len(options)} parameter groups, the optimizer has "
            f"{len(optimizer.param_groups)}; build it with the same groups"
        )
    for group, saved in zip(optimizer.param_groups, options, strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), torch.Tensor):
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value


@dataclass(frozen=True)
class Targets:
    """Live tensors to fill in place, and what to call with them afterwards."""

    leaves: dict[str, Leaf]
    optimizer_state: dict[str, dict[str, Any]]


def targets_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, manifest: Manifest
) -> Targets:
    """The model's and the optimizer's tensors under the names of the checkpoint.

    A fresh optimizer gets its state first, by a step of zero gradients at learning rate zero as
    torch does it, which is collective where the optimizer's step is. Raises LayoutMismatchError for
    tensors that only one side has, or that differ in shape or dtype.
    """
    leaves, _, _ = _model_leaves(model)
    state: dict[str, dict[str, Any]] = {}
    prefix = f"{OPTIMIZER}."
    stored = {name for name in manifest.tensors if name.startswith(prefix)}
    if optimizer is not None and stored:
        found = _state_of(model, optimizer)
        for parameter, entries in found.items():
            tensors = {k: v for k, v in entries.items() if isinstance(v, torch.Tensor)}
            if any(f"{prefix}{parameter}.{key}" in stored for key in tensors):
                state[parameter] = dict(entries)
                leaves |= {f"{prefix}{parameter}.{key}": v for key, v in tensors.items()}
    _require_match(leaves, manifest, optimizer is not None)
    return Targets(leaves, state)


def _require_match(leaves: Mapping[str, Leaf], manifest: Manifest, with_optimizer: bool) -> None:
    known = manifest.tensors.keys() | manifest.aliases.keys()
    prefixes = (f"{MODEL}.", f"{OPTIMIZER}.") if with_optimizer else (f"{MODEL}.",)
    live_names = leaves.keys() | manifest.aliases.keys()
    problems = [f"{n}: not in the checkpoint" for n in sorted(leaves.keys() - known)]
    problems += [
        f"{n}: only in the checkpoint"
        for n in sorted(manifest.tensors.keys() - live_names)
        if n.startswith(prefixes)
    ]
    for name in sorted(leaves.keys() & known):
        record = manifest.tensors[manifest.aliases.get(name, name)]
        live = Fragment.of(name, leaves[name]).facts
        if (live.shape, live.dtype) != (tuple(record.shape), record.torch_dtype):
            problems.append(
                f"{name}: {tuple(record.shape)} {record.dtype} in the checkpoint, {live.shape} "
                f"{str(live.dtype).removeprefix('torch.')} here"
            )
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise LayoutMismatchError(
            f"the checkpoint does not fit: {shown}. Build the model and optimizer that were saved"
        )


def install_optimizer_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    targets: Targets,
    values: RunValues,
) -> None:
    """Hand the filled state to the optimizer; parameters without a saved state lose theirs."""
    groups = (
        get_optimizer_state_dict(model, optimizer)["param_groups"]
        if targets.optimizer_state
        else []
    )
    for parameter, entries in values.optimizer_values.items():
        found = read_tree(entries, {}, f"optimizer values of {parameter}")
        targets.optimizer_state.setdefault(parameter, {}).update(found)
    if targets.optimizer_state:
        full: dict[str, Any] = {"state": targets.optimizer_state, "param_groups": groups}
        # a parameter that has had no gradient yet has no state
        options = StateDictOptions(strict=False)
        set_optimizer_state_dict(model, optimizer, full, options=options)
    else:
        optimizer.state.clear()


class RunValues(BaseModel):
    """What :func:`collect` puts into a manifest as JSON; empty where no Checkpointer wrote it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model_values: dict[str, Any] = {}
    optimizer_values: dict[str, dict[str, Any]] = {}
    param_groups: list[dict[str, Any]] | None = None
    stateful: dict[str, Any] = {}
    extra: dict[str, Any] = {}


def run_values(manifest: Manifest) -> RunValues:
    """The JSON side of a checkpoint. Raises CorruptCheckpointError where it is none of ours."""
    try:
        values = RunValues.model_validate({} if manifest.extra is None else manifest.extra)
        leaf_paths(values.model_dump())
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"step {manifest.step}: extra: {short(str(error))}") from None
    return values


def read_tree(value: Any, leaves: Mapping[str, Leaf], what: str) -> Any:
    """A tree of the manifest with its tensors. Raises CorruptCheckpointError for one that is none."""
    try:
        return tree_from_json(value, leaves.__getitem__)
    except (TypeError, ValueError, LookupError, AttributeError, RecursionError) as error:
        reason = short(f"{type(error).__name__}: {error}")
        raise CorruptCheckpointError(f"the manifest's {what} cannot be read: {reason}") from None


def extra_leaves(manifest: Manifest, stateful: Mapping[str, Stateful]) -> dict[str, Leaf]:
    """Empty tensors for what ``stateful`` and ``extra`` hold; rows in the layout that the live
    objects ask for now.

    ``state_dict()`` of objects with rows is called for their layout, and may communicate.
    """
    paths = leaf_paths(run_values(manifest).model_dump())
    wanted: dict[str, Leaf] = {}
    row_paths = {path for path, tag in paths.items() if tag == "$rows"}
    for name, obj in stateful.items():
        if any(path.startswith(f"stateful.{name}.") for path in row_paths):
            tree_to_json({name: obj.state_dict()}, "stateful", wanted)
    leaves: dict[str, Leaf] = {}
    for path in paths:
        record = manifest.tensors.get(path)
        if record is None:
            raise CorruptCheckpointError(
                f"{short(str(path))}: the manifest refers to a tensor that it does not hold"
            )
        rows = wanted.get(path)
        if isinstance(rows, LocalRows):
            leaves[path] = LocalRows(rows.local.clone(), rows.start, rows.global_rows)
        else:
            leaves[path] = empty_for(path, record)
    return leaves


def empty_for(name: str, record: TensorRecord) -> torch.Tensor:
    """Host memory for a whole tensor that a manifest describes."""
    try:
        return torch.empty(record.shape, dtype=record.torch_dtype)
    except RuntimeError as error:
        raise CorruptCheckpointError(
            f"{name}: no memory for a tensor of shape {record.shape}: {short(str(error))}"
        ) from None


def chained_references(
    leaves: Mapping[str, Leaf], names: Iterable[str]
) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    """Host copies of the local boxes of ``names``: what the next save is a difference against."""
    return {
        (name, box.offsets): part.detach().to("cpu", copy=True).contiguous()
        for name in names
        for box, part in Fragment.of(name, leaves[name]).parts
    }
