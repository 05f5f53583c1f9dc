"""The compiled quantisers and codecs give the bytes of the numpy ones, for good input and bad."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.codecs import BytePlanes, pack, pack_inside, unpack, unpack_inside
from effx_dist.core.excp import (
    PROFILES,
    SUMS_LEN,
    JointArrays,
    JointQuantiser,
    build_quantiser,
    cells,
    folded_delta,
    ranges,
    sums,
    undo_folded_delta_,
)
from effx_dist.core.excp.dead_zone import DeadZone, DeadZoneGrid
from effx_dist.native import kernels as excp
from tests.excp_pieces import same_bits, whole_tensor
from tests.native_forms import FINITE, HOSTILE, LENGTHS, by_both, hostile_values, needs_compiled

pytestmark = needs_compiled
lengths = st.sampled_from(LENGTHS)
seeds = st.integers(0, 10**6)
symbol_arrays = st.builds(
    lambda seed, length, density, top: (
        np.random.default_rng(seed).integers(1, top + 1, length)
        * (np.random.default_rng(seed + 1).random(length) < density)
    ).astype(np.uint8),
    seeds,
    lengths,
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    st.sampled_from([1, 14, 15, 16, 31, 255]),
)


def statistics(name: str, a: JointArrays) -> tuple[bytes, bytes, bytes, str]:
    """All three rounds of one piece, and the quantiser as JSON."""
    numel, profile = a.r.size, PROFILES[name]
    r1 = ranges(a)
    r2 = sums(a, r1, numel)
    r3 = cells(a, r1, r2, numel, profile)
    made = build_quantiser(profile, a.m is not None, a.v is not None, numel, r1, r2, r3)
    return r1.tobytes(), r2.tobytes(), r3.tobytes(), json.dumps(made and made.to_json())


@pytest.mark.parametrize("name", sorted(PROFILES))
@given(seeds, lengths, st.sampled_from([FINITE, FINITE, HOSTILE, [0.0], [-0.0], [1.0]]), st.data())
@settings(max_examples=60, deadline=None)
def test_statistics_symbols_and_values(
    name: str, seed: int, length: int, pool: list[float], data: st.DataObject
) -> None:
    r, m, v = (hostile_values(seed + i, length, pool) for i in range(3))
    if data.draw(st.booleans()):
        v = np.abs(v)
    has_m = data.draw(st.booleans())
    has_v = has_m and data.draw(st.booleans())
    arrays = JointArrays(r, m if has_m else None, v if has_v else None)
    compiled, reference = by_both(lambda: statistics(name, arrays))
    assert compiled == reference
    fields = json.loads(reference[3])
    if fields is None:
        return
    quantiser = JointQuantiser.from_json(fields)
    ours, theirs = by_both(lambda: quantiser.encode(arrays))
    for part in ("w", "escapes", "m", "v"):
        assert same_bits(getattr(ours, part), getattr(theirs, part)), part
    ours, theirs = by_both(lambda: quantiser.decode(theirs))
    for part in ("r", "m", "v"):
        assert same_bits(getattr(ours, part), getattr(theirs, part)), part


def test_residuals_on_the_borders_of_levels() -> None:
    """floor(|r| / step + 0.4) where the sum is one rounding away from the next level."""
    step = np.float32(0.1)
    around = (np.arange(1, 40, dtype=np.float32) - np.float32(0.4)) * step
    for _ in range(3):
        around = np.concatenate(
            [around, np.nextafter(around, np.float32(9)), np.nextafter(around, np.float32(0))]
        )
    weight = DeadZone(DeadZoneGrid(step, 15), np.empty(0, dtype=np.float32))
    ours, theirs = by_both(lambda: weight.encode(np.concatenate([around, -around]))[0])
    assert same_bits(ours, theirs)  # type: ignore[arg-type]
    assert set(theirs) == set(range(32)), "every level of either sign, and the escape"


@given(symbol_arrays, seeds)
@settings(max_examples=150, deadline=None)
def test_packed_bytes_and_the_way_back(symbols: np.ndarray, seed: int) -> None:
    support = (symbols != 0) | (np.random.default_rng(seed).random(symbols.size) < 0.2)
    for encode, decode in (
        (lambda: pack(symbols), lambda data: unpack(data, symbols.size)),
        (lambda: pack_inside(symbols, support), lambda data: unpack_inside(data, support)),
    ):
        compiled, reference = by_both(encode)
        assert compiled == reference
        for form in by_both(lambda payload=reference, decode=decode: decode(payload)):
            assert np.array_equal(form, symbols)
    refused = by_both(lambda: pack_inside(symbols, np.zeros(symbols.size, dtype=np.bool_)))
    assert (refused == ("refused", "refused")) == bool(symbols.any())


@given(symbol_arrays, st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_symbols_fare_the_same(symbols: np.ndarray, data: st.DataObject) -> None:
    damaged = bytearray(pack(symbols))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    support = symbols != 0
    for decode in (
        lambda: unpack(bytes(damaged), symbols.size, 32).tobytes(),
        lambda: unpack_inside(bytes(damaged), support, 32).tobytes(),
    ):
        compiled, reference = by_both(decode)
        assert compiled == reference


@given(seeds, lengths, st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([0.0, 1e-3, 1.0]))
@settings(max_examples=80, deadline=None)
def test_planes(seed: int, length: int, itemsize: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    raw = (
        rng.integers(0, 256, itemsize * length) * (rng.random(itemsize * length) < noise)
    ).astype(np.uint8)
    codec = BytePlanes(itemsize)
    compiled, reference = by_both(lambda: codec.encode(raw))
    assert compiled == reference
    for form in by_both(lambda: codec.decode_bounded(reference, raw.size)):
        assert np.array_equal(form, raw)


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "f4", "i8"])
@given(seeds, lengths)
@settings(max_examples=30, deadline=None)
def test_folded_differences(dtype: str, seed: int, length: int) -> None:
    rng = np.random.default_rng(seed)
    itemsize = np.dtype(dtype).itemsize
    current, reference = rng.integers(0, 256, (2, length * itemsize), dtype=np.uint8).view(dtype)
    ours, theirs = by_both(lambda: folded_delta(current, reference))
    assert same_bits(ours, theirs)  # type: ignore[arg-type]

    def undone() -> np.ndarray:
        values = reference.copy()
        undo_folded_delta_(theirs, values)  # type: ignore[arg-type]
        return values

    for form in by_both(undone):
        assert same_bits(form, current)  # type: ignore[arg-type]


def test_small_differences_of_either_sign_fold_to_small_numbers() -> None:
    reference = np.full(5, 1000, dtype=np.uint32)
    current = reference + np.array([0, -1, 1, -2, 2]).astype(np.uint32)
    assert folded_delta(current, reference).tolist() == [0, 1, 2, 3, 4]


def lying_calls(found: excp.Kernels) -> dict[str, Any]:
    """Calls whose counts lie about what the arrays hold."""
    pairs, ones = np.full(50, 0x11, np.uint8), np.full(13, 255, np.uint8)
    large, none = np.full(50, 0xFF, np.uint8), np.empty(0, np.uint8)
    symbols, table = np.full(100, 7, np.uint8), np.zeros(7, np.float32)
    return {
        "more marked than there are values": lambda: found.join_symbols(100, ones, pairs, 99, none),
        "a short mask": lambda: found.join_symbols(200, ones, pairs, 100, none),
        "short pairs": lambda: found.join_symbols(100, ones, pairs[:49], 100, none),
        "large ones missing": lambda: found.join_symbols(100, ones, large, 100, ones),
        "too few values inside": lambda: found.put_inside(symbols[:99], np.ones(100, np.bool_)),
        "a symbol beyond the table": lambda: found.take_table(table, symbols),
        "a level beyond the tables": lambda: found.dead_zone_symbols(table, np.float32(1), 127),
        "another type": lambda: found.take_table(table.astype(np.float64), symbols),
        "gaps": lambda: found.count_bits(symbols[::2]),
        "planes of another length": lambda: found.merge_planes([symbols, symbols[:99]], 100),
        "three planes": lambda: found.merge_planes([symbols] * 3, 100),
        "a short output": lambda: found.sums(table, None, None, [1.0] * 3, np.zeros(9, np.int64)),
    }


KERNELS = excp.kernels()


@pytest.mark.parametrize("lie", sorted(lying_calls(KERNELS)) if KERNELS else [])
def test_counts_that_lie_are_refused(lie: str) -> None:
    assert KERNELS is not None
    with pytest.raises((ValueError, TypeError)):
        lying_calls(KERNELS)[lie]()


@pytest.mark.parametrize(
    ("num_values", "large", "escapes"),
    [(63, [16] * 63, 63), (64, [16] * 63, 64), (64, [16] * 64, 63)],
    ids=["values", "large", "escapes"],
)
def test_a_lying_residual_writes_nowhere_else(
    num_values: int, large: list[int], escapes: int
) -> None:
    assert KERNELS is not None
    memory = np.full(64 * 3, 5.0, dtype=np.float32)
    inner = memory[64:128]
    with pytest.raises(ValueError, match="do not fit"):
        KERNELS.add_symbols(
            (inner.ctypes.data, excp.FLOAT32, 64),
            *(np.full(8, 255, np.uint8), np.full(32, 255, np.uint8), num_values),
            *(np.array(large, np.uint8), np.zeros(256, np.float32), 16),
            np.ones(escapes, np.float32),
        )
    assert (memory[:64] == 5).all()
    assert (memory[128:] == 5).all()


def test_sums_of_a_large_piece_in_several_blocks() -> None:
    arrays = whole_tensor(0, (1 << 18) + 77)
    compiled, reference = by_both(lambda: statistics("balanced", arrays))
    assert compiled == reference
    assert len(reference[1]) == 8 * SUMS_LEN
