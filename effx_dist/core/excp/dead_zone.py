"""Dead-zone uniform quantisation of the weight residual.

level = floor(|r| / step + 0.4), capped. Level 0 decodes to 0, every other level to the mean of |r|
over the whole tensor's values in it, with the sign of r. Beyond the cap the value is stored exactly.
So no element's error exceeds one step (0.6 steps where it decodes to 0), whatever the outliers, up
to the rounding of float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from effx_dist.core.excp.arrays import (
    F32,
    I64,
    LARGEST,
    TINY,
    U8,
    Bools,
    largest_symbol,
    take_table,
)
from effx_dist.core.excp.json_fields import (
    float32_field,
    float32_json,
    int_field,
    table_field,
    table_json,
)
from effx_dist.core.excp.profiles import DeadZoneRule
from effx_dist.core.excp.statistics import Scales, Totals, value_at_rank
from effx_dist.core.fixed_point import (
    block_exponent,
    count_by,
    fixed_floats,
    fixed_sum,
    from_fixed,
    sum_by,
)
from effx_dist.native import kernels as native

_ROUNDING = np.float32(0.4)
_MAX_LEVEL = 127
_OUTLIER_FRACTION = 1024


def choose_step(rule: DeadZoneRule, totals: Totals) -> np.float32:
    """step_medians * median|r|, kept sensible where the median says little.

    Where at least half of r is zero: the median of the rest. Bounded from above and below by the
    largest |r| that is not an outlier (about one value in 1024 may be): below, so that escapes stay
    rare where most weights hardly moved; above, so that a tensor whose |r| are all alike (Lion's
    first steps) does not fall into the dead zone whole.
    """
    moved = totals.non_zero()
    num_moved = int(moved.sum())
    if num_moved == 0:
        return TINY
    median = totals.median() or value_at_rank(moved, (num_moved - 1) / 2)
    num_outliers = num_moved // _OUTLIER_FRACTION + min(4, num_moved // 16)
    top = value_at_rank(moved, num_moved - 1 - num_outliers)
    step = min(max(rule.step_medians * median, top / rule.max_level), top)
    return max(np.float32(step), TINY)


@dataclass(frozen=True)
class DeadZoneGrid:
    """Which level a residual falls in."""

    step: np.float32
    max_level: int

    @property
    def cells_len(self) -> int:
        """Levels 0 to max_level and the escapes: a count and a sum each; one sum of squares."""
        return 2 * (self.max_level + 2) + 1

    @property
    def escape(self) -> int:
        """The symbol of values stored exactly."""
        return 2 * self.max_level + 1

    def steps(self, r: F32) -> F32:
        """|r| in steps, clipped just above the cap. One rounding per operation, any block."""
        with np.errstate(over="ignore"):
            out = np.abs(r) / self.step
        return np.minimum(out, np.float32(self.max_level + 1), out=out)

    def levels(self, steps: F32) -> U8:
        """Level of each value; max_level + 1 beyond the cap."""
        return (steps + _ROUNDING).astype(np.uint8)

    def exponents(self, global_numel: int) -> tuple[int, int]:
        """Fixed point exponents of |r| and r^2, in steps."""
        limit = float(self.max_level + 1)
        return block_exponent(limit, global_numel), block_exponent(limit * limit, global_numel)

    def accumulate(self, r: F32, scales: Scales, out: I64) -> Bools:
        """Add one block to the cells; returns where the symbol is not 0."""
        exponent, squares_exponent = self.exponents(scales.global_numel)
        if (compiled := native.kernels()) is not None:
            factors = (math.ldexp(1.0, exponent), math.ldexp(1.0, squares_exponent))
            return compiled.dead_zone_cells(r, self.step, self.max_level, factors, out)
        length = self.max_level + 2
        steps = self.steps(r)
        levels = self.levels(steps)
        kept: Bools = levels != 0
        index = np.flatnonzero(kept)  # a random boolean mask costs five times as much
        coded = levels[index]
        out[:length] += count_by(coded, length)
        out[0] += r.size - index.size
        out[length : 2 * length] += sum_by(coded, fixed_floats(steps[index], exponent), length)
        inside = steps[levels <= self.max_level] if largest_symbol(levels) >= length - 1 else steps
        squares = np.multiply(inside, inside, dtype=np.float64)
        out[2 * length] += fixed_sum(squares, squares_exponent)
        return kept

    def finish(self, cells: I64, scales: Scales, totals: Totals) -> tuple[DeadZone, float]:
        """The quantiser from merged cells, and its squared error."""
        del totals
        exponent, squares_exponent = self.exponents(scales.global_numel)
        length = self.max_level + 2
        counts = [int(x) for x in cells[1 : length - 1]]
        sums = [int(x) for x in cells[length + 1 : 2 * length - 1]]
        while counts and counts[-1] == 0:
            counts.pop()
        means = [
            from_fixed(total, exponent) / count if count else float(level)
            for level, (count, total) in enumerate(zip(counts, sums, strict=False), start=1)
        ]
        error = from_fixed(int(cells[2 * length]), squares_exponent) - sum(
            count * mean * mean for count, mean in zip(counts, means, strict=True)
        )
        step = float(self.step)
        table = np.minimum(np.array(means, dtype=np.float64) * step, float(LARGEST))
        return DeadZone(self, table.astype(np.float32)), max(error, 0.0) * step * step


@dataclass(frozen=True, eq=False)
class DeadZone:
    """Symbols: 0, then 2L-1 for +level L and 2L for -level L; the last is the escape."""

    grid: DeadZoneGrid
    levels: F32
    """Reconstruction of levels 1, 2, ... up to the highest one used."""

    kind = "dead_zone"

    @property
    def num_symbols(self) -> int:
        """Symbols are below this."""
        return 2 * self.grid.max_level + 2

    def encode(self, r: F32) -> tuple[U8, F32]:
        """Symbols and escapes of one block."""
        if (compiled := native.kernels()) is not None:
            found, num = compiled.dead_zone_symbols(r, self.grid.step, self.grid.max_level)
            return found, r[found == self.grid.escape] if num else np.empty(0, dtype=np.float32)
        levels = self.grid.levels(self.grid.steps(r))
        # Level 0 wraps around and is cleared by the product.
        symbols = (levels * np.uint8(2) - np.uint8(1) + np.signbit(r)) * (levels != 0)
        if largest_symbol(levels) <= self.grid.max_level:
            return symbols, np.empty(0, dtype=np.float32)
        np.minimum(symbols, np.uint8(self.grid.escape), out=symbols)
        return symbols, r[symbols == self.grid.escape]

    def table(self) -> F32:
        """What each symbol decodes to [num_symbols]; 0 for the escape."""
        table = np.zeros(self.num_symbols, dtype=np.float32)
        table[1 : 2 * self.levels.size : 2] = self.levels
        table[2 : 2 * self.levels.size + 1 : 2] = -self.levels
        return table

    def decode(self, symbols: U8, escapes: F32) -> F32:
        """Undoes encode; ValueError where symbols and escapes do not fit."""
        if largest_symbol(symbols) >= self.num_symbols:
            raise ValueError(f"w: symbol {largest_symbol(symbols)}, must be < {self.num_symbols}")
        out = take_table(self.table(), symbols)
        at = np.flatnonzero(symbols == self.grid.escape)
        if at.size != escapes.size:
            raise ValueError(f"escapes: {escapes.size} values for {at.size} escape symbols")
        out[at] = escapes
        return out

    def to_json(self) -> dict[str, Any]:
        """JSON fields of this weight quantiser."""
        return {
            "kind": self.kind,
            "step": float32_json(self.grid.step),
            "max_level": self.grid.max_level,
            "levels": table_json(self.levels),
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> DeadZone:
        """Undoes to_json; ValueError names the field that is wrong."""
        max_level = int_field(fields, "max_level", 1, _MAX_LEVEL - 1)
        step = float32_field(fields, "step")
        if step < TINY:
            raise ValueError(f"step: {step}, must be a normal float32 above 0")
        levels = table_field(fields, "levels", max_level)
        return cls(DeadZoneGrid(step, max_level), levels)
