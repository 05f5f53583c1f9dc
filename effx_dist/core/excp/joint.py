"""The joint quantiser of one parameter tensor: round 3, building, encoding, decoding, JSON.

Use, on every rank that holds a piece of the tensor (the merging is the caller's):

    r1 = max over pieces of ranges(piece)
    r2 = sum over pieces of sums(piece, r1, global_numel)
    r3 = sum over pieces of cells(piece, r1, r2, global_numel, profile)
    quantiser = build_quantiser(profile, has_m, has_v, global_numel, r1, r2, r3)

The quantiser is a function of the whole tensor: bit-identical however the tensor is cut and in
whatever order the pieces are merged. No communication is performed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from effx_dist.core.excp import centroids, dead_zone, moments
from effx_dist.core.excp.arrays import F32, F64, I64, JointArrays, JointSymbols, block_slices
from effx_dist.core.excp.json_fields import float_field, name_field, object_field
from effx_dist.core.excp.profiles import DeadZoneRule, Profile
from effx_dist.core.excp.statistics import Scales, Totals, quantisable


@dataclass(frozen=True)
class _Plan:
    """What rounds 1 and 2 decide for the whole tensor."""

    scales: Scales
    totals: Totals
    weight: dead_zone.DeadZoneGrid | centroids.CentroidGrid
    moments: moments.MomentGrid

    @classmethod
    def make(cls, profile: Profile, merged: tuple[F64, I64], global_numel: int) -> _Plan:
        scales = Scales.from_ranges(merged[0], global_numel)
        totals = Totals.from_sums(merged[1], scales)
        threshold = moments.choose_threshold(profile.beta, totals)
        rule = profile.weight
        if isinstance(rule, DeadZoneRule):
            grid = dead_zone.DeadZoneGrid(dead_zone.choose_step(rule, totals), rule.max_level)
            octaves = moments.OctaveMoments(threshold)
            return cls(scales, totals, grid, moments.MomentGrid(threshold, octaves))
        cut = centroids.choose_threshold(rule, totals, scales)
        bins = centroids.CentroidGrid(cut, np.float32(scales.max_r), rule.num_centroids)
        codes = moments.CentroidMoments(rule.num_centroids)
        return cls(scales, totals, bins, moments.MomentGrid(threshold, codes))


def cells_len(profile: Profile) -> int:
    """Length of the round 3 vector."""
    rule = profile.weight
    if isinstance(rule, DeadZoneRule):
        octaves = moments.OctaveMoments.cells_len
        return dead_zone.DeadZoneGrid(np.float32(1), rule.max_level).cells_len + octaves + 2
    return 2 * centroids.NUM_BINS + moments.CentroidMoments.cells_len + 2


def cells(
    a: JointArrays, merged_ranges: F64, merged_sums: I64, global_numel: int, profile: Profile
) -> I64:
    """Round 3: int64 [cells_len] of one piece; merge by +.

    Counts and fixed point sums of each quantisation cell. All zero where the tensor is not
    quantisable.
    """
    out = np.zeros(cells_len(profile), dtype=np.int64)
    if not quantisable(merged_ranges):
        return out
    plan = _Plan.make(profile, (merged_ranges, merged_sums), global_numel)
    split = plan.weight.cells_len
    for block in a.blocks():
        kept = plan.weight.accumulate(block.r, plan.scales, out[:split])
        if block.m is not None:
            plan.moments.accumulate(kept, block, plan.scales, out[split:])
    return out


def build_quantiser(
    profile: Profile,
    has_m: bool,
    has_v: bool,
    global_numel: int,
    merged_ranges: F64,
    merged_sums: I64,
    merged_cells: I64,
) -> JointQuantiser | None:
    """The whole tensor's quantiser, the same on every rank.

    None where the tensor holds a non-finite value or a negative v: store it losslessly.
    """
    if not quantisable(merged_ranges):
        return None
    plan = _Plan.make(profile, (merged_ranges, merged_sums), global_numel)
    split = plan.weight.cells_len
    weight, squared_error = plan.weight.finish(merged_cells[:split], plan.scales, plan.totals)
    pair = None
    if has_m:
        pair = plan.moments.finish(merged_cells[split:], plan.scales, plan.totals, has_v)
    return JointQuantiser(profile.name, weight, pair, squared_error, plan.totals.squared_norm)


@dataclass(frozen=True, eq=False)
class JointQuantiser:
    """Turns arrays into symbols and back, elementwise, by tables of the whole tensor."""

    profile: str
    weight: dead_zone.DeadZone | centroids.Centroids
    moments: moments.Moments | None
    squared_error: float
    """Sum over the whole tensor of (r - r')^2."""
    squared_norm: float
    """Sum over the whole tensor of r^2."""

    @property
    def error(self) -> float:
        """Relative rms error of r: sqrt(squared_error / squared_norm); 0 for an all-zero r."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0

    @property
    def num_w_symbols(self) -> int:
        """Symbols of w are below this."""
        return self.weight.num_symbols

    @property
    def escape_symbol(self) -> int | None:
        """The symbol of w that stands for an escape; None where this quantiser has none."""
        return self.weight.grid.escape if isinstance(self.weight, dead_zone.DeadZone) else None

    def w_table(self) -> F32:
        """What each symbol of w decodes to [num_w_symbols]; 0 for escapes."""
        return self.weight.table()

    @property
    def num_m_symbols(self) -> int:
        """Symbols of m are below this; 0 where there is no m."""
        return 0 if self.moments is None else self.moments.m_table.size + 1

    @property
    def num_v_symbols(self) -> int:
        """Symbols of v are below this; 0 where there is no v."""
        if self.moments is None or self.moments.v_table is None:
            return 0
        return self.moments.v_table.size + 1

    def encode(self, a: JointArrays) -> JointSymbols:
        """Symbols of one piece. An element's symbol does not depend on the piece it is in."""
        if (a.m is not None, a.v is not None) != (self.num_m_symbols > 0, self.num_v_symbols > 0):
            raise ValueError("m, v: must be given exactly where this quantiser was built with them")
        w = np.empty(a.r.size, dtype=np.uint8)
        m = None if a.m is None else np.empty(a.r.size, dtype=np.uint8)
        v = None if a.v is None else np.empty(a.r.size, dtype=np.uint8)
        escapes = [np.empty(0, dtype=np.float32)]
        for cut, block in zip(block_slices(a.r.size), a.blocks(), strict=True):
            w[cut], exact = self.weight.encode(block.r)
            escapes.append(exact)
            if self.moments is None or m is None:
                continue
            m[cut], v_symbols = self.moments.encode(w[cut] != 0, block)
            if v is not None and v_symbols is not None:
                v[cut] = v_symbols
        return JointSymbols(w, np.concatenate(escapes), m, v)

    def decode(self, s: JointSymbols) -> JointArrays:
        """Reconstruction of one piece, float32, elementwise.

        Any sub-range's symbols (with its escapes) decode to that sub-range. Raises ValueError where
        symbols are out of range or do not fit each other.
        """
        r = self.weight.decode(s.w, s.escapes)
        if self.moments is None:
            if s.m is not None or s.v is not None:
                raise ValueError("m, v: symbols given, this quantiser has no moments")
            return JointArrays(r)
        if s.m is None:
            raise ValueError("m: no symbols given, this quantiser has an m")
        return JointArrays(r, *self.moments.decode(s.m, s.v))

    def to_json(self) -> dict[str, Any]:
        """JSON fields; float32 tables as base64 of little-endian bytes."""
        fields: dict[str, Any] = {"profile": self.profile, "weight": self.weight.to_json()}
        if self.moments is not None:
            fields["moments"] = self.moments.to_json()
        return fields | {"squared_error": self.squared_error, "squared_norm": self.squared_norm}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> JointQuantiser:
        """Undoes to_json. Hostile input raises ValueError, naming the field."""
        if not isinstance(fields, Mapping):
            raise ValueError("quantiser: must be an object")  # noqa: TRY004
        pair = None
        if "moments" in fields:
            pair = moments.Moments.from_json(object_field(fields, "moments"))
        return cls(
            profile=name_field(fields, "profile"),
            weight=_weight_from_json(object_field(fields, "weight")),
            moments=pair,
            squared_error=float_field(fields, "squared_error"),
            squared_norm=float_field(fields, "squared_norm"),
        )


def _weight_from_json(fields: Mapping[str, Any]) -> dead_zone.DeadZone | centroids.Centroids:
    """Single place that tells weight quantisers apart."""
    match name_field(fields, "kind"):
        case dead_zone.DeadZone.kind:
            return dead_zone.DeadZone.from_json(fields)
        case centroids.Centroids.kind:
            return centroids.Centroids.from_json(fields)
        case other:
            raise ValueError(f"kind: {other!r}, must be dead_zone or centroids")
