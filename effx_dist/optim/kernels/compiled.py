"""The step in C++ for the CPU (cautious.cpp): vectorised, on all of torch's threads, in one call per
walk. It gives the bits of the eager form.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effx_dist.core.cautious import MIN_FRACTION
from effx_dist.core.update_rules import AdamW, UpdateRule
from effx_dist.native.library import BuildError, Library, Source, load
from effx_dist.optim.kernels.eager import EagerKernels
from effx_dist.optim.kernels.interface import Item, Kernels, described, readable_grad, working_dtype

_RULES = {"adamw": 0, "lion": 1, "sgd": 2, "nesterov": 3}
_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
SOURCE = Source((Path(__file__).with_name("cautious.cpp"),))


@functools.cache
def library() -> Library | None:
    """The loaded library, built if need be. None, with one warning, where it cannot be had."""
    try:
        return load(SOURCE)
    except BuildError as error:
        warnings.warn(
            f"the compiled cautious step is not available ({error}); the eager one is used: the same "
            "values, many times slower. Install a C++ compiler with OpenMP (cautious.cpp is "
            "compiled once, within seconds), or choose implementation='eager' to say so.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class CompiledKernels(Kernels):
    """Steps all items in one call, so that hundreds of small tensors cost no more than one large one."""

    def __init__(self, rule: UpdateRule, items: Sequence[Item], rows: torch.Tensor) -> None:
        loaded = library()
        assert loaded is not None, "kernels_class chooses this form only where the library is there"
        self._library = loaded
        self._rule = _RULES[rule.name]
        self._rows = rows.contiguous()
        self._grads = [readable_grad(item) for item in items]  # kept alive with their addresses
        self._items = items
        described = [_describe(item, grad) for item, grad in zip(items, self._grads, strict=True)]
        self._table = np.array(described, dtype=np.int64)

    def count_into(self, counts: torch.Tensor) -> None:
        self._call(self._library.effx_cautious_count, _address(counts))

    def update(self, scales: torch.Tensor, skip: torch.Tensor | None) -> None:
        if skip is not None and bool(skip):
            return
        scales = scales.contiguous()
        self._call(self._library.effx_cautious_update, _address(scales))
        self._note_writes()

    def step_wholes(self, counts: torch.Tensor, numels: torch.Tensor) -> None:
        """See :meth:`Kernels.step_wholes`. Goes whole by whole, so that the second walk finds in the cache
        what the first has read."""
        min_fraction = ctypes.c_double(MIN_FRACTION)
        self._call(self._library.effx_cautious_step, _address(counts), min_fraction)
        self._note_writes()

    def _call(self, function: Any, *per_slot: Any) -> None:
        function(
            ctypes.c_int64(self._rule),
            ctypes.c_void_p(self._table.ctypes.data),
            ctypes.c_int64(len(self._table)),
            _address(self._rows),
            *per_slot,
            ctypes.c_int64(torch.get_num_threads()),
        )

    def _note_writes(self) -> None:
        """Autograd does not see the library write."""
        torch.autograd.graph.increment_version([item.param for item in self._items])


def _address(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _describe(item: Item, grad: torch.Tensor) -> list[int]:
    """A row of the table, as struct Piece of cautious.cpp has it."""
    return [
        *described(item, grad),
        _TYPES[item.param.dtype],
        _TYPES[grad.dtype],
        item.decays_cautiously,
    ]


@functools.cache
def is_available() -> bool:
    """Whether the library is there and gives what the eager form does, bit for bit.

    Compilers have been known to relax floating point unasked; a wrong step is worse than a slow one.
    """
    if library() is None:
        return False
    if all(_agrees_with_eager(dtype) for dtype in _TYPES):
        return True
    warnings.warn(
        "the compiled cautious step does not give the bits of the eager one on this machine (a "
        "compiler that relaxes floating-point arithmetic?); the eager one is used: right, but slower",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _agrees_with_eager(dtype: torch.dtype) -> bool:
    """One AdamW step of a few elements by both forms, with a vector's body and its tail."""
    rule = AdamW()
    settings = {"betas": (0.9, 0.999), "eps": 1e-8}
    row = [1e-2, 0.999, 1.0, *rule.coefficients(settings, 3.0)]
    rows = torch.tensor([row], dtype=torch.float64)
    # An irrational stride scatters values and signs; no random state is touched.
    spread = torch.arange(1, 4 * 71 + 1, dtype=torch.float64).mul(2**0.5).frac().sub(0.5)
    param, grad, first, second = spread.chunk(4)
    results = []
    for form in (CompiledKernels, EagerKernels):
        state = (first.clone(), second.square())
        moments = tuple(moment.to(working_dtype(param.to(dtype))) for moment in state)
        item = Item(param.to(dtype), grad.to(dtype), moments, 0, 0, decays_cautiously=True)
        kernels: Kernels = form(rule, [item], rows)
        counts = torch.zeros(1, dtype=torch.int64)
        kernels.count_into(counts)
        kernels.update(torch.full((1,), 1.5, dtype=torch.float64), None)
        results.append((counts, item.param, *moments))
    return all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
