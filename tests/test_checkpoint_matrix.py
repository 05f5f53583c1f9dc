"""Every operation of a save fails once, and every process dies at each of them.

The operations are those that an undisturbed run asks of the disk, so that a new step of the
protocol is disturbed as well from the day that it is there.
"""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, tzinfo
from pathlib import Path

import pytest

import effx_dist.checkpoint.saving.manifest_building
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.saving.retention import pin
from effx_dist.checkpoint.storage.steps import committed_steps, step_name, step_of
from tests import fault_checks as checks
from tests.fault_injection import ERRORS, Operation, fails_once, kills_at, watch, watched
from tests.runs import lossless
from tests.thread_ranks import run_ranks

PINNED, LAST = 2, 3
DISTURBED = (4, 5)
"""A base, before which nothing is known of the folder and after which old steps go, and a link."""
RETIRING = lossless(base_every=3, keep_latest_k=1)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two links, whole, of which the next save makes the last superfluous."""
    folder = tmp_path_factory.mktemp("template") / "run"
    run_ranks(2, checks.saves(folder, range(1, LAST + 1)))
    pin(folder, PINNED)
    return folder


@pytest.fixture(scope="module")
def operations(template: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Operation]:
    """What two undisturbed saves ask of the disk."""
    folder = copy_of(template, tmp_path_factory.mktemp("dry") / "run")
    found: list[Operation] = []
    with watched(folder, found.append):
        told = run_ranks(2, checks.saves(folder, DISTURBED, RETIRING))
    assert told == [dict.fromkeys(DISTURBED)] * 2
    kinds = {operation.kind for operation in found}
    assert kinds == {"create", "write", "fsync", "rename", "mkdir", "unlink", "rmdir"}
    assert {operation.rank for operation in found} == {None, 0, 1}
    return found


@pytest.fixture(autouse=True)
def nothing_is_made_durable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process leaves behind does not depend on it, and a busy disk takes long over it."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def copy_of(template: Path, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    return folder


@contextmanager
def naming(operation: Operation) -> Iterator[None]:
    """Say at which operation a check failed."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"at: {operation}")
        raise


def needed(operations: list[Operation]) -> set[Operation]:
    """Those without which a save must fail: all until its folder's name is durable, but for the
    removal of names that nothing refers to."""
    found, is_renamed, is_committed = set(), False, False
    for operation in operations:
        is_committed &= operation.kind != "mkdir"  # the next save begins
        if not is_committed and operation.kind not in ("unlink", "rmdir"):
            found.add(operation)
        is_committed |= is_renamed and operation.kind == "fsync"
        is_renamed = operation.kind == "rename" and step_of(operation.path) is not None
    return found


def fail_at(chosen: Operation, number: int, folder: Path, operations: list[Operation]) -> None:
    """One error of the disk: what every rank says of it, what is left, and that the run goes on."""
    before = checks.contents(folder)
    with watched(folder, fails_once(chosen, number)):
        told = run_ranks(2, checks.saves(folder, (*DISTURBED, DISTURBED[-1] + 1), RETIRING))
    checks.check_told(folder, told)
    errors = [error for error in told[0].values() if error is not None]
    assert len(errors) == (chosen in needed(operations))
    for error in errors:
        assert os.strerror(number) in str(error)
        [rank] = error.failures
        assert chosen.rank in (None, rank)
    checks.check_survival(folder, before, may_go={LAST})
    checks.check_next_start(folder, RETIRING)


@pytest.mark.parametrize(
    ("stride", "errors"),
    [
        pytest.param(3, ERRORS, id="some"),
        *(pytest.param(1, (e,), id=errno.errorcode[e], marks=pytest.mark.slow) for e in ERRORS),
    ],
)
def test_every_operation_fails_once(
    stride: int,
    errors: tuple[int, ...],
    template: Path,
    operations: list[Operation],
    tmp_path: Path,
) -> None:
    """Some, with the errors by turns; and all of them with each error."""
    for operation, number in zip(operations[::stride], itertools.cycle(errors), strict=False):
        with naming(operation):
            fail_at(operation, number, copy_of(template, tmp_path / "run"), operations)


def die_at(chosen: Operation, folder: Path) -> None:
    """Body of a process: both ranks, as threads, and their end."""
    watch(folder, kills_at(chosen), pytest.MonkeyPatch())
    run_ranks(2, checks.saves(folder, DISTURBED, RETIRING))


@pytest.mark.ranks
@pytest.mark.parametrize(
    "stride", [pytest.param(8, id="some"), pytest.param(1, id="all", marks=pytest.mark.slow)]
)
def test_all_ranks_are_killed_at_an_operation(
    stride: int, template: Path, operations: list[Operation], tmp_path: Path
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tests.test_checkpoint_matrix"])
    for operation in operations[::stride]:
        folder = copy_of(template, tmp_path / "run")
        before = checks.contents(folder)
        process = context.Process(target=die_at, args=(operation, folder))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        with naming(operation):
            checks.check_survival(folder, before, may_go={LAST})
            checks.check_next_start(folder, RETIRING)


class WrongClock(datetime):
    """Runs backwards by a year a save, from a future far away."""

    years = itertools.count(2090, -1)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> WrongClock:
        return cls(next(cls.years), 1, 1, tzinfo=tz)


def test_clocks_decide_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Newer saves are stamped older, and files have the times of other files."""
    monkeypatch.setattr(effx_dist.checkpoint.saving.manifest_building, "datetime", WrongClock)
    folder = tmp_path / "run"
    run_ranks(2, checks.saves(folder, range(1, 6)))
    stamps = [read_manifest(folder / step_name(step))[0].saved_at for step in range(1, 6)]
    assert stamps == sorted(stamps, reverse=True)
    for number, path in enumerate(sorted(folder.rglob("*"), reverse=True)):
        os.utime(path, (number * 1e6, number * 1e6))
    before = checks.contents(folder)
    assert checks.check_survival(folder, before) == 5
    checks.check_next_start(folder, RETIRING)
    assert committed_steps(folder) == [4, 5, 6], "the newest, and what it is a difference to"
    checks.check_loads(folder, 6)
