"""Two jobs on one folder: the one that came last goes on, the other says who took its folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path

import pytest

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.storage.steps import committed_steps, newest_step, remove_step
from effx_dist.shard import SoloGroup
from tests import fault_checks as checks
from tests.fault_injection import Operation, watched
from tests.fault_target import STOPPED, Setup, running
from tests.runs import lossless

RETIRING = lossless(base_every=3, keep_latest_k=2)
FIRST = (1, 2, 3)
OTHER_JOB = "another job|gone|No such file|never overwritten"
"""What the first job meets: the other's name, or what the other did to the folder of its save."""


@pytest.fixture(autouse=True)
def nothing_is_made_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two processes see of each other does not depend on it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_the_job_that_came_first_stops_saving(tmp_path: Path) -> None:
    first = Checkpointer(tmp_path, RETIRING)
    assert checks.save_one(first, 1) is None
    with Checkpointer(tmp_path, RETIRING) as second:
        assert checks.save_one(second, 2) is None
        for step in (2, 3):
            error = checks.save_one(first, step)
            assert error is not None
            assert "another job" in error.failures[0]
            assert f"pid {os.getpid()}" in error.failures[0]
        assert checks.save_one(second, 3) is None
    first.close()
    checks.check_survival(tmp_path, {})
    checks.check_next_start(tmp_path, RETIRING)


def test_a_step_that_the_other_job_retired_is_not_built_upon(tmp_path: Path) -> None:
    """The second job loads it, the first one removes it, and only then the second saves."""
    bases = lossless(base_every=1, keep_latest_k=1)
    run = checks.small_run(seed=5)
    with (
        Checkpointer(tmp_path, bases) as first,
        Checkpointer(tmp_path, lossless(base_every=9)) as second,
    ):
        assert checks.save_one(first, 1) is None
        second.load(run.model, run.optimizer)
        assert checks.save_one(first, 2) is None
        assert committed_steps(tmp_path) == [2]
        assert checks.save_one(second, 3) is None
    assert checks.check_survival(tmp_path, {}) == 3


def test_a_step_that_is_retired_while_the_next_is_saved(tmp_path: Path) -> None:
    """That save fails, and the one after it stores everything."""
    writing = Operation("create", "writing-*-step-2/rank-00000.effx.*.part", 0)

    def retire_parent(operation: Operation) -> None:
        if operation == writing:
            remove_step(tmp_path, 1)

    with Checkpointer(tmp_path, lossless(base_every=9)) as checkpointer:
        assert checks.save_one(checkpointer, 1) is None
        with watched(tmp_path, retire_parent):
            assert "was removed by another job" in str(checks.save_one(checkpointer, 2))
        assert committed_steps(tmp_path) == []
        assert checks.save_one(checkpointer, 3) is None
    assert checks.check_survival(tmp_path, {}) == 3


class SecondJob:
    """Starts, resumes and saves once, from start to end, in the middle of another job's operation."""

    def __init__(self, folder: Path, chosen: Operation, ahead: int) -> None:
        self.folder, self.chosen, self.ahead = folder, chosen, ahead
        self.saved: int | None = None
        self.committed: checks.Contents = {}

    def __call__(self, operation: Operation) -> None:
        if operation != self.chosen or self.saved is not None:
            return
        self.saved = newest_step(self.folder) + self.ahead
        run = checks.small_run(seed=5)
        with Checkpointer(self.folder, RETIRING, group=SoloGroup()) as checkpointer:
            checkpointer.load(run.model, run.optimizer)
            assert checks.save_one(checkpointer, self.saved) is None
        self.committed = {self.saved: checks.contents(self.folder)[self.saved]}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template") / "run"
    assert set(checks.saves(folder, FIRST, lossless(base_every=3))(SoloGroup()).values()) == {None}
    return folder


@pytest.mark.parametrize("ahead", [1, 2], ids=["same step", "later step"])
@pytest.mark.parametrize(
    "stride", [pytest.param(9, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_a_job_starts_while_another_is_in_the_middle_of_a_save(
    stride: int, ahead: int, template: Path, tmp_path: Path
) -> None:
    """At each operation of the first job's save, retention included."""
    operations: list[Operation] = []
    folder = Path(shutil.copytree(template, tmp_path / "dry"))
    with watched(folder, operations.append):
        checks.saves(folder, (4, 5), RETIRING)(SoloGroup())
    for operation in operations[::stride]:
        folder = Path(shutil.copytree(template, tmp_path / "run"))
        second = SecondJob(folder, operation, ahead)
        try:
            with watched(folder, second):
                told = checks.saves(folder, (4, 5), RETIRING)(SoloGroup())
            assert second.saved is not None
            for error in filter(None, told.values()):
                assert re.search(OTHER_JOB, str(error))
            checks.check_survival(folder, second.committed)
            checks.check_next_start(folder, RETIRING)
        except BaseException as error:
            error.add_note(f"at: {operation}, the other saved step {second.saved}")
            raise
        shutil.rmtree(folder)


@pytest.mark.ranks
def test_two_jobs_save_at_the_same_time(tmp_path: Path) -> None:
    """Processes of their own, at steps of their own: from the second one's first save on, the first
    one is told who the second is."""
    folder = tmp_path / "run"
    stop_at = {0: Operation("create", "owner.json.*.part", 0)}
    with (
        running(Setup(folder, tmp_path / "store-odd", world=1, stop_at=stop_at)) as odd,
        running(Setup(folder, tmp_path / "store-even", world=1, stop_at=stop_at)) as even,
    ):
        odd.ask(*range(1, 20, 2))
        even.ask(*range(2, 21, 2))
        assert [odd.hear(0), even.hear(0)] == [STOPPED, STOPPED]
        odd.go_on(0)
        even.go_on(0)
        told = [[job.hear(0) for _ in range(10)] for job in (odd, even)]
        pids = [job.processes[0].pid for job in (odd, even)]
        assert [odd.close(), even.close()] == [[0], [0]]
    losers = [number for number, said in enumerate(told) if said[-1] is not None]
    assert len(losers) < 2
    for loser in losers:  # none if one had ended before the other came to its first save
        winner = f"another job (host {socket.gethostname()} pid {pids[1 - loser]})"
        assert winner in told[loser][-1][0]
        assert told[1 - loser].count(None) >= 9, "the other removes one at its start at most"
    checks.check_survival(folder, {})
    checks.check_next_start(folder)
