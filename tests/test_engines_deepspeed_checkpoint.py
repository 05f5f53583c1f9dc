"""Checkpoints of DeepSpeed engines at other stages and world sizes: the same bits, and training goes on.

All that needs one number of ranks runs in one spawn: 2 ranks save, 1 and 3 ranks load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import inspect_folder, verify_folder
from effx_dist.checkpoint.tools.convert import convert_checkpoint
from tests.deepspeed_checkpoint_runs import (
    ADAMW,
    BF16,
    CAUTIOUS,
    LOSSLESS,
    OFFLOAD,
    SMALL,
    TORCHS,
    assert_cast,
    assert_same,
    frozen_of,
    make_engine,
    state_of,
    train,
)
from tests.deepspeed_runs import BASE, Model, be_a_rank, merged, needs_deepspeed, two_groups
from tests.ranks import spawn

pytestmark = [pytest.mark.ranks, pytest.mark.deepspeed, needs_deepspeed]

# What 2 ranks save


WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}
SAVED: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "stage 3": (3, merged(SMALL, WARMUP), CAUTIOUS),
    "bf16": (2, BF16, TORCHS),
}


def save_all(folder: Path) -> dict[str, Any]:
    be_a_rank()
    found: dict[str, Any] = {}
    for name, (stage, config, block) in SAVED.items():
        engine = make_engine(stage, config, block=block)
        train(engine, 2)
        state = {"epoch": 3, "step": 77, "seen": torch.arange(3), "none": None, "t": (1, 2.5)}
        assert engine.save_checkpoint(str(folder / name), client_state=state) is True
        saved, frozen = state_of(engine), frozen_of(engine)
        assert_cast(engine, saved)
        losses = train(engine, 2)  # the save goes on meanwhile
        engine.destroy()
        assert (folder / name / "latest").read_text() == "global_step2\n"
        found[name] = (saved, frozen, losses)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, spawn(2, save_all, folder / "ranks", folder)


def test_files_hold_masters_and_moments_once(saved: tuple[Path, list[dict[str, Any]]]) -> None:
    """Names and dtypes as FSDP2's: no 16-bit copy, no padding."""
    folder, of_ranks = saved
    for name in SAVED:
        assert not verify_folder(folder / name).findings
        [step] = inspect_folder(folder / name)
        assert (step.name, step.kind, step.world_size) == ("global_step2", "base", 2)
        manifest = json.loads((folder / name / "global_step2" / "manifest.json").read_text())
        tensors = manifest["tensors"]
        state, frozen, _ = of_ranks[0][name]
        stored = {n: t for n, t in tensors.items() if n.startswith(("model.", "optimizer."))}
        expected = state | {f"model.frozen.{n}": t for n, t in frozen.items()}
        assert {n: (tuple(t["shape"]), t["dtype"]) for n, t in stored.items()} == {
            n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in expected.items()
        }
        assert manifest["aliases"] == {"model.head.weight": "model.embed.weight"}


# What other numbers of ranks load


LOADED: dict[str, list[tuple[str, int, dict[str, Any], dict[str, Any]]]] = {
    "unmarked": [("stage 3", 1, {}, CAUTIOUS), ("bf16", 3, merged(BF16, SMALL), TORCHS)],
    "slow": [
        ("stage 3", 0, {}, TORCHS),
        ("stage 3", 2, {"zero_optimization": {"round_robin_gradients": True}}, CAUTIOUS),
        ("stage 3", 2, OFFLOAD, CAUTIOUS),
        ("stage 3", 3, merged(OFFLOAD, SMALL), LOSSLESS),
        ("bf16", 0, BF16, CAUTIOUS),
        ("bf16", 1, BF16, CAUTIOUS),
        ("bf16", 1, merged(BF16, {"bf16": {"immediate_grad_update": True}}), TORCHS),
        ("bf16", 2, merged(BF16, OFFLOAD), LOSSLESS),
        ("bf16", 3, merged(BF16, OFFLOAD, SMALL), CAUTIOUS),
    ],
}


def load_all(folder: Path, cases: str, expected: dict[str, Any]) -> None:
    be_a_rank()
    for name, stage, config, block in LOADED[cases]:
        engine = make_engine(stage, config, block=block)
        with torch.no_grad():
            engine.module.frozen.bias.add_(1)
        path, client_state = engine.load_checkpoint(str(folder / name))
        assert path == str(folder / name / "global_step2")
        assert torch.equal(client_state.pop("seen"), torch.arange(3))
        assert client_state == {"epoch": 3, "step": 77, "none": None, "t": (1, 2.5)}
        state, frozen, _ = expected[name]
        assert_same(state_of(engine), state)
        assert_same(frozen_of(engine), frozen)
        assert_cast(engine, state)
        assert (engine.global_steps, engine.skipped_steps) == (2, 0)
        assert engine.global_samples == 8  # 2 steps of 2 ranks and 2 samples
        train(engine, 2)
        after = state_of(engine)
        assert all(bool(t.isfinite().all()) for t in after.values())
        assert not torch.equal(after["model.cube"], state["model.cube"])
        assert after["optimizer.cube.step"] == 4
        engine.destroy()


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("cases", ["unmarked", pytest.param("slow", marks=pytest.mark.slow)])
def test_another_stage_on_other_ranks_goes_on_from_the_same_bits(
    world: int, cases: str, saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, of_ranks = saved
    spawn(world, load_all, tmp_path, folder, cases, of_ranks[0])


# What DeepSpeed reads without this library


def load_universal(folder: Path, stage: int, expected: dict[str, Any]) -> None:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    be_a_rank()
    universal = {"checkpoint": {"load_universal": True}, "zero_allow_untested_optimizer": True}
    config = merged(BASE, TORCHS, ADAMW, {"zero_optimization": {"stage": stage}}, universal, WARMUP)
    del config["effx"]
    model = Model()
    engine = deepspeed.initialize(model=model, model_parameters=two_groups(model), config=config)[0]
    _, client_state = engine.load_checkpoint(str(folder))
    assert (client_state["epoch"], client_state["step"]) == (3, 77)
    assert (engine.global_steps, engine.global_samples, engine.skipped_steps) == (2, 8, 0)
    assert engine.lr_scheduler.last_batch_iteration == 1
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            assert torch.equal(safe_get_full_fp32_param(param), expected[f"model.{name}"])
            for key in ("exp_avg", "exp_avg_sq"):
                found = safe_get_full_optimizer_state(param, key)
                assert torch.equal(found, expected[f"optimizer.{name}.{key}"])
    engine.destroy()


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_reads_it_as_a_universal_checkpoint(
    stage: int, saved: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, of_ranks = saved
    convert_checkpoint(folder / "stage 3", "universal", tmp_path / "out")
    state, _, _ = of_ranks[0]["stage 3"]
    spawn(3, load_universal, tmp_path / "ranks", tmp_path / "out", stage, state)
