"""Settings of a run: strict keys, overrides, and every file in configs/."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from effx_dist.config import EffxConfig
from effx_dist.errors import ConfigError
from launch.llama.model import llama_config
from launch.llama.settings import RunSettings, apply_override, to_toml

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*_fsdp2.toml"))
DEMO = Path(__file__).parents[1] / "configs" / "llama_demo_fsdp2.toml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_read_and_written_back_the_same(path: Path, tmp_path: Path) -> None:
    settings = RunSettings.from_file(path)
    (tmp_path / "again.toml").write_text(settings.to_toml())
    assert RunSettings.from_file(tmp_path / "again.toml") == settings
    assert EffxConfig.from_file(path) == settings.effx_config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_model_of_every_config_has_the_size_that_its_first_line_gives(path: Path) -> None:
    settings = RunSettings.from_file(path)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config(settings.model, settings.data.seq_len))
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert f" {num_parameters / 1e6:,.1f} million parameters" in path.read_text().splitlines()[0]


def test_there_is_a_config_for_every_published_size() -> None:
    assert {"9m", "60m", "100m", "350m", "1b"} <= {path.stem.split("_")[1] for path in CONFIGS}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate=1", "unknown key 'learning_rate'"),
        ("train.micro_batch=1", "did you mean 'micro_batch_size'"),
        ("trian.lr=1", "unknown key 'trian'; did you mean 'train'"),
        ("effx.infobatch.prune_rate=0.5", "prune_ratio"),
        ("effx.infobatch.num_epochs=9", "train.num_epochs"),
        ("effx.pruning.enabled=true", "pruning"),
        ("train.lr=fast", r"train\.lr='fast'"),
        ("train.lr=-1", r"train\.lr=-1"),
        ("model.num_heads=5", "must be a multiple of num_heads=5"),
        ("checkpoint.resume=sometimes", "checkpoint.resume"),
        ("train=3", "section.key=value"),
        ("train.lr", "section.key=value"),
        ("train.lr.high=3", "is a value, not a section"),
    ],
)
def test_what_is_wrong_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunSettings.from_file(DEMO, [override])


def test_overrides_are_toml_values_or_plain_strings() -> None:
    settings = RunSettings.from_file(
        DEMO,
        [
            "train.lr=1e-4",
            "train.betas=[0.9, 0.999]",
            "data.source=some/folder with spaces",
            "checkpoint.resume=120",
            "log.tensorboard=false",
            "effx.excp.enabled=false",
        ],
    )
    assert settings.train.lr == 1e-4
    assert settings.train.betas == (0.9, 0.999)
    assert settings.data.source == "some/folder with spaces"
    assert settings.checkpoint.resume == 120
    assert settings.log.tensorboard is False
    excp = settings.effx_config().excp
    assert excp is not None
    assert not excp.enabled


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: no such settings file"):
        RunSettings.from_file(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[train\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML"):
        RunSettings.from_file(tmp_path / "bad.toml")


keys = st.text("abcdefgh_", min_size=1, max_size=5)
values = (
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.lists(st.integers(-9, 9), max_size=3)
)


@given(st.dictionaries(keys, values | st.dictionaries(keys, values, max_size=3), max_size=4))
def test_toml_is_read_back_as_written(table: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(table)) == table


@given(values)
def test_override_takes_any_toml_value(value: object) -> None:
    table: dict[str, Any] = {}
    apply_override(table, "a.b=" + to_toml({"x": value}).removeprefix("x = ").rstrip("\n"))
    assert table == {"a": {"b": value}}
