"""The state of a training run as named tensors and JSON, and back into live objects.

Names, the same under every engine and world size: ``model.<parameter>``,
``optimizer.<parameter>.<key>`` and ``rng.<rank>.<generator>``. Tensors inside ``stateful`` and
``extra`` are named by their path.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from torch.distributed.tensor import DTensor

from effx_dist.checkpoint.format.manifest import Manifest, short
from effx_dist.checkpoint.format.whole_tensors import empty_for
from effx_dist.checkpoint.state.fragment import Fragment, plain_tensors
from effx_dist.checkpoint.state.joints import TensorFacts, is_spread
from effx_dist.checkpoint.state.live import LiveState
from effx_dist.checkpoint.state.matching import (
    MODEL,
    OPTIMIZER,
    LoadReport,
    NameMap,
    SavedNames,
    match,
)
from effx_dist.checkpoint.state.random_state import random_state
from effx_dist.checkpoint.state.rank_values import PerRank, own_state, per_rank_path
from effx_dist.checkpoint.state.tree import PER_RANK, Leaf, leaf_paths, read_tree, tree_to_json
from effx_dist.errors import CorruptCheckpointError, LayoutMismatchError
from effx_dist.shard import EvenShare, LocalRows


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
    values["stateful"] = {
        name: _stateful_tree(name, obj, rank, leaves) for name, obj in stateful.items()
    }
    values["extra"] = tree_to_json(extra, "extra", leaves)
    if live.has_random_state:
        generators = random_state() | live.random_states()
        leaves |= {f"rng.{rank}.{name}": tensor for name, tensor in generators.items()}
    return TrainingState(leaves, aliases, values)


def saver_of(name: str, facts: TensorFacts, num_ranks: int) -> int:
    """Which of the ranks that all hold a tensor saves it.

    By the parameter's name alone, so that its moments go with it, and the rank that has the reference
    of it writes it again next time. Buffers are the first rank's, as DDP hands them round: those of one
    layer must not come from several ranks.
    """
    if not is_spread(facts):
        return 0
    kind, _, rest = name.partition(".")
    parameter = rest.rpartition(".")[0] if kind == OPTIMIZER else rest
    return zlib.crc32(parameter.encode()) % num_ranks


def shared_out(leaves: Mapping[str, Leaf], rank: int, num_ranks: int) -> dict[str, Leaf]:
    """The tensors of a state that every rank holds whole, each left to one rank: a rank copies and
    writes its own alone. Others than the model's and the optimizer's stay as they are."""
    found: dict[str, Leaf] = {}
    for name, leaf in leaves.items():
        found[name] = leaf
        if not name.startswith((f"{MODEL}.", f"{OPTIMIZER}.")):
            continue
        whole = Fragment.of(name, leaf)
        if saver_of(name, whole.facts, num_ranks) != rank:
            found[name] = Fragment(whole.shape, whole.dtype, whole.pieces, is_replica=True)
    return found


def _stateful_tree(name: str, obj: Stateful, rank: int, leaves: dict[str, Leaf]) -> Any:
    path = f"stateful.{name}"
    if not isinstance(obj, PerRank):
        return tree_to_json(obj.state_dict(), path, leaves)
    own = tree_to_json(obj.state_dict(), per_rank_path(path, rank), leaves)
    return {PER_RANK: {str(rank): own}}


def _model_leaves(live: LiveState) -> tuple[dict[str, Leaf], dict[str, str], dict[str, Any]]:
    tied = live.tied_names()
    leaves: dict[str, Leaf] = {}
    values: dict[str, Any] = {}
    for name, value in live.model_state().items():
        if not isinstance(value, Leaf):
            values[name] = tree_to_json(value, f"{MODEL}.{name}", leaves)
        elif name not in tied:
            leaves |= plain_tensors(f"{MODEL}.{name}", value)
    aliases: dict[str, str] = {}
    for alias, name in tied.items():
        first, other = f"{MODEL}.{name}", f"{MODEL}.{alias}"
        parts = [part for part in leaves if part.startswith(f"{first}.")] or [first]
        aliases |= {other + part.removeprefix(first): part for part in parts}
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
                leaves |= plain_tensors(path, value)
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
        values: saved names of the model's values that are not tensors, by live name.
        report: what is left alone.
        optimizer: the optimizer's part.
    """

    leaves: dict[str, Leaf]
    unrenamed: frozenset[str]
    values: dict[str, str]
    report: LoadReport
    optimizer: OptimizerTargets


def targets_of(
    live: LiveState, manifest: Manifest, mapping: NameMap | None = None, strict: bool = True
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
            f"{OPTIMIZER}.{parameter}.{part}": (tensor, f"{OPTIMIZER}.{saved}.{part}")
            for key, value in entries.items()
            if isinstance(value, Leaf)
            for part, tensor in plain_tensors(key, value).items()
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
    """The JSON side of a checkpoint. Raises CorruptCheckpointError where it is not of this form."""
    try:
        values = RunValues.model_validate({} if manifest.extra is None else manifest.extra)
        leaf_paths(values.model_dump())
    except (ValidationError, ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"step {manifest.step}: extra: {short(str(error))}") from None
    return values


def own_states(
    manifest: Manifest, stateful: Mapping[str, Stateful], rank: int, size: int
) -> dict[str, Any]:
    """The saved trees of the objects that are handed over, as this rank takes them. Raises
    LayoutMismatchError as :func:`effx_dist.checkpoint.state.rank_values.own_state` does."""
    saved = run_values(manifest).stateful
    found = {
        name: own_state(name, saved[name], obj, rank, size)
        for name, obj in stateful.items()
        if name in saved
    }
    return {name: tree for name, tree in found.items() if tree is not None}


def extra_leaves(
    manifest: Manifest, stateful: Mapping[str, Stateful], states: Mapping[str, Any]
) -> dict[str, Leaf]:
    """What the tensors of ``states`` (of :func:`own_states`) and of ``extra`` are read into: empty
    ones; rows in the layout that the live objects ask for now; live DTensors themselves.

    ``state_dict()`` of objects with rows or DTensors is called for their layout, and may communicate.
    """
    values = run_values(manifest)
    paths = leaf_paths(values.model_copy(update={"stateful": dict(states)}).model_dump())
    wanted: dict[str, Leaf] = {}
    for name, obj in stateful.items():
        own = {tag for path, tag in paths.items() if path.startswith(f"stateful.{name}.")}
        if own & {"$rows", "$sharded"} or (own and isinstance(obj, nn.Module)):
            tree_to_json({name: obj.state_dict()}, "stateful", wanted)
    return {path: _target(path, tag, manifest, wanted.get(path)) for path, tag in paths.items()}


def _target(path: str, tag: str, manifest: Manifest, live: Leaf | None) -> Leaf:
    """What one tensor of a state is read into."""
    record = manifest.tensors.get(path)
    if record is None:
        raise CorruptCheckpointError(
            f"{short(str(path))}: the manifest refers to a tensor that it does not hold"
        )
    if isinstance(live, EvenShare) and live.global_rows != record.shape[0]:
        start, stop = live.of(record.shape[0])
        shape = (stop - start, *live.local.shape[1:])
        return LocalRows(live.local.new_empty(shape), start, record.shape[0])
    if isinstance(live, LocalRows):
        return LocalRows(torch.empty_like(live.local), live.start, live.global_rows)
    if isinstance(live, DTensor):
        here, there = (tuple(live.shape), live.dtype), (tuple(record.shape), record.torch_dtype)
        if here != there:
            raise LayoutMismatchError(
                f"{path}: {there[0]} {there[1]} in the checkpoint, {here[0]} {here[1]} here"
            )
        return live
    if tag == "$sharded" and live is None:
        raise LayoutMismatchError(
            f"{path}: was saved from a DTensor, and the object's state has none there to fill; make its "
            "state first (an optimizer: by a step), or hand it over as model and optimizer"
        )
    return empty_for(path, record)


def chained_references(
    leaves: Mapping[str, Leaf], names: Iterable[str]
) -> dict[tuple[str, tuple[int, ...]], torch.Tensor]:
    """Host copies of the local boxes of ``names``: what the next save is a difference against."""
    return {
        (name, box.offsets): values.detach().to("cpu", copy=True).contiguous()
        for name in names
        for box, values in Fragment.of(name, leaves[name]).pieces
    }
