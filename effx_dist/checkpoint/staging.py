"""The training-safe copy: live pieces into host buffers that are reused from save to save."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

import torch

from effx_dist.checkpoint.fragment import Fragment
from effx_dist.checkpoint.tree import Leaf
from effx_dist.shard import Box

Key = tuple[str, tuple[int, ...]]


SHARED_MEMORY = "/dev/shm"


class Staging:
    """Copies fragments so that later training steps cannot change what is being saved.

    Buffers are pinned where the source is on an accelerator, and shared between processes where
    ``shared``.
    """

    def __init__(self, shared: bool = False) -> None:
        self._shared = shared
        self._buffers: dict[Key, torch.Tensor] = {}

    def copy(self, leaves: Mapping[str, Leaf]) -> dict[str, Fragment]:
        """Fragments of all leaves in host memory. Waits for the copies. No communication is
        performed."""
        staged = {}
        devices = set()
        for name, leaf in leaves.items():
            live = Fragment.of(name, leaf)
            parts = []
            for box, part in live.own_parts:
                buffer = self._buffer((name, box.offsets), box, part)
                buffer.copy_(part, non_blocking=buffer.is_pinned())
                devices.add(part.device)
                parts.append((box, buffer))
            staged[name] = Fragment(live.shape, live.dtype, parts)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        return staged

    def _buffer(self, key: Key, box: Box, part: torch.Tensor) -> torch.Tensor:
        found = self._buffers.get(key)
        if found is not None and tuple(found.shape) == box.sizes and found.dtype == part.dtype:
            return found
        if self._shared:
            _check_room(part.numel() * part.element_size())
        pinned = part.device.type == "cuda" and not self._shared
        made = torch.empty(box.sizes, dtype=part.dtype, pin_memory=pinned)
        self._buffers[key] = made.share_memory_() if self._shared else made
        return self._buffers[key]


def _check_room(num_bytes: int) -> None:
    """Shared memory that is full is not refused: the first write to it ends the process."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    found = os.statvfs(SHARED_MEMORY)
    free = found.f_bavail * found.f_frsize
    if num_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{SHARED_MEMORY}: {free} bytes are free of {num_bytes} that one more tensor needs; enlarge it "
            '(docker run --shm-size), or set effx.excp.async_mode = "thread"',
        )
