"""Implementations of the cautious step: the same two walks, for different devices."""

from effx_dist.optim.kernels.choice import IMPLEMENTATIONS, Implementation, walks_class
from effx_dist.optim.kernels.eager import EagerWalks
from effx_dist.optim.kernels.walks import NUM_COLUMNS, Column, Item, Walks, working_dtype

__all__ = [
    "IMPLEMENTATIONS",
    "NUM_COLUMNS",
    "Column",
    "EagerWalks",
    "Implementation",
    "Item",
    "Walks",
    "walks_class",
    "working_dtype",
]
