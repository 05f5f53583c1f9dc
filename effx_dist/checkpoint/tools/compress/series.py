"""The checkpoints of a series: where they lie, what wrote them, and the steps in their names."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from effx_dist.checkpoint.format.manifest import short
from effx_dist.checkpoint.state.matching import listed
from effx_dist.checkpoint.storage.steps import MANIFEST
from effx_dist.checkpoint.tools.compress.content import PlainContent, ReadOptions
from effx_dist.checkpoint.tools.compress.dcp import METADATA, open_dcp
from effx_dist.checkpoint.tools.compress.deepspeed import MODEL_STATES, open_deepspeed
from effx_dist.checkpoint.tools.compress.torch_file import open_torch_file
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, EffxError

logger = logging.getLogger(__name__)

Kind = Literal["dcp", "torch", "deepspeed"]
_OPEN = {"dcp": open_dcp, "torch": open_torch_file, "deepspeed": open_deepspeed}
_TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class PlainCheckpoint:
    """One checkpoint of a series: its step, where it lies, what wrote it, and the bytes of its files."""

    step: int
    path: Path
    kind: Kind
    num_bytes: int

    def open(self, options: ReadOptions) -> PlainContent:
        """What it holds. Raises ConfigError, CorruptCheckpointError, OSError."""
        try:
            return _OPEN[self.kind](self.path, options)
        except (EffxError, OSError):
            raise
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CorruptCheckpointError(
                f"{self.path}: is not laid out as {self.kind} checkpoints are: "
                f"{type(error).__name__}: {short(str(error))}"
            ) from error


def find_series(
    paths: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> list[PlainCheckpoint]:
    """The checkpoints among ``paths``, and in those of them that are folders of checkpoints, by
    ascending step. ``output`` is left out.

    What wrote a checkpoint is told by its files; its step is the last number in its name. Raises
    ConfigError where two have one step or one has no step, CheckpointNotFoundError for an empty series.
    """
    found: list[tuple[Path, Kind]] = []
    target = os.path.abspath(output)
    for path in map(Path, paths):
        kind = _kind_of(path)
        if os.path.abspath(path) == target:
            raise ConfigError(f"{path}: is the output, too; name another folder for it")
        found += [(path, kind)] if kind is not None else _inside(path, target)
    if not found:
        raise CheckpointNotFoundError(
            f"{', '.join(map(str, paths))}: no checkpoint was found: no folder of "
            "torch.distributed.checkpoint or DeepSpeed, no torch file"
        )
    return _in_order([(_step_of(path), path, kind) for path, kind in found])


def _inside(folder: Path, target: str) -> list[tuple[Path, Kind]]:
    if not folder.is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such checkpoint, nor a folder of them")
    found: list[tuple[Path, Kind]] = []
    for child in sorted(folder.iterdir()):
        if child.name.startswith(".") or os.path.abspath(child) == target:
            continue
        kind = _kind_of(child)
        if kind is not None:
            found.append((child, kind))
        elif child.is_dir() and _step_of(child) is not None:
            logger.warning("%s: is no checkpoint, or not a whole one; left out", child)
    return found


def _kind_of(path: Path) -> Kind | None:
    if path.is_dir():
        if (path / MANIFEST).exists():
            raise ConfigError(f"{path}: is compressed already; leave it out")
        if (path / METADATA).exists():
            return "dcp"
        return "deepspeed" if any(path.glob(f"*{MODEL_STATES}")) else None
    if not path.is_file():
        return None
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP)) == _ZIP
    return "torch" if is_zip or path.suffix in _TORCH_ENDINGS else None


def _step_of(path: Path) -> int | None:
    name = path.stem if path.suffix in _TORCH_ENDINGS else path.name
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


def _in_order(found: Sequence[tuple[int | None, Path, Kind]]) -> list[PlainCheckpoint]:
    nameless = [str(path) for step, path, _ in found if step is None]
    if nameless:
        raise ConfigError(f"no number is in the name, so the step is not known: {listed(nameless)}")
    by_step: dict[int, PlainCheckpoint] = {}
    for step, path, kind in found:
        assert step is not None
        if (other := by_step.get(step)) is not None:
            raise ConfigError(f"{other.path} and {path}: both are named step {step}; leave one out")
        by_step[step] = PlainCheckpoint(step, path, kind, _num_bytes(path))
    return [by_step[step] for step in sorted(by_step)]


def _num_bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
