"""Disks that are really full, files that may really not grow, folders that are really read-only."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from effx_dist.checkpoint import Checkpointer
from tests import fault_checks as checks
from tests.fault_target import in_own_mounts, mount
from tests.thread_ranks import run_ranks

pytestmark = pytest.mark.ranks
PAGE = 4096
DISK_BYTES = 64 * PAGE
BALLAST = "ballast"
SAVED = (1, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place to mount something on."""
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "none", str(tmp_path)]
    try:
        subprocess.run(probe, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs util-linux (unshare, mount)")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"may not mount: {error.stderr.strip()}")
    path = tmp_path / "run"
    path.mkdir()
    return path


def save(folder: Path, *steps: int) -> list[str]:
    """What the ranks are told of the last save, if it fails; all of it checked."""
    told = run_ranks(2, checks.saves(folder, steps))
    checks.check_told(folder, told)
    last = told[0][steps[-1]]
    return [] if last is None else list(last.failures.values())


def fill_up(folder: Path) -> None:
    """With fewer and fewer pages left on the disk, until not even the folder can be made."""
    mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder)
    save(folder, *SAVED)
    before = checks.contents(folder)
    ballast, outcomes = folder / BALLAST, []
    for num_free in range(10):
        ballast.unlink(missing_ok=True)
        left = shutil.disk_usage(folder).free
        ballast.write_bytes(bytes(left - num_free * PAGE))
        assert shutil.disk_usage(folder).free == num_free * PAGE
        failures = save(folder, SAVED[-1] + 1 + num_free)
        assert all("No space left" in failure for failure in failures)
        outcomes.append(bool(failures))
        checks.check_survival(folder, before)
    assert set(outcomes) == {True, False}
    ballast.unlink()
    checks.check_next_start(folder)


def test_a_disk_is_full(folder: Path) -> None:
    in_own_mounts(fill_up, folder)


def turn_read_only(folder: Path) -> None:
    mount("--bind", folder, folder)
    save(folder, *SAVED)
    before = checks.contents(folder)
    mount("-o", "remount,bind,ro", folder)
    [failure] = save(folder, SAVED[-1] + 1)
    assert "Read-only file system" in failure
    checks.check_survival(folder, before)
    mount("-o", "remount,bind,rw", folder)
    checks.check_next_start(folder)


def test_a_folder_is_read_only(folder: Path) -> None:
    in_own_mounts(turn_read_only, folder)


@contextmanager
def file_bytes_at_most(limit: int) -> Iterator[None]:
    """No file of this process may grow beyond that; Python ignores the signal that comes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # it would be cut off
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        sys.dont_write_bytecode = writes_none
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_files_may_not_grow(tmp_path: Path) -> None:
    """A cut-off write that the kernel reports as short, then as an error, in every kind of file."""
    save(tmp_path, *SAVED)
    before = checks.contents(tmp_path)
    largest = max(len(data) for files in before.values() for data in files.values())
    outcomes = set()
    for number, limit in enumerate(range(0, 2 * largest, largest // 6)):
        with file_bytes_at_most(limit):
            failures = save(tmp_path, SAVED[-1] + 1 + number)
        assert all("File too large" in failure for failure in failures)
        outcomes.add(bool(failures))
        checks.check_survival(tmp_path, before)
    assert outcomes == {True, False}
    checks.check_next_start(tmp_path)


def test_the_next_save_of_the_same_job_succeeds(tmp_path: Path) -> None:
    run = checks.small_run(1)
    with Checkpointer(tmp_path, checks.CONFIG) as checkpointer:
        with file_bytes_at_most(100):
            assert checks.save_one(checkpointer, 1) is not None
        checkpointer.save(1, run.model, run.optimizer)
    checks.check_loads(tmp_path, 1)
    checks.check_clean(tmp_path)
