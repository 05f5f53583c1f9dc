"""The process that saves: it does not outlive its trainer, may die itself, and piles up nothing."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.saving.executor import ProcessExecutor
from effx_dist.errors import RankFailedError
from tests.processes import has_ended, stop, wait_for_unread
from tests.ranks import spawn
from tests.runs import Run, committed, lossless

TRAINER = """
import sys
import torch
from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig

model = torch.nn.Linear(4, 4)
checkpointer = Checkpointer(sys.argv[1], ExcpConfig(profile="lossless", async_mode="process"))
checkpointer.save(1, model)
print(checkpointer._executor._process.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_trainer_takes_its_saving_process_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        child = int(trainer.stdout.readline())
        watched = os.pidfd_open(child)
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    try:
        ended = has_ended(watched)
    finally:
        os.close(watched)
    assert ended, f"process {child} is still there"


def test_it_ends_also_while_it_is_busy(tmp_path: Path) -> None:
    """The watcher does not depend on the loop that answers requests."""
    program = (
        "import os, sys, threading\n"
        "from effx_dist.checkpoint.saving.executor import end_with\n"
        "end_with(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "threading.Event().wait()\n"
    )
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {program!r}])\n"
        "child.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            watched = os.pidfd_open(child)
        except ProcessLookupError:
            pytest.fail("the child ended before its parent")
        process.kill()
    try:
        assert has_ended(watched), f"process {child} is still there"
    finally:
        os.close(watched)


@pytest.fixture(scope="class")
def checkpointer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpointer]:
    """One whose saves run in a process."""
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder, lossless(async_mode="process")) as made:
        yield made


class TestAKilledSavingProcess:
    """What a rank's saves come to whose child is killed, by the kernel when memory is short, say."""

    def test_while_it_is_idle_costs_a_base(self, checkpointer: Checkpointer) -> None:
        run = Run()
        kinds = [checkpointer.save(step, run.model).result.kind for step in (1, 2)]
        child_process(checkpointer).kill()
        child_process(checkpointer).wait()
        kinds += [checkpointer.save(step, run.model).result.kind for step in (3, 4)]
        assert kinds == ["base", "link", "base", "link"]

    def test_during_a_save_fails_that_save_alone(self, checkpointer: Checkpointer) -> None:
        run = Run()
        checkpointer.save(5, run.model)  # so that the child has read all that it was sent before
        stop(child_of(checkpointer))
        pending = checkpointer.async_save(6, run.model)
        kill_when_asked(checkpointer)
        with pytest.raises(RankFailedError, match=r"rank 0: its saving process ended .*code -9"):
            pending.wait()
        assert checkpointer.save(7, run.model).result.kind == "base"
        assert verify_folder(checkpointer.folder).findings == []

    def test_an_error_brings_its_traceback_along(self, checkpointer: Checkpointer) -> None:
        pending = checkpointer.async_save(7, Run().model)
        with pytest.raises(RankFailedError, match="never overwritten") as caught:
            pending.wait()
        [note] = caught.value.__notes__
        assert "claim_step_folder" in note

    def test_after_a_load_the_next_one_knows_what_was_loaded(
        self, checkpointer: Checkpointer
    ) -> None:
        """Newer steps than the loaded one make room, as the process that is gone was told."""
        run = Run()
        checkpointer.load(run.model, step=3)
        child_process(checkpointer).kill()
        child_process(checkpointer).wait()
        checkpointer.save(4, run.model)
        assert committed(checkpointer.folder) == [1, 2, 3, 4]
        assert verify_folder(checkpointer.folder).findings == []


def executor_of(checkpointer: Checkpointer) -> ProcessExecutor:
    executor = checkpointer._executor
    assert isinstance(executor, ProcessExecutor)
    return executor


def child_process(checkpointer: Checkpointer) -> subprocess.Popen[bytes]:
    return executor_of(checkpointer)._process


def child_of(checkpointer: Checkpointer) -> int:
    return child_process(checkpointer).pid


def kill_when_asked(checkpointer: Checkpointer) -> None:
    """The stopped child: killed earlier, it would be replaced before it is asked."""
    wait_for_unread(executor_of(checkpointer)._connection.fileno())
    child_process(checkpointer).kill()


def _one_child_is_killed(folder: Path) -> tuple[str, list[str]]:
    """The other rank is told by name, and not only when the timeout, an hour, is over."""
    run = Run()
    config = lossless(async_mode="process")
    with Checkpointer(folder, config, timeout=timedelta(hours=1)) as checkpointer:
        kinds = [checkpointer.save(1, run.model).result.kind]
        if dist.get_rank() == 1:
            stop(child_of(checkpointer))
        pending = checkpointer.async_save(2, run.model)
        if dist.get_rank() == 1:
            kill_when_asked(checkpointer)
        with pytest.raises(RankFailedError) as caught:
            pending.wait()
        kinds += [checkpointer.save(step, run.model).result.kind for step in (3, 4)]
    return str(caught.value), kinds


@pytest.mark.ranks
def test_one_of_two_children_is_killed(tmp_path: Path) -> None:
    reason = "rank 1 failed (rank 1: its saving process ended (exit code -9))"
    expected = (reason, ["base", "base", "link"])
    assert spawn(2, _one_child_is_killed, tmp_path, tmp_path / "run") == [expected] * 2


def _count(pids: list[int]) -> dict[str, int]:
    """What must not grow with the number of saves, in this process and what these share."""
    shared = os.listdir("/dev/shm")
    return {
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "shared memory": sum(f"_{pid}_" in name for name in shared for pid in pids),
    }


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("mode", ["thread", "process"])
@pytest.mark.parametrize("num_saves", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_saves_leave_nothing_behind(tmp_path: Path, mode: str, num_saves: int) -> None:
    run, warm = Run(), 20
    run.train(1)
    config = lossless(async_mode=mode, keep_latest_k=2, base_every=5)
    with Checkpointer(tmp_path, config) as checkpointer:
        pids = [os.getpid()] + ([child_of(checkpointer)] if mode == "process" else [])
        for step in range(warm + num_saves):
            checkpointer.async_save(step, run.model, run.optimizer)
            if step in (warm - 1, warm + num_saves - 1):
                checkpointer.wait()
                gc.collect()
            if step == warm - 1:
                before, child_files = _count(pids), _descriptors(pids[-1])
                resident = [_resident_bytes(pid) for pid in pids]
        assert _count(pids) == before
        assert _descriptors(pids[-1]) == child_files
        growth = [_resident_bytes(pid) - old for pid, old in zip(pids, resident, strict=True)]
        assert max(growth) < 8 * 2**20 + 4096 * num_saves, growth
    assert len(list(tmp_path.glob("step-*"))) <= 2 + config.base_every


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))
