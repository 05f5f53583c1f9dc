"""torch.distributed.checkpoint with this library's writer, reader and planners in the place of its file
system's, for tests that know nothing of them. Importing it changes torch for the whole process."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import (
    default_planner,
    filesystem,
    state_dict_loader,
    state_dict_saver,
)

from effx_dist.checkpoint import ExcpLoadPlanner, ExcpReader, ExcpSavePlanner, ExcpWriter
from effx_dist.config import ExcpConfig

PLACE = "effx"
"""Tests hand over a folder that exists; the checkpoint appears inside it."""


class Writer(ExcpWriter):
    """Takes what FileSystemWriter takes, and overwrites as it does."""

    def __init__(self, path: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        super().__init__(Path(path) / PLACE, ExcpConfig(profile="lossless", base_every=1))

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        super().reset(None if checkpoint_id is None else Path(checkpoint_id) / PLACE)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            shutil.rmtree(str(self.path), ignore_errors=True)
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)


class Reader(ExcpReader):
    """Takes what FileSystemReader takes."""

    def __init__(self, path: str | os.PathLike[str], *_: Any, **__: Any) -> None:
        super().__init__(Path(path) / PLACE)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        super().reset(None if checkpoint_id is None else Path(checkpoint_id) / PLACE)


for module in (dcp, filesystem):
    module.FileSystemWriter, module.FileSystemReader = Writer, Reader  # type: ignore[attr-defined]
for module in (dcp, default_planner, state_dict_saver, state_dict_loader):
    for name, planner in (
        ("DefaultSavePlanner", ExcpSavePlanner),
        ("DefaultLoadPlanner", ExcpLoadPlanner),
    ):
        if hasattr(module, name):
            setattr(module, name, planner)
