"""1-D k-means on a merged histogram: one pass over the data, exact sums, no sampling."""

from __future__ import annotations

import numpy as np

from effx_dist.core.excp.arrays import F64, I64

_ITERATIONS = 40
_TOLERANCE = 1e-6
_COUNT_CAP = 50
"""Bins weigh at most this much in the starting quantiles, so that the tails get centroids too."""


def lloyd(counts: I64, totals: I64, num_centroids: int) -> F64:
    """Ascending, distinct centroids (at most num_centroids) of a histogram with exact sums.

    counts: values per bin, bins ascending; totals: sum of the values per bin, in any fixed point
    unit, which is the unit of the result. Empty where the histogram is. Deterministic: elementwise
    IEEE arithmetic and integer prefix sums only.
    """
    seen = counts > 0
    counts, totals = counts[seen], totals[seen]
    if counts.size == 0:
        return np.empty(0)
    values = totals / counts
    num_before = np.concatenate([[0], np.cumsum(counts)])
    sum_before = np.concatenate([[0], np.cumsum(totals)])
    centroids = _start(values, counts, num_centroids)
    for _ in range(_ITERATIONS):
        inner = np.searchsorted(values, (centroids[1:] + centroids[:-1]) / 2)
        edges = np.concatenate([[0], inner, [values.size]])
        num = num_before[edges[1:]] - num_before[edges[:-1]]
        total = sum_before[edges[1:]] - sum_before[edges[:-1]]
        moved = np.sort(np.where(num > 0, total / np.maximum(num, 1), centroids))
        done = np.abs(moved - centroids).max() <= _TOLERANCE * np.abs(moved).max()
        centroids = moved
        if done:
            break
    return np.unique(centroids)


def _start(values: F64, counts: I64, num_centroids: int) -> F64:
    """Values at evenly spaced quantiles of the capped counts."""
    ends = np.cumsum(np.minimum(counts, _COUNT_CAP))
    ranks = (np.arange(num_centroids) + 0.5) * (ends[-1] / num_centroids)
    start: F64 = values[np.minimum(np.searchsorted(ends, ranks), values.size - 1)]
    return start
