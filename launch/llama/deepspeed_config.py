"""A DeepSpeed configuration beside the settings file of a run: which of the two says what.

The settings file says what is trained and on what; the DeepSpeed file how, and which of the three
techniques ("effx") take part. Where both have a word for something, that of the DeepSpeed file
counts, unless it is "auto" or missing there. `--set` on the command line comes before both.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from effx_dist.config import BLOCK
from effx_dist.errors import ConfigError
from launch.llama.settings import RunSettings, apply_override, read_table

AUTO = "auto"
PLACES: dict[str, tuple[str, ...]] = {
    "global_batch_size": ("train_batch_size",),
    "micro_batch_size": ("train_micro_batch_size_per_gpu",),
    "clip_norm": ("gradient_clipping",),
    "lr": ("optimizer", "params", "lr"),
    "betas": ("optimizer", "params", "betas"),
    "eps": ("optimizer", "params", "eps"),
    "weight_decay": ("optimizer", "params", "weight_decay"),
}
"""What [train] of the settings file calls it -> where a DeepSpeed configuration has it."""

WHOLE_AND_EXACT = {"profile": "lossless", "base_every": 1}

NOT_HERE = {
    "gradient_accumulation_steps": "follows from train_batch_size, which is the same at every number "
    "of ranks, and train_micro_batch_size_per_gpu",
    "scheduler": "the rate follows the data, by train.warmup_epochs and train.min_lr_ratio of the "
    "settings file",
}


def read_run(
    settings_file: Path, deepspeed_file: Path, overrides: Iterable[str] = ()
) -> tuple[RunSettings, dict[str, Any]]:
    """The settings of the run and the configuration for `initialize`, each with what the other says.

    Raises ConfigError, naming file and key, for what cannot be used.
    """
    config = read_json(deepspeed_file)
    for key, reason in NOT_HERE.items():
        if config.pop(key, AUTO) != AUTO:
            raise ConfigError(f"{deepspeed_file}: {key}: leave it out; it {reason}")
    table = read_table(settings_file)
    table[BLOCK] = config.get(BLOCK, {})
    for key, path in PLACES.items():
        if (stated := value_at(config, path)) not in (None, AUTO):
            table.setdefault("train", {})[key] = stated
    for override in overrides:
        apply_override(table, override)
    settings = RunSettings.from_dict(table, origin=f"{settings_file} with {deepspeed_file}")
    return settings, filled(config, settings)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConfigError where it cannot be read."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such DeepSpeed configuration") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must hold an object, not a {type(config).__name__}")
    return config


def value_at(config: dict[str, Any], path: tuple[str, ...]) -> Any:
    """What stands at `path`, or None."""
    value: Any = config
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def filled(config: dict[str, Any], settings: RunSettings) -> dict[str, Any]:
    """The configuration with every value of `settings` that it has a place for, and its effx block.

    InfoBatch is always on in it: switched off in the settings it takes every sample, so that a plain
    run goes through its data by the same code. Checkpoints likewise: with excp switched off they are
    whole and exact.
    """
    config = json.loads(json.dumps(config))
    optimizer = config.setdefault("optimizer", {"type": "AdamW"})
    optimizer.setdefault("params", {})
    for key, path in PLACES.items():
        if key == "eps" and optimizer["type"].lower() == "lion":
            continue
        inner = config
        for name in path[:-1]:
            inner = inner[name]
        value = getattr(settings.train, key)
        inner[path[-1]] = list(value) if isinstance(value, tuple) else value
    effx = settings.effx_config()
    block = {**effx.to_dict(), "infobatch": settings.infobatch_config().model_dump()}
    if effx.excp is None or not effx.excp.enabled:
        block["excp"] = WHOLE_AND_EXACT
    config[BLOCK] = block
    return config
