"""Objects with tensors in them, from one process to another through one piece of shared memory.

torch hands over a descriptor for every tensor; a process may hold 1,024 at the usual limit, and a
model's state has more tensors than that.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
class Parcel:
    """A pickled object without its tensors; those lie in one shared ``memory``."""

    pickled: bytes
    memory: torch.Tensor
    specs: list[Spec]

    def unpack(self) -> Any:
        """The object. Its tensors share the memory."""
        tensors = [view_at(self.memory, spec) for spec in self.specs]
        return _Unpickler(io.BytesIO(self.pickled), tensors).load()


def parcel(value: Any) -> Parcel:
    """Pack an object for another process of the same job.

    Contiguous host tensors that lie in one shared memory already, as staged ones do, stay where they
    are; else all are copied into a new one.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    tensors = pickler.tensors
    memory = _common_memory(tensors)
    if memory is not None:
        specs: list[Spec] = [
            (int(t.storage_offset()) * t.element_size(), tuple(t.shape), t.dtype) for t in tensors
        ]
        return Parcel(buffer.getvalue(), memory, specs)
    specs = []
    end = 0
    for tensor in tensors:
        specs.append((end, tuple(tensor.shape), tensor.dtype))
        end += rounded(tensor.nbytes)
    memory = shared_bytes(end)
    for tensor, spec in zip(tensors, specs, strict=True):
        view_at(memory, spec).copy_(tensor)
    return Parcel(buffer.getvalue(), memory, specs)


def _common_memory(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The one shared storage in which all tensors lie contiguously, as bytes."""
    if not tensors:
        return None
    storage = tensors[0].untyped_storage()
    is_common = storage.is_shared() and all(
        t.is_contiguous() and t.untyped_storage().data_ptr() == storage.data_ptr() for t in tensors
    )
    return torch.empty(0, dtype=torch.uint8).set_(storage) if is_common else None


class _Pickler(pickle.Pickler):
    """Leaves tensors out, and collects them."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, torch.Tensor):
            return None
        self.tensors.append(obj)
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    """Puts them back. What it reads comes from this process's own parent, through a pipe."""

    def __init__(self, file: io.BytesIO, tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: Any) -> Any:
        return self._tensors[pid]
