"""The state of a training run as named tensors and JSON, and back into live objects.

Names, the same under every engine and world size: ``model.<parameter>``,
``optimizer.<parameter>.<key>`` and ``rng.<rank>.<generator>``. Tensors inside ``stateful`` and
``extra`` are named by their path.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from effx_dist.checkpoint.fragment import Fragment
from effx_dist.checkpoint.joints import TensorFacts
from effx_dist.checkpoint.live import LiveState
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
    live: LiveState, stateful: Mapping[str, Stateful], extra: Any, rank: int
) -> TrainingState:
    """Everything a checkpoint holds. ``state_dict()`` of ``stateful`` may communicate; nothing else
    does."""
    leaves, aliases, model_values = _model_leaves(live)
    values: dict[str, Any] = {"model_values": model_values}
    if live.has_optimizer:
        optimizer = live.optimizer_state()
        tensors, values["optimizer_values"] = _optimizer_leaves(optimizer.by_name)
        leaves |= tensors
        values["group_parameters"] = optimizer.group_parameters
        values["param_groups"] = tree_to_json(optimizer.group_options, "param_groups", leaves)
    states = {name: obj.state_dict() for name, obj in stateful.items()}
    values["stateful"] = tree_to_json(states, "stateful", leaves)
    values["extra"] = tree_to_json(extra, "extra", leaves)
    if live.has_random_state:
        generators = random_state() | live.random_states()
        leaves |= {f"rng.{rank}.{name}": tensor for name, tensor in generators.items()}
    return TrainingState(leaves, aliases, values)


def _model_leaves(live: LiveState) -> tuple[dict[str, Leaf], dict[str, str], dict[str, Any]]:
    tied = live.tied_names()
    leaves: dict[str, Leaf] = {}
    values: dict[str, Any] = {}
    for name, value in live.model_state().items():
        if not isinstance(value, Leaf):
            values[name] = tree_to_json(value, f"{MODEL}.{name}", leaves)
        elif name not in tied:
            leaves[f"{MODEL}.{name}"] = value
    aliases = {f"{MODEL}.{alias}": f"{MODEL}.{name}" for alias, name in tied.items()}
    return leaves, aliases, values


def _optimizer_leaves(
    state: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Leaf], dict[str, Any]]:
    """State tensors by name, and other state values as JSON."""
    leaves: dict[str, Leaf] = {}
    values: dict[str, Any] = {}
    for parameter, entries in state.items():
        for key, value in entries.items():
            path = f"{OPTIMIZER}.{parameter}.{key}"
            if isinstance(value, Leaf):
                leaves[path] = value
            else:
                values.setdefault(parameter, {})[key] = tree_to_json(value, path, leaves)
    return leaves, values


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
    live: LiveState,
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
    live.fit(_model_facts(manifest))
    leaves, aliases, values = _model_leaves(live)
    own = [name.removeprefix(f"{MODEL}.") for name in (*leaves, *aliases)] + list(values)
    names = SavedNames(mapping, own, manifest, strict)
    bare = {name: names.of(name.removeprefix(f"{MODEL}.")) for name in leaves}
    saved_names = {name: f"{MODEL}.{saved}" for name, saved in bare.items() if saved is not None}
    state = OptimizerTargets()
    if live.has_optimizer:
        state = _optimizer_targets(live, manifest, names, strict)
    leaves |= state.leaves
    saved_names |= state.saved_names
    found, report = match(leaves, saved_names, names.left_out, manifest, live.has_optimizer, strict)
    return Targets(
        leaves={saved: leaves[name] for name, saved in found.items()},
        unrenamed=frozenset(name for name, saved in found.items() if saved == name),
        values={name: saved for name in values if (saved := names.of(name)) is not None},
        report=report,
        optimizer=state,
    )


def _model_facts(manifest: Manifest) -> dict[str, TensorFacts]:
    prefix = f"{MODEL}."
    return {
        name.removeprefix(prefix): TensorFacts(record.torch_dtype, tuple(record.shape))
        for name, record in manifest.tensors.items()
        if name.startswith(prefix)
    }


def _optimizer_targets(
    live: LiveState, manifest: Manifest, names: SavedNames, strict: bool
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
    state, was_fresh = live.made_optimizer_state()
    for parameter, entries in state.items():
        saved = names.of(parameter)
        tensors = {
            f"{OPTIMIZER}.{parameter}.{key}": (tensor, f"{OPTIMIZER}.{saved}.{key}")
            for key, tensor in entries.items()
            if isinstance(tensor, Leaf)
        }
        has_tensors = any(name in stored for _, name in tensors.values())
        if saved is not None and (has_tensors or saved in values.optimizer_values):
            targets.state[parameter] = entries | read_tree(
                values.optimizer_values.get(saved, {}), {}, f"optimizer values of {saved}"
            )
            targets.leaves |= {name: tensor for name, (tensor, _) in tensors.items()}
            targets.saved_names |= {name: there for name, (_, there) in tensors.items()}
        elif not was_fresh and not names.is_known(saved):
            targets.state[parameter] = entries  # the checkpoint does not speak of it
    return targets


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
