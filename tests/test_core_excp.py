"""The joint quantiser: one function of the whole tensor, whatever the cut."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.core.excp import (
    PROFILES,
    RANGES_LEN,
    SUMS_LEN,
    JointArrays,
    JointQuantiser,
    JointSymbols,
    cells,
    cells_len,
    ranges,
    sums,
)
from effx_dist.core.excp.arrays import BLOCK_VALUES
from tests.excp_pieces import build, cut, must_build, same_bits, sub_range, whole_tensor

NAMES = sorted(PROFILES)
DEAD_ZONE = ["balanced", "safe", "small"]
HUGE = float(np.finfo(np.float32).max)


def _f32(values: object) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_cut_gives_the_same_quantiser_and_reconstruction(
    name: str, data: st.DataObject
) -> None:
    numel = data.draw(st.integers(0, 3000))
    has_m = data.draw(st.booleans())
    has_v = has_m and data.draw(st.booleans())
    whole = whole_tensor(data.draw(st.integers(0, 99)), numel, has_m, has_v)
    edges = sorted(data.draw(st.lists(st.integers(0, numel), max_size=6)))
    pieces = cut(whole, edges)
    order = data.draw(st.permutations(pieces))

    one, many = must_build(name, [whole]), must_build(name, order)
    assert json.dumps(one.to_json()) == json.dumps(many.to_json())
    expected, decoded = one.decode(one.encode(whole)), [many.decode(many.encode(p)) for p in pieces]
    assert same_bits(expected.r, np.concatenate([d.r for d in decoded]))
    if has_m:
        assert same_bits(expected.m, np.concatenate([_f32(d.m) for d in decoded]))
    if has_v:
        assert same_bits(expected.v, np.concatenate([_f32(d.v) for d in decoded]))


@pytest.mark.parametrize("name", NAMES)
def test_cuts_across_internal_blocks(name: str) -> None:
    whole = whole_tensor(3, BLOCK_VALUES + 1001)
    pieces = cut(whole, [17, 17, BLOCK_VALUES - 5])
    one, many = must_build(name, [whole]), must_build(name, reversed(pieces))
    assert one.to_json() == many.to_json()
    whole_symbols = one.encode(whole)
    assert same_bits(whole_symbols.w, np.concatenate([many.encode(p).w for p in pieces]))
    assert same_bits(
        whole_symbols.escapes, np.concatenate([many.encode(p).escapes for p in pieces])
    )


@pytest.mark.parametrize("name", NAMES)
@given(start=st.integers(0, 2000), stop=st.integers(0, 2000))
@settings(max_examples=20, deadline=None)
def test_a_sub_range_of_symbols_decodes_alone(name: str, start: int, stop: int) -> None:
    whole = whole_tensor(5, 2000)
    whole.r[[100, 900, 1700]] = [1e3, 2e3, -3e3]
    quantiser = must_build(name, [whole])
    symbols = quantiser.encode(whole)
    assert name == "excp" or set(symbols.escapes) >= {1e3, 2e3, -3e3}
    expected = quantiser.decode(symbols)
    part = quantiser.decode(sub_range(quantiser, symbols, start, max(start, stop)))
    inside = slice(start, max(start, stop))
    assert same_bits(part.r, expected.r[inside])
    assert same_bits(part.m, _f32(expected.m)[inside])
    assert same_bits(part.v, _f32(expected.v)[inside])


def _edge_cases() -> dict[str, JointArrays]:
    rng = np.random.default_rng(0)
    normal = _f32(rng.normal(size=500))
    squares = normal * normal
    outlier = normal.copy()
    outlier[7] = 1e6 * np.abs(normal).max()
    mostly_zero = np.where(np.arange(500) % 10 == 0, normal, np.float32(0))
    sparse_v = np.where(np.arange(500) % 3 == 0, squares, np.float32(0))
    huge = _f32(np.where(normal > 0, HUGE, -HUGE))
    denormal = (normal * np.float32(1e-40)).astype(np.float32)
    zero = np.zeros(500, dtype=np.float32)
    return {
        "normal": JointArrays(normal, normal, squares),
        "empty": JointArrays(normal[:0], normal[:0], squares[:0]),
        "one": JointArrays(normal[:1], normal[:1], squares[:1]),
        "one zero": JointArrays(zero[:1], zero[:1], zero[:1]),
        "two": JointArrays(_f32([1, -1e-30]), _f32([1e-20, 1]), _f32([0, 1])),
        "outlier": JointArrays(outlier, outlier, squares),
        "outlier in v": JointArrays(normal, normal, np.abs(outlier)),
        "constant": JointArrays(zero + 3, zero - 2, zero + 1),
        "all zero": JointArrays(zero, zero, zero),
        "mostly zero": JointArrays(mostly_zero, normal, squares),
        "zero m": JointArrays(normal, zero, squares),
        "zero v": JointArrays(normal, normal, zero),
        "negative zero v": JointArrays(normal, normal, -zero),
        "sparse v": JointArrays(normal, normal, sparse_v),
        "tiny v": JointArrays(normal, normal, squares * np.float32(1e-30)),
        "denormal v": JointArrays(normal, normal, squares * np.float32(1e-42)),
        "denormal": JointArrays(denormal, denormal, np.abs(denormal)),
        "huge": JointArrays(huge, huge, np.abs(huge)),
        "huge and tiny": JointArrays(np.where(normal > 2, huge, denormal), normal, np.abs(huge)),
    }


EDGE_CASES = _edge_cases()


@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize("name", NAMES)
def test_edge_cases_decode_to_finite_arrays_that_keep_the_invariant(name: str, case: str) -> None:
    whole = EDGE_CASES[case]
    quantiser = must_build(name, [whole])
    assert (
        quantiser.to_json() == must_build(name, reversed(cut(whole, [whole.r.size // 3]))).to_json()
    )
    symbols = quantiser.encode(whole)
    back = quantiser.decode(symbols)
    m, v = _f32(back.m), _f32(back.v)
    for array in (back.r, m, v):
        assert np.isfinite(array).all()
    assert (v >= 0).all()
    assert not np.any((m != 0) & (v == 0)), "m kept where v is 0: Adam's next step would blow up"
    assert symbols.w.size == 0 or int(symbols.w.max()) < quantiser.num_w_symbols
    assert same_bits(quantiser.decode(_round_trip_json(quantiser).encode(whole)).r, back.r)


def _round_trip_json(quantiser: JointQuantiser) -> JointQuantiser:
    again = JointQuantiser.from_json(json.loads(json.dumps(quantiser.to_json())))
    assert again.to_json() == quantiser.to_json()
    return again


@pytest.mark.parametrize("case", EDGE_CASES)
@pytest.mark.parametrize("name", DEAD_ZONE)
def test_dead_zone_error_is_at_most_one_step(name: str, case: str) -> None:
    whole = EDGE_CASES[case]
    quantiser = must_build(name, [whole])
    step = quantiser.to_json()["weight"]["step"]
    symbols = quantiser.encode(whole)
    error = np.abs(whole.r.astype(np.float64) - quantiser.decode(symbols).r)
    rounding = 1e-6 * np.abs(whole.r.astype(np.float64))
    assert (error <= step + rounding).all()
    assert (error[symbols.w == 0] <= 0.6 * step * (1 + 1e-6)).all()
    assert (error[symbols.w == quantiser.num_w_symbols - 1] == 0).all()


@pytest.mark.parametrize("name", DEAD_ZONE)
def test_one_outlier_does_not_change_the_others(name: str) -> None:
    """A 1e6 times larger value is stored exactly, and the step stays where the median puts it."""
    plain, with_outlier = EDGE_CASES["normal"], EDGE_CASES["outlier"]
    quantiser = must_build(name, [with_outlier])
    back = quantiser.decode(quantiser.encode(with_outlier))
    assert back.r[7] == with_outlier.r[7]
    rest = np.arange(500) != 7
    error = np.linalg.norm(back.r[rest] - with_outlier.r[rest])
    other = must_build(name, [plain])
    plain_error = np.linalg.norm(other.decode(other.encode(plain)).r - plain.r)
    assert error == pytest.approx(plain_error, rel=0.05)


@pytest.mark.parametrize("name", DEAD_ZONE)
def test_dead_zone_against_a_plain_float64_reference(name: str) -> None:
    whole = whole_tensor(11, 20_000)
    quantiser = must_build(name, [whole])
    rule = PROFILES[name].weight
    r = whole.r.astype(np.float64)
    step = quantiser.to_json()["weight"]["step"]
    assert step == pytest.approx(rule.step_medians * np.median(np.abs(r)), rel=0.01)

    magnitude = np.abs(whole.r) / np.float32(step)
    level = np.floor(magnitude + np.float32(0.4))
    expected = np.zeros_like(r)
    for value in np.unique(level[(level > 0) & (level <= rule.max_level)]):
        expected[level == value] = np.abs(r[level == value]).mean()
    expected = np.where(level > rule.max_level, r, np.copysign(expected, r))
    back = quantiser.decode(quantiser.encode(whole))
    np.testing.assert_allclose(back.r, expected, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_moments_against_a_plain_float64_reference(name: str) -> None:
    whole = whole_tensor(12, 20_000)
    quantiser = must_build(name, [whole])
    symbols = quantiser.encode(whole)
    back = quantiser.decode(symbols)
    m, v = _f32(whole.m).astype(np.float64), _f32(whole.v).astype(np.float64)
    kept = (np.abs(m) > PROFILES[name].beta * np.abs(m).mean()) & (symbols.w != 0) & (v > 0)
    assert np.array_equal(_f32(back.m) != 0, kept)
    assert kept.sum() > 20
    np.testing.assert_allclose(_f32(back.v)[~kept], v[~kept].mean(), rtol=1e-5)
    assert quantiser.moments is not None
    nearest = np.abs(m[kept, None] - quantiser.moments.m_table).min(axis=1)
    np.testing.assert_allclose(np.abs(_f32(back.m)[kept] - m[kept]), nearest, atol=1e-10)
    assert np.median(np.abs(_f32(back.m)[kept] / m[kept] - 1)) < 0.15
    assert np.median(np.abs(np.log2(_f32(back.v)[kept] / v[kept]))) < 0.5


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", ["normal", "outlier", "mostly zero", "constant"])
def test_stated_error_is_the_true_one(name: str, case: str) -> None:
    whole = EDGE_CASES[case]
    quantiser = must_build(name, [whole])
    r = whole.r.astype(np.float64)
    lost = r - quantiser.decode(quantiser.encode(whole)).r
    assert quantiser.squared_norm == pytest.approx((r * r).sum(), rel=1e-6)
    true_error = np.sqrt((lost * lost).sum() / (r * r).sum())
    assert quantiser.error == pytest.approx(true_error, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("name", DEAD_ZONE)
def test_a_tensor_that_moved_by_one_amount_is_kept(name: str) -> None:
    """Lion's first step: every |r| alike, so a step of a few medians would prune all of it."""
    sign = np.where(np.arange(999) % 3 == 0, np.float32(-1), np.float32(1))
    whole = JointArrays(sign * np.float32(1e-4))
    quantiser = must_build(name, [whole])
    np.testing.assert_allclose(quantiser.decode(quantiser.encode(whole)).r, whole.r, rtol=1e-6)


@pytest.mark.parametrize("name", DEAD_ZONE)
def test_an_embedding_most_rows_of_which_hardly_moved_has_few_escapes(name: str) -> None:
    rng = np.random.default_rng(2)
    r = rng.normal(scale=1e-7, size=20_000)
    r[:6000] = rng.laplace(scale=1e-3, size=6000)
    whole = JointArrays(_f32(r))
    symbols = must_build(name, [whole]).encode(whole)
    assert symbols.escapes.size <= 20_000 // 500


@pytest.mark.parametrize("bad", ["nan r", "inf r", "nan m", "inf v", "negative v"])
@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_quantised_is_refused_by_every_piece(name: str, bad: str) -> None:
    good = whole_tensor(1, 300)
    r, m, v = good.r.copy(), _f32(good.m).copy(), _f32(good.v).copy()
    kind, field = bad.split()
    value = {"nan": np.nan, "inf": np.inf, "negative": -1e-20}[kind]
    {"r": r, "m": m, "v": v}[field][17] = value
    faulty = JointArrays(r, m, v)
    assert build(name, [good, faulty]) is None
    assert build(name, [faulty, good]) is None
    merged = np.maximum(ranges(faulty), ranges(good))
    profile = PROFILES[name]
    round_2 = sums(good, merged, 600)
    assert not round_2.any()
    assert not cells(good, merged, round_2, 600, profile).any()


@pytest.mark.parametrize("name", NAMES)
def test_vectors_have_fixed_lengths(name: str) -> None:
    profile = PROFILES[name]
    whole = whole_tensor(1, 100)
    r1 = ranges(whole)
    r2 = sums(whole, r1, 100)
    assert r1.shape == (RANGES_LEN,)
    assert r2.shape == (SUMS_LEN,)
    assert cells(whole, r1, r2, 100, profile).shape == (cells_len(profile),)


def test_profiles_order_by_error() -> None:
    whole = whole_tensor(4, 50_000)
    errors = [must_build(name, [whole]).error for name in ("safe", "balanced", "small")]
    assert errors == sorted(errors)
    assert errors[0] < errors[-1]


def test_arrays_are_checked() -> None:
    x = np.zeros(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"m: float32 of shape \(2,\)"):
        JointArrays(x, x[:2])
    with pytest.raises(ValueError, match="r: float64"):
        JointArrays(x.astype(np.float64))
    with pytest.raises(ValueError, match="v: given without m"):
        JointArrays(x, None, x)
    with pytest.raises(ValueError, match="w: int64"):
        JointSymbols(np.zeros(3, dtype=np.int64), x)
    with pytest.raises(ValueError, match="m, v: must be given"):
        must_build("balanced", [JointArrays(x, x, x)]).encode(JointArrays(x))
