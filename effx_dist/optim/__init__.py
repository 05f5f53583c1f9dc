"""Technique 2: cautious optimizers that do the same on a sharded model as on one device."""

from effx_dist.optim.adamw import CautiousAdamW
from effx_dist.optim.lion import CautiousLion
from effx_dist.optim.sgd import CautiousSGD
from effx_dist.optim.wrap import CautiousWrapper, cautious

__all__ = ["CautiousAdamW", "CautiousLion", "CautiousSGD", "CautiousWrapper", "cautious"]
