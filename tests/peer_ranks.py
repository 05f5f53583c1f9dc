"""Ranks as threads on a grid of data-, context- and model-parallel groups, as engines with all of them lay out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from effx_dist.data.peers import Peers
from effx_dist.shard import Group
from tests.thread_ranks import ThreadGroup, run_ranks

T = TypeVar("T")
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Grid:
    """Sizes; the model-parallel ranks are ``tp`` fastest, then ``pp``."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1

    @property
    def size(self) -> int:
        return self.dp * self.tp * self.pp * self.cp


@dataclass(frozen=True)
class Place:
    """One rank of a grid."""

    data: Group
    peers: Peers
    rank: int


def run_grid(grid: Grid, body: Callable[[Place], T]) -> list[list[T]]:
    """Run ``body`` on every rank; its results by peer (the reporter's first) and data-parallel rank."""
    groups: dict[Hashable, tuple[list[Any], threading.Barrier]] = {}
    num_model = grid.tp * grid.pp

    def group_of(name: Hashable, rank: int, size: int) -> Group:
        slots, barrier = groups[name]
        assert len(slots) == size
        return ThreadGroup(rank, slots, barrier)

    def make(name: Hashable, size: int) -> None:
        groups[name] = ([None] * size, threading.Barrier(size, timeout=TIMEOUT_S))

    for d in range(grid.dp):
        for c in range(grid.cp):
            make(("model", d, c), num_model)
    for m in range(num_model):
        for d in range(grid.dp):
            make(("context", d, m), grid.cp)
        for c in range(grid.cp):
            make(("data", c, m), grid.dp)

    def run(world: Group) -> T:
        rest, m = divmod(world.rank, num_model)
        d, c = divmod(rest, grid.cp)
        has_losses = m // grid.tp == grid.pp - 1
        peers = Peers(
            (group_of(("model", d, c), m, num_model), group_of(("context", d, m), c, grid.cp)),
            is_reporter=has_losses and m % grid.tp == 0 and c == 0,
            has_losses=has_losses,
        )
        return body(Place(group_of(("data", c, m), d, grid.dp), peers, world.rank))

    results = run_ranks(grid.size, run)
    num_peers = num_model * grid.cp
    by_peer = [results[peer::num_peers] for peer in range(num_peers)]
    reporter = (grid.pp - 1) * grid.tp
    return [by_peer[reporter], *by_peer[:reporter], *by_peer[reporter + 1 :]]
