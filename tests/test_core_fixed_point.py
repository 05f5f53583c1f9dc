"""Sums that do not depend on their order."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.core import fixed_point

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def _exact_mean(values: list[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction(0)) / len(values)


@given(st.lists(finite, min_size=1, max_size=60))
def test_mean_is_within_the_stated_bound_of_the_exact_one(values: list[float]) -> None:
    array = np.array(values, dtype=np.float32)
    largest = float(np.abs(array).max())
    exponent = fixed_point.scale_exponent(largest, len(values))
    total = int(fixed_point.to_fixed(array, exponent).sum())
    mean = fixed_point.fixed_mean(total, len(values), exponent)
    bound = Fraction(largest) * len(values) / 2**58 + Fraction(math.ulp(mean))
    assert abs(Fraction(mean) - _exact_mean(values)) <= bound


@given(st.lists(finite, min_size=1, max_size=60), st.randoms(use_true_random=False))
def test_sum_is_the_same_in_any_order_and_any_split(values: list[float], random) -> None:
    array = np.array(values, dtype=np.float32)
    exponent = fixed_point.scale_exponent(float(np.abs(array).max()), len(values))
    total = int(fixed_point.to_fixed(array, exponent).sum())
    random.shuffle(values)
    cut = random.randint(0, len(values))
    parts = [np.array(part, dtype=np.float32) for part in (values[:cut], values[cut:])]
    assert sum(int(fixed_point.to_fixed(p, exponent).sum()) for p in parts) == total


@given(finite.filter(bool), st.integers(1, 2**45))
def test_no_overflow_at_the_largest_sum(value: float, num_terms: int) -> None:
    exponent = fixed_point.scale_exponent(abs(value), num_terms)
    one = int(fixed_point.to_fixed(np.array([value], dtype=np.float32), exponent)[0])
    assert abs(one) * num_terms <= 2**62
    assert abs(one) * 4 * num_terms >= 2**59  # and no more than a few bits are given away


def test_equal_values_have_exactly_that_mean() -> None:
    value = np.float32(0.1)
    array = np.full(1001, value)
    exponent = fixed_point.scale_exponent(float(value), len(array))
    total = int(fixed_point.to_fixed(array, exponent).sum())
    assert fixed_point.fixed_mean(total, len(array), exponent) == float(value)


def test_way_back() -> None:
    array = np.array([1.5, -0.375, 3.0], dtype=np.float32)
    exponent = fixed_point.scale_exponent(3.0, 3)
    fixed = fixed_point.to_fixed(array, exponent)
    back = [fixed_point.from_fixed(int(v), exponent) for v in fixed]
    assert back == array.tolist()


def test_a_huge_value_does_not_coarsen_other_buckets() -> None:
    values = np.array([1e30, 0.5, 0.25], dtype=np.float32)
    buckets = np.array([0, 1, 1], dtype=np.int8)
    exponents = fixed_point.scale_exponents(
        fixed_point.max_abs_by_bucket(values, buckets, 3), num_terms=3
    )
    merged = fixed_point.sums_by_bucket(values, buckets, exponents)
    means = fixed_point.means_by_bucket(merged, exponents)
    assert means.tolist() == [pytest.approx(1e30), 0.375, 0.0]
    assert merged[1].tolist() == [1, 2, 0]
