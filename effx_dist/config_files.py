"""Configuration files as plain values: JSON, TOML and YAML, in which no key may stand twice."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from effx_dist.errors import ConfigError

SUFFIXES = (".json", ".toml", ".yaml", ".yml")


def read(path: Path) -> object:
    """What a file says.

    Raises:
        ConfigError: The file, which the message names, cannot be read or parsed (with the line where the parser gives
            it), or holds a key twice.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{path}: must end in one of {', '.join(SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        return _parse(text, path.suffix.lower())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: is not well formed: {error}") from error


def _parse(text: str, suffix: str) -> object:
    """Parse by suffix; an error comes out as a ValueError with the line, where that is known."""
    if suffix == ".json":
        return json.loads(text, object_pairs_hook=_unique_pairs)
    if suffix == ".toml":
        return tomllib.loads(text)
    try:
        values = yaml.load(text, _UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return {} if values is None else values  # an empty file says nothing, as in TOML


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object; the plain parser would silently keep the last of two equal keys."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"key given twice: {', '.join(map(json.dumps, twice))}")
    return values


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses equal keys; the plain loader would silently keep the last of them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[object] = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key given twice: {key}", problem_mark=key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)
