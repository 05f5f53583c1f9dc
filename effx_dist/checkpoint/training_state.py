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
from effx_dist.checkpoint.matching import (
    MODEL,
    OPTIMIZER,
    LoadReport,
    NameMap,
    SavedNames,
    match,
)
from effx_dist.checkpoint.random_state import random_state
from effx_dist.checkpoint.tree import Leaf, leaf_paths, tree_from_json, tree_to_json
from effx_dist.errors import CorruptCheckpointError, LayoutMismatchError
from effx_dist.shard import LocalRows

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
        full = _full_state_of(model, optimizer) if optimizer.state else {}
        tensors, values["optimizer_values"] = _optimizer_leaves(full.get("state", {}))
        leaves |= tensors
        values["group_parameters"] = _group_parameters(model, optimizer, full)
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
    state: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """State tensors by name, and other state values as JSON."""
    leaves: dict[str, Leaf] = {}
    values: dict[str, Any] = {}
    for parameter, entries in state.items():
        for key, value in entries.items():
            path = f"{OPTIMIZER}.{parameter}.{key}"
            if isinstance(value, torch.Tensor):
                leaves[path] = value
            else:
                values.setdefault(parameter, {})[key] = tree_to_json(value, path, leaves)
    return leaves, values


def _full_state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State and groups by parameter name, as torch.distributed.checkpoint has them."""
    return cast(dict[str, Any], get_optimizer_state_dict(model, optimizer))


def _group_parameters(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, full: Mapping[str, Any]
) -> list[list[str]]:
    """Names of each group's parameters in the optimizer's order, which a plain optimizer's
    state_dict() counts by."""
    if full:
        return [list(group["params"]) for group in full["param_groups"]]
    names: dict[int, str] = {}
    for raw, parameter in model.named_parameters():
        names[id(parameter)] = ".".join(p for p in raw.split(".") if p not in _WRAPPERS)
    groups = optimizer.param_groups
    return [[names[id(p)] for p in group["params"] if id(p) in names] for group in groups]


def _state_of(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Any]]:
    """The live optimizer state by parameter name; initialises it where it is empty."""
    if not optimizer.state:
        return _initialised_state_of(model, optimizer)
    return cast(dict[str, dict[str, Any]], _full_state_of(model, optimizer)["state"])


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


@dataclass
class OptimizerTargets:
    """An optimizer's tensors to fill: by live name, the saved name of each, and the whole state
    that they are part of, by live parameter name."""

    leaves: dict[str, Leaf] = field(default_factory=dict)
    saved_names: dict[str, str] = field(default_factory=dict)
    state: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Targets:
    """Live tensors to fill in place, and what to call with them afterwards.

    Attributes:
        leaves: live tensors by their names in the checkpoint.
        unrenamed: names in ``leaves`` that are also the live tensors' own.
        values: saved names of the model's values that are no tensors, by live name.
        report: what is left alone.
        optimizer: the optimizer's part.
    """

    leaves: dict[str, Leaf]
    unrenamed: frozenset[str]
    values: dict[str, str]
    report: LoadReport
    optimizer: OptimizerTargets


def targets_of(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    manifest: Manifest,
    mapping: NameMap | None = None,
    strict: bool = True,
) -> Targets:
    """The model's and the optimizer's tensors under the names of the checkpoint.

    A fresh optimizer gets its state first, by a step of zero gradients at learning rate zero as
    torch does it, which is collective where the optimizer's step is. Raises LayoutMismatchError for
    tensors that differ in shape or dtype, for a mapping that leads nowhere and, if ``strict``, for
    tensors that only one side has.
    """
    leaves, aliases, values = _model_leaves(model)
    live = [name.removeprefix(f"{MODEL}.") for name in (*leaves, *aliases)] + list(values)
    names = SavedNames(mapping, live, manifest, strict)
    bare = {name: names.of(name.removeprefix(f"{MODEL}.")) for name in leaves}
    saved_names = {name: f"{MODEL}.{saved}" for name, saved in bare.items() if saved is not None}
    state = OptimizerTargets()
    if optimizer is not None:
        state = _optimizer_targets(model, optimizer, manifest, names, strict)
    leaves |= state.leaves
    saved_names |= state.saved_names
    found, report = match(
        leaves, saved_names, names.left_out, manifest, optimizer is not None, strict
    )
    return Targets(
        leaves={saved: leaves[name] for name, saved in found.items()},
        unrenamed=frozenset(name for name, saved in found.items() if saved == name),
        values={name: saved for name in values if (saved := names.of(name)) is not None},
        report=report,
        optimizer=state,
    )


def _optimizer_targets(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    manifest: Manifest,
    names: SavedNames,
    strict: bool,
) -> OptimizerTargets:
    values = run_values(manifest)
    if strict and values.param_groups is None:
        raise LayoutMismatchError(
            f"step {manifest.step} was saved without an optimizer; leave the optimizer out, or load "
            "with strict=False"
        )
    targets = OptimizerTargets()
    stored = {name for name in manifest.tensors if name.startswith(f"{OPTIMIZER}.")}
    if not stored and not values.optimizer_values:
        return targets
    is_fresh = not optimizer.state
    for parameter, entries in _state_of(model, optimizer).items():
        saved = names.of(parameter)
        tensors = {
            f"{OPTIMIZER}.{parameter}.{key}": (tensor, f"{OPTIMIZER}.{saved}.{key}")
            for key, tensor in entries.items()
            if isinstance(tensor, torch.Tensor)
        }
        has_tensors = any(name in stored for _, name in tensors.values())
        if saved is not None and (has_tensors or saved in values.optimizer_values):
            targets.state[parameter] = entries | read_tree(
                values.optimizer_values.get(saved, {}), {}, f"optimizer values of {saved}"
            )
            targets.leaves |= {name: tensor for name, (tensor, _) in tensors.items()}
            targets.saved_names |= {name: there for name, (_, there) in tensors.items()}
        elif not is_fresh and not names.is_known(saved):
            targets.state[parameter] = entries  # the checkpoint does not speak of it
    return targets


def install_optimizer_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, targets: OptimizerTargets
) -> None:
    """Hand the filled state to the optimizer; parameters without a saved state lose theirs."""
    if not targets.state:
        optimizer.state.clear()
        return
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    full: dict[str, Any] = {"state": targets.state, "param_groups": groups}
    # a parameter that has had no gradient yet has no state
    options = StateDictOptions(strict=False)
    set_optimizer_state_dict(model, optimizer, full, options=options)


class RunValues(BaseModel):
    """What :func:`collect` puts into a manifest as JSON; empty where no Checkpointer wrote it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model_values: dict[str, Any] = {}
    optimizer_values: dict[str, dict[str, Any]] = {}
    param_groups: list[dict[str, Any]] | None = None
    group_parameters: list[list[str]] | None = None
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
    values = run_values(manifest)
    asked = {name: state for name, state in values.stateful.items() if name in stateful}
    paths = leaf_paths(values.model_copy(update={"stateful": asked}).model_dump())
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
            local = torch.empty_like(rows.local)
            leaves[path] = LocalRows(local, rows.start, rows.global_rows)
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
