"""The learning rate by data progress."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from effx_dist.data import InfoBatchSampler, ProgressLR
from effx_dist.errors import ConfigError, LayoutMismatchError
from tests.data_runs import plain_losses


def _optimizer(as_tensor: bool = False) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": lr} for lr in (1.0, 0.5)]
    if as_tensor:
        for group in groups:
            group["lr"] = torch.tensor(group["lr"])
    return torch.optim.SGD(groups, lr=0.1)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_rates_follow_progress(as_tensor: bool) -> None:
    schedule = ProgressLR(_optimizer(as_tensor), total_epochs=4, warmup_epochs=1, min_ratio=0.1)
    assert schedule.get_last_lr() == [0, 0]
    for progress, factor in [(0.5, 0.5), (1, 1), (2.5, 0.55), (4, 0.1), (9, 0.1)]:
        schedule.step(progress)
        assert schedule.get_last_lr() == pytest.approx([factor, factor / 2])


def test_a_pruned_run_ends_at_the_last_rate() -> None:
    sampler = InfoBatchSampler(960, batch_size=8, num_epochs=4)
    schedule = ProgressLR(_optimizer(), total_epochs=4, warmup_epochs=0.5)
    rates = []
    for epoch in range(4):
        sampler.set_epoch(epoch)
        ids = sampler.plan.local_ids
        for start in range(0, len(ids), 8):
            batch = ids[start : start + 8]
            sampler.weigh(torch.from_numpy(plain_losses(epoch, batch)), batch.tolist())
            schedule.step(sampler.progress)
            rates.append(schedule.get_last_lr()[0])
    assert len(rates) < 4 * 120
    assert rates[0] > 0
    assert max(rates) == pytest.approx(1, abs=1e-3)
    assert rates[-1] == pytest.approx(0.1)
    largest_jump = max(abs(a - b) for a, b in itertools.pairwise(rates))
    assert largest_jump < 0.02  # none at the borders of epochs either


def test_state_comes_back_through_json() -> None:
    schedule = ProgressLR(_optimizer(), 4)
    schedule.step(1.7)
    other = ProgressLR(_optimizer(), 4)
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert other.get_last_lr() == schedule.get_last_lr()
    assert other.progress == 1.7


def test_initial_rates_are_those_of_the_groups_not_the_current_ones() -> None:
    optimizer = _optimizer()
    ProgressLR(optimizer, 4).step(2)
    again = ProgressLR(optimizer, 4)
    assert again.base_lrs == [1.0, 0.5]


def test_bad_values_are_refused_by_name() -> None:
    cases = [
        ({"total_epochs": 0}, "total_epochs"),
        ({"total_epochs": math.inf}, "total_epochs"),
        ({"total_epochs": 1, "warmup_epochs": 1}, "warmup_epochs"),
        ({"total_epochs": 1, "warmup_epochs": -1}, "warmup_epochs"),
        ({"total_epochs": 1, "min_ratio": 1.5}, "min_ratio"),
    ]
    for arguments, named in cases:
        with pytest.raises(ConfigError, match=named):
            ProgressLR(_optimizer(), **arguments)
    schedule = ProgressLR(_optimizer(), 4)
    for progress in (-0.1, math.nan):
        with pytest.raises(ConfigError, match="progress"):
            schedule.step(progress)
    with pytest.raises(LayoutMismatchError, match="3 groups"):
        schedule.load_state_dict({"progress": 0.0, "base_lrs": [1, 1, 1]})
