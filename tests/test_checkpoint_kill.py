"""Kill -9 at any moment of training or saving: the newest checkpoint is whole and is resumed from."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.storage.steps import LATEST, committed_steps, step_of, unfinished_steps
from tests import kill_target
from tests.chain_runs import same_bits
from tests.kill_target import Job, Training

pytestmark = pytest.mark.ranks
TIMEOUT_S = 60.0


@dataclass
class Ranks:
    """The processes of one start, all in one process group."""

    processes: list[ForkServerProcess] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    @property
    def first(self) -> Connection:
        """Rank 0's pipe."""
        return self.pipes[0]

    def start(self, job: Job) -> None:
        # forked from a server that has imported torch: real processes, without seconds of imports
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch._dynamo", "torch.distributed.fsdp", "tests.kill_target"]
        )
        for rank in range(job.world):
            ours, theirs = context.Pipe()
            group = self.processes[0].pid if rank else None
            process = context.Process(target=kill_target.start, args=(job, rank, theirs, group))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
            assert receive(ours) == "started"

    def kill(self, delay_s: float, only_rank: int | None = None) -> None:
        """SIGKILL to all of them, or to one; ``delay_s`` is when, not a wait for anything."""
        self.processes[0].join(delay_s)
        assert all(process.is_alive() for process in self.processes), "ended before it was killed"
        first = self.processes[0].pid
        assert first is not None
        if only_rank is None:
            os.killpg(first, signal.SIGKILL)
        else:
            self.processes[only_rank].kill()

    def close(self) -> list[int | None]:
        """Wait for the end of all; their exit codes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(TIMEOUT_S)
        return [process.exitcode for process in self.processes]


def receive(pipe: Connection) -> object:
    assert pipe.poll(TIMEOUT_S), "the run makes no progress"
    return pipe.recv()


@contextmanager
def running(job: Job) -> Iterator[Ranks]:
    ranks = Ranks()
    try:
        ranks.start(job)
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
        ranks.close()


class Campaign:
    """Kills one run again and again, in one folder."""

    def __init__(self, folder: Path, seed: int, profile: str = "lossless") -> None:
        self.folder, self.profile = folder, profile
        self.random = random.Random(seed)
        self.oracle = Training(1)
        self.num_starts = 0
        self.num_cut_off = 0
        self.newest = 0

    def job(self, world: int = 1, async_mode: str = "thread") -> Job:
        self.num_starts += 1
        store = self.folder.with_name(f"store-{self.num_starts}")
        return Job(self.folder, store, world, self.profile, async_mode)

    def kill(
        self, world: int = 1, only_rank: int | None = None, async_mode: str = "thread"
    ) -> None:
        """Start, let it resume and commit something new, kill it, and look at what it left."""
        with running(self.job(world, async_mode)) as ranks:
            while self.committed()[-1] <= self.newest:
                receive(ranks.first)
            ranks.kill(self.random.uniform(0, 0.2), only_rank)
            codes = ranks.close()
        assert codes.count(-signal.SIGKILL) == (world if only_rank is None else 1)
        assert 0 not in codes, "a rank went on without the one that died"
        self.check()

    def committed(self) -> list[int]:
        return [0, *committed_steps(self.folder)]

    def check(self) -> None:
        """Every committed byte is right, and the newest step is the state of a run that never died."""
        assert not verify_folder(self.folder).findings
        self.num_cut_off += len(unfinished_steps(self.folder))
        newest = self.committed()[-1]
        assert newest > self.newest
        self.newest = newest
        assert step_of((self.folder / LATEST).read_text().strip()) in self.committed()
        job = replace(self.job(), async_mode="sync")
        with Checkpointer(self.folder, job.config) as checkpointer:
            loaded = Training(1)
            loaded.load(checkpointer, self.profile)
        assert loaded.step == newest
        while self.oracle.step < newest:
            self.oracle.advance()
        if self.profile == "lossless":
            same_bits(loaded.state(), self.oracle.state())

    def finish(self) -> None:
        """The last run is left alone, and leaves nothing half done behind."""
        with running(self.job()) as ranks:
            receive(ranks.first)
            ranks.first.send("stop")
            with suppress(EOFError, ConnectionResetError):
                while True:
                    receive(ranks.first)
            assert ranks.close() == [0]
        self.check()
        assert unfinished_steps(self.folder) == []


def test_two_kills(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path / "run", seed=0)
    campaign.kill()
    campaign.kill(world=2)
    campaign.finish()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("profile", ["lossless", "balanced"])
def test_a_hundred_kills(profile: str, tmp_path: Path) -> None:
    """50 of one process, 40 of two ranks at once, 10 of one rank of two, which takes the other
    along."""
    campaign = Campaign(tmp_path / "run", seed=1, profile=profile)
    for round_ in range(10):
        for _ in range(5):
            campaign.kill()
        for _ in range(4):
            campaign.kill(world=2)
        campaign.kill(world=2, only_rank=round_ % 2)
    campaign.finish()
    assert campaign.num_cut_off > 0, "no kill fell into a save"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_while_a_process_of_its_own_saves(tmp_path: Path) -> None:
    """The saving process is in the same process group and dies with its trainer."""
    campaign = Campaign(tmp_path / "run", seed=2)
    for _ in range(2):
        campaign.kill(async_mode="process")
    campaign.kill(world=2, async_mode="process")
    campaign.finish()
