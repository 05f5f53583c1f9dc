"""What an engine's handle does with checkpoints: the live state, and what travels with it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from effx_dist.checkpoint import Checkpointer, LiveState, PendingSave
from effx_dist.checkpoint.checkpointer import CheckpointersByFolder
from effx_dist.checkpoint.state.training_state import Stateful
from effx_dist.checkpoint.storage.steps import StepPrefix
from effx_dist.config import ExcpConfig

SAMPLER = "sampler"
"""The name under which a run's sampler is saved, by every engine alike."""


class RunCheckpoints(ABC):
    """Saves and loads a run to and from any number of folders, each with a Checkpointer of its own.

    Args:
        excp: the ``excp`` section; None or ``enabled = false`` writes exact, whole checkpoints.
        sampler: gives the sampler whose state travels with the run, if there is one.
        step_prefix: begins the names of steps' folders.

    Attributes:
        last_save: the save that began last, to wait for or to read figures of; None before the first.
    """

    def __init__(
        self,
        excp: ExcpConfig | None,
        sampler: Callable[[], Stateful | None],
        step_prefix: StepPrefix = "step-",
    ) -> None:
        self.last_save: PendingSave | None = None
        self._state_of_samples = sampler
        self._by_folder = CheckpointersByFolder(excp, step_prefix)

    @abstractmethod
    def _live(self, with_optimizer: bool = True) -> LiveState:
        """The engine's model and optimizer as they are now."""

    def checkpointer(self, folder: str | os.PathLike[str]) -> Checkpointer:
        """What saves to and loads from a folder; made on first use, which is collective."""
        return self._by_folder[folder]

    def begin(self, save_dir: str | os.PathLike[str]) -> None:
        """With ``seeded_base``: as :meth:`Checkpointer.begin`, for checkpoints in ``save_dir``."""
        self.checkpointer(save_dir).begin(self._live(with_optimizer=False))

    def close(self) -> None:
        """Finish the saves in flight. Raises what made one fail."""
        self._by_folder.close()

    def _with_sampler(self, others: Mapping[str, Stateful | None]) -> dict[str, Stateful]:
        """What has a state and travels with the run, the sampler among it; None stands for nothing."""
        found = {**others, SAMPLER: self._state_of_samples()}
        return {name: value for name, value in found.items() if value is not None}
