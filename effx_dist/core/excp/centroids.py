"""The published weight rule: prune below a threshold, 15 centroids and a zero for the rest.

threshold = min(2.5, alpha / sqrt(mean v)) * median|r|   (ExCP, arXiv 2406.11257, as in its code)

The centroids are k-means on a linear 1024-bin histogram of the kept residuals of the whole tensor.
A value's symbol is that of its bin, so the error is known exactly from the merged sums. There is
no bound on one element's error: the published algorithm has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effx_dist.core.excp.arrays import F32, F64, I64, LARGEST, U8, Bools, largest_symbol, take_table
from effx_dist.core.excp.json_fields import (
    ascending,
    float32_field,
    float32_json,
    table_field,
    table_json,
)
from effx_dist.core.excp.profiles import CentroidRule
from effx_dist.core.excp.statistics import Scales, Totals
from effx_dist.core.fixed_point import block_exponent, count_by, fixed_floats, sum_by

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


NUM_BINS = 1024


def choose_threshold(rule: CentroidRule, totals: Totals, scales: Scales) -> np.float32:
    """Residuals at or below this are pruned; without v (mean 0) the cap alone decides."""
    mean_v = totals.mean_v(scales)
    medians = min(rule.cap_medians, rule.alpha / math.sqrt(mean_v)) if mean_v else rule.cap_medians
    return np.float32(min(medians * totals.median(), float(LARGEST)))


def linear_bins(values: F32, limit: np.float32) -> npt.NDArray[np.int64]:
    """Which of NUM_BINS equal bins over [-limit, limit] each value falls in."""
    half = np.float32(NUM_BINS // 2)
    shifted = (values / limit + np.float32(1)) * half
    return np.minimum(shifted.astype(np.int64), NUM_BINS - 1)


@dataclass(frozen=True)
class CentroidGrid:
    """Which bin a residual falls in, and whether it is kept."""

    threshold: np.float32
    limit: np.float32
    """max|r|."""
    num_centroids: int

    @property
    def cells_len(self) -> int:
        """A count and a sum for each bin."""
        return 2 * NUM_BINS

    def kept(self, r: F32) -> Bools:
        """Where the residual is not pruned."""
        kept: Bools = np.abs(r) > self.threshold
        return kept

    def accumulate(self, r: F32, scales: Scales, out: I64) -> Bools:
        """Add one block to the cells; returns where the symbol is not 0."""
        kept = self.kept(r)
        values = r[np.flatnonzero(kept)]
        bins = linear_bins(values, self.limit)
        exponent = block_exponent(float(self.limit), scales.global_numel)
        out[:NUM_BINS] += count_by(bins, NUM_BINS)
        out[NUM_BINS:] += sum_by(bins, fixed_floats(values, exponent), NUM_BINS)
        return kept

    def finish(self, cells: I64, scales: Scales, totals: Totals) -> tuple[Centroids, float]:
        """The quantiser from merged cells, and its squared error."""
        counts, sums = cells[:NUM_BINS], cells[NUM_BINS:]
        exponent = block_exponent(float(self.limit), scales.global_numel)
        unit = math.ldexp(1.0, -exponent)
        centroids = np.unique((lloyd(counts, sums, self.num_centroids) * unit).astype(np.float32))
        quantiser = Centroids(self, centroids)
        if centroids.size == 0:
            return quantiser, totals.squared_norm
        centre = centroids.astype(np.float64)[quantiser.symbol_of_bin() - 1]
        # sum (r - c)^2 = sum r^2 - sum over kept bins of c * (2 sum r - count * c)
        gain = math.fsum(centre * (2 * unit * sums - counts * centre))
        return quantiser, max(totals.squared_norm - gain, 0.0)


@dataclass(frozen=True, eq=False)
class Centroids:
    """Symbols: 0 = pruned, then 1 + the index of the centroid."""

    grid: CentroidGrid
    centroids: F32
    """Ascending."""

    kind = "centroids"

    @property
    def num_symbols(self) -> int:
        """Symbols are below this."""
        return self.centroids.size + 1

    def symbol_of_bin(self) -> U8:
        """1 + the index of the centroid nearest to each bin's middle."""
        width = 2.0 * float(self.grid.limit) / NUM_BINS
        middles = (np.arange(NUM_BINS) + 0.5) * width - float(self.grid.limit)
        centre = self.centroids.astype(np.float64)
        nearest = np.searchsorted((centre[1:] + centre[:-1]) / 2, middles)
        return (nearest + 1).astype(np.uint8)

    def encode(self, r: F32) -> tuple[U8, F32]:
        """Symbols of one block; there are no escapes."""
        symbols = np.zeros(r.size, dtype=np.uint8)
        if self.centroids.size:
            index = np.flatnonzero(self.grid.kept(r))
            symbols[index] = self.symbol_of_bin()[linear_bins(r[index], self.grid.limit)]
        return symbols, np.empty(0, dtype=np.float32)

    def table(self) -> F32:
        """What each symbol decodes to [num_symbols]."""
        return np.concatenate([np.zeros(1, dtype=np.float32), self.centroids])

    def decode(self, symbols: U8, escapes: F32) -> F32:
        """Undoes encode; ValueError where symbols and escapes do not fit."""
        if largest_symbol(symbols) >= self.num_symbols:
            raise ValueError(f"w: symbol {largest_symbol(symbols)}, must be < {self.num_symbols}")
        if escapes.size:
            raise ValueError(f"escapes: {escapes.size} values, this quantiser has none")
        return take_table(self.table(), symbols)

    def to_json(self) -> dict[str, Any]:
        """JSON fields of this weight quantiser."""
        return {
            "kind": self.kind,
            "threshold": float32_json(self.grid.threshold),
            "limit": float32_json(self.grid.limit),
            "centroids": table_json(self.centroids),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Centroids:
        """Undoes to_json; ValueError names the field that is wrong."""
        threshold, limit = float32_field(fields, "threshold"), float32_field(fields, "limit")
        table = ascending(table_field(fields, "centroids", 255), "centroids")
        return cls(CentroidGrid(threshold, limit, max(table.size, 1)), table)
