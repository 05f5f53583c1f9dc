"""The sampler at every world size: the same kept samples, weights and global batches; and its epochs."""

from __future__ import annotations

import copy
import pickle
import random
import warnings

import numpy as np
import pytest
import torch

from effx_dist.data import EffxWarning, InfoBatchSampler
from effx_dist.errors import ConfigError, EffxError, PlanNotTrainedError, RankFailedError
from tests.data_runs import (
    LAYOUTS,
    LossOf,
    Merged,
    consume,
    faulty_losses,
    make,
    merge_runs,
    plain_losses,
    recorded,
    train,
)
from tests.thread_ranks import run_ranks

SETTINGS = [
    {"score": "loss"},
    {"score": "relative"},
    {"score": "loss", "threshold": 0.8},
    {"score": "relative", "drop_last": False},
]


def _run(layout: tuple[int, int, int], losses_of: LossOf, **settings) -> list[Merged]:
    plans = run_ranks(layout[0], lambda g: train(make(g, layout, **settings), losses_of))
    return merge_runs(plans)


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("losses_of", [plain_losses, faulty_losses])
def test_every_world_size_trains_the_same_global_batches(losses_of: LossOf, settings) -> None:
    runs = [
        _run(layout, losses_of, num_samples=1500, num_epochs=5, seed=3, **settings)
        for layout in LAYOUTS
    ]
    assert all(run == runs[0] for run in runs[1:])
    assert any(len(epoch.ids) < 1500 - 168 for epoch in runs[0])  # something was pruned


def test_keep_rule_against_a_plain_oracle() -> None:
    """One rank's published algorithm, written without any of the library's plan."""
    epochs = _run((4, 21, 2), plain_losses, num_samples=1680, num_epochs=4, seed=9)
    scores = plain_losses(0, np.arange(1680))
    assert epochs[0].kept == set(range(1680))
    mean = scores.astype(np.float64).mean()
    assert epochs[1].threshold == pytest.approx(mean, rel=1e-9)
    low = set(np.flatnonzero(scores < mean).tolist())
    for sample, weight in zip(epochs[1].ids, epochs[1].weights, strict=True):
        assert weight == (2.0 if sample in low else 1.0)
    num_low_kept = sum(weight == 2.0 for weight in epochs[1].weights)
    num_usable = len(epochs[1].ids)
    assert abs(num_low_kept - len(low) / 2) < 6 * np.sqrt(len(low)) / 2 + 168
    assert num_usable % 168 == 0
    assert epochs[3].weights == [1.0] * 1680


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize(
    ("num_samples", "drop_last"), [(5, False), (97, False), (97, True), (96, True)]
)
def test_full_epochs_have_every_sample_once(size: int, num_samples: int, drop_last: bool) -> None:
    layout = (size, 4, 1)
    settings = {"num_samples": num_samples, "num_epochs": 3, "delta": 1.0, "drop_last": drop_last}
    first = merge_runs(
        run_ranks(size, lambda g: train(make(g, layout, **settings), plain_losses, 0, 1))
    )[0]
    real = [i for i, w in zip(first.ids, first.weights, strict=True) if w > 0]
    assert len(real) == len(set(real))
    num_expected = num_samples // (4 * size) * 4 * size if drop_last else num_samples
    assert len(real) == num_expected
    assert len(first.ids) % (4 * size) == 0
    assert set(first.weights) <= {0.0, 1.0}


def test_pads_are_spread_weigh_nothing_and_are_not_recorded() -> None:
    sampler = InfoBatchSampler(70, batch_size=32, drop_last=False)
    losses = torch.ones(32, requires_grad=True)
    pads_per_batch = []
    total = torch.zeros(70)
    for start in range(0, len(sampler), 32):
        ids = torch.from_numpy(sampler.plan.local_ids[start : start + 32])
        weights = sampler.plan.local_weights[start : start + 32]
        (gradient,) = torch.autograd.grad(sampler.weigh(losses, ids), losses)
        total.index_add_(0, ids, gradient)
        pads_per_batch.append(int((weights == 0).sum()))
    assert sum(pads_per_batch) == 26
    assert max(pads_per_batch) < 20
    assert torch.equal(
        total, torch.full((70,), 1 / 32)
    )  # each sample counts once, wherever its pads lie


def test_a_pad_with_a_nan_loss_and_its_sample_in_one_batch() -> None:
    sampler = InfoBatchSampler(3, batch_size=8, drop_last=False)
    ids, weights = sampler.plan.local_ids, torch.from_numpy(sampler.plan.local_weights)
    losses = torch.arange(1.0, 9.0)
    losses[weights == 0] = torch.nan
    losses.requires_grad_()
    loss = sampler.weigh(losses, ids.tolist())
    loss.backward()
    assert loss.isfinite()
    assert losses.grad is not None
    assert torch.equal(losses.grad, weights / 8)
    expected = dict(zip(ids.tolist(), losses.tolist(), strict=True))
    is_real = dict(zip(ids.tolist(), (weights > 0).tolist(), strict=True))
    assert recorded(sampler).keys() == is_real.keys() == expected.keys()
    real = {int(i): float(x) for i, x, w in zip(ids, losses.tolist(), weights, strict=True) if w}
    assert recorded(sampler) == real
    assert sampler.num_nonfinite == 0


def test_what_is_dropped_is_uniformly_random() -> None:
    """Each of 20 samples is dropped in 8 of 20 places; z = 6 over 20 samples is a false-alarm rate below 1e-6."""
    num_runs = 1500
    dropped = np.full(20, num_runs)
    for seed in range(num_runs):
        dropped[InfoBatchSampler(20, batch_size=12, seed=seed).plan.local_ids] -= 1
    assert np.abs(dropped - num_runs * 0.4).max() < 6 * np.sqrt(num_runs * 0.4 * 0.6)


def test_threshold_is_the_same_however_samples_are_numbered() -> None:
    losses = plain_losses(0, np.arange(1680))
    order = np.random.default_rng(0).permutation(1680)
    thresholds = {
        _run((size, 168 // size, 1), fn, num_samples=1680, num_epochs=3)[1].threshold
        for size in (1, 4)
        for fn in (lambda _, ids: losses[ids], lambda _, ids: losses[order[ids]])
    }
    assert len(thresholds) == 1


def test_epochs_advance_by_themselves_and_end() -> None:
    sampler = InfoBatchSampler(96, batch_size=8, num_epochs=3)
    assert len(sampler) == 96
    first = list(sampler)
    with pytest.warns(EffxWarning, match="none of it was weighed"):
        assert list(sampler) == first  # the same again, from a fresh iterator
    consume(sampler, plain_losses)
    assert sampler.finished_epochs == 1
    assert sampler.progress == 1.0
    ids = consume(sampler, plain_losses)
    assert sampler.epoch == 1
    assert len(ids) == len(sampler) < 96
    assert sampler.samples_saved == 96 - round(sampler.kept_fraction * 96)
    sampler.set_epoch(1)
    with pytest.raises(PlanNotTrainedError, match=r"call set_epoch\(2\)"):
        iter(sampler)
    sampler._was_epoch_set = False
    consume(sampler, plain_losses)
    assert (sampler.epoch, sampler.finished_epochs, sampler.kept_fraction) == (2, 3, 1.0)
    with pytest.warns(EffxWarning, match="beyond num_epochs=3"):
        assert len(list(sampler)) == 96


def test_set_epoch_of_the_current_epoch_changes_nothing() -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    sampler.set_epoch(0)
    rest = sampler.plan.local_ids.tolist()[16:]
    consume(sampler, plain_losses, num_batches=2)
    sampler.set_epoch(0)
    assert (sampler.position, list(sampler)) == (16, rest)


def test_nonfinite_losses_keep_their_samples_are_counted_and_warned_of_once() -> None:
    sampler = InfoBatchSampler(960, batch_size=8, num_epochs=6, prune_ratio=0.9, max_weight=4)
    bad = {i for i in range(960) if not np.isfinite(faulty_losses(0, np.array([i]))[0])}
    consume(sampler, faulty_losses)
    with pytest.warns(EffxWarning, match="NaN or infinite") as caught:
        sampler.set_epoch(1)
    assert len(caught) == 1
    assert sampler.num_nonfinite == len(bad)
    weights = dict(zip(sampler.plan.local_ids.tolist(), sampler.plan.local_weights, strict=True))
    num_dropped = sampler.plan.span.num_kept - len(weights)
    assert num_dropped < 8
    assert len(bad - set(weights)) <= num_dropped
    assert {weights[i] for i in bad & set(weights)} == {1.0}
    consume(sampler, faulty_losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.set_epoch(2)


def test_a_loss_that_becomes_nonfinite_takes_the_old_score_away() -> None:
    sampler = InfoBatchSampler(960, batch_size=1, num_epochs=6, prune_ratio=0.9, max_weight=4)
    easy = set(range(0, 960, 2))

    def losses_of(epoch: int, ids: np.ndarray) -> np.ndarray:
        low = np.float32(np.nan if epoch else 0.1)
        return np.where(ids % 2, np.float32(2), low)

    consume(sampler, losses_of)
    sampler.set_epoch(1)
    visited = easy & set(sampler.plan.local_ids.tolist())
    assert 0 < len(visited) < 480
    consume(sampler, losses_of)
    with pytest.warns(EffxWarning, match="NaN or infinite"):
        sampler.set_epoch(2)
    weights = dict(zip(sampler.plan.local_ids.tolist(), sampler.plan.local_weights, strict=True))
    assert visited <= set(weights)
    assert {weights[i] for i in visited} == {1.0}


def test_every_epoch_leaves_out_others() -> None:
    plans = train(
        InfoBatchSampler(960, batch_size=1, num_epochs=6), lambda _, i: plain_losses(0, i)
    )
    dropped = [set(range(960)) - set(plan.local_ids.tolist()) for plan in plans[1:3]]
    num_both = len(dropped[0] & dropped[1])
    num_low = int((plain_losses(0, np.arange(960)) < plans[1].threshold).sum())
    assert abs(num_both - num_low / 4) < 6 * np.sqrt(num_low * 3 / 16)
    orders = [
        np.array([i for i in plan.local_ids if i not in dropped[0] | dropped[1]]) for plan in plans
    ]
    assert not np.array_equal(orders[1], orders[2])


def _falling(sampler: InfoBatchSampler) -> LossOf:
    """Losses that fall from 5 to 1 while the first epoch goes by."""
    return lambda epoch, ids: (
        plain_losses(epoch, ids) * 0.1 + 5 - 4 * (sampler.position / 1600 if epoch == 0 else 1)
    ).astype(np.float32)


def test_stale_scores_are_warned_of_and_relative_scores_mend_them() -> None:
    stale = InfoBatchSampler(1600, batch_size=8, seed=1)
    consume(stale, _falling(stale))
    with pytest.warns(EffxWarning, match='score="relative"'):
        stale.set_epoch(1)
    mended = InfoBatchSampler(1600, batch_size=8, seed=1, score="relative")
    consume(mended, _falling(mended))
    mended.set_epoch(1)
    hard = plain_losses(0, np.arange(1600)) > 1.5  # well above the mean
    assert len(set(np.flatnonzero(hard)) & set(stale.plan.local_ids)) < 0.9 * hard.sum()
    assert len(set(np.flatnonzero(hard)) & set(mended.plan.local_ids)) > 0.97 * hard.sum()


@pytest.mark.parametrize(
    "settings", [{"num_epochs": 1}, {"num_epochs": 2}, {"num_epochs": 3, "delta": 0.5}]
)
def test_runs_that_save_nothing_say_so(settings) -> None:
    with pytest.warns(EffxWarning, match="save nothing"):
        InfoBatchSampler(100, **settings)


def test_pruning_switched_off_is_not_warned_of() -> None:
    sampler = InfoBatchSampler(96, num_epochs=1, prune_ratio=0)
    assert train(sampler, plain_losses)[0].span.num_kept == 96


def test_a_pruned_epoch_below_one_global_batch_is_not_pruned() -> None:
    sampler = InfoBatchSampler(100, batch_size=96, prune_ratio=0.9, max_weight=4)
    ids = sampler.plan.local_ids
    sampler.weigh(torch.from_numpy(plain_losses(0, ids)), ids.tolist())
    with pytest.warns(EffxWarning, match="fewer than one global batch of 96"):
        sampler.set_epoch(1)
    assert (len(sampler), sampler.kept_fraction, sampler.threshold_value) == (96, 1.0, None)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_samples": 7}, "num_samples=7"),
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": 2.5}, "num_samples=2.5"),
        ({"batch_size": True}, "batch_size=True"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"prune_ratio": 1.0}, "prune_ratio"),
        ({"threshold": "median"}, "threshold"),
        ({"score": "margin"}, "score"),
    ],
)
def test_bad_arguments_are_named(settings, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        InfoBatchSampler(**({"num_samples": 100} | settings))


@pytest.mark.parametrize("epoch", [-1, 1.0, True, "1"])
def test_bad_epochs_are_refused(epoch) -> None:
    with pytest.raises(ConfigError, match="epoch="):
        InfoBatchSampler(100).set_epoch(epoch)


def test_no_global_random_state_is_touched() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    before = (torch.get_rng_state().clone(), np.random.get_state()[1].copy(), random.getstate())
    train(InfoBatchSampler(96, batch_size=8), plain_losses)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


def test_seed_changes_what_is_dropped_and_the_order() -> None:
    plans = [train(InfoBatchSampler(960, seed=s), plain_losses)[1] for s in (0, 1)]
    assert set(plans[0].local_ids) != set(plans[1].local_ids)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_go_on_alike_and_apart(twin_of) -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    consume(sampler, plain_losses, num_batches=3)
    twin = twin_of(sampler)
    mine, its = consume(sampler, plain_losses), consume(twin, plain_losses)
    assert mine == its
    sampler.set_epoch(1)
    assert twin.epoch == 0
    twin.set_epoch(1)
    assert np.array_equal(sampler.plan.local_ids, twin.plan.local_ids)


def test_a_pickled_rank_finishes_its_epoch_but_refuses_to_communicate() -> None:
    def body(group):
        sampler = make(group, (2, 4, 1), num_samples=96)
        sampler.set_epoch(0)
        twin, shared = pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)
        assert shared.group is group
        assert consume(twin, plain_losses) == list(sampler)
        with pytest.raises(EffxError, match="unpickled"):
            twin.set_epoch(1)

    run_ranks(2, body)


def test_one_rank_with_foreign_ids_is_named_everywhere() -> None:
    """Ids on an accelerator are checked when the epoch ends; the recorder's note of them is made by hand here."""

    def body(group):
        sampler = make(group, (2, 4, 1), num_samples=96)
        consume(sampler, plain_losses)
        if group.rank == 1:
            sampler._run.recorder._note_strays(
                torch.tensor([4, 77, 5000]), torch.tensor([0, 48, 48]), None
            )
        with pytest.raises(EffxError) as caught:
            sampler.set_epoch(1)
        return caught.value

    other, own = run_ranks(2, body)
    assert isinstance(own, PlanNotTrainedError)
    assert "77, 5000" in str(own)
    assert isinstance(other, RankFailedError)
    assert list(other.failures) == [1]
