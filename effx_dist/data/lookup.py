"""Values that other ranks hold, by number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.data.slots import Owners
from effx_dist.shard import Group


def look_up(
    held: npt.NDArray[np.float32], holders: Owners, wanted: npt.NDArray[np.int64], group: Group
) -> npt.NDArray[np.float32]:
    """The values with the numbers ``wanted``, of which every rank holds its range. Two all-to-alls.

    Args:
        held: This rank's range of the values.
        holders: Which rank holds which range.
        wanted: Numbers in [0, ``holders.num_samples``).
        group: The ranks.
    """
    holder = holders.of(wanted)
    order = np.argsort(holder, kind="stable")
    counts = np.bincount(holder, minlength=group.size).tolist()
    asked = group.all_to_all(list(torch.from_numpy(wanted[order]).split(counts)))
    start = holders.start(group.rank)
    answers = group.all_to_all([torch.from_numpy(held[rows.numpy() - start]) for rows in asked])
    found = np.empty(len(wanted), dtype=np.float32)
    found[order] = torch.cat(answers).numpy()
    return found
