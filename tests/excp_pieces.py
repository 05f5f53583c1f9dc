"""Helpers of the test_core_excp files: a whole tensor cut in pieces, and the three rounds merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from effx_dist.core.excp import (
    PROFILES,
    RANGES_LEN,
    SUMS_LEN,
    JointArrays,
    JointQuantiser,
    JointSymbols,
    build_quantiser,
    cells,
    cells_len,
    ranges,
    sums,
)


def cut(whole: JointArrays, edges: Sequence[int]) -> list[JointArrays]:
    """Pieces between consecutive edges."""

    def part(x: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
        return None if x is None else x[start:stop].copy()

    pairs = list(zip([0, *edges], [*edges, whole.r.size], strict=True))
    return [JointArrays(whole.r[a:b], part(whole.m, a, b), part(whole.v, a, b)) for a, b in pairs]


def build(name: str, pieces: Iterable[JointArrays]) -> JointQuantiser | None:
    """All three rounds, merged in the order given."""
    pieces, profile = list(pieces), PROFILES[name]
    numel = sum(piece.r.size for piece in pieces)
    r1 = np.zeros(RANGES_LEN)
    for piece in pieces:
        r1 = np.maximum(r1, ranges(piece))
    r2 = np.zeros(SUMS_LEN, dtype=np.int64)
    for piece in pieces:
        r2 = r2 + sums(piece, r1, numel)
    r3 = np.zeros(cells_len(profile), dtype=np.int64)
    for piece in pieces:
        r3 = r3 + cells(piece, r1, r2, numel, profile)
    has_m, has_v = pieces[0].m is not None, pieces[0].v is not None
    return build_quantiser(profile, has_m, has_v, numel, r1, r2, r3)


def must_build(name: str, pieces: Iterable[JointArrays]) -> JointQuantiser:
    quantiser = build(name, pieces)
    assert quantiser is not None
    return quantiser


def whole_tensor(seed: int, numel: int, has_m: bool = True, has_v: bool = True) -> JointArrays:
    """Laplacian residuals and moments, with some zeros and a few outliers."""
    rng = np.random.default_rng(seed)
    r = rng.laplace(scale=1e-3, size=numel) * (rng.random(numel) > 0.1)
    r[rng.random(numel) < 5e-4] *= 1e3
    m = rng.laplace(scale=1e-4, size=numel) * (rng.random(numel) > 0.1)
    v = (1e-8 * rng.laplace(size=numel) ** 2) * (rng.random(numel) > 0.1)
    return JointArrays(
        r.astype(np.float32),
        m.astype(np.float32) if has_m else None,
        v.astype(np.float32) if has_v else None,
    )


def same_bits(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    """Both absent, or equal bit for bit."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def sub_range(quantiser: JointQuantiser, s: JointSymbols, start: int, stop: int) -> JointSymbols:
    """The symbols of values start to stop of a piece, with their escapes: what decode takes."""
    first = num = 0
    if quantiser.escape_symbol is not None and s.escapes.size:
        first = int(np.count_nonzero(s.w[:start] == quantiser.escape_symbol))
        num = int(np.count_nonzero(s.w[start:stop] == quantiser.escape_symbol))
    return JointSymbols(
        s.w[start:stop],
        s.escapes[first : first + num],
        None if s.m is None else s.m[start:stop],
        None if s.v is None else s.v[start:stop],
    )
