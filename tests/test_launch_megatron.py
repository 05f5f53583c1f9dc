"""The Megatron script: trained, killed, and resumed at other tensor-, pipeline- and data-parallel sizes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import typer
from typer.testing import CliRunner

from effx_dist.cli import app
from effx_dist.errors import ConfigError
from effx_dist.report.run_log import RunRecords
from launch.llama.blocks import BlockDataset
from launch.llama.evaluate import held_out_loss
from launch.llama.megatron_settings import MegatronRunSettings
from launch.processes import Job, torchrun
from launch.resume_check import GlobalBatch, check_resume
from tests import small_llama
from tests.launch_runs import batches_of, held_by, killed_when_held, records_of
from tests.megatron_processes import needs_megatron
from tests.mpi_runs import by_mpirun, needs_mpi

pytestmark = [needs_megatron, pytest.mark.megatron, pytest.mark.ranks]

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "pretrain_gpt_megatron.py"
ON_CPU = ROOT / "tests" / "megatron_launch.py"
SAVED_AT, KILLED_AT = 16, 18
"""Within the pruned epoch, which begins with step 13."""
SETTINGS = """
[megatron]
precision = "fp32"
distributed_backend = "gloo"
[effx.infobatch]
delta = 0.7
[effx.cautious]
[effx.excp]
profile = "lossless"
"""
DP2: dict[str, Any] = {}
TP2 = {"megatron.tensor_model_parallel_size": 2}
PP2 = {"megatron.pipeline_model_parallel_size": 2}


def by_torchrun(num_ranks: int) -> list[str]:
    return torchrun(sys.executable, num_ranks, ON_CPU, [])


@dataclass(frozen=True)
class Files:
    """Where the runs of this module are, and their settings."""

    folder: Path

    def job(self, launcher: Sequence[str], name: str, layout: Mapping[str, Any]) -> Job:
        """A start of the script in the folder `name`; what it prints goes to a log beside it."""
        arguments = ["--config", str(self.folder / "settings.toml"), "--log-samples"]
        arguments += ["--run-dir", str(self.folder / name)]
        for key, value in {"checkpoint.every_steps": 4, **layout}.items():
            arguments += ["--set", f"{key}={value}"]
        command = [*launcher, str(SCRIPT), *arguments]
        return Job(name, command, self.folder / f"{name}.log", {"OMP_NUM_THREADS": "1"})

    def run(self, launcher: Sequence[str], name: str, layout: Mapping[str, Any]) -> RunRecords:
        return records_of(self.job(launcher, name, layout), self.folder / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("launch_megatron")
    texts = small_llama.write_texts(folder / "texts", num_texts=30, num_words=60)
    settings = small_llama.settings(
        texts, max_samples=96, num_epochs=3, eval_every_steps=12, eval_batch_size=2
    )
    (folder / "settings.toml").write_text(settings + SETTINGS)
    return Files(folder)


@pytest.fixture(scope="module")
def killed(files: Files) -> dict[int, GlobalBatch]:
    """A data-parallel run on 2 ranks, killed within the pruned epoch, some steps after a checkpoint of
    it; the samples of its steps."""
    job = files.job(held_by(by_torchrun(2), KILLED_AT), "killed", DP2)
    return killed_when_held(job, files.folder / "killed", SAVED_AT, KILLED_AT)


@pytest.fixture(scope="module")
def whole(files: Files) -> RunRecords:
    """The uninterrupted run: two data-parallel ranks."""
    return files.run(by_torchrun(2), "whole", DP2)


def resumed(
    files: Files,
    before: Mapping[int, GlobalBatch],
    launcher: Sequence[str],
    name: str,
    layout: Mapping[str, Any],
) -> RunRecords:
    """The killed run gone on with; no sample of its epoch is repeated or skipped."""
    shutil.copytree(files.folder / "killed", files.folder / name)
    records = files.run(launcher, name, layout)
    (event,) = records.events_of("resume")
    step = int(event.fields["step"])
    epoch = before[step].epoch
    plans = {
        int(event.fields["planned_samples"])
        for event in records.events_of("epoch")
        if event.fields["epoch"] == epoch
    }
    (planned,) = plans  # of the killed run and of this one
    assert 0 < planned < 96
    after = batches_of(files.folder / name)
    check = check_resume(dict(before), after, step, planned)
    assert check.is_good, str(check)
    assert min(after) == step + 1
    return records


@pytest.fixture(scope="module")
def tp2(files: Files, killed: dict[int, GlobalBatch]) -> RunRecords:
    return resumed(files, killed, by_torchrun(2), "tp2", TP2)


def test_killed_on_two_data_ranks_it_goes_on_on_two_tensor_ranks(tp2: RunRecords) -> None:
    records = tp2
    assert records.records[-1].samples == 8 * records.records[-1].step
    losses = [value for _, value in records.series("eval/loss")]
    assert losses[-1] < losses[0] < 5.8  # the loss of guessing among 288 ids is 5.66
    assert all(0 < value < 1 for _, value in records.series("effx/cautious/alignment"))
    assert all(value > 1 for _, value in records.series("effx/checkpoint/ratio"))
    rates = [value for _, value in records.series("lr")]
    assert rates[-1] == pytest.approx(3e-4, rel=0.05)  # min_lr_ratio of 3e-3, with the data's end
    assert rates[0] > 0


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_the_trained_model_is_a_llama_of_transformers(files: Files, tp2: RunRecords) -> None:
    from transformers import LlamaForCausalLM

    converted = files.folder / "converted"
    arguments = ["convert", str(files.folder / "tp2" / "checkpoints"), str(converted)]
    done = CliRunner().invoke(app, [*arguments, "--to", "safetensors"])
    assert done.exit_code == 0, done.output
    model = LlamaForCausalLM.from_pretrained(converted)
    (blocks,) = (files.folder / "cache").glob("held_out-*.npy")
    found = held_out_loss(model, BlockDataset(blocks, 13), 4, torch.device("cpu"))
    assert found == pytest.approx(tp2.latest("eval/loss"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [DP2, TP2, PP2], ids=str)
def test_resumed_anywhere_it_is_the_uninterrupted_run(
    files: Files, killed: dict[int, GlobalBatch], whole: RunRecords, layout: dict[str, Any]
) -> None:
    name = f"again-{'-'.join(layout) or 'dp2'}"
    records = resumed(files, killed, by_torchrun(2), name, layout)
    expected, order = dict(whole.series("train/loss")), batches_of(files.folder / "whole")
    assert dict(records.series("train/loss")) == pytest.approx(expected, abs=2e-3)
    assert dict(records.series("lr")) == pytest.approx(dict(whole.series("lr")))
    assert records.latest("eval/loss") == pytest.approx(whole.latest("eval/loss"), abs=2e-3)
    after = batches_of(files.folder / name)
    assert after == {step: batch for step, batch in order.items() if step in after}
    assert max(after) == max(order)


@pytest.mark.slow
@needs_mpi
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({**TP2, "megatron.precision": "bf16"}, id="tp2-dp2-bf16"),
        # the last steps are not a whole stretch of the log: its first stage has no losses of them
        pytest.param({**TP2, **PP2, "log.every_steps": 7}, id="tp2-pp2"),
    ],
)
def test_mpirun_goes_on_on_four_ranks(
    files: Files,
    killed: dict[int, GlobalBatch],
    layout: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id
    records = resumed(files, killed, [*by_mpirun(4), str(ON_CPU)], name, layout)
    losses = [value for _, value in records.series("train/loss")]
    assert losses[-1] < losses[0]
    assert records.events_of("end")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.filterwarnings("ignore")  # megatron.core, of what is not installed beside it
def test_without_a_gpu_it_says_what_to_use(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    from launch import pretrain_gpt_megatron

    with mock.patch.dict(os.environ), pytest.raises(typer.Exit) as ended:
        pretrain_gpt_megatron.main(files.folder / "settings.toml", files.folder / "none")
    assert ended.value.exit_code == 2
    message = capsys.readouterr().err
    assert "Megatron-core computes on GPUs only" in message
    assert "pretrain_llama_fsdp2.py" in message


def test_the_demo_settings_can_be_used() -> None:
    settings = MegatronRunSettings.from_file(ROOT / "configs" / "megatron_llama_demo.toml")
    assert MegatronRunSettings.from_dict(settings.model_dump()) == settings
    assert settings.effx_config().infobatch is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("megatron.pipeline_model_parallel_size=2", r"num_layers=3: must be a multiple"),
        ("megatron.tensor_model_parallel_size=3", r"num_heads=4: must be a multiple"),
        ("megatron.tensor_parallel=2", "did you mean 'tensor_model_parallel_size'"),
        ("megatron.precision=fp16", "bf16"),
    ],
)
def test_settings_that_cannot_be_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MegatronRunSettings.from_file(ROOT / "configs" / "megatron_llama_demo.toml", [override])
