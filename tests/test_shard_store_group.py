"""StoreGroup: like the other groups, and it names who failed, in bounded time, and meets again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from effx_dist.errors import RankFailedError
from effx_dist.shard import Group, StoreGroup, TorchGroup, meet
from tests.conformance import group as conformance
from tests.processes import stop
from tests.ranks import spawn
from tests.thread_ranks import run_ranks

T = TypeVar("T")
LONG, SHORT = timedelta(seconds=60), timedelta(seconds=0.3)
SERVER = """
import sys
import torch.distributed as dist
store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
sys.stdin.read()
"""


def run_over(
    store: dist.Store, size: int, body: Callable[[StoreGroup], T], timeout: timedelta = LONG
) -> list[T]:
    """``body(group)`` in ``size`` threads over one store; results by rank."""

    def on_rank(thread: Group) -> T:
        with closing(StoreGroup(lambda: store, thread.rank, size, timeout)) as group:
            return body(group)

    return run_ranks(size, on_rank)


def failures_of(body: Callable[[], object]) -> dict[int, str]:
    with pytest.raises(RankFailedError) as caught:
        body()
    return caught.value.failures


def barrier_of_session(group: Group, number: int) -> None:
    with group.session(number):
        group.barrier()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_it_conforms_over_a_store_of_threads(size: int) -> None:
    run_over(dist.HashStore(), size, conformance.check)


def test_sessions_of_all_sizes_leave_no_keys_behind() -> None:
    """What is there after two sessions is there after two hundred, also if half of them failed."""
    store, counts = dist.HashStore(), []

    def body(group: StoreGroup) -> None:
        for number in range(200):
            try:
                with group.session(number):
                    group.all_reduce(torch.arange(5))
                    group.barrier()
                    if number % 2 and group.rank == 1:
                        raise ValueError("gives up")
                    group.all_gather_object("x" * 10)
            except (RankFailedError, ValueError):
                assert number % 2
            if group.rank == 0:
                counts.append(store.num_keys())

    run_over(store, 3, body)
    assert max(counts) <= max(counts[:4]) + 6  # a turn's keys of ranks that are ahead or behind


def test_large_objects_travel_compressed_and_arrive_whole() -> None:
    store, size = dist.HashStore(), 2
    value = [f"model.layers.{i}.weight" for i in range(20_000)]

    def body(group: StoreGroup) -> None:
        assert group.all_gather_object(value) == [value] * size
        if group.rank == 0:
            stored = [len(store.get(f"0/1/{rank}")) for rank in range(size)]
            assert max(stored) < len(str(value)) / 3
        group.barrier()

    run_over(store, size, body)


class TestAfterAFailure:
    def test_a_rank_that_does_not_come_is_named_by_all(self) -> None:
        def body(group: StoreGroup) -> dict[int, str]:
            if group.rank == 2:
                return {}
            return failures_of(lambda: barrier_of_session(group, 1))

        named = {2: "did not answer within 0.3 s"}
        assert run_over(dist.HashStore(), 4, body, SHORT) == [named, named, {}, named]

    @pytest.mark.parametrize("absent", [0, 2])
    def test_so_it_is_where_rank_0_reduces(self, absent: int) -> None:
        def body(group: StoreGroup) -> dict[int, str]:
            if group.rank == absent:
                return {}
            return failures_of(lambda: group.all_reduce(torch.ones(3)))

        found = run_over(dist.HashStore(), 3, body, SHORT)
        named = {absent: "did not answer within 0.3 s"}
        assert found == [{} if rank == absent else named for rank in range(3)]

    def test_an_exception_on_one_rank_releases_the_others_at_once(self) -> None:
        """The timeout is a minute; run_ranks would not return before it."""
        seen: dict[int, dict[int, str]] = {}

        def body(group: StoreGroup) -> None:
            try:
                with group.session(5):
                    group.barrier()
                    if group.rank == 1:
                        raise KeyboardInterrupt("by hand")
                    group.barrier()
            except KeyboardInterrupt:
                assert group.rank == 1
            except RankFailedError as error:
                seen[group.rank] = error.failures

        run_over(dist.HashStore(), 3, body)
        told = {1: "KeyboardInterrupt: by hand"}
        assert seen == {0: told, 2: told}

    def test_the_next_session_works_and_a_late_rank_joins_it_in_step(self) -> None:
        """Rank 1 comes to two sessions that the others have given up, and to the third in time."""
        others_gave_up = threading.Barrier(3)

        def body(group: StoreGroup) -> list[int]:
            for number in (1, 2):
                if group.rank == 1:
                    others_gave_up.wait(60)
                assert list(failures_of(partial(barrier_of_session, group, number))) == [1]
                if group.rank != 1:
                    others_gave_up.wait(60)
            late = StoreGroup(group._connect, group.rank, group.size, LONG)
            with closing(late), late.session(3):
                late.barrier()
                return late.all_gather_object(group.rank)

        assert run_over(dist.HashStore(), 3, body, SHORT) == [[0, 1, 2]] * 3

    def test_a_rank_that_was_given_up_by_somebody_else(self) -> None:
        """A parent speaks for its dead child, under the child's rank."""

        def body(group: StoreGroup) -> dict[int, str]:
            if group.rank == 1:
                group.give_up({1: "its saving process ended"}, session=7)
                return {}
            return failures_of(lambda: barrier_of_session(group, 7))

        assert run_over(dist.HashStore(), 2, body)[0] == {1: "its saving process ended"}


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen[str], Callable[[], dist.Store]]]:
    """A store in a process of its own, and what makes clients of it."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        try:
            yield process, partial(dist.TCPStore, "localhost", port, timeout=LONG)
        finally:
            process.kill()


class TestServedStore:
    def test_it_conforms(self) -> None:
        with served() as (_, connect):

            def on_rank(thread: Group) -> None:
                with closing(StoreGroup(connect, thread.rank, 3, LONG)) as group:
                    conformance.check(group)

            run_ranks(3, on_rank)

    def test_a_killed_store_ends_every_wait(self) -> None:
        with served() as (process, connect):
            group = StoreGroup(connect, 0, 2, LONG)
            group.give_up({}, session=99)  # connected
            killer = threading.Thread(target=process.kill)
            killer.start()
            failures = failures_of(group.barrier)
            killer.join()
            group.close()
        assert list(failures) == [0]
        assert "its store is gone" in failures[0]

    def test_a_frozen_store_ends_every_wait_and_is_used_again_when_it_is_back(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A client of a server that does not answer never returns from its call."""
        monkeypatch.setattr("effx_dist.shard.store_group.GRACE_S", 0.3)
        with served() as (process, connect):
            groups = [StoreGroup(connect, rank, 2, SHORT) for rank in range(2)]

            def talk(thread: Group) -> list[int]:
                group = groups[thread.rank]
                with group.session(number):
                    return group.all_gather_object(group.rank)

            number = 1
            assert run_ranks(2, talk) == [[0, 1]] * 2
            number = 2
            stop(process.pid)
            with pytest.raises(RankFailedError, match="rank 0: its store does not answer"):
                run_ranks(2, talk)
            os.kill(process.pid, signal.SIGCONT)
            for group in groups:
                group._timeout_s = LONG.total_seconds()  # a new client has to connect
            number = 3
            assert run_ranks(2, talk) == [[0, 1]] * 2
            for group in groups:
                group.close()


def _over_tcp() -> None:
    world = TorchGroup()
    server, rendezvous = meet(world, LONG)
    assert (server is not None) == (world.rank == 0)
    with closing(rendezvous.join()) as group:
        conformance.check(group)
        with group.session(10):
            assert group.all_gather_object(group.rank) == list(range(world.size))


@pytest.mark.ranks
def test_ranks_of_torch_distributed_meet_beside_it(tmp_path: Path) -> None:
    spawn(2, _over_tcp, tmp_path)
