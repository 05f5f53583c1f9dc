"""The demo's own logic, and (slow) the demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from effx_dist.report.run_log import RunLog, read_run
from launch import demo
from launch.llama.settings import RunSettings
from launch.processes import RunFailedError

ROOT = Path(__file__).parents[1]


def test_only_a_folder_of_a_demo_is_emptied(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(RunFailedError, match="no demo's"):
        demo.empty_folder(mine)
    assert (mine / "thesis.txt").exists()
    for _ in range(2):
        demo.empty_folder(tmp_path / "new" / "demo")
        (tmp_path / "new" / "demo" / "old.log").write_text("from before")
    demo.empty_folder(tmp_path / "new" / "demo")
    assert not (tmp_path / "new" / "demo" / "old.log").exists()


def fill(run_dir: Path, committed: dict[int, bool], steps: dict[int, int]) -> None:
    """Checkpoint folders (True: with a manifest) and one rank's records of (step, epoch)."""
    for step, has_manifest in committed.items():
        folder = run_dir / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        if has_manifest:
            (folder / "manifest.json").touch()
    lines = [json.dumps({"step": s, "epoch": e, "ids": [s]}) for s, e in steps.items()]
    (run_dir / "samples.rank-0.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("committed", "last_step", "wanted"),
    [
        ({}, 9, False),  # no checkpoint
        ({4: True}, 8, True),
        ({4: True}, 7, False),  # too few steps since
        ({4: False}, 9, False),  # begun, not committed
        ({2: True}, 9, False),  # of the epoch before
        ({2: True, 4: True}, 9, True),
        ({4: True}, 11, False),  # the epoch is over
    ],
)
def test_the_kill_waits_for_a_checkpoint_within_the_epoch(
    tmp_path: Path, committed: dict[int, bool], last_step: int, wanted: bool
) -> None:
    epochs = {step: 0 if step < 3 else 1 if step < 11 else 2 for step in range(1, last_step + 1)}
    fill(tmp_path, committed, epochs)
    assert demo.is_time_to_kill(tmp_path) is wanted


def test_the_kill_waits_for_a_run_that_has_only_started(tmp_path: Path) -> None:
    assert not demo.is_time_to_kill(tmp_path)


def test_saved_samples_are_those_the_standing_run_did_not_process(tmp_path: Path) -> None:
    with RunLog(tmp_path / "plain", tensorboard=False) as log:
        log.log(10, {"train/loss": 2.0}, samples=1000)
    with RunLog(tmp_path / "effx", tensorboard=False) as log:
        log.log(8, {"train/loss": 2.0}, samples=800)
        log.event("resume", step=6)
        log.log(7, {"train/loss": 2.0, "effx/infobatch/samples_saved": 290.0}, samples=700)
    plain, effx = (read_run(tmp_path / name) for name in ("plain", "effx"))
    assert demo.sample_cells(plain, effx) == ("1,000", "700 (300 = 30.0% saved; 290 pruned)")


def test_a_run_without_a_result_is_a_failure(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"train/loss": 2.0})
    with pytest.raises(RunFailedError, match="no eval/loss"):
        demo.require(read_run(tmp_path), "eval/loss")
    with pytest.raises(RunFailedError, match="no checkpoint"):
        demo.checkpoint_rows(read_run(tmp_path))


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(1800)
def test_the_demo_ends_well(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "demo.py"), "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["resume_passed"]
    assert "<html" in (tmp_path / "demo" / "report.html").read_text().lower()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 7, 11, 31, 40])
def test_any_number_of_ranks_shares_out_one_global_batch(num_ranks: int) -> None:
    train = RunSettings.from_file(demo.CONFIG, ()).train
    global_batch = demo.global_batch_of(train, num_ranks)
    assert abs(global_batch - train.global_batch_size) < max(num_ranks, 2)
    for world in (num_ranks, 1):
        micro_batch = demo.micro_batch_of(train, global_batch // world)
        assert 1 <= micro_batch <= train.micro_batch_size
        assert global_batch % (micro_batch * world) == 0
