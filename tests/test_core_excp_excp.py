"""The published algorithm: thresholds, centroids, and its two mended faults."""

from __future__ import annotations

import numpy as np
import pytest

from effx_dist.core.excp import JointArrays
from effx_dist.core.excp.centroids import lloyd
from tests.excp_pieces import must_build


def _published_threshold(whole: JointArrays) -> float:
    v = np.asarray(whole.v, dtype=np.float64)
    return min(2.5, 5e-5 / np.sqrt(v.mean())) * float(np.median(np.abs(whole.r)))


@pytest.mark.parametrize("v_scale", [1e-8, 1e-2, 1.0])
def test_threshold_is_the_published_one(v_scale: float) -> None:
    rng = np.random.default_rng(0)
    r = rng.laplace(size=50_000).astype(np.float32)
    v = (v_scale * rng.random(50_000)).astype(np.float32)
    whole = JointArrays(r, r.copy(), v)
    quantiser = must_build("excp", [whole])
    threshold = quantiser.to_json()["weight"]["threshold"]
    assert threshold == pytest.approx(_published_threshold(whole), rel=0.01)
    kept = quantiser.encode(whole).w != 0
    assert np.array_equal(kept, np.abs(r) > np.float32(threshold))


def test_without_v_the_cap_decides() -> None:
    r = np.random.default_rng(0).laplace(size=10_000).astype(np.float32)
    threshold = must_build("excp", [JointArrays(r, r.copy())]).to_json()["weight"]["threshold"]
    assert threshold == pytest.approx(2.5 * np.median(np.abs(r)), rel=0.01)


def test_codebooks_have_at_most_15_entries_and_all_are_used() -> None:
    rng = np.random.default_rng(0)
    r, m = rng.laplace(size=(2, 50_000)).astype(np.float32)
    whole = JointArrays(r, m, m * m)
    quantiser = must_build("excp", [whole])
    symbols = quantiser.encode(whole)
    assert quantiser.num_w_symbols == quantiser.num_m_symbols == quantiser.num_v_symbols == 16
    for stream in (symbols.w, symbols.m, symbols.v):
        assert set(np.unique(stream)) <= set(range(16))
    assert len(np.unique(symbols.v)) > 12


def test_small_v_keeps_its_relative_precision() -> None:
    """The published fp16 codebook turns v below 6e-8 into 0; ours codes log v in fp32."""
    rng = np.random.default_rng(1)
    v = np.exp(rng.normal(loc=np.log(1e-12), scale=2.0, size=30_000)).astype(np.float32)
    x = rng.laplace(size=30_000).astype(np.float32)
    quantiser = must_build("excp", [JointArrays(x, x.copy(), v)])
    back = quantiser.decode(quantiser.encode(JointArrays(x, x.copy(), v)))
    kept = np.asarray(back.m) != 0
    relative = np.sqrt(np.asarray(back.v)[kept] / v[kept])
    assert np.median(np.abs(relative - 1)) < 0.15
    assert np.all(np.asarray(back.v) > 0)


def _lloyd_on_points(points: np.ndarray, num_centroids: int) -> float:
    """Mean squared error of plain k-means, started at quantiles."""
    centroids = np.quantile(points, (np.arange(num_centroids) + 0.5) / num_centroids)
    for _ in range(100):
        nearest = np.abs(points[:, None] - centroids).argmin(axis=1)
        for k in range(num_centroids):
            if np.any(nearest == k):
                centroids[k] = points[nearest == k].mean()
    return float(np.min((points[:, None] - centroids) ** 2, axis=1).mean())


@pytest.mark.parametrize("num_centroids", [1, 3, 15])
def test_lloyd_on_a_histogram_is_as_good_as_on_the_points(num_centroids: int) -> None:
    points = np.random.default_rng(5).laplace(size=4000)
    limit = np.abs(points).max()
    bins = np.minimum(((points / limit + 1) * 512).astype(int), 1023)
    fixed = np.rint(points * 2**30)
    counts = np.bincount(bins, minlength=1024)
    totals = np.bincount(bins, weights=fixed, minlength=1024).astype(np.int64)
    centroids = lloyd(counts, totals, num_centroids) / 2**30
    error = np.min((points[:, None] - centroids) ** 2, axis=1).mean()
    assert error <= 1.05 * _lloyd_on_points(points, num_centroids)
    assert np.all(np.diff(centroids) > 0)


def test_lloyd_of_fewer_values_than_centroids() -> None:
    counts, totals = np.array([0, 3, 0, 2]), np.array([0, 30, 0, 80])
    assert lloyd(counts, totals, 15).tolist() == [10.0, 40.0]
    assert lloyd(counts * 0, totals * 0, 15).size == 0
