"""Values from the host on a device, without waiting for it."""

from __future__ import annotations

import torch


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on ``device``, without waiting for the device. Also while a CUDA graph is
    captured."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device, non_blocking=True)
    if not is_capturing(device):
        return values.pin_memory().to(device, non_blocking=True)
    # Not through host memory, which a graph would read again at each replay, when it may be gone or
    # used for something else. A kernel's arguments become part of the graph.
    filled = torch.zeros_like(values, device=device)
    torch._foreach_add_(list(filled.view(-1).unbind()), values.reshape(-1).tolist())
    return filled


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
