"""Where what was planned is not what was trained: refused on all ranks, with the counts and the likely cause."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

from effx_dist.data import EffxWarning, InfoBatchSampler, with_sample_ids
from effx_dist.errors import PlanNotTrainedError, RankFailedError
from effx_dist.shard import Group
from tests.data_runs import consume, plain_losses
from tests.thread_ranks import run_ranks


def test_a_loader_with_another_batch_size_and_no_set_epoch_is_an_error_in_its_second_pass() -> None:
    sampler = InfoBatchSampler(200, batch_size=8)
    loader = DataLoader(with_sample_ids(list(range(200))), 64, sampler=sampler, drop_last=True)
    for batch in loader:
        sampler.weigh(torch.ones(64), batch[1])
    with pytest.raises(PlanNotTrainedError, match=r"8 of the 200 .*the sampler's batch_size"):
        iter(sampler)


def test_what_drop_last_would_drop_is_excused_with_a_warning() -> None:
    sampler = InfoBatchSampler(200, batch_size=10)
    for batch in DataLoader(with_sample_ids(list(range(200))), 16, sampler=sampler, drop_last=True):
        sampler.weigh(torch.ones(16), batch[1])
    with pytest.warns(EffxWarning, match="8 of the 200"):
        sampler.set_epoch(1)
    assert sampler.epoch == 1


def test_a_refused_epoch_can_be_declared_and_left() -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    consume(sampler, plain_losses, 3)
    with pytest.raises(PlanNotTrainedError, match=r"72 of the 96 .*end_epoch"):
        sampler.set_epoch(1)
    assert (sampler.epoch, sampler.position) == (0, 24)
    sampler.end_epoch()
    sampler.set_epoch(1)
    assert sampler.epoch == 1
    assert sampler.finished_epochs == 0


def test_a_resumed_epoch_that_is_passed_over_is_an_error() -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    consume(sampler, plain_losses, 3)
    twin = InfoBatchSampler(96, batch_size=8)
    twin.load_state_dict(sampler.state_dict())
    with pytest.raises(
        PlanNotTrainedError, match=r"72 of the 72 .*begin the loop with sampler\.epoch"
    ):
        twin.set_epoch(1)


def test_a_declared_end_is_kept_in_the_state() -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    consume(sampler, plain_losses, 3)
    sampler.end_epoch()
    twin = InfoBatchSampler(96, batch_size=8)
    twin.load_state_dict(sampler.state_dict())
    twin.set_epoch(1)
    assert twin.epoch == 1


def test_not_strict_warns_of_each_once() -> None:
    sampler = InfoBatchSampler(96, batch_size=8, strict=False)
    consume(sampler, plain_losses, 3)
    with pytest.warns(EffxWarning, match="72 of the 96"):
        sampler.set_epoch(1)
    with pytest.warns(EffxWarning, match="sample_ids 4000"):
        loss = sampler.weigh(torch.ones(2), [int(sampler.plan.local_ids[0]), 4000])
    assert loss == float(sampler.plan.local_weights[0]) / 2  # the stranger counts nothing


@pytest.mark.parametrize("epoch", [0, 3])
def test_epochs_that_come_again_or_are_left_out_are_refused(epoch: int) -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    consume(sampler, plain_losses)
    sampler.set_epoch(1)
    consume(sampler, plain_losses)
    with pytest.raises(PlanNotTrainedError, match=rf"set_epoch\({epoch}\).*so 2 is the next"):
        sampler.set_epoch(epoch)


def test_the_last_epoch_is_judged_on_request() -> None:
    def body(group: Group) -> str:
        sampler = InfoBatchSampler(96, batch_size=8, group=group)
        consume(sampler, plain_losses, 6 if group.rank else 4)
        with pytest.raises(PlanNotTrainedError) as caught:
            sampler.check_epoch()
        return str(caught.value)

    told = run_ranks(2, body)
    assert told[0] == told[1]
    assert "32, 48 of 48" in told[0]


def weigh_all(sampler: InfoBatchSampler, loader: Any) -> None:
    for _, ids in loader:
        sampler.weigh(torch.ones(len(ids)), ids)


def test_a_permuted_subset_outside_of_the_ids_is_found_at_its_first_batch() -> None:
    order = np.random.default_rng(0).permutation(100).tolist()
    dataset = Subset(with_sample_ids(list(range(100))), order)
    sampler = InfoBatchSampler(100, batch_size=4)
    with pytest.warns(EffxWarning, match="had not handed out"):
        weigh_all(sampler, DataLoader(dataset, 4, sampler=sampler))
    with pytest.raises(PlanNotTrainedError, match="outermost data set"):
        sampler.set_epoch(1)


def test_two_data_sets_with_the_same_ids_are_found_by_the_end_of_the_epoch() -> None:
    parts = [with_sample_ids(list(range(200))) for _ in range(2)]
    sampler = InfoBatchSampler(400, batch_size=8)
    with pytest.warns(EffxWarning, match="had not handed out"):
        weigh_all(sampler, DataLoader(ConcatDataset(parts), 8, sampler=sampler))
    with pytest.raises(PlanNotTrainedError, match="outside of Subset, ConcatDataset"):
        sampler.set_epoch(1)


def test_strangers_on_one_rank_are_an_error_on_all() -> None:
    def body(group: Group) -> Exception:
        sampler = InfoBatchSampler(96, batch_size=8, group=group)
        sampler.set_epoch(0)
        first = list(islice(sampler, 8))
        assert sampler._run is not None
        if group.rank:  # as if they had been handed out to nobody
            late = sampler.plan.local_ids[40:48].tolist()
            sampler.weigh(torch.ones(8), late)
        else:
            sampler.weigh(torch.ones(8), first)
        with pytest.raises((PlanNotTrainedError, RankFailedError)) as caught:
            sampler.set_epoch(1)
        return caught.value

    other, own = run_ranks(2, body)
    assert isinstance(other, RankFailedError)
    assert isinstance(own, PlanNotTrainedError)
