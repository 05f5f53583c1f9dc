"""Random numbers that are a function of (key, counter), so that every rank draws the same ones in any order.

The generator is splitmix64 (Steele, Lea, Flood 2014, with Stafford's variant 13 finaliser) read at any place of its
sequence: ``bits(key, i) = mix(key + i * GOLDEN)``. Keys are themselves mixed from (seed, epoch, purpose), so that
neighbouring seeds and epochs give unrelated sequences. There is no state, and no global generator is touched.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def stream_key(*parts: int) -> int:
    """A 64-bit key from integers such as (seed, epoch, purpose); the order of the parts counts."""
    key = 0
    for part in parts:
        key = _mix_int((key ^ _mix_int((part + _GOLDEN) & _MASK)) + _GOLDEN & _MASK)
    return key


def random_bits(key: int, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """64 random bits for each counter (at least 0), as uint64 of the counters' shape."""
    bits = counters.astype(np.uint64)
    bits *= np.uint64(_GOLDEN)
    bits += np.uint64(key)
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(_MULTIPLIER_1)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(_MULTIPLIER_2)
    bits ^= bits >> np.uint64(31)
    return bits


def uniform(key: int, counters: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each counter: a multiple of 2**-53, float64."""
    bits = random_bits(key, counters)
    bits >>= np.uint64(11)
    numbers = bits.astype(np.float64)
    numbers *= 2.0**-53
    return numbers


def _mix_int(value: int) -> int:
    """The finaliser of :func:`random_bits`, for one Python integer below 2**64."""
    value = ((value ^ (value >> 30)) * _MULTIPLIER_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLIER_2) & _MASK
    return value ^ (value >> 31)
