"""The training-safe copy: live pieces into host buffers that are reused from save to save."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effx_dist.checkpoint.fragment import Fragment
from effx_dist.shard import Box, LocalRows

Key = tuple[str, tuple[int, ...]]


class Staging:
    """Copies fragments so that later training steps cannot change what is being saved.

    Buffers are pinned where the source is on an accelerator, and shared between processes where
    ``shared``.
    """

    def __init__(self, shared: bool = False) -> None:
        self._shared = shared
        self._buffers: dict[Key, torch.Tensor] = {}

    def copy(self, leaves: Mapping[str, torch.Tensor | LocalRows]) -> dict[str, Fragment]:
        """Fragments of all leaves in host memory. Waits for the copies. No communication is
        performed."""
        staged = {}
        devices = set()
        for name, leaf in leaves.items():
            live = Fragment.of(name, leaf)
            parts = []
            for box, part in live.parts:
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
        pinned = part.device.type == "cuda" and not self._shared
        made = torch.empty(box.sizes, dtype=part.dtype, pin_memory=pinned)
        self._buffers[key] = made.share_memory_() if self._shared else made
        return self._buffers[key]
