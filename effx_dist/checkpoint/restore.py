"""From an open checkpoint into live objects, and into what the next save goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from effx_dist.checkpoint.drive import drive_load
from effx_dist.checkpoint.fragment import Fragment
from effx_dist.checkpoint.joints import is_chained
from effx_dist.checkpoint.manifest import Manifest, ParentRecord, short
from effx_dist.checkpoint.random_state import set_random_state
from effx_dist.checkpoint.reader import ExcpReader
from effx_dist.checkpoint.saver import Loaded
from effx_dist.checkpoint.training_state import (
    Stateful,
    Targets,
    chained_references,
    empty_for,
    extra_leaves,
    install_optimizer_state,
    read_tree,
    restore_group_options,
    run_values,
    targets_of,
)
from effx_dist.checkpoint.tree import Leaf
from effx_dist.errors import CorruptCheckpointError
from effx_dist.shard import Group


def restore(
    reader: ExcpReader,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    stateful: Mapping[str, Stateful],
    group: Group,
) -> tuple[dict[str, Any], Loaded]:
    """Fill everything in place; returns the caller's ``extra`` and the state of the chain.

    Collective: initialising a fresh optimizer's state and asking ``stateful`` for its layout may
    communicate, and the ranks tell each other of failures.
    """
    manifest = reader.chain.top.manifest
    targets, others = group.everywhere(
        lambda: (targets_of(model, optimizer, manifest), extra_leaves(manifest, stateful)),
        keep_own_error=True,
    )
    random_states = _random_leaves(manifest, group.rank)
    leaves = {**targets.leaves, **others, **random_states}

    def fill() -> None:
        drive_load({name: Fragment.of(name, leaf) for name, leaf in leaves.items()}, reader)

    group.everywhere(fill, keep_own_error=True)
    _install(model, optimizer, stateful, targets, manifest, others)
    states = {name.rpartition(".")[2]: tensor for name, tensor in random_states.items()}
    _set_random_state(states, group.rank)
    extra = read_tree(run_values(manifest).extra, others, "extra")
    return extra, _loaded(reader, {**targets.leaves, **others})


def _install(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    stateful: Mapping[str, Stateful],
    targets: Targets,
    manifest: Manifest,
    others: Mapping[str, Leaf],
) -> None:
    values = run_values(manifest)
    if values.model_values:
        model_values = read_tree(values.model_values, others, "model values")
        set_model_state_dict(model, model_values, options=StateDictOptions(strict=False))
    if optimizer is not None and values.param_groups is not None:
        install_optimizer_state(model, optimizer, targets, values)
        options = read_tree(values.param_groups, others, "param_groups")
        restore_group_options(optimizer, options)
    states = read_tree(values.stateful, others, "stateful")
    for name, obj in stateful.items():
        if name in states:
            obj.load_state_dict(states[name])


def _set_random_state(state: Mapping[str, torch.Tensor], rank: int) -> None:
    try:
        set_random_state(state)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        reason = short(f"{type(error).__name__}: {error}")
        raise CorruptCheckpointError(
            f"rng.{rank}: the saved random states are none: {reason}"
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
