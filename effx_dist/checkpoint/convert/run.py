"""One conversion from beginning to end: the output appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from effx_dist.checkpoint.convert.content import Content
from effx_dist.checkpoint.convert.dcp import write_dcp
from effx_dist.checkpoint.convert.hugging_face import write_hugging_face
from effx_dist.checkpoint.convert.torch_file import write_torch_file
from effx_dist.checkpoint.convert.universal import write_universal
from effx_dist.checkpoint.pieces import OnProgress
from effx_dist.checkpoint.reader import open_checkpoint
from effx_dist.checkpoint.storage import Folder, LocalFolder
from effx_dist.errors import ConfigError

Target = Literal["dcp", "torch", "safetensors", "universal"]
TARGETS: tuple[Target, ...] = get_args(Target)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What a conversion can be told."""

    weights_only: bool = False
    """dcp and torch: leave out the optimizer and the rest of the run."""
    max_shard_size: str = "5GB"
    """safetensors: larger models are split into several files."""
    config: Mapping[str, Any] | None = None
    """safetensors: content of config.json; None: the checkpoint's extra["config"]."""


def convert_checkpoint(
    source: Folder,
    target: Target,
    output: str | os.PathLike[str],
    *,
    step: int | None = None,
    options: ConvertOptions | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Write the checkpoint of ``step`` (default: the newest) in the format of ``target`` to the local
    path ``output``; return the step. No communication is performed.

    Raises:
        ConfigError: ``output`` is there and not an empty folder, or the checkpoint does not hold
            what the target needs.
        CheckpointNotFoundError: There is no such checkpoint.
        CorruptCheckpointError: It is damaged.
        OSError: The output cannot be written; nothing of it stays.
    """
    options = options or ConvertOptions()
    with open_checkpoint(source, step) as chain:
        content = Content(chain, on_progress)
        with _appearing(Path(output), is_file=target == "torch") as staged:
            match target:
                case "dcp":
                    write_dcp(content, staged, options.weights_only)
                case "torch":
                    write_torch_file(content, staged, options.weights_only)
                case "safetensors":
                    write_hugging_face(content, staged, options.max_shard_size, options.config)
                case "universal":
                    write_universal(content, staged)
        return content.manifest.step


@contextlib.contextmanager
def _appearing(output: Path, is_file: bool) -> Iterator[Path]:
    """A path to write to that becomes ``output`` in the end, and is removed if anything fails."""
    _require_free(output, is_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(f"{output.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        if not is_file:
            staged.mkdir()
        yield staged
        _make_durable(staged)
        os.replace(staged, output)
        LocalFolder(output.parent).sync()
    except BaseException:
        if staged.is_dir():
            shutil.rmtree(staged)
        staged.unlink(missing_ok=True)
        raise


def _require_free(output: Path, is_file: bool) -> None:
    if "://" in str(output):
        raise ConfigError(f"{output}: must be a local path; copy the result from there")
    if is_file and (output.exists() or output.is_symlink()):
        raise ConfigError(f"{output}: is there already; name a file that is not")
    if output.is_symlink() or (output.exists() and not _is_empty_folder(output)):
        raise ConfigError(f"{output}: is there already; name a folder that is not, or is empty")


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _make_durable(path: Path) -> None:
    for inner in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(inner, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
