"""What excp.cpp and symbols.cpp do, on numpy arrays. Their calls release the interpreter lock.

Each function gives the bits of the numpy form that stands beside its use in core/excp or codecs;
what it computes is said there. Lengths, types and contiguity are checked here, and the C++ checks
every index that comes from a payload, so that no input writes out of bounds.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from effx_dist.native.library import BuildError, Library, Source, load

Array = npt.NDArray[Any]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]

logger = logging.getLogger(__name__)

SOURCE = Source(tuple(Path(__file__).with_name(name) for name in ("excp.cpp", "symbols.cpp")))
MAX_LEVEL = 126
"""Highest level that the C++ tables hold."""
FLOAT32, FLOAT16, BFLOAT16 = range(3)

# p: address, q: int64, f: float, d: double. All functions return int64 or nothing.
_SIGNATURES = {
    "effx_range": "pqp",
    "effx_sums": "pppqpp",
    "effx_dead_zone_cells": "pqfqddpp",
    "effx_moment_cells": "pppqfqqqdp",
    "effx_dead_zone_symbols": "pqfqp",
    "effx_moment_symbols": "pppqfpqpqpp",
    "effx_split_symbols": "pqpp",
    "effx_pair_nibbles": "pqpp",
    "effx_take_inside": "ppqp",
    "effx_put_inside": "pqpqp",
    "effx_count_bits": "pq",
    "effx_count_large": "pq",
    "effx_join_symbols": "pqpqpqp",
    "effx_take_table": "pqpqp",
    "effx_add_symbols": "pqqppqpqpqpq",
    "effx_split_planes": "pqqp",
    "effx_merge_planes": "pqqp",
    "effx_delta": "ppqqp",
    "effx_undo_delta": "pqqp",
}
_TYPES = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "f": ctypes.c_float, "d": ctypes.c_double}


def _at(array: Array | None, dtype: type, length: int) -> int | None:
    """Address of a flat array of this type and at least this length; None for None."""
    if array is None:
        return None
    if array.dtype != dtype or not array.flags.c_contiguous or array.size < length:
        raise ValueError(
            f"{array.dtype}{array.shape}: must be contiguous {np.dtype(dtype)}, >= {length} values"
        )
    return int(array.ctypes.data)


class Kernels:
    """The loaded library's functions."""

    def __init__(self, loaded: Library) -> None:
        self._call: dict[str, Any] = {}
        for name, signature in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes = [_TYPES[letter] for letter in signature]
            function.restype = ctypes.c_int64
            self._call[name.removeprefix("effx_")] = function

    def range(self, x: F32) -> tuple[np.float32, bool]:
        """The largest magnitude (NaN where there is one), and whether a value is below 0."""
        out = np.empty(2, dtype=np.int64)
        self._call["range"](_at(x, np.float32, x.size), x.size, out.ctypes.data)
        return np.uint32(out[0]).view(np.float32), bool(out[1])

    def sums(self, r: F32, m: F32 | None, v: F32 | None, scales: Sequence[float], out: I64) -> None:
        """Adds to out [4099]: the histogram of |r|, fixed point sums of r^2, |m| and v."""
        n, factors = r.size, np.array(scales, dtype=np.float64)
        self._call["sums"](
            *(_at(x, np.float32, n) for x in (r, m, v)),
            *(n, _at(factors, np.float64, 3), _at(out, np.int64, 4096 + 3)),
        )

    def dead_zone_cells(
        self, r: F32, step: np.float32, max_level: int, scales: tuple[float, float], out: I64
    ) -> npt.NDArray[np.bool_]:
        """Adds to out: the weight's cells; returns where the symbol is not 0."""
        _check_level(max_level)
        kept = np.empty(r.size, dtype=np.uint8)
        at_out = _at(out, np.int64, 2 * max_level + 5)
        at_r = _at(r, np.float32, r.size)
        self._call["dead_zone_cells"](
            at_r, r.size, float(step), max_level, *scales, at_out, kept.ctypes.data
        )
        return kept.view(np.bool_)

    def moment_cells(
        self,
        kept_w: npt.NDArray[np.bool_],
        m: F32,
        v: F32 | None,
        threshold: np.float32,
        cells: tuple[int, int, int],
        v_scale: float,
        out: I64,
    ) -> None:
        """Adds to out: the moments' cells, the number kept and the sum of kept v.

        ``cells``: the first half octave of m, and the numbers of cells of m and of v.
        """
        n = m.size
        at_out = _at(out, np.int64, 2 * (cells[1] + cells[2]) + 2)
        self._call["moment_cells"](
            *(_at(kept_w, np.bool_, n), _at(m, np.float32, n), _at(v, np.float32, n)),
            *(n, float(threshold), *cells, v_scale, at_out),
        )

    def dead_zone_symbols(self, r: F32, step: np.float32, max_level: int) -> tuple[U8, int]:
        """Symbols, and how many of them are escapes."""
        _check_level(max_level)
        symbols = np.empty(r.size, dtype=np.uint8)
        at_r = _at(r, np.float32, r.size)
        num_escapes = self._call["dead_zone_symbols"](
            at_r, r.size, float(step), max_level, symbols.ctypes.data
        )
        return symbols, num_escapes

    def moment_symbols(
        self,
        kept_w: npt.NDArray[np.bool_],
        m: F32,
        v: F32 | None,
        threshold: np.float32,
        m_edges: F32,
        v_edges: npt.NDArray[np.uint32] | None,
    ) -> tuple[U8, U8 | None]:
        """Symbols of m and of v, which has edges if it is there; at most 254 edges each."""
        n = m.size
        m_symbols = np.empty(n, dtype=np.uint8)
        v_symbols = None if v is None else np.empty(n, dtype=np.uint8)
        num_v_edges = 0 if v_edges is None else v_edges.size
        self._call["moment_symbols"](
            *(_at(kept_w, np.bool_, n), _at(m, np.float32, n), _at(v, np.float32, n)),
            *(n, float(threshold)),
            *(_at(m_edges, np.float32, 0), m_edges.size),
            *(_at(v_edges, np.uint32, 0), num_v_edges),
            *(_at(m_symbols, np.uint8, n), _at(v_symbols, np.uint8, n)),
        )
        return m_symbols, v_symbols

    def split_symbols(self, symbols: U8) -> tuple[U8, U8]:
        """The packed mask of the symbols that are not 0, and those."""
        n = symbols.size
        mask, values = np.empty((n + 7) // 8, dtype=np.uint8), np.empty(n, dtype=np.uint8)
        at = _at(symbols, np.uint8, n)
        count = self._call["split_symbols"](at, n, mask.ctypes.data, values.ctypes.data)
        return mask, values[:count]

    def pair_nibbles(self, values: U8) -> tuple[U8, U8]:
        """Nibble pairs of non-zero symbols, and the large ones."""
        n = values.size
        pairs, large = np.empty((n + 1) // 2, dtype=np.uint8), np.empty(n, dtype=np.uint8)
        at = _at(values, np.uint8, n)
        count = self._call["pair_nibbles"](at, n, pairs.ctypes.data, large.ctypes.data)
        return pairs, large[:count]

    def take_inside(self, symbols: U8, support: npt.NDArray[np.bool_]) -> U8 | None:
        """The symbols where support is true; None where another one is not 0."""
        n = symbols.size
        out = np.empty(n, dtype=np.uint8)
        at, at_support = _at(symbols, np.uint8, n), _at(support, np.bool_, n)
        count = self._call["take_inside"](at, at_support, n, out.ctypes.data)
        return None if count < 0 else out[:count]

    def put_inside(self, values: U8, support: npt.NDArray[np.bool_]) -> U8:
        """Undoes take_inside."""
        n = support.size
        out = np.empty(n, dtype=np.uint8)
        at, at_support = _at(values, np.uint8, values.size), _at(support, np.bool_, n)
        _checked(self._call["put_inside"](at, values.size, at_support, n, out.ctypes.data))
        return out

    def count_bits(self, mask: U8) -> int:
        """How many bits are set."""
        return int(self._call["count_bits"](_at(mask, np.uint8, mask.size), mask.size))

    def count_large(self, pairs: U8, num_values: int) -> int:
        """How many of the first num_values nibbles are 15."""
        at = _at(pairs, np.uint8, (num_values + 1) // 2)
        return int(self._call["count_large"](at, num_values))

    def join_symbols(
        self, num_symbols: int, mask: U8 | None, pairs: U8, num_values: int, large: U8
    ) -> U8:
        """Undoes split_symbols and pair_nibbles; all are non-zero where there is no mask."""
        out = np.empty(num_symbols, dtype=np.uint8)
        used = self._call["join_symbols"](
            *(_at(mask, np.uint8, (num_symbols + 7) // 8), num_symbols),
            *(_at(pairs, np.uint8, (num_values + 1) // 2), num_values),
            *(_at(large, np.uint8, large.size), large.size, out.ctypes.data),
        )
        _checked(used)
        return out

    def take_table(self, table: F32, symbols: U8) -> F32:
        """table[symbols]; ValueError for a symbol that is not in the table."""
        n = symbols.size
        out = np.empty(n, dtype=np.float32)
        at_table, at = _at(table, np.float32, table.size), _at(symbols, np.uint8, n)
        _checked(self._call["take_table"](at_table, table.size, at, n, out.ctypes.data))
        return out

    def add_symbols(
        self,
        values: tuple[int, int, int],
        mask: U8,
        pairs: U8,
        num_values: int,
        large: U8,
        table: F32,
        escape: int,
        escapes: F32,
    ) -> None:
        """Adds table[symbol] to values in memory, rounding each sum once to the values' type.

        ``values``: address, one of FLOAT32, FLOAT16, BFLOAT16, and length. ``table`` [256]. Where it
        raises ValueError the values are partly done: check the counts before.
        """
        address, kind, n = values
        used = self._call["add_symbols"](
            *(address, kind, n, _at(mask, np.uint8, (n + 7) // 8)),
            *(_at(pairs, np.uint8, (num_values + 1) // 2), num_values),
            *(_at(large, np.uint8, large.size), large.size, _at(table, np.float32, 256), escape),
            *(_at(escapes, np.float32, escapes.size), escapes.size),
        )
        _checked(used)

    def split_planes(self, words: Array) -> U8:
        """Bytes of equal position [itemsize, n] of words of 1, 2, 4 or 8 bytes."""
        n, width = words.size, words.dtype.itemsize
        planes = np.empty((width, n), dtype=np.uint8)
        at = _at(words, np.dtype(f"u{width}").type, n)
        _checked(self._call["split_planes"](at, width, n, planes.ctypes.data))
        return planes

    def merge_planes(self, planes: Sequence[U8], n: int) -> Array:
        """Undoes split_planes."""
        words: Array = np.empty(n, dtype=f"u{len(planes)}")
        at = (ctypes.c_void_p * len(planes))(*(_at(plane, np.uint8, n) for plane in planes))
        _checked(self._call["merge_planes"](at, len(planes), n, words.ctypes.data))
        return words

    def delta(self, words: Array, reference: Array) -> Array:
        """Folded differences of unsigned words to as many others."""
        n, width = words.size, words.dtype.itemsize
        out = np.empty_like(words)
        at, at_reference = (_at(x, np.dtype(f"u{width}").type, n) for x in (words, reference))
        _checked(self._call["delta"](at, at_reference, width, n, out.ctypes.data))
        return out

    def undo_delta_(self, folded: Array, words: Array) -> None:
        """Undoes delta in place: ``words`` holds the reference at first, and the original words afterwards."""
        n, width = words.size, words.dtype.itemsize
        if not words.flags.writeable:
            raise ValueError("words: must be writable")
        at, at_words = (_at(x, np.dtype(f"u{width}").type, n) for x in (folded, words))
        _checked(self._call["undo_delta"](at, width, n, at_words))


def _check_level(max_level: int) -> None:
    if not 1 <= max_level <= MAX_LEVEL:
        raise ValueError(f"max_level: {max_level}, must be 1 to {MAX_LEVEL}")


def _checked(result: int) -> None:
    if result < 0:
        raise ValueError("payload: its parts do not fit each other")


@functools.cache
def kernels() -> Kernels | None:
    """The compiled functions; None, logged once, where they cannot be had or round otherwise.

    Compilers have been known to relax floating point unasked.
    """
    remedy = "numpy is used: the same bytes and values, several times slower"
    if sys.byteorder != "little":
        return None
    try:
        found = Kernels(load(SOURCE))
    except BuildError as error:
        logger.warning("the compiled checkpoint coding is not available (%s); %s", error, remedy)
        return None
    if _rounds_once(found):
        return found
    logger.warning("the compiled checkpoint coding does not round as numpy does; %s", remedy)
    return None


def _rounds_once(found: Kernels) -> bool:
    """Whether levels and fixed point come out as numpy's, on residuals at the borders of levels."""
    step = np.float32(0.1)
    borders = (np.arange(1, MAX_LEVEL, dtype=np.float32) - np.float32(0.4)) * step
    above, below = (np.nextafter(borders, np.float32(limit)) for limit in (99, 0))
    r = np.concatenate([borders, above, below, -borders])
    symbols, _ = found.dead_zone_symbols(r, step, MAX_LEVEL)
    level = (np.abs(r) / step + np.float32(0.4)).astype(np.int64)
    expected = np.where(level == 0, 0, 2 * level - 1 + np.signbit(r))
    sums = np.zeros(4096 + 3, dtype=np.int64)
    found.sums(r, r, np.abs(r), (1e3, 5.0, 1e5), sums)
    wide = np.abs(r.astype(np.float64))
    exact = [np.rint(x).sum() for x in (wide * wide * 1e3, wide * 5.0, wide * 1e5)]
    return np.array_equal(symbols, expected) and np.array_equal(sums[4096:], exact)
