"""Every kind of file of a run's folder, with a flipped bit, cut, empty or missing: it does no harm,
or a check names it; a load never gives other values than were saved."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.saving.retention import pin
from effx_dist.checkpoint.tools.compact import compact
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError
from tests import fault_checks as checks
from tests.runs import lossless
from tests.thread_ranks import run_ranks

NEWEST = 4
KEPT_FOR_WEIGHTS = 1
NUM_FLIPS = 12

# what restores nothing but says where, who or what for
HARMLESS = ["latest", "owner.json", "step-2/pinned", "step-1/moments-removed"]
# beside the data files of the newest step, those of what lies below it and of what was merged
CHECKED = [
    "step-4/manifest.json",
    "step-4/manifest.json.sha256",
    "step-4/rank-00000.effx",
    "step-4/rank-00000.moments.effx",
    "step-4/rank-00001.effx",
    "step-4/merged/manifest.json",
    "step-4/merged/rank-00000.effx",
    "step-1/manifest.json",
    "step-1/rank-00000.effx",
    "step-2/rank-00000.moments.effx",
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chain of four with all that a folder may hold."""
    folder = tmp_path_factory.mktemp("template") / "run"
    config = {"base_every": 10, "manifest_sha256": True}
    run_ranks(2, checks.saves(folder, (1, 2, 3), lossless(**config)))
    pin(folder, 2)
    retiring = lossless(**config, keep_latest_k=2)
    run_ranks(2, lambda group: checks.resume(folder, retiring, group))
    assert compact(folder) is not None
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert {*HARMLESS, *CHECKED} <= files
    kinds = {p.rsplit("/")[-1].replace("00001", "00000") for p in files}
    assert kinds == {p.rsplit("/")[-1].replace("00001", "00000") for p in (*HARMLESS, *CHECKED)}
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "run"))


def loads_or_says(folder: Path, name: str) -> bool:
    """Whether the newest loads, with the right values; else the damaged file is named."""
    refusal = None
    try:
        checks.check_loads(folder, NEWEST)
    except CorruptCheckpointError as error:
        refusal = str(error)
    assert refusal is None or str(folder / name).removesuffix(".sha256") in refusal
    return refusal is None


def is_found(folder: Path, name: str) -> bool:
    """Whether a check finds the damaged file, and nothing else."""
    findings = verify_folder(folder, decode=True).findings
    path = str(folder / name).removesuffix(".sha256")
    assert all(path in finding or str(Path(path).parent) in finding for finding in findings)
    return bool(findings)


def test_the_undamaged_folder(folder: Path) -> None:
    assert not verify_folder(folder, decode=True).findings
    checks.check_loads(folder, NEWEST)


@pytest.mark.parametrize("name", CHECKED)
def test_any_flipped_bit_is_found(name: str, folder: Path) -> None:
    path, chooser = folder / name, random.Random(name)
    whole = path.read_bytes()
    positions = [0, len(whole) - 1, *(chooser.randrange(len(whole)) for _ in range(NUM_FLIPS))]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << chooser.randrange(8)
        path.write_bytes(damaged)
        assert is_found(folder, name), position
        loads_or_says(folder, name)


@pytest.mark.parametrize("change", ["cut", "empty", "missing"])
@pytest.mark.parametrize("name", CHECKED)
def test_a_file_that_is_not_whole_is_found(name: str, change: str, folder: Path) -> None:
    change_file(folder / name, change)
    if change != "missing" or name.endswith(".effx"):
        assert is_found(folder, name)
        loads_or_says(folder, name)
    elif name == "step-4/manifest.json":  # the step is no checkpoint then; the one before it loads
        checks.check_loads(folder, NEWEST - 1)
    elif name == "step-1/manifest.json":  # neither is what is merged, which needs it no longer
        assert loads_or_says(folder, name)
    else:  # a sum that nobody wrote, a merged copy of what is still there
        assert not is_found(folder, name)
        assert loads_or_says(folder, name)


@pytest.mark.parametrize("change", ["flip", "cut", "empty", "missing"])
@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_describes_harms_nothing(name: str, change: str, folder: Path) -> None:
    change_file(folder / name, change)
    assert loads_or_says(folder, name)
    if (name, change) == ("step-1/moments-removed", "missing"):
        assert is_found(folder, name), "its moments are missing now"
        return
    assert not is_found(folder, name)
    checks.check_next_start(folder)


def test_a_step_without_moments_says_so(folder: Path) -> None:
    run = checks.small_run()
    with (
        pytest.raises(CheckpointNotFoundError, match="moments were removed"),
        Checkpointer(folder, lossless()) as checkpointer,
    ):
        checkpointer.load(run.model, run.optimizer, step=KEPT_FOR_WEIGHTS)


def change_file(path: Path, change: str) -> None:
    whole = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "flip":
        path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    else:
        path.write_bytes(whole[:-1] if change == "cut" else b"")
