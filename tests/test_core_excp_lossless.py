"""Bit pattern differences: exact for every type and value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from effx_dist.core.excp import delta_bits, folded_delta, undo_delta_bits, undo_folded_delta_

TYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u8", "?"]


@pytest.mark.parametrize("dtype", TYPES)
def test_round_trip_is_bit_exact(dtype: str) -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, size=(2, 24 * 8), dtype=np.uint8)
    if dtype == "?":
        raw &= 1
    current, reference = raw[0].view(dtype).reshape(2, -1), raw[1].view(dtype).reshape(2, -1)
    delta = delta_bits(current, reference)
    assert delta.dtype.kind == "u"
    back = undo_delta_bits(delta, reference)
    assert back.dtype == current.dtype
    assert back.shape == current.shape
    assert back.tobytes() == current.tobytes()
    values = reference.copy()
    undo_folded_delta_(folded_delta(current, reference), values)
    assert values.dtype == current.dtype
    assert values.tobytes() == current.tobytes()


def test_values_that_cannot_be_changed_in_place_are_refused() -> None:
    values = np.zeros((4, 4), dtype=np.float32)
    with pytest.raises(ValueError, match="contiguous"):
        undo_folded_delta_(np.zeros((4, 4), dtype=np.uint32), values.T)
    with pytest.raises(ValueError, match="as wide and as long"):
        undo_folded_delta_(np.zeros(4, dtype=np.uint32), values)
    with pytest.raises(ValueError, match="must be float32"):
        folded_delta(values, values.astype(np.float64)[:0])


@given(hnp.arrays(np.float32, 9), hnp.arrays(np.float32, 9))
def test_any_float32_pair(current: np.ndarray, reference: np.ndarray) -> None:
    back = undo_delta_bits(delta_bits(current, reference), reference)
    assert back.tobytes() == current.tobytes()


def test_small_moves_give_small_differences() -> None:
    reference = np.array([1.0, -2.0, 3e-3], dtype=np.float32)
    current = np.nextafter(reference, np.float32(10) * reference)
    assert delta_bits(current, reference).tolist() == [1, 1, 1]


def test_strided_and_empty() -> None:
    grid = np.arange(12, dtype=np.float32).reshape(3, 4)
    back = undo_delta_bits(delta_bits(grid.T, grid.T + 1), grid.T + 1)
    assert np.array_equal(back, grid.T)
    assert delta_bits(grid[:0], grid[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("current", "reference"),
    [
        (np.zeros(3, "f4"), np.zeros(3, "i4")),
        (np.zeros(3, "f4"), np.zeros(4, "f4")),
        (np.zeros(3, "c16"), np.zeros(3, "c16")),
        (np.zeros(3, object), np.zeros(3, object)),
    ],
)
def test_what_does_not_fit_is_refused(current: np.ndarray, reference: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must (be|have)"):
        delta_bits(current, reference)


def test_a_delta_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="must be as wide"):
        undo_delta_bits(np.zeros(3, "u2"), np.zeros(3, "f4"))
