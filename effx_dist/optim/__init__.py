"""Technique 2: cautious optimizers that do the same on a sharded model as on one device."""

from effx_dist.former_paths import keep_former_paths
from effx_dist.optim import drawn_layouts
from effx_dist.optim.adamw import CautiousAdamW
from effx_dist.optim.lion import CautiousLion
from effx_dist.optim.sgd import CautiousSGD
from effx_dist.optim.wrap import CautiousWrapper, cautious

keep_former_paths(__name__, layouts=drawn_layouts)

__all__ = ["CautiousAdamW", "CautiousLion", "CautiousSGD", "CautiousWrapper", "cautious"]
