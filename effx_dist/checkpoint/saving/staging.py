"""The training-safe copy: live pieces into host buffers that are reused from save to save."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.tree import Leaf
from effx_dist.shard import Box

ALIGNMENT = 64
"""Bytes to which each tensor's start is rounded up: a cache line."""

Spec = tuple[int, tuple[int, ...], torch.dtype]
"""Where a tensor lies in a shared memory: its first byte, its shape and its dtype."""


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


LivePiece = tuple[str, Box, torch.Tensor]
"""Name of a tensor, one box of it, and the live values."""

SHARED_MEMORY = "/dev/shm"


class Staging:
    """Copies fragments so that later training steps cannot change what is being saved.

    Buffers are pinned where the source is on an accelerator; where ``shared``, they lie in one piece of
    memory that a saving process maps, whatever the number of tensors.
    """

    def __init__(self, shared: bool = False) -> None:
        self._shared = shared
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._memory: torch.Tensor | None = None

    def copy(self, leaves: Mapping[str, Leaf]) -> dict[str, Fragment]:
        """Fragments of all leaves in host memory. Waits for the copies. No communication is
        performed."""
        live = {name: Fragment.of(name, leaf) for name, leaf in leaves.items()}
        pieces = [
            (name, box, values) for name, found in live.items() for box, values in found.own_pieces
        ]
        buffers = self._shared_buffers(pieces) if self._shared else self._own_buffers(pieces)
        staged = {name: Fragment(found.shape, found.dtype, []) for name, found in live.items()}
        for (name, box, values), buffer in zip(pieces, buffers, strict=True):
            buffer.copy_(values, non_blocking=buffer.is_pinned())
            staged[name].pieces.append((box, buffer))
        for device in {values.device for _, _, values in pieces}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return staged

    def clear(self) -> None:
        """Let go of all buffers."""
        self._buffers.clear()
        self._memory = None

    def _own_buffers(self, pieces: Sequence[LivePiece]) -> list[torch.Tensor]:
        before, self._buffers = self._buffers, {}
        for name, box, values in pieces:
            key = (name, box.offsets)
            found = before.get(key)
            if found is None or tuple(found.shape) != box.sizes or found.dtype != values.dtype:
                pinned = values.device.type == "cuda"
                found = torch.empty(box.sizes, dtype=values.dtype, pin_memory=pinned)
            self._buffers[key] = found
        return list(self._buffers.values())

    def _shared_buffers(self, pieces: Sequence[LivePiece]) -> list[torch.Tensor]:
        specs, end = [], 0
        for _, box, values in pieces:
            specs.append((end, box.sizes, values.dtype))
            end += rounded(box.numel * values.element_size())
        if self._memory is None or self._memory.numel() < end:
            self._memory = None  # given back before more is taken
            _check_room(end)
            self._memory = shared_bytes(end)
        memory = self._memory
        return [view_at(memory, spec) for spec in specs]


def _check_room(num_bytes: int) -> None:
    """Shared memory that is full is not refused: the first write to it ends the process."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    found = os.statvfs(SHARED_MEMORY)
    free = found.f_bavail * found.f_frsize
    if num_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{SHARED_MEMORY}: {free} bytes are free of {num_bytes} that a save's copy needs; enlarge it "
            '(docker run --shm-size), or set effx.excp.async_mode = "thread"',
        )
