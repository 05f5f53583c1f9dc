"""Work that ranks share: which of them does which part, and what the first one decides for all."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from effx_dist.shard import Group

T = TypeVar("T")


def dealt_out(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """By rank, which of the parts of these sizes (bytes) it does: indices in rising order.

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


def on_all(group: Group, body: Callable[[], T]) -> T:
    """:meth:`Group.everywhere`; what fails where nobody else waits is raised as it is."""
    return group.everywhere(body, keep_own_error=group.size == 1)


def on_first(group: Group, body: Callable[[], T]) -> T | None:
    """Run ``body`` on rank 0 alone; its result there, None elsewhere. All ranks get an error where it
    fails. One small gather."""
    return on_all(group, lambda: body() if group.rank == 0 else None)


def from_first(group: Group, body: Callable[[], T]) -> T:
    """Run ``body`` on rank 0 alone; its result on all ranks, or an error on all where it fails. One small
    gather and one broadcast."""
    return cast(T, group.broadcast_object(on_first(group, body)))
