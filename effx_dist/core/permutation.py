"""A keyed permutation of [0, n) that is computed place by place, in O(1) memory, and its inverse.

A Feistel network over the smallest power of two that holds n, on two halves of (nearly) equal width, is a bijection
whatever its round function; walking on from values beyond n until one falls below it (cycle-walking, Black and Rogaway
2002) makes it one of [0, n). Fewer than two steps are needed on average. No table of n entries is ever built, so every
rank can place its own samples without seeing the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from effx_dist.core.counter_random import stream_key

_NUM_ROUNDS = 8
_BLOCK = 1 << 15  # places handled at a time: the work arrays stay in the processor's cache
_MULTIPLIER_1 = np.uint64(0xFF51AFD7ED558CCD)
_MULTIPLIER_2 = np.uint64(0xC4CEB9FE1A85EC53)

_Bits = npt.NDArray[np.uint64]


def permute(places: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """Image of each of ``places``, all in [0, size), under the permutation of [0, size) that ``key`` names."""
    return _by_blocks(places, size, _Network(size, key).forward)


def unpermute(slots: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """The way back: ``unpermute(permute(x, size, key), size, key) == x``."""
    return _by_blocks(slots, size, _Network(size, key).backward)


class _Network:
    """The bijection of [0, 2**bits), the smallest power of two that holds ``size``."""

    def __init__(self, size: int, key: int) -> None:
        bits = (size - 1).bit_length()
        self.low_bits = np.uint64(bits // 2)
        self.high_bits = np.uint64(bits - bits // 2)
        self.low_mask = (np.uint64(1) << self.low_bits) - np.uint64(1)
        self.round_keys = [np.uint64(stream_key(key, number)) for number in range(_NUM_ROUNDS)]

    def forward(self, values: _Bits) -> _Bits:
        return self._run(values, range(_NUM_ROUNDS))

    def backward(self, values: _Bits) -> _Bits:
        return self._run(values, reversed(range(_NUM_ROUNDS)))

    def _run(self, values: _Bits, rounds: Iterable[int]) -> _Bits:
        low, high = values & self.low_mask, values >> self.low_bits
        # a round is its own inverse: it XORs one half with a hash of the other
        for number in rounds:
            if number % 2:
                low ^= _hashed(high, self.round_keys[number], self.low_bits)
            else:
                high ^= _hashed(low, self.round_keys[number], self.high_bits)
        high <<= self.low_bits
        high |= low
        return high


def _hashed(values: _Bits, key: np.uint64, num_bits: np.uint64) -> _Bits:
    """``num_bits`` hashed bits of each value: murmur3's finaliser, keyed, of which the top bits are taken."""
    if not num_bits:
        return np.zeros_like(values)  # a shift by 64 is not defined
    hashed = values ^ key
    hashed *= _MULTIPLIER_1
    hashed ^= hashed >> np.uint64(33)
    hashed *= _MULTIPLIER_2
    hashed >>= np.uint64(64) - num_bits
    return hashed


def _by_blocks(
    values: npt.NDArray[np.int64], size: int, step: Callable[[_Bits], _Bits]
) -> npt.NDArray[np.int64]:
    images = np.empty(len(values), dtype=np.int64)
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK].astype(np.uint64)
        images[start : start + _BLOCK] = _walk(block, np.uint64(size), step)
    return images


def _walk(block: _Bits, size: np.uint64, step: Callable[[_Bits], _Bits]) -> _Bits:
    block = step(block)
    outside = np.flatnonzero(block >= size)
    while len(outside):
        walked = step(block[outside])
        block[outside] = walked
        outside = outside[walked >= size]
    return block
