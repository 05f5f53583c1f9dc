"""Values to compute with."""

from __future__ import annotations

import torch


def random_values(num: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values over many orders of magnitude, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num, generator=generator, dtype=torch.float64)
    values *= torch.pow(10.0, torch.randint(-6, 3, (num,), generator=generator))
    values[torch.rand(num, generator=generator) < 0.05] = 0
    return values.to(dtype)
