"""What users have pickled with an earlier release, by torch.save of their own, loads and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist import InfoBatchSampler
from effx_dist.checkpoint import PerRank
from effx_dist.shard import Group
from tests.fixtures.pickles.write import (
    NUM_SAMPLES,
    loss_of,
    make_optimizer,
    make_sampler,
    take_step,
)
from tests.thread_ranks import run_ranks

FOLDER = Path(__file__).parent / "fixtures" / "pickles"


def unpickled(name: str) -> Any:
    return torch.load(FOLDER / f"{name}.pt", weights_only=False)


def plan_of_next_epoch(sampler: InfoBatchSampler) -> tuple[list[int], float | None]:
    sampler.set_epoch(1)
    return list(sampler), sampler.threshold_value


def test_a_samplers_state_is_taken_up() -> None:
    sampler = InfoBatchSampler(NUM_SAMPLES, batch_size=4, num_epochs=4)
    sampler.load_state_dict(unpickled("sampler_state"))
    found, threshold = plan_of_next_epoch(sampler)
    assert (found, threshold) == plan_of_next_epoch(make_sampler())
    assert threshold is not None
    assert len(found) < NUM_SAMPLES, "the scores were there to prune by"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_states_of_two_ranks_within_an_epoch_are_taken_up_at_any_number(world: int) -> None:
    """Written by 0.1 after 24 samples of the second epoch, whose plan follows from the losses of the first."""
    states = unpickled("two_ranks_within_an_epoch")

    def body(group: Group) -> tuple[int, list[int]]:
        sampler = InfoBatchSampler(96, batch_size=8 // world, num_epochs=4, group=group)
        sampler.load_state_dict(states)
        assert sampler.plan.pruned
        return sampler.position, sampler.plan.local_ids.tolist()

    def whole(group: Group) -> list[int]:
        sampler = InfoBatchSampler(96, batch_size=4, num_epochs=4, group=group)
        sampler.set_epoch(0)
        for ids in torch.from_numpy(sampler.plan.local_ids).split(4):
            sampler.weigh(loss_of(ids), ids)
        sampler.set_epoch(1)
        return sampler.plan.local_ids.tolist()[12:]

    ranks = run_ranks(world, body)
    rest = sorted(i for _, ids in ranks for i in ids)
    expected = sorted(i for ids in run_ranks(2, whole) for i in ids)
    assert {position for position, _ in ranks} == {24}
    if world < 3:  # else the global batch is 6, and as many are dropped
        assert rest == expected
    else:
        assert len(set(rest)) == len(rest) >= len(expected) - 6


def test_a_whole_sampler_goes_on() -> None:
    assert plan_of_next_epoch(unpickled("sampler")) == plan_of_next_epoch(make_sampler())


@pytest.mark.parametrize("kind", ["adamw", "wrapped"])
def test_a_whole_optimizer_goes_on(kind: str) -> None:
    old, fresh = unpickled(kind), make_optimizer(kind)
    take_step(fresh, 0)
    for number in (1, 2):
        take_step(old, number)
        take_step(fresh, number)
    (found,), (expected,) = (o.param_groups[0]["params"] for o in (old, fresh))
    assert torch.equal(found, expected)


def test_a_state_for_each_rank_is_one_still() -> None:
    found = unpickled("per_rank")
    assert type(found) is PerRank
    assert set(found.state_dict()) == {"weight", "bias"}
