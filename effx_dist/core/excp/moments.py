"""Joint pruning and coding of Adam's moments m = exp_avg and v = exp_avg_sq.

Kept where |m| > beta * mean|m|, the weight residual's symbol is not 0, and v > 0. A pruned m
decodes to 0, a pruned v to the mean of the pruned v of the whole tensor; kept ones to the nearest
entry of a table. Table entries of v are positive, so m is never non-zero where v is 0 (which would
make Adam's next update m / eps). v is compared by its bit pattern, which is a logarithm; see
magnitude_bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from effx_dist.core.excp.arrays import (
    F32,
    I64,
    LARGEST,
    TINY,
    U8,
    U32,
    Bools,
    JointArrays,
    from_bits,
    largest_symbol,
    magnitude_bits,
    take_table,
)
from effx_dist.core.excp.centroids import NUM_BINS, linear_bins, lloyd
from effx_dist.core.excp.json_fields import (
    ascending,
    float32_field,
    float32_json,
    table_field,
    table_json,
)
from effx_dist.core.excp.statistics import Scales, Totals
from effx_dist.core.fixed_point import (
    block_exponent,
    count_by,
    fixed_floats,
    fixed_sum,
    from_fixed,
    sum_by,
)
from effx_dist.native import kernels as native

MAX_ENTRIES = 255
"""Most entries of a moment's table: its symbols are 1 to 255."""


def choose_threshold(beta: float, totals: Totals) -> np.float32:
    """beta * mean|m|: moments at or below it are pruned."""
    return np.float32(min(beta * totals.mean_abs_m, float(LARGEST)))


def kept_index(kept_w: Bools, threshold: np.float32, a: JointArrays) -> npt.NDArray[np.intp]:
    """Where one block's moments are kept."""
    assert a.m is not None
    kept = kept_w & (np.abs(a.m) > threshold)
    if a.v is not None:
        kept &= a.v > 0
    return np.flatnonzero(kept)


@dataclass(frozen=True)
class KeyCells:
    """Counts and sums of bit patterns over cells of 2^shift patterns, first cell given."""

    shift: int
    first: int
    num_cells: int

    def accumulate(self, bits: U32, out: I64) -> None:
        """Add one block. Sums are of the distance from the first cell's start: exact integers."""
        offset = bits - np.uint32(self.first << self.shift)
        cells = np.minimum(offset >> self.shift, self.num_cells - 1)
        out[: self.num_cells] += count_by(cells, self.num_cells)
        out[self.num_cells :] += sum_by(cells, offset.astype(np.float64), self.num_cells)

    def means(self, cells: I64) -> list[int]:
        """Mean bit pattern of every cell that is not empty, ascending."""
        start = self.first << self.shift
        pairs = zip(cells[: self.num_cells].tolist(), cells[self.num_cells :].tolist(), strict=True)
        return [start + (total + count // 2) // count for count, total in pairs if count]


@dataclass(frozen=True)
class OctaveMoments:
    """One entry per non-empty half octave of |m| (either sign) and per octave of v: no k-means."""

    threshold: np.float32

    _M_CELLS = 120
    _V_CELLS = 256
    cells_len = 2 * (_M_CELLS + _V_CELLS)

    def layout(self) -> tuple[int, int, int]:
        """The first half octave of m, and the numbers of cells of m and of v."""
        return int(self.threshold.view(np.uint32)) >> 22, self._M_CELLS, self._V_CELLS

    def _cells(self) -> tuple[KeyCells, KeyCells]:
        first, num_m, num_v = self.layout()
        return KeyCells(22, first, num_m), KeyCells(23, 0, num_v)

    def accumulate(self, m: F32, v: F32 | None, scales: Scales, out: I64) -> None:
        """Add one block's kept moments to the cells."""
        del scales
        m_cells, v_cells = self._cells()
        m_cells.accumulate(magnitude_bits(m), out[: 2 * self._M_CELLS])
        if v is not None:
            v_cells.accumulate(magnitude_bits(v), out[2 * self._M_CELLS :])

    def tables(self, cells: I64, scales: Scales) -> tuple[F32, F32]:
        """Tables of m (both signs) and of v from merged cells."""
        del scales
        m_cells, v_cells = self._cells()
        magnitudes = _from_keys(m_cells.means(cells[: 2 * self._M_CELLS]))
        m_table = np.concatenate([-magnitudes[::-1], magnitudes])
        return m_table, _from_keys(v_cells.means(cells[2 * self._M_CELLS :]))


@dataclass(frozen=True)
class CentroidMoments:
    """The published coding: 15 centroids each, k-means on m and on log v."""

    num_centroids: int

    _V_CELLS = KeyCells(20, 0, 2048)
    cells_len = 2 * (NUM_BINS + 2048)

    def accumulate(self, m: F32, v: F32 | None, scales: Scales, out: I64) -> None:
        """Add one block's kept moments to the cells."""
        bins = linear_bins(m, np.float32(scales.max_m))
        exponent = block_exponent(scales.max_m, scales.global_numel)
        out[:NUM_BINS] += count_by(bins, NUM_BINS)
        out[NUM_BINS : 2 * NUM_BINS] += sum_by(bins, fixed_floats(m, exponent), NUM_BINS)
        if v is not None:
            self._V_CELLS.accumulate(magnitude_bits(v), out[2 * NUM_BINS :])

    def tables(self, cells: I64, scales: Scales) -> tuple[F32, F32]:
        """Codebooks of m and of v from merged cells."""
        exponent = block_exponent(scales.max_m, scales.global_numel)
        m_codes = lloyd(cells[:NUM_BINS], cells[NUM_BINS : 2 * NUM_BINS], self.num_centroids)
        m_table = np.ldexp(m_codes, -exponent).astype(np.float32)
        v_cells = cells[2 * NUM_BINS :]
        num = self._V_CELLS.num_cells
        v_keys = lloyd(v_cells[:num], v_cells[num:], self.num_centroids)
        return np.unique(m_table), _from_keys([int(key) for key in v_keys])


def _from_keys(keys: list[int]) -> F32:
    """Ascending distinct float32 values of bit patterns, at least the smallest normal number."""
    table = np.array([from_bits(key) for key in keys], dtype=np.float32)
    return np.unique(np.maximum(table, TINY))


@dataclass(frozen=True, eq=False)
class Moments:
    """Quantiser of m and, where there is one, v. Symbols: 0 = pruned, else 1 + a table index."""

    threshold: np.float32
    m_table: F32
    """Ascending."""
    v_table: F32 | None
    """Ascending, positive; None where there is no v."""
    fill: np.float32
    """What every pruned v decodes to."""

    def encode(self, kept_w: Bools, a: JointArrays) -> tuple[U8, U8 | None]:
        """Symbols of one block."""
        assert a.m is not None
        if (compiled := native.kernels()) is not None and (a.v is None) == (self.v_table is None):
            edges = None if self.v_table is None else _key_middles(self.v_table)
            middles = _middles(self.m_table)
            return compiled.moment_symbols(kept_w, a.m, a.v, self.threshold, middles, edges)
        index = kept_index(kept_w, self.threshold, a)
        m = np.zeros(a.m.size, dtype=np.uint8)
        m[index] = 1 + np.searchsorted(_middles(self.m_table), a.m[index])
        if a.v is None or self.v_table is None:
            return m, None
        v = np.zeros(a.m.size, dtype=np.uint8)
        v[index] = 1 + np.searchsorted(_key_middles(self.v_table), magnitude_bits(a.v[index]))
        return m, v

    def decode(self, m: U8, v: U8 | None) -> tuple[F32, F32 | None]:
        """Undoes encode; ValueError where the symbols do not fit the tables or each other."""
        _check_symbols("m", m, self.m_table)
        out_m = take_table(np.concatenate([[np.float32(0)], self.m_table]), m)
        if self.v_table is None:
            if v is not None:
                raise ValueError("v: symbols given, this quantiser has no v")
            return out_m, None
        if v is None:
            raise ValueError("v: no symbols given, this quantiser has a v")
        _check_symbols("v", v, self.v_table)
        if np.any((m != 0) != (v != 0)):
            raise ValueError("v: symbols must be 0 exactly where those of m are")
        return out_m, take_table(np.concatenate([[self.fill], self.v_table]), v)

    def to_json(self) -> dict[str, Any]:
        """JSON fields of the moments' quantiser."""
        fields: dict[str, Any] = {
            "threshold": float32_json(self.threshold),
            "m": table_json(self.m_table),
        }
        if self.v_table is not None:
            fields |= {"v": table_json(self.v_table), "fill": float32_json(self.fill)}
        return fields

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Moments:
        """Undoes to_json; ValueError names the field that is wrong."""
        threshold = float32_field(fields, "threshold")
        m_table = ascending(table_field(fields, "m", MAX_ENTRIES), "m")
        if "v" not in fields:
            return cls(threshold, m_table, None, np.float32(0))
        v_table = ascending(table_field(fields, "v", MAX_ENTRIES), "v")
        if v_table.size and v_table[0] <= 0:
            raise ValueError(f"v: entry {v_table[0]}, must be > 0")
        return cls(threshold, m_table, v_table, float32_field(fields, "fill"))


def _middles(table: F32) -> F32:
    """Midpoints of an ascending table."""
    wide = table.astype(np.float64)
    return ((wide[1:] + wide[:-1]) / 2).astype(np.float32)


def _key_middles(table: F32) -> U32:
    """Midpoints of the bit patterns of an ascending table."""
    keys = magnitude_bits(table).astype(np.int64)
    return ((keys[1:] + keys[:-1]) // 2).astype(np.uint32)


def _check_symbols(name: str, symbols: U8, table: F32) -> None:
    if largest_symbol(symbols) > table.size:
        raise ValueError(f"{name}: symbol {largest_symbol(symbols)}, must be <= {table.size}")


@dataclass(frozen=True)
class MomentGrid:
    """Round 3 of the moments: what is kept, and the cells of the kept."""

    threshold: np.float32
    coding: OctaveMoments | CentroidMoments

    @property
    def cells_len(self) -> int:
        """The coding's cells, the number kept, and the sum of kept v."""
        return self.coding.cells_len + 2

    def accumulate(self, kept_w: Bools, a: JointArrays, scales: Scales, out: I64) -> None:
        """Add one block."""
        assert a.m is not None
        if isinstance(self.coding, OctaveMoments) and (compiled := native.kernels()) is not None:
            scale = math.ldexp(1.0, scales.v_exponent)
            cells = self.coding.layout()
            compiled.moment_cells(kept_w, a.m, a.v, self.threshold, cells, scale, out)
            return
        index = kept_index(kept_w, self.threshold, a)
        v = None if a.v is None else a.v[index]
        self.coding.accumulate(a.m[index], v, scales, out[:-2])
        out[-2] += index.size
        if v is not None:
            out[-1] += fixed_sum(v, scales.v_exponent)

    def finish(self, cells: I64, scales: Scales, totals: Totals, has_v: bool) -> Moments:
        """The quantiser from merged cells."""
        m_table, v_table = self.coding.tables(cells[:-2], scales)
        num_pruned = scales.global_numel - int(cells[-2])
        fill = 0.0
        if num_pruned > 0:
            pruned_v = totals.fixed_sum_v - int(cells[-1])
            fill = min(from_fixed(pruned_v, scales.v_exponent) / num_pruned, float(LARGEST))
        return Moments(self.threshold, m_table, v_table if has_v else None, np.float32(fill))
