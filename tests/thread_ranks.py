"""Ranks as threads of one process, for tests of what ranks say to each other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from effx_dist.errors import RankFailedError
from effx_dist.shard.group import Group, ReduceOp, T, reduce_tensors


class ThreadGroup(Group):
    """Ranks as threads of one process, for tests of rank logic: start them with
    :func:`run_ranks`."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(slots)
        self._slots = slots
        self._barrier = barrier

    def _exchange(self, value: Any) -> list[Any]:
        try:
            self._slots[self.rank] = value
            self._barrier.wait()
            values = list(self._slots)
            self._barrier.wait()  # nobody overwrites a slot that another rank still reads
        except threading.BrokenBarrierError as error:
            raise RankFailedError({self.rank: "another rank of this group left early"}) from error
        return values

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        values = self._exchange(tensor.clone())
        return tensor.copy_(reduce_tensors(values, op))

    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rows = self._exchange([part.clone() for part in send])
        return [row[self.rank] for row in rows]

    def all_gather_object(self, value: T) -> list[T]:
        return self._exchange(value)


def run_ranks(size: int, body: Callable[[Group], T], timeout_s: float = 60.0) -> list[T]:
    """Run ``body(group)`` in ``size`` threads and return its results by rank.

    The first error of a rank is raised here; the other ranks are released instead of waiting for
    it.
    """
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=timeout_s)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadGroup(rank, slots, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
