"""Scores belong to (data set, sample): names, fingerprints, and scores kept by id where a data set changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from effx_dist.data import EffxWarning, InfoBatchSampler, fingerprint
from effx_dist.errors import ConfigError, EffxError, LayoutMismatchError
from effx_dist.shard import Group
from tests.data_runs import consume, plain_losses
from tests.thread_ranks import run_ranks


def after_two_epochs(world: int, num_samples: int = 96, **settings: Any) -> list[Any]:
    """States within the second epoch; scores are the losses of the first."""

    def body(group: Group) -> Any:
        sampler = InfoBatchSampler(num_samples, batch_size=2, num_epochs=5, group=group, **settings)
        consume(sampler, plain_losses)
        sampler.set_epoch(1)
        consume(sampler, plain_losses, 2)
        return sampler.state_dict()

    return run_ranks(world, body)


def test_a_state_of_another_data_set_is_refused_by_name() -> None:
    states = after_two_epochs(1, dataset="wiki")
    InfoBatchSampler(96, batch_size=2, num_epochs=5, dataset="wiki").load_state_dict(states)
    InfoBatchSampler(96, batch_size=2, num_epochs=5).load_state_dict(states)  # says nothing
    with pytest.raises(ConfigError, match=r"dataset='wiki' in the state, 'news' here"):
        InfoBatchSampler(96, batch_size=2, num_epochs=5, dataset="news").load_state_dict(states)
    with pytest.raises(LayoutMismatchError, match="keep_scores_by_id"):
        InfoBatchSampler(97, batch_size=2, num_epochs=5).load_state_dict(states)


@pytest.mark.parametrize("world", [1, 3])
def test_a_grown_data_set_keeps_its_scores_by_id(world: int) -> None:
    states = after_two_epochs(2, dataset="v1")

    def body(group: Group) -> Any:
        sampler = InfoBatchSampler(130, batch_size=2, num_epochs=5, group=group, dataset="v2")
        sampler.keep_scores_by_id()
        sampler.load_state_dict(states)
        assert sampler.epoch == 1
        assert sampler.plan.pruned
        return sampler.state_dict()["scores"].local

    with pytest.warns(EffxWarning, match="96 samples were taken over by id for 130"):
        scores = torch.cat(run_ranks(world, body))
    assert torch.equal(scores[:96], torch.from_numpy(plain_losses(0, np.arange(96))))
    assert scores[96:].isnan().all()


def test_a_reordered_data_set_keeps_its_scores_by_the_ids_that_it_had() -> None:
    states = after_two_epochs(2)
    old_ids = np.random.default_rng(1).permutation(100) - 4  # four of them are new
    old_ids = np.where(old_ids < 0, -1, old_ids)

    def body(group: Group) -> Any:
        sampler = InfoBatchSampler(100, batch_size=2, num_epochs=5, group=group)
        sampler.keep_scores_by_id(old_ids)
        sampler.load_state_dict(states)
        return sampler.state_dict()["scores"].local

    with pytest.warns(EffxWarning, match="by id"):
        scores = torch.cat(run_ranks(2, body)).numpy()
    is_old = old_ids >= 0
    np.testing.assert_array_equal(scores[is_old], plain_losses(0, old_ids[is_old]))
    assert np.isnan(scores[~is_old]).all()


@pytest.mark.parametrize("old_ids", [np.arange(99), np.full(100, 96)])
def test_ids_that_do_not_fit_are_refused_on_all_ranks(old_ids: np.ndarray) -> None:
    states = after_two_epochs(2)

    def body(group: Group) -> str:
        sampler = InfoBatchSampler(100, batch_size=2, num_epochs=5, group=group)
        sampler.keep_scores_by_id(old_ids)
        with pytest.raises(EffxError) as caught:
            sampler.load_state_dict(states)
        return str(caught.value)

    assert all("old_ids" in told for told in run_ranks(2, body))


def test_the_request_is_for_one_load_and_changes_nothing_in_the_same_data_set() -> None:
    states = after_two_epochs(1)
    sampler, plain = (InfoBatchSampler(96, batch_size=2, num_epochs=5) for _ in range(2))
    sampler.keep_scores_by_id()
    sampler.load_state_dict(states)
    plain.load_state_dict(states)
    assert (sampler.position, list(sampler)) == (4, list(plain))


ITEMS: list[Any] = [
    {"x": torch.arange(3), "y": "a"},
    {"x": np.arange(3.0), "y": b"a"},
    (torch.ones(2, dtype=torch.bfloat16), [1, 2.5, None]),
]


def test_fingerprints_follow_the_content() -> None:
    plain = [item for item in ITEMS for _ in range(100)]
    assert fingerprint(plain) == fingerprint(list(plain))
    assert len({fingerprint(d) for d in (plain, plain[:-1], plain[::-1], [ITEMS[0]] * 300)}) == 4
    changed = [*plain[:-1], (torch.ones(2, dtype=torch.bfloat16), [1, 2.5, 0])]
    assert fingerprint(changed) != fingerprint(plain)


def test_a_fingerprint_of_the_data_sets_own_counts() -> None:
    class Own(list[int]):
        _fingerprint = "f00d"

    assert fingerprint(Own([1])) == "f00d"
