"""Technique 2: cautious optimisers that do the same on a sharded model as on one device."""

from effx_dist.optim.adamw import CautiousAdamW
from effx_dist.optim.lion import CautiousLion

__all__ = ["CautiousAdamW", "CautiousLion"]
