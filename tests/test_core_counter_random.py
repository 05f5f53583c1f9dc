"""Counter-based random numbers: uniform, and unrelated across counters, epochs and seeds.

The statistical tests are deterministic (fixed keys); their bounds are those of a test with a false-alarm rate
below 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest

from effx_dist.core.counter_random import random_bits, stream_key, uniform

NUM = 1 << 16
IDS = np.arange(NUM)
SIX_SIGMA = 6.0


def _chi_square_is_plausible(counts: np.ndarray) -> bool:
    expected = counts.sum() / counts.size
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    return abs(statistic - freedom) < SIX_SIGMA * np.sqrt(2 * freedom)


def test_reference_values_of_splitmix64() -> None:
    # The published first outputs of splitmix64 from state 1234567 (the state moves before it is mixed).
    bits = random_bits(1234567, np.arange(1, 4))
    assert bits.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("key_parts", [(0, 0, 1), (0, 1, 1), (7, 3, 2), (2**63 - 1, 5, 1)])
def test_numbers_are_uniform(key_parts: tuple[int, ...]) -> None:
    numbers = uniform(stream_key(*key_parts), IDS)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert _chi_square_is_plausible(np.bincount((numbers * 256).astype(int), minlength=256))


@pytest.mark.parametrize("other", [(0, 1, 1), (1, 0, 1), (0, 0, 2), (2**40, 0, 1)])
def test_neighbouring_keys_are_unrelated(other: tuple[int, ...]) -> None:
    first, second = uniform(stream_key(0, 0, 1), IDS), uniform(stream_key(*other), IDS)
    pairs = (first * 16).astype(int) * 16 + (second * 16).astype(int)
    assert _chi_square_is_plausible(np.bincount(pairs, minlength=256))


@pytest.mark.parametrize("distance", [1, 2, 256, 4096])
def test_neighbouring_ids_are_unrelated(distance: int) -> None:
    numbers = uniform(stream_key(3, 1, 1), np.arange(NUM + distance))
    first, second = numbers[:-distance], numbers[distance:]
    pairs = (first * 16).astype(int) * 16 + (second * 16).astype(int)
    assert _chi_square_is_plausible(np.bincount(pairs, minlength=256))


def test_one_id_over_many_seeds_is_uniform() -> None:
    keys = [stream_key(seed, epoch, 1) for seed in range(2000) for epoch in range(4)]
    numbers = np.array([uniform(key, np.array([12345]))[0] for key in keys])
    assert _chi_square_is_plausible(np.bincount((numbers * 32).astype(int), minlength=32))


def test_each_input_bit_flips_half_of_the_output_bits() -> None:
    base = random_bits(stream_key(1, 1, 1), IDS)
    for bit in range(0, 48, 5):
        flipped = random_bits(stream_key(1, 1, 1), IDS ^ (1 << bit))
        share = np.bitwise_count(base ^ flipped).mean() / 64
        assert abs(share - 0.5) < SIX_SIGMA * 0.5 / np.sqrt(64 * NUM) * 2


def test_keys_do_not_collide_and_the_order_of_parts_counts() -> None:
    keys = {
        stream_key(seed, epoch, use) for seed in range(50) for epoch in range(50) for use in (1, 2)
    }
    assert len(keys) == 5000


def test_any_subset_in_any_order_gives_the_same_numbers() -> None:
    key = stream_key(5, 5, 1)
    chosen = np.random.default_rng(0).permutation(NUM)[:100]
    assert np.array_equal(uniform(key, chosen), uniform(key, IDS)[chosen])
