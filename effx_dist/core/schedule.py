"""Learning-rate factor as a function of data progress, since pruning changes the number of steps in an epoch."""

from __future__ import annotations

import math


def warmup_cosine(
    progress: float, total_epochs: float, warmup_epochs: float = 0.0, min_ratio: float = 0.1
) -> float:
    """Linear from 0 to 1 over ``warmup_epochs``, then a half cosine down to ``min_ratio`` at ``total_epochs``.

    Args:
        progress: Data consumed so far, in epochs (epoch + fraction), at least 0. Beyond ``total_epochs`` the factor
            stays ``min_ratio``.
        total_epochs: Length of the run, in epochs, above ``warmup_epochs``.
        warmup_epochs: Length of the warm-up, in epochs; 0 for none.
        min_ratio: Factor at the end, in [0, 1].
    """
    if progress < warmup_epochs:
        return progress / warmup_epochs
    fraction = min(1.0, (progress - warmup_epochs) / (total_epochs - warmup_epochs))
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * fraction))
