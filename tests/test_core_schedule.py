"""The learning-rate factor."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from effx_dist.core.schedule import warmup_cosine


def test_known_points() -> None:
    assert warmup_cosine(0, 10, 2, 0.1) == 0
    assert warmup_cosine(1, 10, 2, 0.1) == 0.5
    assert warmup_cosine(2, 10, 2, 0.1) == 1
    assert abs(warmup_cosine(6, 10, 2, 0.1) - 0.55) < 1e-12
    assert abs(warmup_cosine(10, 10, 2, 0.1) - 0.1) < 1e-12
    assert warmup_cosine(11, 10, 2, 0.1) == warmup_cosine(10, 10, 2, 0.1)
    assert warmup_cosine(0, 10) == 1


@given(st.floats(0, 20), st.floats(0, 20), st.floats(0, 1))
def test_falls_after_the_warmup_and_stays_in_range(a: float, b: float, min_ratio: float) -> None:
    early, late = sorted((a, b))
    factors = [warmup_cosine(p, 10, 2, min_ratio) for p in (early, late)]
    assert all(0 <= f <= 1 + 1e-12 for f in factors)
    if early >= 2:
        assert factors[0] >= factors[1] - 1e-12
        assert factors[1] >= min_ratio - 1e-12
