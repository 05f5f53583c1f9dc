"""Folders that DeepSpeed itself wrote become a chain of the engine's own master weights and moments."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.places import location
from effx_dist.checkpoint.tools.compress import ReadOptions, compress_series
from effx_dist.checkpoint.tools.compress.deepspeed import STAND_INS
from effx_dist.checkpoint.tools.compress.torch_file import load_torch
from effx_dist.errors import ConfigError, CorruptCheckpointError
from effx_dist.shard import Group, SoloGroup
from tests import plain_series as plain
from tests.deepspeed_checkpoint_runs import (
    BF16,
    FP16,
    SMALL,
    State,
    frozen_of,
    make_engine,
    state_of,
    train,
)
from tests.deepspeed_runs import Model, be_a_rank, needs_deepspeed, two_groups
from tests.plain_series import LOSSLESS, assert_same
from tests.ranks import spawn
from tests.thread_ranks import run_ranks

TORCHS: dict[str, Any] = {"optimizer": {"params": {"torch_adam": True}}}
STEPS = (1, 2)
Run = tuple[int, list[Mapping[str, Any]]]
FEW: dict[str, Run] = {"zero2": (2, [TORCHS])}
MANY: dict[str, Run] = {
    "without": (0, [TORCHS]),
    "without bf16": (0, [TORCHS, BF16]),
    "zero1 bf16": (1, [TORCHS, BF16]),
    "zero2 fp16": (2, [FP16]),
    "zero3 bf16": (3, [BF16]),
    "zero3 small": (3, [TORCHS, SMALL]),
}


def save_runs(folder: Path, runs: dict[str, Run]) -> dict[str, list[State]]:
    """On each rank: every run, saved by DeepSpeed after each step, and its state as it was then."""
    be_a_rank()
    found: dict[str, list[State]] = {}
    for name, (stage, configs) in runs.items():
        engine = make_engine(stage, *configs, block={})
        engine.tput_timer.steps_per_output = None
        for _ in STEPS:
            train(engine)
            engine.save_checkpoint(str(folder / name), client_state={"note": [1, "two"]})
            frozen = {f"model.frozen.{n}": t for n, t in frozen_of(engine).items()}
            found.setdefault(name, []).append(state_of(engine) | frozen)
        engine.destroy()
    return found


def saved(folder: Path, runs: dict[str, Run]) -> dict[str, list[State]]:
    found: dict[str, list[State]] = spawn(2, save_runs, folder / "ranks", folder, runs)[0]
    return found


@pytest.fixture(scope="module")
def zero2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder / "zero2", saved(folder, FEW)["zero2"]


def names_by_group() -> list[list[str]]:
    """As two_groups gives the parameters of the model to the engine."""
    model = Model()
    name_of = {id(param): name for name, param in model.named_parameters()}
    return [[name_of[id(param)] for param in group["params"]] for group in two_groups(model)]


def check(series: Path, expected: list[State], folder: Path, options: ReadOptions) -> None:
    """Values, at one rank and at two; and that a plain model and optimizer load them."""

    def body(group: Group) -> None:
        compress_series([series], folder / "two", LOSSLESS, options=options, group=group)

    run_ranks(2, body)
    compress_series([series], folder / "one", LOSSLESS, options=options)
    for step, state in zip(STEPS, expected, strict=True):
        for chain in ("one", "two"):
            assert_same(plain.values_of(folder / chain, step), state)
        model = Model()
        optimizer = torch.optim.AdamW(two_groups(model))
        with Checkpointer(folder / "one", LOSSLESS, group=SoloGroup()) as checkpoints:
            if not any(tensor.dtype != torch.float32 for tensor in state.values()):
                extra = checkpoints.load(model, optimizer, step=step)
                assert extra["note"] == [1, "two"]
                assert extra["deepspeed"]["global_steps"] == step
                assert optimizer.param_groups[0]["lr"] == 0.03
                held = {f"model.{name}": tensor for name, tensor in model.named_parameters()}
                assert_same({n: t.detach() for n, t in held.items()}, {n: state[n] for n in held})


pytestmark = [pytest.mark.ranks, pytest.mark.deepspeed, needs_deepspeed]


class TestZero2:
    def test_masters_and_moments(self, zero2: tuple[Path, list[State]], tmp_path: Path) -> None:
        series, expected = zero2
        before = plain.digests(series)
        check(series, expected, tmp_path, ReadOptions())
        assert plain.digests(series) == before
        manifest = read_manifest(location(tmp_path / "one/step-2"))[0]
        assert manifest.kind == "link"
        assert manifest.aliases == {"model.head.weight": "model.embed.weight"}

    def test_weights_only(self, zero2: tuple[Path, list[State]], tmp_path: Path) -> None:
        series, expected = zero2
        options = ReadOptions(weights_only=True)
        compress_series([series / "global_step2"], tmp_path / "out", LOSSLESS, options=options)
        weights = {n: t for n, t in expected[1].items() if n.startswith("model.")}
        assert_same(plain.values_of(tmp_path / "out", 2), weights)

    def test_a_rank_whose_file_is_missing(
        self, zero2: tuple[Path, list[State]], tmp_path: Path
    ) -> None:
        shutil.copytree(zero2[0], tmp_path / "series")
        next((tmp_path / "series/global_step2").glob("*rank_1_*optim*")).unlink()
        with pytest.raises(
            CorruptCheckpointError, match=r"global_step2: was saved by 2 ranks; .* 1 "
        ):
            compress_series([tmp_path / "series"], tmp_path / "out")

    def test_a_flat_vector_that_is_cut_short_or_moved(
        self, zero2: tuple[Path, list[State]], tmp_path: Path
    ) -> None:
        for name, message in [("cut", "lies at"), ("moved", "lies at")]:
            folder = tmp_path / name / "global_step2"
            shutil.copytree(zero2[0] / "global_step2", folder)
            path = next(folder.glob("*rank_0_*optim*"))
            content = torch.load(path, weights_only=False)
            flats = content["optimizer_state_dict"]["single_partition_of_fp32_groups"]
            flats[0] = flats[0][:-4] if name == "cut" else torch.cat([flats[0], flats[0][:4]])
            torch.save(content, path)
            with pytest.raises(CorruptCheckpointError, match=message):
                compress_series([folder], tmp_path / "out")

    def test_a_tensor_parallel_run_is_refused(
        self, zero2: tuple[Path, list[State]], tmp_path: Path
    ) -> None:
        folder = tmp_path / "global_step2"
        shutil.copytree(zero2[0] / "global_step2", folder)
        shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_01_model_states.pt")
        with pytest.raises(ConfigError, match=r"mp_rank_01_model_states\.pt: is of a pipeline"):
            compress_series([folder], tmp_path / "out")

    def test_no_class_of_deepspeed_is_made(self, zero2: tuple[Path, list[State]]) -> None:
        """Nor any other: what stands in for those that it pickles holds attributes, and no code."""
        path = next((zero2[0] / "global_step2").glob("*_optim_states.pt"))
        state = load_torch(path, stand_ins=STAND_INS)["optimizer_state_dict"]
        assert type(state["zero_stage"]) is int
        assert (
            type(state["loss_scaler"]).__module__ == "effx_dist.checkpoint.tools.compress.deepspeed"
        )
        with pytest.raises(ConfigError, match=r"deepspeed\.runtime\.fp16\.loss_scaler\.LossScaler"):
            load_torch(path)


@pytest.mark.slow
def test_every_stage(tmp_path: Path) -> None:
    found = saved(tmp_path, MANY)
    for name, states in found.items():
        names = names_by_group() if name.startswith("without") else None
        options = ReadOptions(param_names=names)
        folder = tmp_path / "chains" / re.sub(r"\W", "_", name)
        check(tmp_path / name, states, folder, options)
    manifest = read_manifest(location(tmp_path / "chains/zero2_fp16/one/step-2"))[0]
    assert manifest.extra["stateful"]["loss_scaler"]["cur_scale"] > 1
