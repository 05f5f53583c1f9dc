"""Filling live objects from an open checkpoint, and preparing what the next save goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from effx_dist.checkpoint.format.manifest import Manifest, ParentRecord, short
from effx_dist.checkpoint.format.whole_tensors import empty_for
from effx_dist.checkpoint.loading.dcp_reader import ExcpReader
from effx_dist.checkpoint.loading.seeded import check_seed
from effx_dist.checkpoint.saving.drive import drive_load
from effx_dist.checkpoint.saving.saver import Loaded
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.joints import is_chained
from effx_dist.checkpoint.state.live import LiveState
from effx_dist.checkpoint.state.matching import MODEL, LoadReport, NameMap
from effx_dist.checkpoint.state.random_state import set_random_state
from effx_dist.checkpoint.state.training_state import (
    Stateful,
    Targets,
    chained_references,
    extra_leaves,
    own_states,
    run_values,
    shared_out,
    targets_of,
)
from effx_dist.checkpoint.state.tree import Leaf, read_tree
from effx_dist.errors import CorruptCheckpointError
from effx_dist.shard import Group


@dataclass(frozen=True)
class Wanted:
    """What a caller asked to load, and how.

    Attributes:
        strict: refuse tensors that only one side has, instead of leaving them alone.
        mapping: live to saved names of parameters and buffers; None: they are the same.
        keeps_references: copy what was loaded, for the next save to be a difference against.
    """

    live: LiveState
    stateful: Mapping[str, Stateful]
    strict: bool = True
    mapping: NameMap | None = None
    keeps_references: bool = True

    @property
    def continues(self) -> bool:
        """Whether the run that was saved goes on, rather than another that begins with its
        weights."""
        return self.strict and self.mapping is None


def restore(
    reader: ExcpReader, wanted: Wanted, group: Group
) -> tuple[dict[str, Any], Loaded, LoadReport]:
    """Fill everything in place; returns the caller's ``extra``, the state of the chain and what was
    left alone.

    Collective: initialising a fresh optimizer's state, asking ``stateful`` for its layout and
    finishing the live state may communicate, and the ranks tell each other of failures.
    """
    manifest = reader.chain.top.manifest

    def find() -> tuple[Targets, dict[str, Any], dict[str, Leaf]]:
        found = targets_of(wanted.live, manifest, wanted.mapping, wanted.strict)
        own = own_states(manifest, wanted.stateful, group.rank, group.size)
        return found, own, extra_leaves(manifest, wanted.stateful, own)

    targets, states, others = group.everywhere(find)
    random_states = _random_leaves(manifest, group.rank) if wanted.continues else {}
    leaves = {**targets.leaves, **others, **random_states}
    check_seed(reader.chain, leaves, group)

    def fill() -> None:
        drive_load({name: Fragment.of(name, leaf) for name, leaf in leaves.items()}, reader)

    group.everywhere(fill)
    group.everywhere(lambda: _install(wanted, targets, manifest, states, others))
    wanted.live.finish()
    generators = {name.rpartition(".")[2]: tensor for name, tensor in random_states.items()}
    _set_random_state(wanted.live, generators, group.rank)
    extra = read_tree(run_values(manifest).extra, others, "extra")
    refitted = {f"{MODEL}.{name}" for name in wanted.live.refitted}
    chained = {name: targets.leaves[name] for name in targets.unrenamed - refitted} | others
    if wanted.live.is_replicated:  # a rank needs references of what it saves
        own = shared_out(chained, group.rank, group.size)
        chained = {name: leaf for name, leaf in own.items() if Fragment.of(name, leaf).own_pieces}
    loaded = _loaded(reader, chained if wanted.keeps_references else {})
    return extra, loaded, replace(targets.report, extra=extra)


def _install(
    wanted: Wanted,
    targets: Targets,
    manifest: Manifest,
    states: Mapping[str, Any],
    others: Mapping[str, Leaf],
) -> None:
    values, live = run_values(manifest), wanted.live
    if values.model_values:
        saved = read_tree(values.model_values, others, "model values")
        found = {own: saved[name] for own, name in targets.values.items() if name in saved}
        live.take_model_values(found)
    if live.has_optimizer and values.param_groups is not None:
        live.take_optimizer_state(targets.optimizer.state)
        stored = read_tree(values.param_groups, others, "param_groups")
        options = live.fit_groups(stored, values.group_parameters)
        if wanted.strict or len(options) == live.num_groups:
            live.take_group_options(options)
    for name, state in read_tree(dict(states), others, "stateful").items():
        wanted.stateful[name].load_state_dict(state)


def _set_random_state(live: LiveState, state: Mapping[str, torch.Tensor], rank: int) -> None:
    try:
        set_random_state(state)
        live.take_random_states(state)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = short(f"{type(error).__name__}: {error}")
        raise CorruptCheckpointError(
            f"rng.{rank}: the saved random states cannot be used: {reason}"
        ) from None


def _random_leaves(manifest: Manifest, rank: int) -> dict[str, torch.Tensor]:
    prefix = f"rng.{rank}."
    return {
        name: empty_for(name, record)
        for name, record in manifest.tensors.items()
        if name.startswith(prefix)
    }


def _loaded(reader: ExcpReader, leaves: Mapping[str, Leaf]) -> Loaded:
    top = reader.chain.top
    names = [
        name
        for name, leaf in leaves.items()
        if name in top.manifest.tensors and is_chained(name, Fragment.of(name, leaf).facts)
    ]
    return Loaded(
        id=top.checksum,
        step=top.manifest.step,
        parent=ParentRecord(name=top.folder.name, xxh3=top.checksum),
        figures=top.manifest.figures,
        references=chained_references(leaves, names),
        is_newest=True,
    )
