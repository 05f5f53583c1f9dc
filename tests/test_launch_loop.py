"""The plumbing of the loop, and the held-out loss, on one process."""

import math
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint import PendingSave
from effx_dist.checkpoint.format.manifest import Figures
from effx_dist.checkpoint.saving.saver import SaveResult
from effx_dist.errors import ConfigError, RankFailedError
from effx_dist.report.run_log import read_run
from launch.llama import loop
from launch.llama.blocks import BlockDataset, write_blocks
from launch.llama.evaluate import held_out_loss
from launch.llama.metrics import Metrics
from launch.llama.model import build_llama
from launch.llama.settings import ModelSettings, RunSettings, TrainSettings

CPU = torch.device("cpu")
DEMO = Path(__file__).parents[1] / "configs" / "llama_demo_fsdp2.toml"


def train_settings(global_batch_size: int, micro_batch_size: int) -> TrainSettings:
    return TrainSettings(
        num_epochs=1, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size, lr=1.0
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_accumulation_fills_the_global_batch(micro: int, world: int, steps: int) -> None:
    train = train_settings(micro * world * steps, micro)
    assert loop.accumulation_steps(train, world) == steps


def test_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_size=32.* 4 x 3 = 12"):
        loop.accumulation_steps(train_settings(32, 4), 3)


@given(st.integers(1, 5), st.integers(0, 6))
def test_windows_hold_the_batches_in_order(size: int, count: int) -> None:
    windows = list(loop.windows(range(size * count), size))
    assert [len(window) for window in windows] == [size] * count
    assert [batch for window in windows for batch in window] == list(range(size * count))


def test_resume_setting_chooses_the_step() -> None:
    def step(newest: int | None, resume: str) -> int | None:
        settings = RunSettings.from_file(DEMO, [f"checkpoint.resume={resume}"])
        checkpointer: Any = SimpleNamespace(newest=lambda: newest)
        return loop.resume_step(checkpointer, settings, Path("the_run"))

    assert step(None, "auto") is None
    assert step(40, "auto") == 40
    assert step(40, "20") == 20
    assert step(None, "never") is None
    with pytest.raises(ConfigError, match="the_run holds step 40"):
        step(40, "never")


def save_of(step: int) -> SaveResult:
    """What a committed save came to."""
    sizes = {"raw_bytes": 700, "stored_bytes": 10, "run_raw_bytes": 1200, "run_stored_bytes": 20}
    figures = Figures.model_validate({**sizes, "saves_since_base": 0, "error": 0.01})
    return SaveResult(step, "base", figures, write_s=0.2)


def test_finished_saves_are_logged_and_failed_ones_do_not_end_the_run(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, rank=0, num_epochs=1, tensorboard=False)
    full = RankFailedError({1: "the disk is full"})
    ends: dict[int, Future[SaveResult]] = {step: Future() for step in (10, 20, 30)}
    saves = [(step, PendingSave(step, end, blocked_s=0.1)) for step, end in ends.items()]
    ends[10].set_result(save_of(10))
    ends[20].set_exception(full)
    loop.log_finished_saves(saves, metrics)
    assert [step for step, _ in saves] == [30]
    ends[30].set_result(save_of(30))
    loop.log_finished_saves(saves, metrics, wait=True)
    assert not saves
    metrics.close()
    records = read_run(tmp_path)
    assert records.series("effx/checkpoint/ratio") == [(10, 70.0), (30, 70.0)]
    assert records.series("effx/checkpoint/run_ratio") == [(10, 60.0), (30, 60.0)]
    assert records.series("effx/checkpoint/blocked_s") == [(10, 0.1), (30, 0.1)]
    (failed,) = records.events_of("checkpoint_failed")
    assert failed.fields["step"] == 20
    assert "the disk is full" in failed.fields["error"]


def test_only_rank_zero_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (1, 0):
        metrics = Metrics(tmp_path, rank, num_epochs=2, tensorboard=False)
        metrics.log(3, {"train/loss": 2.5}, samples=96)
        metrics.show(0.5, "loss 2.5")
        metrics.close()
    assert read_run(tmp_path).series("train/loss") == [(3, 2.5)]
    assert capsys.readouterr().out == "epoch  0.500  loss 2.5\n"


def test_meter_gives_means_since_the_last_report() -> None:
    meter = loop.StepMeter(CPU)
    for losses in ([1.0, 2.0], [6.0]):
        meter.add_losses(torch.tensor(losses, requires_grad=True), num_tokens=8)
    with meter.optimizer_step(is_timed=True):
        pass
    report = meter.report()
    assert report["train/loss"] == pytest.approx(3.0)
    assert report["tokens_per_s"] > 0
    meter.add_losses(torch.tensor([5.0]), num_tokens=1)
    assert meter.report()["train/loss"] == 5.0


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_held_out_loss_is_the_mean_over_all_tokens(tmp_path: Path, batch_size: int) -> None:
    blocks = np.random.default_rng(0).integers(0, 60, (7, 9), dtype=np.uint32)
    write_blocks(tmp_path / "a.npy", [blocks], 9, 64)
    settings = ModelSettings(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, vocab_size=64
    )
    model = build_llama(settings, 8, 0)
    tokens = torch.from_numpy(blocks.astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    found = held_out_loss(model, BlockDataset(tmp_path / "a.npy"), batch_size, CPU)
    assert found == pytest.approx(float(wanted), rel=1e-5)
    assert model.training
    assert found == pytest.approx(math.log(64), abs=0.2)


def test_model_is_the_same_for_a_seed_and_leaves_the_random_state() -> None:
    settings = ModelSettings(
        hidden_size=16, intermediate_size=32, num_layers=1, num_heads=2, vocab_size=64
    )
    state = torch.get_rng_state()
    first, again, other = (build_llama(settings, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
