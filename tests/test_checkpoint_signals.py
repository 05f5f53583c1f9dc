"""Ctrl-C, SIGTERM and the interpreter's exit: a save is finished or abandoned, and nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.errors import ConfigError
from tests.processes import is_gone, stop
from tests.ranks import spawn
from tests.runs import Run, committed, lossless

MODES = ["thread", "process"]
TRAINER = """
import signal, sys, threading
import torch
import effx_dist.checkpoint.format.block_files as blockfile
import effx_dist.checkpoint.saving.pending as pending
from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig

def say(*words):
    print(*words, flush=True)

# a job in the background is started with it ignored, and so is what a test run there starts
signal.signal(signal.SIGINT, signal.default_int_handler)

folder, mode = sys.argv[1:3]
model = torch.nn.Linear(4, 4)
released = threading.Event()
told = []
append, wait = blockfile.BlockWriter.append, pending.wait

def hold(self, payload):
    if mode == "thread":
        while not released.wait(0.01):
            pass
    return append(self, payload)

def tell_and_wait(futures, timeout):
    if not told:
        told.append(True)
        say("waiting")
    return wait(futures, timeout)

def release_when_told():
    sys.stdin.readline()
    released.set()

def child_of(checkpointer):
    return checkpointer._executor._process.pid if mode == "process" else 0

def start(**settings):
    checkpointer = Checkpointer(
        folder, ExcpConfig(profile="lossless", async_mode=mode, **settings)
    )
    say(child_of(checkpointer))
    return checkpointer

blockfile.BlockWriter.append = hold
pending.wait = tell_and_wait
"""
FREE = "released.set()\n"


class Trainer:
    """A script beside this test, in a process group of its own; its child if its saves have one."""

    def __init__(self, folder: Path, mode: str, script: str) -> None:
        self.mode = mode
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINER + script, str(folder), mode],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.child = int(self.line())

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, self.process.communicate()[1]
        return line

    def write(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hold(self) -> None:
        """Let no save go on (a thread holds itself)."""
        if self.child:
            stop(self.child)

    def tell(self) -> None:
        """Let the save go on."""
        self.write("go")
        if self.child:
            os.kill(self.child, signal.SIGCONT)

    def signal(self, number: int) -> None:
        """To the process and its child, as a terminal or a scheduler sends it."""
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str]:
        """Exit code and what it wrote to stderr. No process of it is left."""
        _, errors = self.process.communicate(timeout=60)
        if self.child:
            assert is_gone(self.child)
        return self.process.returncode, errors


@pytest.fixture(params=MODES)
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Trainer]]:
    """Starts a trainer; afterwards none is left, and nothing of it in shared memory."""
    before, started = shared_memory(), []

    def start_one(script: str) -> Trainer:
        started.append(Trainer(tmp_path, request.param, script))
        return started[-1]

    yield start_one
    for trainer in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(trainer.process.pid, signal.SIGKILL)
        trainer.process.communicate()
        assert not [name for name in shared_memory() - before if f"_{trainer.process.pid}_" in name]


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def saves_on(folder: Path) -> None:
    """The next run finds the folder usable, and leaves nothing unfinished there."""
    run = Run()
    with Checkpointer(folder, lossless()) as checkpointer:
        checkpointer.save(100, run.model, run.optimizer)
    assert verify_folder(folder).findings == []
    assert {p.name for p in folder.glob("step-*")} == {f"step-{s}" for s in committed(folder)}


def test_an_exit_without_close_finishes_the_save(
    start: Callable[[str], Trainer], tmp_path: Path
) -> None:
    trainer = start(
        FREE + "checkpointer = start(encoder_threads=2)\ncheckpointer.async_save(1, model)\n"
    )
    assert trainer.end() == (0, "")
    assert committed(tmp_path) == [1]


INTERRUPTED = """
with start() as checkpointer:
    sys.stdin.readline()
    threading.Thread(target=release_when_told, daemon=True).start()
    saving = checkpointer.async_save(1, model)
    try:
        saving.wait()
    except KeyboardInterrupt:
        assert not saving.done()
        told.clear()  # the wait in close() is another one
        say("interrupted")
        raise
"""


class TestCtrlC:
    def start(self, start: Callable[[str], Trainer]) -> Trainer:
        """A trainer that waits for a save which does not move."""
        trainer = start(INTERRUPTED)
        trainer.hold()
        trainer.write("held")
        assert trainer.line() == "waiting"
        trainer.signal(signal.SIGINT)
        assert trainer.line() == "interrupted"
        assert trainer.line() == "waiting", "in close()"
        return trainer

    def test_in_wait_leaves_the_save_running_and_close_finishes_it(
        self, start: Callable[[str], Trainer], tmp_path: Path
    ) -> None:
        trainer = self.start(start)
        trainer.tell()
        code, errors = trainer.end()
        assert code == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert committed(tmp_path) == [1]

    def test_a_second_one_abandons_the_save(
        self, start: Callable[[str], Trainer], tmp_path: Path
    ) -> None:
        trainer = self.start(start)
        trainer.signal(signal.SIGINT)
        code, _ = trainer.end()
        assert code == -signal.SIGINT
        assert committed(tmp_path) == []
        saves_on(tmp_path)

    def test_in_the_loop_does_not_reach_the_saving_process(
        self, start: Callable[[str], Trainer], tmp_path: Path
    ) -> None:
        """It comes while the child still imports torch."""
        trainer = start(
            FREE
            + "checkpointer = start()\ntry:\n    say('in the loop')\n"
            + "    while True:\n        threading.Event().wait(0.1)\n"
            + "except KeyboardInterrupt:\n    child = child_of(checkpointer)\n"
            + "    checkpointer.save(1, model)\n    assert child == child_of(checkpointer)\n"
        )
        assert trainer.line() == "in the loop"
        trainer.signal(signal.SIGINT)
        assert trainer.line() == "waiting"
        assert trainer.end() == (0, "")
        assert committed(tmp_path) == [1]


class TestSigterm:
    def test_ends_the_process_and_the_save_with_it(
        self, start: Callable[[str], Trainer], tmp_path: Path
    ) -> None:
        trainer = start("checkpointer = start()\ncheckpointer.async_save(1, model).wait()\n")
        trainer.hold()
        trainer.signal(signal.SIGTERM)
        if trainer.child:
            os.kill(trainer.child, signal.SIGCONT)
        assert trainer.end()[0] == -signal.SIGTERM
        assert committed(tmp_path) in ([], [1] if trainer.mode == "process" else [])
        saves_on(tmp_path)

    def test_is_remembered_and_the_loop_saves_once_more(
        self, start: Callable[[str], Trainer], tmp_path: Path
    ) -> None:
        trainer = start(
            FREE
            + "with start(save_on_sigterm=True) as checkpointer:\n"
            + "    while not checkpointer.should_stop:\n        pass\n"
            + "    checkpointer.save(1, model)\n"
        )
        trainer.signal(signal.SIGTERM)
        assert trainer.line() == "waiting"
        assert trainer.end() == (0, "")
        assert committed(tmp_path) == [1]


@pytest.fixture
def got() -> Iterator[list[int]]:
    """The SIGTERMs that reach the handler which was there before."""
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_a_second_sigterm_goes_where_it_went_before(tmp_path: Path, got: list[int]) -> None:
    with Checkpointer(tmp_path, lossless(save_on_sigterm=True)) as checkpointer:
        assert not checkpointer.should_stop
        signal.raise_signal(signal.SIGTERM)
        assert checkpointer.should_stop
        assert got == []
        signal.raise_signal(signal.SIGTERM)
        assert got == [signal.SIGTERM]
        assert checkpointer.should_stop


def test_close_puts_the_handler_back_that_was_there(tmp_path: Path, got: list[int]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Checkpointer(tmp_path, lossless(save_on_sigterm=True)):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with Checkpointer(tmp_path, lossless(save_on_sigterm=True)):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # somebody else's, set later, stays
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def test_without_the_option_signals_are_left_alone(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
        assert not checkpointer.should_stop


def test_the_option_needs_the_main_thread(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def make() -> None:
        try:
            Checkpointer(tmp_path, lossless(save_on_sigterm=True))
        except ConfigError as error:
            errors.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    assert "main thread only" in str(errors)


def _one_rank_is_told(folder: Path) -> tuple[bool, bool]:
    import torch.distributed as dist

    with Checkpointer(folder, lossless(save_on_sigterm=True)) as checkpointer:
        before = checkpointer.should_stop
        if dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return before, checkpointer.should_stop


@pytest.mark.ranks
def test_all_ranks_stop_together(tmp_path: Path) -> None:
    assert spawn(2, _one_rank_is_told, tmp_path, tmp_path / "run") == [(False, True)] * 2
