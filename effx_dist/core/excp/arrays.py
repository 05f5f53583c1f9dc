"""What a quantiser reads and writes: one piece of a whole tensor, as arrays or as symbols."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from effx_dist.core.fixed_point import BLOCK_VALUES
from effx_dist.native import kernels as native

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
Bools = npt.NDArray[np.bool_]

TINY = np.float32(np.finfo(np.float32).tiny)
LARGEST = np.float32(np.finfo(np.float32).max)


def _check_flat(name: str, array: npt.NDArray[np.generic], dtype: type, length: int) -> None:
    if array.dtype != dtype or array.ndim != 1 or array.size != length:
        raise ValueError(
            f"{name}: {array.dtype} of shape {array.shape}, must be "
            f"{np.dtype(dtype)} of shape ({length},); flatten and cast it first"
        )


@dataclass(frozen=True, eq=False)
class JointArrays:
    """One piece (or block of a piece) of a parameter tensor and its moments.

    All arrays are flat float32 of one length, which may be 0.
    """

    r: F32
    """Residual: weight minus reference weight."""
    m: F32 | None = None
    """exp_avg, or None where the optimizer keeps none."""
    v: F32 | None = None
    """exp_avg_sq, or None (Lion). Never present without m."""

    def __post_init__(self) -> None:
        _check_flat("r", self.r, np.float32, self.r.size)
        if self.m is not None:
            _check_flat("m", self.m, np.float32, self.r.size)
        if self.v is not None:
            _check_flat("v", self.v, np.float32, self.r.size)
            if self.m is None:
                raise ValueError("v: given without m; store such a state losslessly")

    def blocks(self) -> Iterator[JointArrays]:
        """Consecutive views of at most BLOCK_VALUES values."""
        for cut in block_slices(self.r.size):
            yield JointArrays(
                np.ascontiguousarray(self.r[cut]),
                None if self.m is None else np.ascontiguousarray(self.m[cut]),
                None if self.v is None else np.ascontiguousarray(self.v[cut]),
            )


@dataclass(frozen=True, eq=False)
class JointSymbols:
    """The quantised form of a JointArrays: small integers, and the few values kept exactly."""

    w: U8
    """Weight residual symbols [n]; 0 decodes to 0."""
    escapes: F32
    """Residuals kept exactly, in flat order: one for each escape symbol in w."""
    m: U8 | None = None
    """exp_avg symbols [n]; 0 = pruned."""
    v: U8 | None = None
    """exp_avg_sq symbols [n]; 0 exactly where m is 0."""

    def __post_init__(self) -> None:
        _check_flat("w", self.w, np.uint8, self.w.size)
        _check_flat("escapes", self.escapes, np.float32, self.escapes.size)
        if self.m is not None:
            _check_flat("m", self.m, np.uint8, self.w.size)
        if self.v is not None:
            _check_flat("v", self.v, np.uint8, self.w.size)


def block_slices(length: int) -> Iterator[slice]:
    """Slices of at most BLOCK_VALUES that cover range(length) in order."""
    for start in range(0, length, BLOCK_VALUES):
        yield slice(start, min(start + BLOCK_VALUES, length))


def magnitude_bits(values: F32) -> U32:
    """Bit patterns of |values|: they order as the magnitudes do, and are a piecewise-linear log2.

    Bits / 2^23 - 127 is log2 to within 0.09 for normal numbers, exact at powers of two; inside one
    octave it is linear. Integer arithmetic on it needs no libm, so it gives the same on every CPU.
    """
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


def from_bits(bits: int) -> np.float32:
    """The float32 with this bit pattern; undoes magnitude_bits for one value >= 0."""
    return np.uint32(bits).view(np.float32)


def take_table(table: F32, symbols: U8) -> F32:
    """table[symbols]; the caller has checked that every symbol is in the table."""
    if (compiled := native.kernels()) is not None:
        return compiled.take_table(table, np.ascontiguousarray(symbols))
    out = np.empty(symbols.size, dtype=np.float32)
    for cut in block_slices(symbols.size):
        # mode="clip" writes straight into out; "raise" would go through a second buffer.
        np.take(table, symbols[cut], out=out[cut], mode="clip")
    return out


def largest_symbol(symbols: U8) -> int:
    """The largest symbol, or 0 for none."""
    return int(symbols.max()) if symbols.size else 0
