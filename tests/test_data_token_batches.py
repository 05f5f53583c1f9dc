"""Batches by tokens: every rank has the same number, and every sample counts once and alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from effx_dist.data import InfoBatchSampler, TokenBatches, with_sample_ids
from effx_dist.data.token_batches import split_to
from effx_dist.errors import ConfigError, EffxError
from effx_dist.shard import Group
from tests.data_runs import plain_losses
from tests.thread_ranks import run_ranks

LENGTHS = np.random.default_rng(0).integers(1, 200, size=300)


def weigh(sampler: InfoBatchSampler, batch: list[int], num_items: float) -> float:
    losses = torch.from_numpy(plain_losses(sampler.epoch, np.array(batch)))
    return float(sampler.weigh(losses, torch.tensor(batch), num_items=num_items))


@pytest.mark.parametrize("accumulated", [1, 3])
def test_d10_ranks_have_equal_numbers_within_the_budget_and_the_mean_is_that_of_the_plan(
    accumulated: int,
) -> None:
    """Batches of unequal sizes, which end the official code on one rank: none waits for another here."""

    def body(group: Group) -> Any:
        sampler = InfoBatchSampler(
            300, 4, num_epochs=4, gradient_accumulation_steps=accumulated, group=group
        )
        batches = TokenBatches(sampler, LENGTHS, max_tokens=400)
        found = []
        for epoch in range(3):
            batches.set_epoch(epoch)
            num, per_batch = len(batches), batches.samples_per_batch
            given = list(batches)
            assert len(given) == num
            total = sum(weigh(sampler, batch, per_batch) for batch in given)
            weights = torch.from_numpy(sampler.plan.local_weights).double()
            losses = torch.from_numpy(plain_losses(epoch, sampler.plan.local_ids)).double()
            assert total == pytest.approx(float((weights * losses).sum()) / per_batch, rel=1e-5)
            found.append((num, given, per_batch, sampler.plan.local_ids.tolist()))
        sampler.check_epoch()
        return found

    for epoch in zip(*run_ranks(3, body), strict=True):
        assert len({num for num, *_ in epoch}) == 1
        assert epoch[0][0] % accumulated == 0
        assert len({per_batch for *_, per_batch, _ in epoch}) == 1
        for _, batches, _, ids in epoch:
            assert [i for batch in batches for i in batch] == ids
            assert all(int(LENGTHS[batch].sum()) <= 400 for batch in batches)


def test_an_interrupted_epoch_goes_on_at_another_number_of_ranks() -> None:
    def start(group: Group) -> Any:
        sampler = InfoBatchSampler(300, 2, group=group, drop_last=False)
        given = list(TokenBatches(sampler, lambda i: int(LENGTHS[i]), max_tokens=300))[:10]
        for batch in given:
            weigh(sampler, batch, 1.0)
        return sampler.state_dict(), [i for batch in given for i in batch]

    first = run_ranks(3, start)
    states = [state for state, _ in first]

    def go_on(group: Group) -> list[int]:
        sampler = InfoBatchSampler(300, 2, group=group, drop_last=False)
        sampler.load_state_dict(states)
        given = list(TokenBatches(sampler, LENGTHS, max_tokens=300))
        real = set(sampler.plan.local_ids[sampler.plan.local_weights > 0].tolist())
        for batch in given:
            weigh(sampler, batch, 1.0)
        sampler.set_epoch(1)
        return [i for i in dict.fromkeys(i for batch in given for i in batch) if i in real]

    before = [i for _, ids in first for i in ids]
    rest = {i for ids in run_ranks(2, go_on) for i in ids}
    assert rest == set(range(300)) - set(before)


def test_under_a_loader_of_torch() -> None:
    sampler = InfoBatchSampler(300, 4)
    batches = TokenBatches(sampler, LENGTHS, max_tokens=500)
    loader = DataLoader(with_sample_ids(list(range(300))), batch_sampler=batches)
    for epoch in range(2):
        batches.set_epoch(epoch)
        seen = [i for _, ids in loader for i in ids.tolist()]
        assert seen == sampler.plan.local_ids.tolist()
        weigh(sampler, seen, 1.0)


def test_a_sample_beyond_the_budget_is_named_on_all_ranks() -> None:
    def body(group: Group) -> str:
        sampler = InfoBatchSampler(300, 4, group=group)
        with pytest.raises(EffxError) as caught:
            iter(TokenBatches(sampler, LENGTHS, max_tokens=int(LENGTHS.max()) - 1))
        return str(caught.value)

    assert all(f"has {LENGTHS.max()} tokens" in told for told in run_ranks(2, body))
    with pytest.raises(ConfigError, match="max_tokens=0"):
        TokenBatches(InfoBatchSampler(300, 4), LENGTHS, max_tokens=0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 30))
def test_splitting_keeps_all_samples_in_order(sizes: list[int], more: int) -> None:
    numbers = iter(range(sum(sizes)))
    batches = [[next(numbers) for _ in range(size)] for size in sizes]
    wanted = min(len(batches) + more, sum(sizes))
    found = split_to(batches, wanted)
    assert len(found) == wanted
    assert [i for batch in found for i in batch] == list(range(sum(sizes)))
    assert all(found)
