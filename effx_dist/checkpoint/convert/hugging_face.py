"""Safetensors shards and config.json, as ``from_pretrained`` of transformers loads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from effx_dist.checkpoint.convert.content import Content
from effx_dist.errors import ConfigError

CONFIG_KEY = "config"
"""Where a run keeps the model's configuration in a checkpoint's ``extra``."""
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]?)(I?)B", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def parse_size(text: str) -> int:
    """Bytes of "5GB" (decimal) or "5GiB" (binary). Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    num_bytes = 0
    if match:
        unit = 1024 if match[3] else 1000
        num_bytes = int(float(match[1]) * unit ** _POWERS[match[2].upper()])
    if num_bytes <= 0:
        raise ConfigError(f"max_shard_size={text!r}: must be a size such as 5GB, 500MB or 2GiB")
    return num_bytes


def write_hugging_face(
    content: Content, folder: Path, max_shard_size: str, config: Mapping[str, Any] | None
) -> None:
    """The model's weights in shards of at most ``max_shard_size`` (one larger tensor has a shard of
    its own), their index, and the configuration.

    Tied weights are written once, under their first name, as transformers does. Memory: one shard.
    Raises ConfigError where there is no configuration, CorruptCheckpointError, OSError.
    """
    found = _config(content) if config is None else dict(config)
    content.will_read(iter(content.untied.values()))
    shards = _shards(content, parse_size(max_shard_size))
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file_name, shard in zip(names, shards, strict=True):
        tensors = {name: content.read(content.untied[name]) for name in shard}
        save_file(tensors, folder / file_name, metadata={"format": "pt"})
    if len(shards) > 1:
        places = zip(names, shards, strict=True)
        index = {
            "metadata": {"total_size": content.total_bytes},
            "weight_map": {name: file for file, shard in places for name in shard},
        }
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", found)


def _config(content: Content) -> dict[str, Any]:
    extra = content.values.extra
    found = extra.get(CONFIG_KEY)
    if not isinstance(found, dict) or "model_type" not in found:
        raise ConfigError(
            f"{content.chain.top.folder}: no model configuration is in its extra[{CONFIG_KEY!r}]; give "
            "the config.json of the model (--config FILE)"
        )
    return dict(content.tree(found, f"extra.{CONFIG_KEY}"))


def _shards(content: Content, max_bytes: int) -> list[list[str]]:
    """Names of each shard's tensors, in the order of their names."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, stored in content.untied.items():
        num_bytes = content.num_bytes(stored)
        if shards[-1] and size + num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _shard_name(index: int, num_shards: int) -> str:
    if num_shards == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
