"""Saves beside training: what they see, how they wait for each other, how they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import effx_dist.checkpoint.format.block_files
from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.format.block_files import BlockWriter
from effx_dist.checkpoint.format.manifest import BlockRecord
from effx_dist.checkpoint.saving.staging import Staging
from effx_dist.checkpoint.storage.places import Location
from effx_dist.errors import ConfigError, RankFailedError
from tests.chain_runs import read_whole, same_bits
from tests.runs import Run, committed, lossless


class Disk:
    """A disk whose writes of one step wait until they are let go, or fail then.

    ``reached``: the step's first block is about to be written. ``events``: what happened, in order.
    """

    def __init__(self, name: str, fails: bool = False) -> None:
        self.name, self.fails = name, fails
        self.reached, self.released = threading.Event(), threading.Event()
        self.events: list[str] = []

    def writer(self) -> type[BlockWriter]:
        disk = self

        class Waits(BlockWriter):
            def __init__(self, folder: Location, name: str) -> None:
                super().__init__(folder, name)
                self.step = folder.name.partition("-")[2].partition("-")[
                    2
                ]  # of "writing-<id>-step-1"

            def append(self, payload: bytes) -> BlockRecord:
                if self.step == disk.name:
                    disk.reached.set()
                    assert disk.released.wait(60)
                    if disk.fails:
                        raise OSError("the disk is gone")
                return super().append(payload)

            def commit(self) -> None:
                super().commit()
                disk.events.append(f"written {self.step}")

        return Waits


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Disk]:
    made = Disk("step-1", fails=getattr(request, "param", False))
    monkeypatch.setattr(effx_dist.checkpoint.format.block_files, "BlockWriter", made.writer())
    yield made
    made.released.set()


def test_what_changes_after_async_save_returns_does_not_show(tmp_path: Path, disk: Disk) -> None:
    """The save has not written a byte when everything is overwritten."""
    run, counts = Run(), torch.arange(5)
    run.train(2)
    before = run.state()
    with Checkpointer(tmp_path, lossless(async_mode="thread")) as checkpointer:
        pending = checkpointer.async_save(1, run.model, run.optimizer, extra={"counts": counts})
        overwrite(run, counts)
        assert disk.reached.wait(60)
        assert not pending.done()
        assert committed(tmp_path) == []
        disk.released.set()
        pending.wait()
        extra = checkpointer.load(run.model, run.optimizer)
    same_bits(run.state(), before)
    assert extra["counts"].tolist() == [0, 1, 2, 3, 4]


def overwrite(run: Run, counts: torch.Tensor) -> None:
    counts.fill_(-1)
    with torch.no_grad():
        for tensor in run.model.state_dict().values():
            tensor.fill_(7)
        for entries in run.optimizer.state.values():
            for tensor in entries.values():
                tensor.fill_(7)


def test_a_saving_process(tmp_path: Path) -> None:
    """Sees what was there at the call, keeps the chain, names errors, and ends with the run."""
    run, counts, states = Run(), torch.arange(5), []
    checkpointer = Checkpointer(tmp_path, lossless(async_mode="process"))
    for step in (1, 2, 3):
        run.train(1, seed=step)
        states.append(run.state())
        checkpointer.async_save(step, run.model, run.optimizer, extra={"counts": counts})
        overwrite(run, counts)
        checkpointer.wait()
        checkpointer.load(run.model, run.optimizer)
        same_bits(run.state(), states[-1])
    with pytest.raises(RankFailedError, match="never overwritten"):
        checkpointer.save(2, run.model, run.optimizer)
    assert checkpointer.save(4, run.model, run.optimizer).result.kind == "link"
    checkpointer.close()
    assert committed(tmp_path) == [1, 2, 3, 4]
    assert verify_folder(tmp_path).findings == []


def test_policy_skip_leaves_out_a_save_while_one_is_in_flight(tmp_path: Path, disk: Disk) -> None:
    run = Run()
    config = lossless(async_mode="thread", policy="skip")
    with Checkpointer(tmp_path, config) as checkpointer:
        first = checkpointer.async_save(1, run.model, run.optimizer)
        assert disk.reached.wait(60)
        second = checkpointer.async_save(2, run.model, run.optimizer)
        assert (first.skipped, second.skipped, second.done()) == (False, True, True)
        assert checkpointer.num_skipped == 1
        second.wait()
        with pytest.raises(ValueError, match="step 2 was skipped"):
            _ = second.stored_bytes
        disk.released.set()
        first.wait()
        assert not checkpointer.async_save(3, run.model, run.optimizer).wait().skipped
    assert committed(tmp_path) == [1, 3]


def test_policy_wait_copies_only_when_the_save_before_has_ended(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The staging buffers are reused: copying sooner would change what is being written."""
    copy = Staging.copy

    def recorded(self: Staging, leaves: dict[str, torch.Tensor]) -> object:
        disk.events.append("copied")
        return copy(self, leaves)

    monkeypatch.setattr(Staging, "copy", recorded)
    run, states = Run(), []
    about_to_save = threading.Event()

    def let_go() -> None:
        about_to_save.wait(60)
        disk.released.set()

    helper = threading.Thread(target=let_go)
    helper.start()
    with Checkpointer(tmp_path, lossless(async_mode="thread")) as checkpointer:
        for step in (1, 2):
            run.train(1, seed=step)
            states.append(run.state())
            if step == 2:
                assert disk.reached.wait(60)
                about_to_save.set()
            checkpointer.async_save(step, run.model, run.optimizer)
        assert checkpointer.num_skipped == 0
    helper.join()
    written_twice = dict.fromkeys(disk.events[:3]), dict.fromkeys(disk.events[3:])  # moments apart
    assert [*map(list, written_twice)] == [
        ["copied", "written step-1"],
        ["copied", "written step-2"],
    ]
    for step, state in enumerate(states, start=1):
        found = read_whole(tmp_path, step)
        same_bits({name: found[name] for name in state}, state)


@pytest.mark.parametrize("disk", [True], indirect=True, ids=["failing disk"])
class TestFailedSave:
    def start(self, folder: Path, disk: Disk, run: Run) -> Checkpointer:
        checkpointer = Checkpointer(folder, lossless(async_mode="thread"))
        self.pending = checkpointer.async_save(1, run.model, run.optimizer)
        disk.released.set()
        return checkpointer

    def test_wait_raises_what_made_it_fail(self, tmp_path: Path, disk: Disk) -> None:
        run = Run()
        checkpointer = self.start(tmp_path, disk, run)
        for _ in range(2):
            with pytest.raises(RankFailedError, match="rank 0: OSError: the disk is gone"):
                self.pending.wait()
        assert self.pending.done()
        assert isinstance(self.pending.failure(), RankFailedError)
        checkpointer.save(2, run.model, run.optimizer)
        checkpointer.close()
        assert committed(tmp_path) == [2]

    def test_nobody_waited_it_is_logged_and_training_saves_on(
        self, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
    ) -> None:
        run = Run()
        with self.start(tmp_path, disk, run) as checkpointer:
            checkpointer.async_save(2, run.model, run.optimizer).wait()
        assert "the save of step 1 failed" in caplog.text
        assert committed(tmp_path) == [2]

    def test_close_raises_what_nobody_has_seen(self, tmp_path: Path, disk: Disk) -> None:
        checkpointer = self.start(tmp_path, disk, Run())
        with pytest.raises(RankFailedError, match="the disk is gone"):
            checkpointer.close()
        checkpointer.close()

    def test_what_was_raised_once_is_neither_raised_by_close_nor_logged(
        self, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A caller that caught the failure and went on must be able to leave the block."""
        run = Run()
        with self.start(tmp_path, disk, run) as checkpointer:
            with pytest.raises(RankFailedError):
                self.pending.wait()
            checkpointer.newest()
        assert "the save of step 1 failed" not in caplog.text


def test_close_finishes_what_is_in_flight_and_then_refuses(tmp_path: Path, disk: Disk) -> None:
    run, threads = Run(), set(threading.enumerate())
    with Checkpointer(tmp_path, lossless(async_mode="thread")) as checkpointer:
        checkpointer.async_save(1, run.model, run.optimizer)
        disk.released.set()
    assert committed(tmp_path) == [1]
    assert set(threading.enumerate()) <= threads
    checkpointer.close()
    with pytest.raises(ConfigError, match="closed"):
        checkpointer.async_save(2, run.model, run.optimizer)


def test_leaving_the_block_by_an_exception_still_finishes_the_save(
    tmp_path: Path, disk: Disk
) -> None:
    run = Run()

    def train() -> None:
        with Checkpointer(tmp_path, lossless(async_mode="thread")) as checkpointer:
            checkpointer.async_save(1, run.model, run.optimizer)
            disk.released.set()
            raise ZeroDivisionError("in training")

    with pytest.raises(ZeroDivisionError, match="in training"):
        train()
    assert committed(tmp_path) == [1]


def test_a_state_that_cannot_be_saved_leaves_the_checkpointer_usable(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path, lossless(async_mode="thread")) as checkpointer:
        with pytest.raises(TypeError, match=r"extra\.bad: a \w*Path"):
            checkpointer.async_save(1, run.model, run.optimizer, extra={"bad": tmp_path})
        with pytest.raises(ConfigError, match="step=-1"):
            checkpointer.async_save(-1, run.model, run.optimizer)
        checkpointer.save(1, run.model, run.optimizer)
    assert committed(tmp_path) == [1]
