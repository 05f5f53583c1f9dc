"""Which of the settings file, the DeepSpeed configuration and the command line says what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from effx_dist.config import EffxConfig
from effx_dist.errors import ConfigError
from launch.llama.deepspeed_config import AUTO, PLACES, read_run, value_at

CONFIGS = Path(__file__).parents[1] / "configs"
SETTINGS = CONFIGS / "llama_demo_fsdp2.toml"
IN_SETTINGS = {"lr": 2e-3, "global_batch_size": 32, "clip_norm": 1.0}


def written(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("ds_*.json")), ids=lambda path: path.stem)
def test_every_configuration_here_is_complete(path: Path) -> None:
    settings, config = read_run(SETTINGS, path)
    for place in PLACES.values():
        assert value_at(config, place) not in (None, AUTO)
    assert config["train_batch_size"] == settings.train.global_batch_size
    block = EffxConfig.from_dict(config)
    assert block.infobatch
    assert block.cautious
    assert block.excp


@pytest.mark.parametrize("stated", [None, "auto", 7e-4])
@pytest.mark.parametrize("override", [None, 3e-4])
def test_command_line_before_deepspeed_before_settings(
    tmp_path: Path, stated: Any, override: float | None
) -> None:
    params = {} if stated is None else {"lr": stated}
    path = written(tmp_path, {"optimizer": {"type": "AdamW", "params": params}})
    overrides = [] if override is None else [f"train.lr={override}"]
    settings, config = read_run(SETTINGS, path, overrides)
    in_file = IN_SETTINGS["lr"] if stated in (None, "auto") else stated
    expected = in_file if override is None else override
    assert settings.train.lr == config["optimizer"]["params"]["lr"] == expected


def test_what_the_file_does_not_say_comes_from_the_settings(tmp_path: Path) -> None:
    settings, config = read_run(SETTINGS, written(tmp_path, {"bf16": {"enabled": True}}))
    assert config["train_batch_size"] == IN_SETTINGS["global_batch_size"]
    assert config["gradient_clipping"] == IN_SETTINGS["clip_norm"]
    assert config["optimizer"]["type"] == "AdamW"
    assert config["bf16"] == {"enabled": True}
    assert settings.effx == {}  # the block is the DeepSpeed file's alone


def test_lion_gets_no_eps(tmp_path: Path) -> None:
    _, config = read_run(SETTINGS, written(tmp_path, {"optimizer": {"type": "Lion"}}))
    assert value_at(config, ("optimizer", "params", "eps")) is None
    assert value_at(config, ("optimizer", "params", "weight_decay")) == 0.1


def test_a_plain_run_takes_every_sample_and_keeps_exact_checkpoints(tmp_path: Path) -> None:
    block = {name: {"enabled": False} for name in ("infobatch", "cautious", "excp")}
    for effx in ({}, {"effx": block}):
        _, config = read_run(SETTINGS, written(tmp_path, effx))
        found = EffxConfig.from_dict(config)
        assert found.infobatch
        assert found.infobatch.enabled
        assert found.infobatch.prune_ratio == 0
        assert found.cautious is None or not found.cautious.enabled
        assert found.excp
        assert found.excp.profile == "lossless"


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps: leave it out"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: leave it out"),
        ({"effx": {"pruning": {}}}, "pruning"),
        ({"train_batch_size": -1}, "global_batch_size=-1"),
    ],
)
def test_refused(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_run(SETTINGS, written(tmp_path, config))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json: no such"):
        read_run(SETTINGS, tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match=r"torn\.json: not valid JSON"):
        read_run(SETTINGS, tmp_path / "torn.json")
