"""Helpers of the test_native files: a computation by the compiled code and by numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import pytest

from effx_dist.native import kernels as excp

T = TypeVar("T")
needs_compiled = pytest.mark.skipif(excp.kernels() is None, reason="no C++ compiler")

TINY = float(np.finfo(np.float32).tiny)
FINITE = [
    *(0.0, -0.0, 1e-45, -1e-45, TINY, -TINY, TINY / 3, 1.0, -1.0, 0.6, 1.6, 15.6, -15.6, 16.0, 1e3),
    *(1e-3, -1e-3, 3e38, -3e38, 1e-30, float(np.nextafter(np.float32(0.6), np.float32(0)))),
]
HOSTILE = [*FINITE, float("nan"), float("inf"), -float("inf")]
LENGTHS = [0, 1, 2, 7, 8, 9, 63, 64, 65, 127, 1000, 4095, 4096, 4097, 9001]


@contextmanager
def numpy_only() -> Iterator[None]:
    """As on a machine without a compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(excp, "kernels", lambda: None)
        yield


def by_both(compute: Callable[[], T]) -> tuple[T | str, T | str]:
    """What the compiled form gives and what numpy gives; "refused" for a ValueError."""

    def attempt() -> T | str:
        try:
            return compute()
        except ValueError:
            return "refused"

    assert excp.kernels() is not None
    compiled = attempt()
    with numpy_only():
        return compiled, attempt()


def hostile_values(seed: int, length: int, pool: list[float]) -> np.ndarray:
    """float32, half of them drawn from the pool, half Laplacian."""
    rng = np.random.default_rng(seed)
    drawn = rng.laplace(size=length).astype(np.float32)
    return np.where(rng.random(length) < 0.5, rng.choice(pool, size=length), drawn).astype(
        np.float32
    )
