"""Files of torch.save: mapped, and unpickled as tensors and plain values only."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from effx_dist.checkpoint.format.manifest import short
from effx_dist.checkpoint.tools.compress.content import (
    PlainContent,
    ReadOptions,
    SourceTensor,
    check_dense,
)
from effx_dist.checkpoint.tools.compress.tree import content_of_tree
from effx_dist.errors import ConfigError, CorruptCheckpointError

StandIn = Callable[..., Any] | tuple[Callable[..., Any], str]
_ALLOWED = threading.Lock()
"""What torch allows to be unpickled is one list of the whole process."""


def open_torch_file(path: Path, options: ReadOptions) -> PlainContent:
    """A state dict, or a dictionary with a model's and an optimizer's. Raises ConfigError,
    CorruptCheckpointError, OSError."""
    loaded = load_torch(path, options.trust)
    if not isinstance(loaded, Mapping):
        raise ConfigError(f"{path}: holds a {type(loaded).__name__}, not a dictionary of tensors")
    tied: dict[str, str] = {}
    return content_of_tree(as_sources(loaded, path, tied), tied, path, options)


def load_torch(path: Path, trust: bool = False, stand_ins: Sequence[StandIn] = ()) -> Any:
    """What a file of torch.save holds; its tensors lie in the mapped file.

    Nothing but tensors and plain values is unpickled, and ``stand_ins`` in the place of the classes
    that they are named for; ``trust``: anything, which runs whatever code the file names. Raises
    ConfigError for a file that needs more, naming it; CorruptCheckpointError, OSError.
    """
    try:
        with _ALLOWED, safe_globals(list(stand_ins)):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=not trust)
    except pickle.UnpicklingError as error:
        needed = _needed_globals(path) - {name for _, name in map(_named, stand_ins)}
        what = ", ".join(sorted(needed)) or short(str(error))
        raise ConfigError(
            f"{path}: holds more than tensors and plain values: {what}. Nothing of it was run. If you "
            "trust the file, --trust unpickles it, which runs whatever code it names"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the system's own; torch says so of a file that is cut short, too
        raise CorruptCheckpointError(
            f"{path}: cannot be read as a file of torch.save: {short(str(error))}"
        ) from error


def as_sources(
    value: Any, where: object, tied: dict[str, str], path: str = "", seen: Any = None
) -> Any:
    """Nested dictionaries with SourceTensors for tensors. ``tied`` gets the paths of tensors that are
    one that came before once more. Tensors in lists stay as they are."""
    first = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        tensor = check_dense(path, value, where)
        if tensor.numel():
            storage = tensor.untyped_storage().data_ptr()
            key = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            if first.setdefault(key, path) != path:
                tied[path] = first[key]
        return SourceTensor.of(tensor)
    if isinstance(value, Mapping):
        return {
            key: as_sources(inner, where, tied, f"{path}.{key}" if path else str(key), first)
            for key, inner in value.items()
        }
    return value


def _named(stand_in: StandIn) -> tuple[Any, str]:
    assert isinstance(stand_in, tuple)
    return stand_in


def _needed_globals(path: Path) -> set[str]:
    try:
        return set(get_unsafe_globals_in_checkpoint(path))
    except (RuntimeError, pickle.UnpicklingError, ValueError, EOFError):
        return set()
