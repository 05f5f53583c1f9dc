"""A save that fails on one rank fails on all, commits nothing, and leaves the chain as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from effx_dist.checkpoint import Checkpointer, ExcpWriter, verify_folder
from effx_dist.checkpoint.format.chunks import JointPieces
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.ownership import OWNER
from effx_dist.checkpoint.storage.steps import LATEST, committed_steps, step_name
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError, ConfigError, RankFailedError
from effx_dist.shard import Group
from tests.chain_runs import SavingRank, Training, read_whole, rows, same_bits, save_all
from tests.fault_injection import Operation, fails_once, watched
from tests.runs import Run, committed, lossless
from tests.thread_ranks import run_ranks

CONFIG = ExcpConfig(profile="balanced")
FAILING = "step-2"
STAGING = f"writing-*-{FAILING}"


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def save_with_one_failure(folder: Path, config: ExcpConfig = CONFIG) -> list[RankFailedError]:
    """Three ranks save steps 0 to 4; what each of them is told of step 2, which must fail."""
    training = Training()
    states = [training.advance() for _ in range(5)]

    def body(group: Group) -> RankFailedError:
        saving = SavingRank(folder, config, rows, group)
        saving.save(0, states[0])
        saving.save(1, states[1])
        with pytest.raises(RankFailedError) as caught:
            saving.save(2, states[2])
        if group.rank == 0:
            assert (committed_steps(folder), verify_folder(folder).findings) == ([0, 1], [])
        group.barrier()
        saving.save(3, states[3])
        saving.save(4, states[4])
        return caught.value

    told = run_ranks(3, body)
    check_chain_without_the_failure(folder, states, config)
    return told


def check_chain_without_the_failure(
    folder: Path, states: list[dict[str, torch.Tensor]], config: ExcpConfig
) -> None:
    """What is on disk is what a run that never tried step 2 has."""
    expected = folder.parent / "expected"
    save_all(expected, [*states[:2], *states[3:]], config, 3)
    for position, step in enumerate((0, 1, 3, 4)):
        same_bits(read_whole(folder, step), read_whole(expected, position))
    manifest, _ = read_manifest(folder / "step-3")
    assert manifest.parent is not None
    assert (manifest.kind, manifest.parent.name) == ("link", "step-1")
    assert (folder / "latest").read_text() == "step-4\n"
    assert not verify_folder(folder).findings


@pytest.mark.parametrize(
    "operation",
    [
        Operation("create", f"{STAGING}/rank-00001.effx.*.part", 0),
        Operation("write", f"{STAGING}/rank-00001.effx.*.part", 3),
        Operation("fsync", f"{STAGING}/rank-00001.effx.*.part", 0),
        Operation("rename", f"{STAGING}/rank-00001.effx", 0),
        Operation("fsync", f"{STAGING}/manifest.json.*.part", 0),
        Operation("rename", FAILING, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("profile", ["balanced", "lossless"])
def test_a_full_disk_on_one_rank(operation: Operation, profile: str, tmp_path: Path) -> None:
    config = ExcpConfig.model_validate({"profile": profile})
    with watched(tmp_path / "run", fails_once(operation, errno.ENOSPC)):
        told = save_with_one_failure(tmp_path / "run", config)
    for error in told:
        assert error.failures.keys() == {operation.rank or 0}
        assert "No space left" in str(error)


class BrokenParts(JointPieces):
    """Cannot be looked at."""

    def arrays(self, cut: slice) -> NoReturn:
        raise no_space()


def test_a_rank_that_fails_while_statistics_are_merged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In the middle of collectives: nobody waits for it, and it alone is named."""
    real = ExcpWriter._joint_pieces

    def joint_pieces(self: ExcpWriter, decision: Any, parts: Any) -> Any:
        found = real(self, decision, parts)
        if str(self.path).endswith(f"run/{FAILING}") and decision.rank == 1:
            return {n: [BrokenParts(**vars(p)) for p in some] for n, some in found.items()}
        return found

    monkeypatch.setattr(ExcpWriter, "_joint_pieces", joint_pieces)
    for error in save_with_one_failure(tmp_path / "run"):
        assert error.failures.keys() == {1}
        assert "No space left" in error.failures[1]


def test_a_committed_step_is_never_overwritten(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        run.train(1)
        checkpointer.save(1, run.model, run.optimizer)
        before = run.state()
        run.train(1)
        with pytest.raises(RankFailedError, match="never overwritten"):
            checkpointer.save(1, run.model, run.optimizer)
        checkpointer.save(2, run.model, run.optimizer)
        checkpointer.load(run.model, run.optimizer, step=1)
    same_bits(run.state(), before)


def test_what_a_cut_off_save_left_behind_is_removed_at_the_next_start(tmp_path: Path) -> None:
    run = Run()
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, run.model, run.optimizer)
    for step in (0, 2, 7):
        (tmp_path / step_name(step)).mkdir()
        (tmp_path / step_name(step) / "rank-00000.effx").write_bytes(b"EFFXBLK1 half")
    (tmp_path / step_name(2) / "manifest.json.0123abcd.part").write_bytes(b"{")
    (tmp_path / "writing-0123abcd-step-5").mkdir()
    (tmp_path / "writing-0123abcd-step-5" / "manifest.json").write_bytes(b"{}")
    (tmp_path / "notes").mkdir()
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        assert checkpointer.newest() == 1
        checkpointer.load(run.model, run.optimizer)
        checkpointer.save(2, run.model, run.optimizer)
    expected = {LATEST, OWNER, "notes", "step-1", "step-2"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert not verify_folder(tmp_path).findings


def test_a_failed_save_gives_its_space_back_at_once(tmp_path: Path) -> None:
    run = Run()
    failing = Operation("fsync", f"{STAGING}/rank-00000.effx.*.part", 0)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, run.model, run.optimizer)
        with (
            watched(tmp_path, fails_once(failing, errno.ENOSPC)),
            pytest.raises(RankFailedError, match="No space left"),
        ):
            checkpointer.save(2, run.model, run.optimizer)
        assert {path.name for path in tmp_path.iterdir()} == {LATEST, OWNER, "step-1"}
        with pytest.raises(RankFailedError, match="never overwritten"):
            checkpointer.save(1, run.model, run.optimizer)
        assert checkpointer.newest() == 1, "a committed step is not what a failure leaves behind"


def test_a_folder_that_cannot_be_written_to_fails_the_save_and_not_the_run(tmp_path: Path) -> None:
    read_only = Path("/proc/checkpoints")  # even for root
    if os.geteuid() != 0:
        read_only = tmp_path / "read-only"
        read_only.mkdir(mode=0o500)
    a_file = tmp_path / "file"
    a_file.write_text("not a folder")
    run = Run()
    for folder in (read_only, a_file):
        with Checkpointer(folder, lossless()) as checkpointer:
            with pytest.raises(RankFailedError, match="rank 0"):
                checkpointer.save(1, run.model, run.optimizer)
            with pytest.raises(CheckpointNotFoundError):
                checkpointer.load(run.model, run.optimizer)
    assert a_file.read_text() == "not a folder"


@pytest.mark.parametrize("restart", [True, False], ids=["next run", "same run"])
def test_going_back_to_an_older_step(restart: bool, tmp_path: Path) -> None:
    """Newer steps are set aside, kept whole on disk, and training saves under their names again."""
    run = Run()
    checkpointer = Checkpointer(tmp_path, lossless())
    for step in range(1, 5):
        run.train(1)
        checkpointer.save(step, run.model, run.optimizer)
        if step == 2:
            second = run.state()
    if restart:
        checkpointer.close()
        checkpointer = Checkpointer(tmp_path, lossless())
    assert checkpointer.load(run.model, run.optimizer, step=2)["step"] == 2
    same_bits(run.state(), second)
    run.train(1, seed=99)
    third = run.state()
    checkpointer.save(3, run.model, run.optimizer)
    checkpointer.close()
    assert committed(tmp_path) == [1, 2, 3]
    aside = sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("superseded-"))
    assert [name.rpartition("-")[2] for name in aside] == ["3", "4"]
    fresh = Run(seed=5)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        assert checkpointer.load(fresh.model, fresh.optimizer)["step"] == 3
    same_bits(fresh.state(), third)
    assert not verify_folder(tmp_path).findings


@pytest.mark.parametrize(
    ("settings", "newest", "always"),
    [
        ({"keep_latest_k": 2}, {8, 9}, set()),
        ({"keep_latest_k": 2, "keep_every_n": 4}, {8, 9}, {0, 4, 8}),
        ({"keep_latest_k": 1, "keep_every_n": 5}, {9}, {0, 5}),
        ({"keep_latest_k": 0}, set(range(10)), set()),
    ],
    ids=str,
)
def test_every_step_that_stays_loads(
    settings: dict[str, int], newest: set[int], always: set[int], tmp_path: Path
) -> None:
    config = lossless(base_every=3, **settings)
    run, states = Run(), []
    with Checkpointer(tmp_path, config) as checkpointer:
        for step in range(10):
            run.train(1)
            states.append(run.state())
            checkpointer.save(step, run.model, run.optimizer)
    kept = set(committed(tmp_path))
    wanted = newest | always
    needed = {parent for step in wanted for parent in range(step - step % 3, step)}
    assert kept == wanted | needed
    assert {p.name for p in tmp_path.iterdir()} == {LATEST, OWNER, *map(step_name, kept)}
    for step in kept:
        fresh = Run(seed=5)
        with Checkpointer(tmp_path, config) as checkpointer:
            if step in wanted:
                checkpointer.load(fresh.model, fresh.optimizer, step=step)
                same_bits(fresh.state(), states[step])
            else:  # kept for its weights alone
                with pytest.raises(CheckpointNotFoundError, match="moments were removed"):
                    checkpointer.load(fresh.model, fresh.optimizer, step=step)
                checkpointer.load(weights := Run(seed=5).model, step=step)
                for name, tensor in weights.state_dict().items():
                    same_bits({name: tensor}, {name: states[step][f"model.{name}"]})


def test_a_damaged_older_checkpoint_does_not_fail_later_saves(tmp_path: Path) -> None:
    """Retention reads older manifests; one it cannot read is no reason to call a committed save failed."""
    run = Run()
    with Checkpointer(tmp_path, lossless(base_every=1, keep_latest_k=2)) as checkpointer:
        checkpointer.save(1, run.model, run.optimizer)
        checkpointer.save(2, run.model, run.optimizer)
        (tmp_path / "step-1" / "manifest.json").write_bytes(b"damaged")
        checkpointer.save(3, run.model, run.optimizer)
        checkpointer.save(4, run.model, run.optimizer)
        assert checkpointer.load(run.model, run.optimizer)["step"] == 4


def test_one_group_is_not_shared_between_training_and_a_save_beside_it(tmp_path: Path) -> None:
    def body(group: Group) -> None:
        with pytest.raises(ConfigError, match="async_mode"):
            Checkpointer(tmp_path, lossless(async_mode="thread"), group=group)
        Checkpointer(tmp_path, lossless(async_mode="sync"), group=group).close()

    run_ranks(2, body)
