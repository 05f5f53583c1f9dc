"""Safetensors shards and config.json, as ``from_pretrained`` of transformers loads them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from effx_dist.checkpoint.tools.convert.content import Content
from effx_dist.checkpoint.tools.convert.megatron_llama import (
    MEGATRON,
    Weight,
    llama_config,
    llama_weights,
    require_llama,
    transformer_of,
)
from effx_dist.checkpoint.tools.sharing import dealt_out
from effx_dist.errors import ConfigError
from effx_dist.shard import Group, whole_box

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
    content: Content,
    folder: Path,
    max_shard_size: str,
    config: Mapping[str, Any] | None,
    group: Group,
) -> None:
    """The model's weights in shards of at most ``max_shard_size`` (one larger tensor has a shard of
    its own), their index, and the configuration. A Megatron GPT model becomes a Llama.

    Tied weights are written once, under their first name, as transformers does. The ranks share the
    shards. Memory: one shard, and one tensor of a Megatron model. No communication is performed.
    Raises ConfigError where there is no configuration, CorruptCheckpointError, OSError.
    """
    weights, found = _model(content, config)
    reader = WeightReader(content)
    num_bytes = {name: reader.num_bytes(weight) for name, weight in weights.items()}
    shards = _shards(num_bytes, parse_size(max_shard_size))
    names = [_shard_name(i, len(shards)) for i in range(len(shards))]
    sizes = [sum(num_bytes[name] for name in shard) for shard in shards]
    mine = dealt_out(sizes, group.size)[group.rank]
    content.total_bytes = sum(sizes[index] for index in mine)
    for index in mine:
        tensors = {name: reader.read(weights[name]) for name in shards[index]}
        save_file(tensors, folder / names[index], metadata={"format": "pt"})
    if group.rank != 0:
        return
    if len(shards) > 1:
        places = zip(names, shards, strict=True)
        total = {"total_size": sum(sizes)}
        weight_map = {name: file for file, shard in places for name in shard}
        index_file = folder / "model.safetensors.index.json"
        _write_json(index_file, {"metadata": total, "weight_map": weight_map})
    _write_json(folder / "config.json", found)


def _model(
    content: Content, given: Mapping[str, Any] | None
) -> tuple[dict[str, Weight], dict[str, Any]]:
    """The tensors to write by name, and the configuration."""
    shapes = {name: tuple(content.record(s).shape) for name, s in content.untied.items()}
    if MEGATRON not in content.values.extra:
        config = _config(content) if given is None else dict(given)
        return {name: Weight.whole(name, shape) for name, shape in shapes.items()}, config
    place, given = str(content.chain.top.folder), given or {}
    megatron = content.tree(content.values.extra[MEGATRON], f"extra.{MEGATRON}")
    transformer = transformer_of(megatron, place)
    is_rope_given = any(given.get(key) for key in ("rope_scaling", "rope_parameters"))
    require_llama(transformer, place, is_rope_given)
    config = llama_config(transformer, given, place)
    return llama_weights(transformer, shapes, config["vocab_size"], place), config


def _config(content: Content) -> dict[str, Any]:
    extra = content.values.extra
    found = extra.get(CONFIG_KEY)
    if not isinstance(found, dict) or "model_type" not in found:
        raise ConfigError(
            f"{content.chain.top.folder}: no model configuration is in its extra[{CONFIG_KEY!r}]; give "
            "the config.json of the model (--config FILE)"
        )
    return dict(content.tree(found, f"extra.{CONFIG_KEY}"))


def _shards(num_bytes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names of each shard's tensors, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, needed in num_bytes.items():
        if shards[-1] and size + needed > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += needed
    return shards


def _shard_name(index: int, num_shards: int) -> str:
    if num_shards == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class WeightReader:
    """Reads weights; one that is taken from many places is cut from its whole source.

    The last such source is kept, as its other parts are asked for next: that is one tensor of
    memory beside what is returned. No communication is performed.
    """

    def __init__(self, content: Content) -> None:
        self._content = content
        self._kept: tuple[str, torch.Tensor] | None = None

    def num_bytes(self, weight: Weight) -> int:
        """Bytes of the tensor to write."""
        return weight.numel * self._dtype(weight).itemsize

    def read(self, weight: Weight) -> torch.Tensor:
        """The tensor to write, contiguous, in the stored dtype. Raises CorruptCheckpointError."""
        if weight.is_zero:
            return torch.zeros(weight.shape, dtype=self._dtype(weight))
        stored = self._content.model[weight.source]
        if weight.boxes == (whole_box(weight.source_shape),):
            return self._content.read(stored)
        if len(weight.boxes) == 1:
            return self._content.read_box(stored, weight.boxes[0])
        whole = self._whole(stored)
        return torch.cat([whole[box.slices] for box in weight.boxes])

    def _whole(self, stored: str) -> torch.Tensor:
        if self._kept is None or self._kept[0] != stored:
            self._kept = None  # before the next one takes its memory
            self._kept = (stored, self._content.read(stored))
        return self._kept[1]

    def _dtype(self, weight: Weight) -> torch.dtype:
        return self._content.record(self._content.model[weight.source]).torch_dtype
