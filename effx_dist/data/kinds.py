"""What each of the sampler's states says that it is, so that none is taken for another."""

SAMPLER = "effx_dist.infobatch.sampler"
"""What was weighed; for checkpoints."""
HANDED_OUT = "effx_dist.infobatch.handed_out"
"""What was handed out; of an iterator, for loaders."""
IN_A_LOADER = "effx_dist.infobatch.in_a_loader"
"""What a loader's snapshot says of the sampler itself, beside its iterator's state."""
