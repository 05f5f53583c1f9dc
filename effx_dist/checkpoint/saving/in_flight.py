"""The Checkpointers of this process that are open: whose saves a load has to wait for, and what an exit
of the interpreter still finishes."""

from __future__ import annotations

import logging
import os
import threading
from typing import Any, Protocol

from effx_dist.checkpoint.storage.places import folder_key

logger = logging.getLogger(__name__)


class OpenCheckpointer(Protocol):
    """What is asked of a Checkpointer here."""

    @property
    def folder(self) -> Any:
        """Where it saves."""

    def wait(self) -> None:
        """Wait for a save in flight; raises what made it fail."""

    def close(self) -> None:
        """Finish a save in flight and let go of everything."""


_open: dict[OpenCheckpointer, int] = {}
"""The open Checkpointers, each with the process that made it: a fork inherits this table, but not the threads in
which the saves would end."""


def opened(checkpointer: OpenCheckpointer) -> None:
    """Add a Checkpointer to the open ones."""
    _open[checkpointer] = os.getpid()


def closed(checkpointer: OpenCheckpointer) -> None:
    """Take a Checkpointer out of the open ones."""
    _open.pop(checkpointer, None)


def settle_saves_in(folder: object) -> None:
    """Wait for every save that is in flight in a folder, by any Checkpointer of this process; what failed is
    logged. No communication is performed."""
    key = folder_key(str(folder))
    for other, pid in list(_open.items()):
        if pid == os.getpid() and folder_key(str(other.folder)) == key:
            settle(other)


def settle(checkpointer: OpenCheckpointer) -> bool:
    """Wait for the save in flight; whether it ended well. A failure is logged."""
    try:
        checkpointer.wait()
    except Exception:
        logger.exception(
            "%s: the last save failed; nothing was committed for it", checkpointer.folder
        )
        return False
    return True


def _close_at_exit() -> None:
    while own := [one for one, pid in _open.items() if pid == os.getpid()]:
        try:
            own[0].close()
        except Exception:
            logger.exception("the last save failed")
        except KeyboardInterrupt:
            logger.warning("the last save was abandoned")


# not atexit: a save in flight still needs thread pools, and those are shut down before atexit runs
threading._register_atexit(_close_at_exit)  # type: ignore[attr-defined]
