"""Taking up a saved state: which samples of its epoch were weighed, and the plan of what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.data.lookup import look_up
from effx_dist.data.peers import Peers
from effx_dist.data.plan import EpochPlan, Planner, Recalled, Unfinished
from effx_dist.data.scores import ScoreBook
from effx_dist.data.slots import Owners
from effx_dist.data.state import Counters, SamplerState
from effx_dist.errors import ConfigError, EffxError

_MANY = 1 << 62


@dataclass(frozen=True, eq=False)
class ByIds:
    """Scores of another data set are wanted: the id that each sample had there, or None where ids did not change."""

    old_ids: npt.NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class Loaded:
    """What a sampler goes on with."""

    book: ScoreBook
    counters: Counters
    plan: EpochPlan | None
    has_ended: bool = False
    message: str = ""
    """What the user should know."""


def load(
    states: Sequence[Mapping[str, Any]],
    planner: Planner,
    peers: Peers,
    settings: dict[str, Any],
    dataset: str | None,
    by_ids: ByIds | None,
) -> Loaded:
    """Take up what ranks have saved; see `InfoBatchSampler.load_state_dict`. Collective.

    No rank raises before all know of it.
    """
    error: Exception | None = None
    is_other = False
    try:
        if not len(states):
            raise ConfigError("states=[]: must hold the state of every rank that saved")
        is_other = by_ids is not None and _is_other(states[0], planner, dataset)
        if not is_other:
            _check_dataset(states[0], dataset)
        loaded = SamplerState.from_dicts(
            states, planner.ranks, settings, peers.is_reporter, by_id=is_other
        )
    except EffxError as caught:
        error = caught
    planner.ranks.group.tell_all(peers.agree(error), None)
    if is_other:
        assert by_ids is not None
        return _adopt(loaded, states[0], planner, by_ids)
    return _go_on(loaded, planner, peers)


def _go_on(loaded: SamplerState, planner: Planner, peers: Peers) -> Loaded:
    message = ""
    book, counters, unfinished = loaded.book, loaded.counters, loaded.unfinished
    if unfinished is None:
        return Loaded(book, counters, None)
    recalled = planner.recall(unfinished, book)
    if loaded.version == 1:  # it has counted them already
        found = torch.tensor([int(np.isinf(book.fresh).sum())])
        counters.num_nonfinite -= int(planner.ranks.group.all_reduce(found)[0])
    else:
        position, message = _position(loaded, unfinished, planner, peers)
        _receive(loaded, unfinished, recalled, planner, peers)
        unfinished = replace(unfinished, position=position)
    return Loaded(
        book, counters, planner.resume(unfinished, recalled, book), loaded.has_ended, message
    )


def _position(
    loaded: SamplerState, unfinished: Unfinished, planner: Planner, peers: Peers
) -> tuple[int, str]:
    """All slots before it were weighed, in whole micro-batches of all ranks; what is odd about them. One small
    all-reduce."""
    prefix = int(np.nanmin(loaded.prefixes, initial=loaded.num_local))
    fewest = int(np.nanmin(loaded.num_weighs, initial=_MANY))
    most = int(np.nanmax(loaded.num_weighs, initial=0))
    found = planner.ranks.group.all_reduce(torch.tensor([prefix, fewest, -most]), "min")
    prefix, fewest, most = peers.spread(found.numpy()).tolist()
    message = ""
    if fewest < -most:
        message = (
            f"the state's ranks had weighed {fewest} to {-most} micro-batches of epoch {unfinished.epoch}: they seem "
            "to be of different moments; each rank's samples go on where it stood"
        )
    if unfinished.rest is not None:
        return unfinished.position, message
    layout = loaded.layout
    num_steps = prefix // layout.batch_size
    return unfinished.span.first + num_steps * layout.micro_step, message


def _receive(
    loaded: SamplerState, unfinished: Unfinished, recalled: Recalled, planner: Planner, peers: Peers
) -> None:
    """Losses that were recorded go to the owners of their samples. Two all-to-alls, and two a group of peers."""
    if not loaded.num_local:
        return
    book, ranks, layout = loaded.book, planner.ranks, loaded.layout
    owned = planner.planned_before(unfinished, recalled, book)
    first = 0 if unfinished.rest is not None else unfinished.span.first
    saver, place = layout.place(owned.slots - first)
    holders = Owners(loaded.num_local * layout.size, ranks.group.size)
    losses = look_up(loaded.recorded, holders, saver * loaded.num_local + place, ranks.group)
    is_known = ~np.isnan(losses)
    offsets, losses = peers.share(owned.offsets[is_known], losses[is_known])
    book.fresh[offsets] = losses


def _is_other(state: Mapping[str, Any], planner: Planner, dataset: str | None) -> bool:
    is_grown = state.get("num_samples") != planner.ranks.owners.num_samples
    return is_grown or state.get("dataset") != dataset


def _check_dataset(state: Mapping[str, Any], dataset: str | None) -> None:
    found = state.get("dataset")
    if found is not None and dataset is not None and found != dataset:
        raise ConfigError(
            f"dataset={found!r} in the state, {dataset!r} here: scores belong to the samples of one data set. If it is "
            "the same with more samples, or in another order, call sampler.keep_scores_by_id() before the load"
        )


def _adopt(
    loaded: SamplerState, state: Mapping[str, Any], planner: Planner, by_ids: ByIds
) -> Loaded:
    """The scores of another data set, by id. Two all-to-alls."""
    ranks, num_old = planner.ranks, int(state["num_samples"])
    start, stop = ranks.owned_start, ranks.owned_start + ranks.num_owned
    if by_ids.old_ids is None:
        old = np.arange(start, stop, dtype=np.int64)
    else:
        old = np.asarray(by_ids.old_ids[start:stop], dtype=np.int64)
    error = None
    if len(old) != stop - start or (old.max(initial=-1) >= num_old and by_ids.old_ids is not None):
        error = ConfigError(
            f"old_ids: must be {ranks.owners.num_samples} ids of the {num_old} samples in the state, or -1"
        )
    ranks.group.tell_all(error, None)
    is_known = (old >= 0) & (old < num_old)
    book = ScoreBook.unscored(ranks.num_owned)
    holders = Owners(num_old, ranks.group.size)
    book.scores[is_known] = look_up(loaded.book.scores, holders, old[is_known], ranks.group)
    epoch = loaded.unfinished.epoch if loaded.unfinished else 0
    message = (
        f"scores of {num_old} samples were taken over by id for {ranks.owners.num_samples}; epoch "
        f"{epoch} begins anew"
    )
    return Loaded(book, replace(loaded.counters, first_epoch=epoch), None, message=message)
