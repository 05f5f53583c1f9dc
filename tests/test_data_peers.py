"""Ranks that get the same samples: one of them reports the losses of all."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from effx_dist.data import EffxWarning, InfoBatchSampler
from effx_dist.data.peers import Peers
from effx_dist.data.plan import EpochPlan
from effx_dist.errors import (
    ConfigError,
    EffxError,
    LayoutMismatchError,
    PlanNotTrainedError,
    RankFailedError,
)
from effx_dist.shard import Group, SoloGroup
from tests.data_runs import consume, merge_runs, plain_losses, train
from tests.peer_ranks import Grid, Place, run_grid
from tests.thread_ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*NaN or infinite")
SETTINGS: dict[str, Any] = {"num_samples": 600, "num_epochs": 5, "seed": 4, "batch_size": 4}
GRIDS = [
    Grid(dp=2, tp=2),
    Grid(dp=1, pp=3),
    Grid(dp=2, tp=2, pp=2),
    Grid(dp=2, cp=2),
    Grid(2, 2, 2, 2),
]


def make(place: Place, num_data_ranks: int, **settings: Any) -> InfoBatchSampler:
    accumulated = 6 // num_data_ranks
    return InfoBatchSampler(
        group=place.data,
        peers=place.peers,
        gradient_accumulation_steps=accumulated,
        **SETTINGS | settings,
    )


def step_over(sampler: InfoBatchSampler, place: Place, num_batches: int | None = None) -> None:
    """Weigh what remains of the epoch, or some micro-batches; peers' losses differ from the reporter's."""
    if not place.peers.has_losses:
        left = sampler.num_remaining
        sampler.advance(left if num_batches is None else num_batches * sampler.batch_size)
        return

    def losses(epoch: int, ids: np.ndarray) -> np.ndarray:
        is_right = place.peers.is_reporter
        told: np.ndarray = plain_losses(epoch, ids)
        return told if is_right else told + (1 + place.rank) * (ids % 3).astype(np.float32)

    consume(sampler, losses, num_batches)


def run_epochs(sampler: InfoBatchSampler, place: Place, first: int = 0) -> list[EpochPlan]:
    plans = []
    for epoch in range(first, 5):
        sampler.set_epoch(epoch)
        plans.append(sampler.plan)
        step_over(sampler, place)
    return plans


def whole_run() -> list[Any]:
    """The same by one rank without peers."""
    sampler = InfoBatchSampler(gradient_accumulation_steps=6, **SETTINGS)
    return merge_runs([train(sampler, plain_losses)])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_all_peers_plan_from_the_reporters_losses(grid: Grid) -> None:
    expected = whole_run()
    assert any(len(epoch.ids) < 560 for epoch in expected)  # some are pruned
    for runs in run_grid(grid, lambda place: run_epochs(make(place, grid.dp), place)):
        assert merge_runs(runs) == expected


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_state_within_an_epoch_is_the_same_on_peers_and_goes_on_elsewhere(grid: Grid) -> None:
    def save(place: Place) -> dict[str, Any]:
        sampler = make(place, grid.dp)
        sampler.set_epoch(0)
        step_over(sampler, place)
        sampler.set_epoch(1)
        step_over(sampler, place, 2 * 6 // grid.dp)
        state = sampler.state_dict()
        assert sampler.position == 48
        return state

    by_peer = run_grid(grid, save)
    states, expected = by_peer[0], whole_run()
    for others in by_peer[1:]:
        for state, other in zip(states, others, strict=True):
            for name, value in state.items():
                if name in ("recorded", "progress"):
                    assert len(value.local)
                    assert not len(other[name].local)  # the reporter's alone count
                elif name in ("scores", "fresh_losses"):
                    assert value.start == other[name].start
                    assert torch.equal(
                        value.local.view(torch.int32), other[name].local.view(torch.int32)
                    )
                else:
                    assert value == other[name]

    def go_on(place: Place) -> list[EpochPlan]:
        sampler = make(place, 3)
        sampler.load_state_dict(states)
        return run_epochs(sampler, place, sampler.epoch)

    for runs in run_grid(Grid(dp=3, tp=2), go_on):
        rest, *later = merge_runs(runs)
        assert rest.ids == expected[1].ids[48:]
        assert rest.weights == expected[1].weights[48:]
        assert later == expected[2:]


def errors_of(grid: Grid, body: Any) -> list[list[EffxError]]:
    def caught(place: Place) -> EffxError:
        with pytest.raises(EffxError) as info:
            body(place)
        return info.value

    return run_grid(grid, caught)


def test_an_unknown_id_on_the_reporter_is_an_error_on_every_rank() -> None:
    grid = Grid(dp=2, tp=2, pp=2)

    def body(place: Place) -> None:
        sampler = make(place, grid.dp)
        sampler.set_epoch(0)
        step_over(sampler, place)
        if place.peers.is_reporter and place.data.rank == 1:
            assert sampler._run is not None
            last = torch.tensor([len(sampler.plan.local_ids)])
            sampler._run.recorder._note_strays(last * 0, last, None)  # as on an accelerator
        sampler.set_epoch(1)

    errors = errors_of(grid, body)
    assert isinstance(errors[0][1], PlanNotTrainedError)
    others = [error for peers in errors for error in peers if error is not errors[0][1]]
    assert len(others) == 7
    assert all(isinstance(error, RankFailedError) for error in others)
    assert all("sample_ids 0" in str(error) for error in others)


@pytest.mark.parametrize("grid", [Grid(dp=2, pp=2), Grid(dp=2, cp=2)], ids=str)
def test_peers_that_consumed_unequal_numbers_are_told(grid: Grid) -> None:
    def body(place: Place) -> None:
        sampler = make(place, grid.dp)
        sampler.set_epoch(0)
        step_over(sampler, place, 3 if place.peers.is_reporter else 2)
        sampler.set_epoch(1)

    for peers in errors_of(grid, body):
        for error in peers:
            assert isinstance(error, ConfigError)
            assert "12" in str(error)
            assert "8" in str(error)


def test_a_state_that_one_peer_refuses_is_refused_by_all() -> None:
    def body(place: Place) -> None:
        sampler = make(place, 2)
        state = sampler.state_dict()
        if place.rank == 3:
            state["num_samples"] = 7
        sampler.load_state_dict(state)

    errors = [error for peers in errors_of(Grid(dp=2, tp=2), body) for error in peers]
    assert sum(isinstance(error, LayoutMismatchError) for error in errors) == 1
    assert all("num_samples=7" in str(error) for error in errors)


def test_only_the_reporter_warns() -> None:
    def body(place: Place) -> None:
        make(place, 2, num_epochs=1)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run_grid(Grid(dp=2, tp=2, pp=2), body)
    assert [entry.category for entry in caught] == [EffxWarning]


def test_a_rank_with_losses_does_not_advance() -> None:
    sampler = InfoBatchSampler(**SETTINGS)
    sampler.set_epoch(0)
    with pytest.raises(ConfigError, match="has losses to weigh"):
        sampler.advance(4)
    stage = InfoBatchSampler(peers=Peers(is_reporter=False, has_losses=False), **SETTINGS)
    stage.set_epoch(0)
    with pytest.raises(ConfigError, match="num_samples=-4"):
        stage.advance(-4)
    stage.advance(8)
    assert (stage.position, stage.progress) == (8, 8 / 600)


def test_a_pickled_copy_leaves_its_peers_behind() -> None:
    def body(group: Group) -> None:
        sampler = InfoBatchSampler(
            peers=Peers((group,), is_reporter=group.rank == 0), group=SoloGroup(), **SETTINGS
        )
        sampler.set_epoch(0)
        copy = pickle.loads(pickle.dumps(sampler))
        assert list(copy) == list(sampler)
        with pytest.raises(ConfigError, match="unpickled"):
            copy.set_epoch(1)

    run_ranks(2, body)


def test_a_group_that_breaks_is_no_answer_of_a_peers() -> None:
    class Broken(SoloGroup):
        def all_gather_object(self, value: Any) -> Any:
            raise RuntimeError("connection reset by peer")

    with pytest.raises(RuntimeError, match="connection reset"):
        Peers((Broken(),), is_reporter=True, has_losses=True).agree(None)
