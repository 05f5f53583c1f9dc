"""Checkpointers for engines whose users name the folder with every call."""

from __future__ import annotations

import os
from collections import OrderedDict

from effx_dist.checkpoint.checkpointer import Checkpointer
from effx_dist.checkpoint.saving.open_ones import folder_key, settle
from effx_dist.checkpoint.storage.steps import StepPrefix
from effx_dist.config import ExcpConfig

MAX_OPEN = 2
"""A run's checkpoints and its best ones, say. Each holds a copy of the state, references and a thread."""


class CheckpointersByFolder:
    """One Checkpointer for each of the folders used last, with the same settings.

    Where every save has a folder of its own, memory stays what two of them take: the others are closed,
    their saves finished first, and would begin with a base if they came back.
    """

    def __init__(self, config: ExcpConfig | None, step_prefix: StepPrefix = "step-") -> None:
        self._config = config
        self._step_prefix: StepPrefix = step_prefix
        self._made: OrderedDict[str, Checkpointer] = OrderedDict()

    def __getitem__(self, folder: str | os.PathLike[str]) -> Checkpointer:
        """That of a folder; made on first use, which is collective."""
        key = folder_key(folder)
        if key not in self._made:
            self._make_room()
            self._made[key] = Checkpointer(key, self._config, step_prefix=self._step_prefix)
        self._made.move_to_end(key)
        return self._made[key]

    def get(self, folder: str | os.PathLike[str]) -> Checkpointer | None:
        """That of a folder, if there is one. No communication is performed."""
        return self._made.get(folder_key(folder))

    def close(self) -> None:
        """Finish the saves in flight. Raises what made one fail; the others may be closed then."""
        while self._made:
            self._made.popitem()[1].close()

    def _make_room(self) -> None:
        while len(self._made) >= MAX_OPEN:
            _, oldest = self._made.popitem(last=False)
            settle(oldest)  # a failure is logged: whoever saves elsewhere now must not get it
            oldest.close()
