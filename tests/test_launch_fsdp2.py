"""The script that users run, started as they start it."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest

from effx_dist.report.run_log import RunRecords, read_run
from launch import pretrain_llama_fsdp2
from launch.processes import torchrun
from launch.resume_check import check_resume
from tests import small_llama
from tests.launch_runs import batches_of, take_batches
from tests.mpi_runs import by_mpirun, has_mpi

SCRIPT = Path(__file__).parents[1] / "launch" / "pretrain_llama_fsdp2.py"
STOP_STEP = 18
TECHNIQUES = """
[effx.infobatch]
num_epochs = 3
delta = 0.7
[effx.cautious]
[effx.excp]
profile = "lossless"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch_fsdp2")
    texts = small_llama.write_texts(folder / "texts", num_texts=30, num_words=60)
    path = folder / "settings.toml"
    settings = small_llama.settings(
        texts, max_samples=96, num_epochs=3, eval_every_steps=12, eval_batch_size=4
    )
    path.write_text(settings + TECHNIQUES)
    return path


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """What the script tells torch.distributed about this process, it does not tell other tests."""
    with mock.patch.dict(os.environ):
        yield


def by_torchrun(num_ranks: int) -> list[str]:
    return torchrun(sys.executable, num_ranks, SCRIPT, [])[:-1]


def run(launcher: Sequence[str], config: Path, run_dir: Path, *overrides: str) -> RunRecords:
    command = [*launcher, str(SCRIPT), "--config", str(config), "--run-dir", str(run_dir)]
    for override in overrides:
        command += ["--set", override]
    command.append("--log-samples")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_run(run_dir)


@pytest.mark.ranks
def test_resumed_run_on_another_world_size_equals_the_uninterrupted_one(
    config: Path, tmp_path: Path
) -> None:
    launcher = by_mpirun if has_mpi() else by_torchrun
    whole = run(launcher(2), config, tmp_path / "whole")
    order = batches_of(tmp_path / "whole")
    run(by_torchrun(2), config, tmp_path / "parts", f"train.max_steps={STOP_STEP}")
    before = take_batches(tmp_path / "parts")
    parts = run([sys.executable], config, tmp_path / "parts")
    after = batches_of(tmp_path / "parts")

    assert list(before) == list(range(1, STOP_STEP + 1))
    assert order[STOP_STEP].epoch == order[STOP_STEP + 1].epoch == 1
    assert {**before, **after} == order
    planned = sum(len(batch.ids) for batch in order.values() if batch.epoch == 1)
    assert planned < 96
    assert check_resume(before, after, STOP_STEP, planned).is_good

    assert parts.events_of("resume")[0].fields["step"] == STOP_STEP
    assert parts.latest("eval/loss") == pytest.approx(whole.latest("eval/loss"), abs=1e-4)
    assert dict(parts.series("lr")) == pytest.approx(dict(whole.series("lr")))
    assert (parts.records[-1].step, parts.records[-1].samples) == (
        whole.records[-1].step,
        whole.records[-1].samples,
    )
    first, last = whole.series("eval/loss")[0][1], whole.latest("eval/loss")
    assert last is not None
    assert last < first < 5.6  # the loss of guessing among 288 ids is 5.66


def test_plain_run_takes_every_sample_and_writes_no_checkpoint(
    config: Path, tmp_path: Path
) -> None:
    overrides = [f"effx.{name}.enabled=false" for name in ("infobatch", "cautious", "excp")]
    overrides.append("checkpoint.every_steps=0")
    pretrain_llama_fsdp2.main(config, tmp_path, overrides, log_samples=True)
    records = read_run(tmp_path)
    batches = batches_of(tmp_path)
    for epoch in range(3):
        ids = [id_ for batch in batches.values() if batch.epoch == epoch for id_ in batch.ids]
        assert sorted(ids) == list(range(96))
    assert not (tmp_path / "checkpoints").exists()
    assert records.latest("effx/cautious/alignment") is None
    assert records.latest("effx/infobatch/kept_fraction") == 1.0
    assert {"train/loss", "lr", "tokens_per_s", "epoch"} <= set(records.metric_names())


def test_a_run_that_is_over_takes_no_step_when_started_again(config: Path, tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        pretrain_llama_fsdp2.main(config, tmp_path, ["train.max_steps=3"])
        records = read_run(tmp_path)
        assert records.records[-1].step == 3
        losses.append(records.latest("eval/loss"))
    assert len(records.events_of("resume")) == 1
    assert losses[0] == losses[1]
