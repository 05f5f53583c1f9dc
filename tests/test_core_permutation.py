"""The keyed permutation: a bijection, undone by its inverse, and uniform over keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.core.counter_random import stream_key
from effx_dist.core.permutation import permute, unpermute


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_is_a_bijection_with_its_inverse(size: int, key: int) -> None:
    places = np.arange(size)
    slots = permute(places, size, key)
    assert np.array_equal(np.sort(slots), places)
    assert np.array_equal(unpermute(slots, size, key), places)


@pytest.mark.parametrize("size", [2**32 - 1, 2**32 + 1, 10**12, 2**61])
def test_large_ranges_need_no_table(size: int) -> None:
    places = np.unique(np.arange(1000) * (size // 1000))
    slots = permute(places, size, 99)
    assert len(np.unique(slots)) == len(places)
    assert slots.min() >= 0
    assert slots.max() < size
    assert np.array_equal(unpermute(slots, size, 99), places)


def test_a_part_is_that_part_of_the_whole_beyond_one_block() -> None:
    size = 100_000
    whole = permute(np.arange(size), size, 5)
    assert np.array_equal(np.sort(whole), np.arange(size))
    assert np.array_equal(permute(np.arange(30_000, 95_000), size, 5), whole[30_000:95_000])


@pytest.mark.parametrize("size", [2, 3, 5, 8, 13])
def test_every_place_takes_every_slot_equally_often(size: int) -> None:
    num_keys = 3000
    counts = np.zeros((size, size))
    for number in range(num_keys):
        counts[np.arange(size), permute(np.arange(size), size, stream_key(number))] += 1
    deviation = np.abs(counts - num_keys / size).max()
    # Six standard deviations of a binomial: a false alarm in all cells together is below 1e-6.
    assert deviation < 6 * np.sqrt(num_keys / size * (1 - 1 / size))


def test_all_orders_of_three_occur_equally_often() -> None:
    num_keys = 3000
    orders = [tuple(permute(np.arange(3), 3, stream_key(n)).tolist()) for n in range(num_keys)]
    counts = np.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 6
    assert np.abs(counts - num_keys / 6).max() < 6 * np.sqrt(num_keys / 6)


def test_pairs_of_neighbours_are_spread_like_random_pairs() -> None:
    size, num_keys = 100, 400
    slots = np.stack([permute(np.arange(size), size, stream_key(n, 1)) for n in range(num_keys)])
    distances = np.abs(slots[:, 1:] - slots[:, :-1])
    expected = (size + 1) / 3  # of two distinct random places
    assert abs(distances.mean() - expected) < 6 * distances.std() / np.sqrt(num_keys * 33)
