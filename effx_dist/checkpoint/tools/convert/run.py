"""One conversion from beginning to end: the output appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from effx_dist.checkpoint.format.reader import checkpoint_folder, open_checkpoint
from effx_dist.checkpoint.format.whole_tensors import OnProgress
from effx_dist.checkpoint.storage.places import Folder, LocalFolder
from effx_dist.checkpoint.tools.convert.content import Content
from effx_dist.checkpoint.tools.convert.dcp import write_dcp
from effx_dist.checkpoint.tools.convert.hugging_face import write_hugging_face
from effx_dist.checkpoint.tools.convert.torch_file import write_torch_file
from effx_dist.checkpoint.tools.convert.universal import write_universal
from effx_dist.errors import ConfigError, RankFailedError
from effx_dist.shard import Group, SoloGroup

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
    group: Group | None = None,
    on_progress: OnProgress | None = None,
) -> int:
    """Write the checkpoint of ``step`` (default: the newest) in the format of ``target`` to the local
    path ``output``; return the step.

    Collective over ``group``, whose ranks share the work (a torch file is the first rank's alone) and
    see one file system; thirteen gathers at most, all small but the plan of dcp. No communication is
    performed without a group.

    Args:
        source: a folder of checkpoints, or one checkpoint's.
        target: what to write; see :data:`TARGETS`.
        output: a file for torch, else a folder.
        step: which checkpoint.
        options: what the targets can be told.
        group: the processes that call this together; None: this one alone.
        on_progress: called with the bytes of this rank's share.

    Raises:
        ConfigError: ``output`` is there and not an empty folder, or the checkpoint does not hold
            what the target needs.
        CheckpointNotFoundError: There is no such checkpoint.
        CorruptCheckpointError: It is damaged.
        OSError: The output cannot be written; nothing of it stays.
        RankFailedError: On all of several ranks where one of them failed, in one of these ways.
    """
    group = group or SoloGroup()
    options = options or ConvertOptions()
    is_alone = group.size == 1  # then what fails is raised as it is
    with contextlib.ExitStack() as opened:
        # the first rank's choice: a save may be committed while others are still looking
        place = group.from_first(lambda: checkpoint_folder(source, step), keep_own_error=is_alone)

        def open_content() -> Content:
            return Content(opened.enter_context(open_checkpoint(place)), on_progress)

        content = group.everywhere(open_content, keep_own_error=is_alone)
        with _appearing(Path(output), target == "torch", group) as staged:
            group.everywhere(
                lambda: _write(content, target, staged, options, group), keep_own_error=is_alone
            )
        return content.manifest.step


def _write(
    content: Content, target: Target, staged: Path, options: ConvertOptions, group: Group
) -> None:
    match target:
        case "dcp":
            write_dcp(content, staged, options.weights_only, group)
        case "torch":
            if group.rank == 0:
                write_torch_file(content, staged, options.weights_only)
        case "safetensors":
            write_hugging_face(content, staged, options.max_shard_size, options.config, group)
        case "universal":
            write_universal(content, staged, group)


@contextlib.contextmanager
def _appearing(output: Path, is_file: bool, group: Group) -> Iterator[Path]:
    """A path to write to that becomes ``output`` in the end, and is removed if anything fails. The
    first rank makes and removes it. Four gathers."""
    is_alone = group.size == 1
    staged = group.from_first(lambda: _make_staged(output, is_file), keep_own_error=is_alone)
    try:
        if not is_file:
            group.everywhere(lambda: _require_visible(staged), keep_own_error=is_alone)
        yield staged
        group.from_first(lambda: _publish(staged, output), keep_own_error=is_alone)
    except BaseException as error:
        if group.rank == 0:
            if staged.is_dir():
                shutil.rmtree(staged)
            staged.unlink(missing_ok=True)
        if isinstance(error, RankFailedError):  # all have it; none leaves while one still removes
            group.barrier()
        raise


def _make_staged(output: Path, is_file: bool) -> Path:
    _require_free(output, is_file)
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.absolute().with_name(f"{output.name}.{uuid.uuid4().hex[:8]}.part")
    if not is_file:
        staged.mkdir()
    return staged


def _publish(staged: Path, output: Path) -> None:
    _make_durable(staged)
    os.replace(staged, output)
    LocalFolder(output.parent).sync()


def _require_free(output: Path, is_file: bool) -> None:
    if "://" in str(output):
        raise ConfigError(f"{output}: must be a local path; copy the result from there")
    if is_file and (output.exists() or output.is_symlink()):
        raise ConfigError(f"{output}: is there already; name a file that is not")
    if output.is_symlink() or (output.exists() and not _is_empty_folder(output)):
        raise ConfigError(f"{output}: is there already; name a folder that is not, or is empty")


def _require_visible(staged: Path) -> None:
    if not staged.is_dir():
        raise ConfigError(
            f"{staged}: is not seen by {socket.gethostname()}; put the output on a file system that all "
            "processes share, or convert with one"
        )


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _make_durable(path: Path) -> None:
    for inner in [path, *path.rglob("*")] if path.is_dir() else [path]:
        descriptor = os.open(inner, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
