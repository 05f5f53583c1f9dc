"""The settings of one run: a frozen model read from one TOML file, without inheritance.

An unknown key is an error that names the nearest known one. `--set section.key=value` changes
single values from the command line, and the resolved settings are written beside the run.
"""

import difflib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from effx_dist.config import EffxConfig, InfoBatchConfig
from effx_dist.errors import ConfigError


class Section(BaseModel):
    """A table of the TOML file: frozen, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Section):
    """Size of a Llama-like decoder, named as in `transformers.LlamaConfig` where it has a name."""

    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    num_kv_heads: int = Field(default=0, ge=0)
    """0 = as many as `num_heads` (no grouped-query attention)."""
    vocab_size: int = Field(gt=0)
    """Rows of the embedding. A byte-level tokeniser needs 257; "bpe" is trained to this size."""
    rope_theta: float = Field(default=10000.0, gt=0)
    norm_eps: float = Field(default=1e-6, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)
    tie_embeddings: bool = False

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of num_heads={self.num_heads}"
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads}: must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}; use 0 for one key head per head"
            )
        return self


class DataSettings(Section):
    """Where the text comes from and how it becomes samples."""

    source: str
    """A file, a folder, a glob, or `package:NAME` for text inside an installed Python package."""
    text_field: str = "text"
    """Field of a `.jsonl` line that holds the text."""
    document: Literal["file", "paragraph"] = "file"
    """What one document of a plain text file is: all of it, or each paragraph."""
    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the training documents), or the path of a `tokenizer.json`."""
    eos_token: str = "</s>"
    """Name of the end-of-document token ("bpe" and `tokenizer.json`)."""
    seq_len: int = Field(gt=1)
    """Tokens in one sample."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents that is never trained on."""
    max_samples: int = Field(default=0, ge=0)
    """Training samples at most, taken evenly over the whole corpus; 0 = all."""
    max_heldout_samples: int = Field(default=0, ge=0)
    """Held-out samples at most, taken evenly; 0 = all."""
    cache_dir: str = ""
    """Folder of the tokeniser and the packed blocks; empty = `data` in the run's folder.
    Every rank must see it: rank 0 writes it."""
    num_workers: int = Field(default=0, ge=0)
    """Loader processes per rank."""


class TrainSettings(Section):
    """Length, batch and optimizer."""

    num_epochs: int = Field(gt=0)
    global_batch_size: int = Field(gt=0)
    """Sequences per optimizer step over all ranks; the same at every world size."""
    micro_batch_size: int = Field(gt=0)
    """Sequences per rank in one forward pass; accumulation follows from the world size."""
    lr: float = Field(gt=0)
    """Highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup_epochs: float = Field(default=0.1, ge=0)
    """Length of the linear warm-up, in epochs (a fraction is usual)."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The cosine ends at this share of `lr`."""
    clip_norm: float = Field(default=1.0, ge=0)
    """Global gradient norm is clipped to this; 0 = not clipped."""
    seed: int = Field(default=0, ge=0)
    """Of the initial weights and of the order of the samples."""
    max_steps: int = Field(default=0, ge=0)
    """Stop after this many optimizer steps (for a trial); 0 = all epochs."""


class EvalSettings(Section):
    """Loss on the held-out documents."""

    every_steps: int = Field(default=0, ge=0)
    """0 = only at the end."""
    batch_size: int = Field(default=16, gt=0)
    """Sequences per rank in one forward pass."""


class LogSettings(Section):
    """What is written while training."""

    every_steps: int = Field(default=10, gt=0)
    tensorboard: bool = True


class CheckpointSettings(Section):
    """When checkpoints are taken and whether a run starts from one."""

    every_steps: int = Field(default=0, ge=0)
    """0 = no checkpoints at all."""
    resume: Literal["auto", "never"] | int = "auto"
    """"auto" = from the newest one if there is any; "never"; or the step to go back to."""


class RunSettings(Section):
    """All of one run. The `effx` table is checked by `effx_dist.EffxConfig`."""

    model: ModelSettings
    data: DataSettings
    train: TrainSettings
    eval: EvalSettings = EvalSettings()
    log: LogSettings = LogSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    effx: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_file(cls, path: Path, overrides: Iterable[str] = ()) -> Self:
        """Read `path` and apply `section.key=value` overrides.

        Raises ConfigError, naming the file and the key, for anything that cannot be used.
        """
        table = read_table(path)
        for override in overrides:
            apply_override(table, override)
        return cls.from_dict(table, origin=str(path))

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], origin: str = "settings") -> Self:
        """Check a nested mapping; `origin` names it in errors."""
        refuse_unknown_keys(cls, table, origin)
        try:
            settings = cls.model_validate(dict(table))
        except ValidationError as error:
            raise ConfigError(f"{origin}: {_explain(error)}") from error
        settings.effx_config()
        return settings

    def effx_config(self) -> EffxConfig:
        """The `effx` table, checked; epochs and seed are those of `train` where it says nothing."""
        table = {name: dict(section) for name, section in self.effx.items()}
        if "infobatch" in table:
            table["infobatch"].setdefault("seed", self.train.seed)
            told = table["infobatch"].setdefault("num_epochs", self.train.num_epochs)
            if told != self.train.num_epochs:
                raise ConfigError(
                    f"effx.infobatch.num_epochs={told} differs from "
                    f"train.num_epochs={self.train.num_epochs}; leave the former out"
                )
        return EffxConfig.from_dict(table)

    def infobatch_config(self) -> InfoBatchConfig:
        """The `effx.infobatch` section; switched off or absent, one that takes every sample."""
        config = self.effx_config().infobatch
        if config is None:
            train = self.train
            config = InfoBatchConfig(num_epochs=train.num_epochs, seed=train.seed, enabled=False)
        if config.enabled:
            return config
        return config.model_copy(update={"enabled": True, "prune_ratio": 0.0})

    def to_toml(self) -> str:
        """The resolved settings, such that `from_file` of them gives the same run."""
        return to_toml(self.model_dump())


def read_table(path: Path) -> dict[str, Any]:
    """The tables of a TOML file, unchecked; ConfigError where it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such settings file") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def refuse_unknown_keys(section: type[BaseModel], table: Mapping[str, Any], origin: str) -> None:
    """Raise ConfigError for the first key `section` does not have, naming the nearest it has."""
    for key, value in table.items():
        field = section.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.0)
            raise ConfigError(f"{origin}: unknown key {key!r}; did you mean {near[0]!r}?")
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, Mapping):
            refuse_unknown_keys(inner, value, f"{origin}: [{key}]")


def apply_override(table: dict[str, Any], override: str) -> None:
    """Put `a.b=value` into `table`; the value is TOML, or a plain string where it is not."""
    dotted, equals, text = override.partition("=")
    names = dotted.strip().split(".")
    if not equals or not all(names) or len(names) < 2:
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    for name in names[:-1]:
        inner = table.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
        table = inner
    table[names[-1]] = value


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Write nested mappings of numbers, strings, booleans and lists as TOML; None is left out."""
    lines, inner = [], []
    for key, value in table.items():
        if isinstance(value, Mapping):
            path = f"{prefix}{key}"
            inner.append(f"\n[{path}]\n{to_toml(value, path + '.')}")
        elif value is not None:
            # JSON writes these kinds of values as TOML reads them, but for DEL and escaped pairs.
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            lines.append(f"{key} = {text}\n")
    return "".join(lines) + "".join(inner)


def _explain(error: ValidationError) -> str:
    parts = []
    for problem in error.errors():
        where = ".".join(str(name) for name in problem["loc"])
        parts.append(f"{where}={problem['input']!r}: {problem['msg']}")
    return "; ".join(parts)
