"""Implementations of the cautious step: the same two walks, for different devices."""

from effx_dist.optim.kernels.eager import EagerKernels
from effx_dist.optim.kernels.interface import NUM_COLUMNS, Column, Item, Kernels, working_dtype
from effx_dist.optim.kernels.selection import IMPLEMENTATIONS, Implementation, kernels_class
