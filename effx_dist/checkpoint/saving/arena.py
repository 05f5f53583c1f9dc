"""Tensors from one process to another, through one piece of shared memory.

torch hands over a descriptor for every tensor; a process may hold 1,024 at the usual limit, and a
model's state has more tensors than that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

ALIGNMENT = 64
"""Bytes to which each tensor's start is rounded up: a cache line."""

Spec = tuple[int, tuple[int, ...], torch.dtype]
"""Of a tensor in an arena: its first byte, its shape and its dtype."""


def rounded(num_bytes: int) -> int:
    """``num_bytes``, rounded up to ALIGNMENT."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def shared_bytes(num_bytes: int) -> torch.Tensor:
    """New memory (uint8) that other processes of this machine can map: one descriptor."""
    memory = torch.empty(max(num_bytes, 1), dtype=torch.uint8)
    memory.share_memory_()
    return memory


def view_at(memory: torch.Tensor, spec: Spec) -> torch.Tensor:
    """A contiguous tensor in ``memory``, which it shares."""
    start, sizes, dtype = spec
    end = start + math.prod(sizes) * dtype.itemsize
    return memory[start:end].view(dtype).view(sizes)


@dataclass(frozen=True)
class Bundle:
    """Tensors in one shared memory, for another process of the same job."""

    memory: torch.Tensor
    specs: list[Spec]

    @classmethod
    def of(cls, tensors: Sequence[torch.Tensor]) -> Bundle:
        """Contiguous host tensors that lie in one shared memory already, as staged ones do, stay where
        they are; else all are copied into a new one."""
        memory = _common_memory(tensors)
        if memory is not None:
            starts = [int(tensor.storage_offset()) * tensor.element_size() for tensor in tensors]
        else:
            sizes = [rounded(tensor.nbytes) for tensor in tensors]
            starts = [0, *accumulate(sizes)]
            memory = shared_bytes(starts.pop())
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        specs = [(start, *shape) for start, shape in zip(starts, shapes, strict=True)]
        made = cls(memory, specs)
        for tensor, kept in zip(tensors, made.tensors(), strict=True):
            if kept.data_ptr() != tensor.data_ptr():
                kept.copy_(tensor)
        return made

    def tensors(self) -> list[torch.Tensor]:
        """The tensors, which share the memory."""
        return [view_at(self.memory, spec) for spec in self.specs]


def _common_memory(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The one shared storage in which all tensors lie contiguously, as bytes."""
    if not tensors:
        return None
    storage = tensors[0].untyped_storage()
    is_common = storage.is_shared() and all(
        t.is_contiguous() and t.untyped_storage().data_ptr() == storage.data_ptr() for t in tensors
    )
    return torch.empty(0, dtype=torch.uint8).set_(storage) if is_common else None
