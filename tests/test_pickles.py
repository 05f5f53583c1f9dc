"""What users have pickled with an earlier release, by torch.save of their own, loads and goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist import InfoBatchSampler
from effx_dist.checkpoint import PerRank
from tests.fixtures.pickles.write import NUM_SAMPLES, make_optimizer, make_sampler, take_step

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
