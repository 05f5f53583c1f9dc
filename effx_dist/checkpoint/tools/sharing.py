"""Work that ranks share: which of them does what."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def dealt_out(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Deal work of these sizes (bytes) out to the ranks: by rank, the indices of what it does, in rising order.

    The largest goes first, each to the rank that has the least so far; a function of its arguments
    alone, so all ranks agree. No communication is performed.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0, rank) for rank in range(num_ranks)]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], rank))
        shares[rank].append(index)
    return [sorted(share) for share in shares]
