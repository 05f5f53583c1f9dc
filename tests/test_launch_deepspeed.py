"""The DeepSpeed script: started by each launcher, killed, and resumed on other ranks and at another stage."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from effx_dist.report.run_log import RunRecords
from launch.processes import Job, torchrun
from launch.ranks import free_port
from launch.resume_check import GlobalBatch, check_resume
from tests import small_llama
from tests.deepspeed_runs import merged, needs_deepspeed
from tests.launch_runs import batches_of, held_by, killed_when_held, records_of
from tests.mpi_runs import by_mpirun, has_mpi, needs_mpi

needs_llama = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
pytestmark = [needs_deepspeed, needs_llama, pytest.mark.deepspeed, pytest.mark.ranks]

SCRIPT = Path(__file__).parents[1] / "launch" / "pretrain_llama_deepspeed.py"
BIN = Path(sys.executable).parent
SAVED_AT, KILLED_AT = 30, 32
"""Within the first pruned epoch, which begins with step 26."""
ENGINE = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": 0.05}},
    "effx": {"infobatch": {"delta": 0.7}, "cautious": {}, "excp": {"profile": "lossless"}},
}


@dataclass(frozen=True)
class Files:
    """Where the runs of this module are, and their settings."""

    folder: Path

    def config_of(self, stage: int) -> Path:
        path = self.folder / f"zero{stage}.json"
        path.write_text(json.dumps(merged(ENGINE, {"zero_optimization": {"stage": stage}})))
        return path

    def job(self, launcher: Sequence[str], name: str, stage: int) -> Job:
        """A start of the script in the folder `name`; what it prints goes to a log beside it."""
        arguments = ["--deepspeed", "--deepspeed_config", str(self.config_of(stage))]
        arguments += ["--config", str(self.folder / "settings.toml"), "--log-samples"]
        command = [*launcher, str(SCRIPT), *arguments, "--run-dir", str(self.folder / name)]
        return Job(name, command, self.folder / f"{name}-zero{stage}.log", {})

    def run(self, launcher: Sequence[str], name: str, stage: int) -> RunRecords:
        return records_of(self.job(launcher, name, stage), self.folder / name)


def by_deepspeed(num_ranks: int) -> list[str]:
    return [str(BIN / "deepspeed"), "--master_port", free_port(), "--num_gpus", str(num_ranks)]


def by_torchrun(num_ranks: int) -> list[str]:
    return torchrun(sys.executable, num_ranks, SCRIPT, [])[:-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("launch_deepspeed")
    texts = small_llama.write_texts(folder / "texts", num_texts=40, num_words=80)
    settings = small_llama.settings(
        texts, max_samples=200, num_epochs=5, eval_every_steps=5, eval_batch_size=1
    )
    (folder / "settings.toml").write_text(settings)
    return Files(folder)


@pytest.fixture(scope="module")
def whole(files: Files) -> RunRecords:
    """The uninterrupted run, on 2 ranks at stage 2; by mpirun where there is one."""
    launcher = by_mpirun if has_mpi() else by_torchrun
    return files.run(launcher(2), "whole", stage=2)


@pytest.fixture(scope="module")
def killed(files: Files) -> dict[int, GlobalBatch]:
    """A run by DeepSpeed's launcher, on 2 ranks at stage 3, killed within an epoch that is pruned,
    some steps after a checkpoint of it; the samples of its steps."""
    job = files.job(held_by(by_deepspeed(2), KILLED_AT), "killed", stage=3)
    return killed_when_held(job, files.folder / "killed", SAVED_AT, KILLED_AT)


def check_continuation(
    files: Files, whole: RunRecords, before: dict[int, GlobalBatch], name: str, parts: RunRecords
) -> None:
    """What was resumed went on as if nothing had happened."""
    order, after = (batches_of(files.folder / run) for run in ("whole", name))
    (resumed,) = parts.events_of("resume")
    restored = int(resumed.fields["step"])
    epoch = before[restored].epoch
    planned = sum(len(batch.ids) for batch in order.values() if batch.epoch == epoch)
    assert planned < 200 or epoch == 4  # pruned, but in the last epoch
    assert check_resume(before, after, restored, planned).is_good
    assert min(after) == restored + 1
    kept = {step: batch for step, batch in before.items() if step <= restored}
    assert {**kept, **after} == order
    assert dict(parts.series("train/loss")) == pytest.approx(
        dict(whole.series("train/loss")), abs=2e-3
    )
    assert dict(parts.series("lr")) == pytest.approx(dict(whole.series("lr")))
    assert parts.records[-1].samples == whole.records[-1].samples


@needs_mpi
def test_mpirun_trains_with_all_three_techniques(whole: RunRecords) -> None:
    losses = [value for _, value in whole.series("eval/loss")]
    assert losses[-1] < losses[0] < 5.8  # the loss of guessing among 288 ids is 5.66
    assert min(value for _, value in whole.series("effx/infobatch/kept_fraction")) < 1
    assert all(0 < value < 1 for _, value in whole.series("effx/cautious/alignment"))
    assert all(value > 1 for _, value in whole.series("effx/checkpoint/ratio"))
    assert whole.events[0].fields["world_size"] == 2


def test_killed_under_zero3_goes_on_at_stage_1_on_1_rank(
    files: Files, whole: RunRecords, killed: dict[int, GlobalBatch]
) -> None:
    shutil.copytree(files.folder / "killed", files.folder / "on1")
    parts = files.run(by_torchrun(1), "on1", stage=1)
    check_continuation(files, whole, killed, "on1", parts)
    assert parts.latest("eval/loss") == pytest.approx(whole.latest("eval/loss"), abs=1e-3)


@pytest.mark.slow
def test_killed_under_zero3_goes_on_on_4_ranks(
    files: Files, whole: RunRecords, killed: dict[int, GlobalBatch]
) -> None:
    shutil.copytree(files.folder / "killed", files.folder / "on4")
    parts = files.run(by_deepspeed(4), "on4", stage=3)
    check_continuation(files, whole, killed, "on4", parts)
