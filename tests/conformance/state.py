"""What every engine must show of its LiveState: that a checkpoint of it is whole, says nothing of the
layout, and comes back."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from effx_dist.checkpoint import Fragment
from effx_dist.checkpoint.state.live import LiveState
from effx_dist.checkpoint.state.tree import Leaf
from effx_dist.shard import Box, Group

Boxes = dict[str, tuple[tuple[int, ...], set[Box]]]
"""By name: the shape of the whole tensor, and the boxes of it that somebody saves."""


def check(make: Callable[[], LiveState], group: Group) -> None:
    """Judge what ``make`` gives of a model whose optimizer has stepped. Its values are others
    afterwards. Called by every rank."""
    live = make()
    model = _leaves(live.model_state())
    state = live.optimizer_state()
    optimizer = _leaves(_flat(state.by_name))
    _check_names(model, group)
    _check_tiled(model, group)
    _check_tiled(optimizer, group)
    _check_groups(live, model, group)
    _check_parts(model | optimizer)
    _check_comes_back(make, group)


def _leaves(state: Mapping[str, Any]) -> dict[str, Fragment]:
    return {name: Fragment.of(name, leaf) for name, leaf in state.items() if isinstance(leaf, Leaf)}


def _flat(by_name: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{name}.{key}": v for name, entries in by_name.items() for key, v in entries.items()}


def _check_names(model: Mapping[str, Fragment], group: Group) -> None:
    """A load names what is missing: all ranks must know of all tensors."""
    told = group.all_gather_object({name: leaf.facts for name, leaf in model.items()})
    assert all(facts == told[0] for facts in told), "ranks give other names, shapes or dtypes"
    assert model


def _check_tiled(leaves: Mapping[str, Fragment], group: Group) -> None:
    """What the ranks save makes up each whole tensor, every element once. Ranks may offer the same
    box, of which one is saved."""
    own: Boxes = {
        name: (leaf.shape, {box for box, _ in leaf.own_pieces}) for name, leaf in leaves.items()
    }
    wholes: Boxes = {}
    for boxes_of_rank in group.all_gather_object(own):
        for name, (shape, boxes) in boxes_of_rank.items():
            known = wholes.setdefault(name, (shape, set()))
            assert known[0] == shape, f"{name}: {shape} on one rank, {known[0]} on another"
            known[1].update(boxes)
    for name, (shape, boxes) in wholes.items():
        times = torch.zeros(shape, dtype=torch.int32)
        for box in boxes:
            times[box.slices] += 1
        assert bool(times.eq(1).all()), (
            f"{name}: elements are saved {times.unique().tolist()} times"
        )


def _check_groups(live: LiveState, model: Mapping[str, Fragment], group: Group) -> None:
    state = live.optimizer_state()
    assert len(state.group_options) == len(state.group_parameters) == live.num_groups
    members = [name for names in state.group_parameters for name in names]
    assert len(set(members)) == len(members), "a parameter is in two groups"
    assert set(members) <= model.keys(), f"{set(members) - model.keys()} are no parameters"
    assert state.by_name.keys() <= set(members)
    told = group.all_gather_object(state.group_parameters)
    assert all(groups == told[0] for groups in told), "ranks give other groups"


def _check_parts(leaves: Mapping[str, Fragment]) -> None:
    for name, leaf in leaves.items():
        for box, part in leaf.pieces:
            assert tuple(part.shape) == box.sizes, f"{name}: a part of {part.shape} for {box}"
            assert part.dtype == leaf.dtype, f"{name}: a part in {part.dtype}"
            assert not part.requires_grad, f"{name}: a part that autograd follows"


def _check_comes_back(make: Callable[[], LiveState], group: Group) -> None:
    """Values that a load writes are there afterwards, and in the parameters that compute."""
    live = make()
    leaves = _leaves(live.model_state())
    state, _ = live.made_optimizer_state()
    leaves |= {f"optimizer.{name}": leaf for name, leaf in _leaves(_flat(state)).items()}
    told = group.all_gather_object(sorted(leaves))
    assert all(names == told[0] for names in told), "a load looks for other tensors on each rank"
    written = {name: _written(name, leaf) for name, leaf in leaves.items()}
    live.take_optimizer_state(state)
    live.take_group_options(live.optimizer_state().group_options)
    live.finish()
    again = make()
    found = _leaves(again.model_state())
    kept = _leaves(_flat(again.optimizer_state().by_name))
    found |= {f"optimizer.{name}": leaf for name, leaf in kept.items()}
    for name, parts in written.items():
        for box, values in parts:
            now = [part for other, part in found[name].pieces if other == box]
            assert len(now) == 1, f"{name}: {box} is there {len(now)} times"
            assert torch.equal(now[0].cpu(), values), f"{name}: what was loaded into {box} is lost"


def _written(name: str, leaf: Fragment) -> list[tuple[Box, torch.Tensor]]:
    """Fill a tensor's parts with values that depend on its name and their place alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    is_step = name.endswith(".step")
    whole = torch.full(leaf.shape, 7.0) if is_step else torch.rand(leaf.shape, generator=generator)
    whole = whole.to(leaf.dtype)
    for box, part in leaf.pieces:
        part.copy_(whole[box.slices])
    return [(box, whole[box.slices]) for box, _ in leaf.pieces]
