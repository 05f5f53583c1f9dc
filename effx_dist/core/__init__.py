"""Pure functions of tensors: no ranks, no files, no clock, no global random state."""
