"""Checkpointers for engines whose users name the folder with every call."""

from __future__ import annotations

import os
from pathlib import Path

from effx_dist.checkpoint.checkpointer import Checkpointer
from effx_dist.checkpoint.folder import StepPrefix
from effx_dist.config import ExcpConfig


def folder_key(folder: str | os.PathLike[str]) -> str:
    """The same text for the same folder: a URL as it is, a local path made absolute."""
    text = os.fspath(folder)
    return text if "://" in text else str(Path(text).absolute())


class CheckpointersByFolder:
    """One Checkpointer for each folder, with the same settings."""

    def __init__(self, config: ExcpConfig | None, step_prefix: StepPrefix = "step-") -> None:
        self._config = config
        self._step_prefix: StepPrefix = step_prefix
        self._made: dict[str, Checkpointer] = {}

    def __getitem__(self, folder: str | os.PathLike[str]) -> Checkpointer:
        """That of a folder; made on first use, which is collective."""
        key = folder_key(folder)
        if key not in self._made:
            self._made[key] = Checkpointer(key, self._config, step_prefix=self._step_prefix)
        return self._made[key]

    def get(self, folder: str | os.PathLike[str]) -> Checkpointer | None:
        """That of a folder, if there is one. No communication is performed."""
        return self._made.get(folder_key(folder))

    def close(self) -> None:
        """Finish the saves in flight. Raises what made one fail; the others may be closed then."""
        while self._made:
            self._made.popitem()[1].close()
