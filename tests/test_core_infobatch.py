"""The keep rule, the annealing schedule, the threshold and the staleness measure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.core import infobatch
from effx_dist.core.counter_random import stream_key
from effx_dist.data import InfoBatchSampler
from effx_dist.errors import ConfigError

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.integers(1, 400), st.floats(0.01, 1.0))
def test_schedule_begins_full_and_ends_full(num_epochs: int, delta: float) -> None:
    full = infobatch.full_epochs(num_epochs, delta)
    num_last = max(1, round((1 - delta) * num_epochs)) if delta < 1 else 0
    expected = {0} | set(range(num_epochs - num_last, num_epochs))
    assert set(full) == {e for e in expected if 0 <= e < num_epochs}
    assert infobatch.is_full_epoch(num_epochs, num_epochs, delta)


def test_published_schedule_of_the_default_delta() -> None:
    assert infobatch.full_epochs(4, 0.875) == (0, 3)
    assert infobatch.full_epochs(16, 0.875) == (0, 14, 15)
    assert infobatch.full_epochs(4, 1.0) == (0,)
    assert infobatch.full_epochs(1, 1.0) == (0,)


def test_keep_rule_touches_only_low_scores() -> None:
    scores = np.array([np.nan, 1.0, 2.0, 2.0, 3.0] * 400, dtype=np.float32)
    role = infobatch.roles(scores, 0, 2.0, 0.5, key=1)
    low = scores < 2.0
    assert set(role[low]) == {infobatch.DROPPED, infobatch.RESCALED}
    assert set(role[~low]) == {infobatch.PLAIN}


def test_a_sample_does_not_depend_on_those_beside_it() -> None:
    scores = np.random.default_rng(0).exponential(size=999).astype(np.float32)
    whole = infobatch.roles(scores, 0, 1.0, 0.3, key=7)
    parts = [
        infobatch.roles(scores[a:b], a, 1.0, 0.3, 7) for a, b in [(0, 10), (10, 640), (640, 999)]
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_threshold_is_not_rounded_to_float32() -> None:
    score = np.array([1.0], dtype=np.float32)
    just_above = 1.0 + 2.0**-40  # rounds to 1.0 in float32, which would not be below itself
    assert infobatch.roles(score, 0, just_above, 0.0, key=0)[0] == infobatch.RESCALED


@pytest.mark.parametrize("prune_ratio", [0.1, 0.5, 0.7])
def test_weighted_inclusion_of_every_low_sample_averages_one(prune_ratio: float) -> None:
    """Over many (seed, epoch) keys. With 200 samples, a Bonferroni bound at z = 6 has a false-alarm rate < 1e-6."""
    num_samples, num_keys = 200, 2500
    scores = np.zeros(num_samples, dtype=np.float32)
    table = infobatch.weight_table(prune_ratio).astype(np.float64)
    total = np.zeros(num_samples)
    for number in range(num_keys):
        key = stream_key(number // 5, number % 5, 1)
        total += table[infobatch.roles(scores, 10**9, 1.0, prune_ratio, key)]
    deviation = np.sqrt(prune_ratio / (1 - prune_ratio) / num_keys)
    assert np.abs(total / num_keys - 1).max() < 6 * deviation
    assert abs(total.mean() / num_keys - 1) < 6 * deviation / np.sqrt(num_samples)


@given(st.lists(floats, min_size=1, max_size=200), st.floats(0.001, 0.999), st.integers(1, 4))
def test_quantile_of_merged_histograms_is_the_order_statistic(
    values: list[float], quantile: float, num_parts: int
) -> None:
    scores = np.array(values, dtype=np.float32)
    parts = [infobatch.ordered_bits(part) for part in np.array_split(scores, num_parts)]
    tops = sum(infobatch.digit_counts(part) for part in parts)
    position = infobatch.quantile_position(len(scores), quantile)
    top, within = infobatch.digit_at(tops, position)
    low, _ = infobatch.digit_at(sum(infobatch.digit_counts(p, top) for p in parts), within)
    assert infobatch.join_digits(top, low) == np.sort(scores)[position]


def test_stretches_cut_the_epoch_evenly() -> None:
    stretches = infobatch.stretch_of_slots(np.arange(4000), 4000)
    assert np.array_equal(np.bincount(stretches), np.full(40, 100))
    assert infobatch.num_stretches(100) == 12
    assert infobatch.num_stretches(3) == 1


@pytest.mark.parametrize(
    ("slope", "low", "high"), [(0.0, -0.05, 0.05), (2.0, 0.2, 0.4), (50.0, 0.95, 1.0)]
)
def test_staleness_is_the_share_explained_by_time(slope: float, low: float, high: float) -> None:
    num = 8000
    stretches = infobatch.stretch_of_slots(np.arange(num), num)
    scores = np.random.default_rng(1).normal(size=num) - slope * np.arange(num) / num
    counts = np.bincount(stretches)
    means = np.bincount(stretches, scores) / counts
    within = float(((scores - means[stretches]) ** 2).sum())
    assert low < infobatch.staleness(counts, means, within) < high


def test_staleness_of_few_or_equal_scores_is_zero() -> None:
    assert infobatch.staleness(np.array([3, 3]), np.array([0.0, 9.0]), 0.1) == 0
    assert infobatch.staleness(np.array([300, 300]), np.array([1.0, 1.0]), 0.0) == 0


def test_the_official_count_of_full_last_epochs() -> None:
    """The authors' code prunes while its counter, from 1, is at most num_epochs * delta."""
    for num_epochs in (2, 3, 7, 16, 100, 200):
        pruned = [e for e in range(1, num_epochs) if e + 1 <= num_epochs * 0.875]
        full = infobatch.full_epochs(num_epochs, 0.875, "official")
        assert sorted([*pruned, *full]) == list(range(num_epochs))
    assert len(infobatch.full_epochs(100, 0.875, "official")) == 14
    assert len(infobatch.full_epochs(100, 0.875)) == 13


def test_the_count_is_kept_in_the_state() -> None:
    sampler = InfoBatchSampler(96, num_epochs=100, full_epochs="official")
    with pytest.raises(ConfigError, match="full_epochs='official' in the state, 'rounded' here"):
        InfoBatchSampler(96, num_epochs=100).load_state_dict(sampler.state_dict())
