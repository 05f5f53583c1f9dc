"""A hash of a whole tensor that pieces add up to, however the tensor is cut.

fingerprint = sum over elements of mix(position, bit pattern) modulo 2**64, twice with unrelated
mixes. Sums do not depend on the order, so ranks hash what they hold. It finds differences; it is no
protection against somebody who makes them.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from effx_dist.core.counter_random import random_bits, stream_key

_PURPOSE = 0x66707231
_KEYS = tuple(stream_key(_PURPOSE, lane) for lane in range(4))
_MASK = (1 << 64) - 1

Fingerprint = tuple[int, int]


def fingerprint(
    words: npt.NDArray[np.unsignedinteger], positions: npt.NDArray[np.integer]
) -> Fingerprint:
    """The fingerprint of some elements, given their bit patterns and their places in the whole tensor (flat,
    row-major).

    Both 1-D and of one length. No communication is performed.
    """
    places = random_bits(_KEYS[0], positions), random_bits(_KEYS[1], positions)
    patterns = words.astype(np.uint64)
    mixed = (
        random_bits(key, place ^ patterns) for key, place in zip(_KEYS[2:], places, strict=True)
    )
    low, high = (int(lane.sum(dtype=np.uint64)) for lane in mixed)
    return low, high


def add_fingerprints(parts: Iterable[Fingerprint]) -> Fingerprint:
    """The fingerprint of all the elements that the given ones are of."""
    low = high = 0
    for part in parts:
        low, high = (low + part[0]) & _MASK, (high + part[1]) & _MASK
    return low, high


def fingerprint_hex(value: Fingerprint) -> str:
    """32 hexadecimal digits."""
    return f"{value[1]:016x}{value[0]:016x}"
