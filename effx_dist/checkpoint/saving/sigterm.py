"""SIGTERM as a request to save once more and leave, as schedulers send it before they preempt."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from effx_dist.errors import ConfigError


class SigtermMemory:
    """Remembers the first SIGTERM; the second one acts as it would have without this.

    Attributes:
        received: whether it has come.

    Raises:
        ConfigError: not made in the main thread, where alone Python lets signals be handled.
    """

    def __init__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "effx.excp.save_on_sigterm = true: signals can be handled in the main thread only; "
                "make the Checkpointer there, or leave save_on_sigterm out"
            )
        self.received = False
        self._is_installed = True
        self._previous = signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.restore()

    def restore(self) -> None:
        """Put back what handled the signal before, unless somebody has replaced this since."""
        if self._is_installed and signal.getsignal(signal.SIGTERM) == self._remember:
            # None: a handler that C code installed, which Python cannot put back
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
        self._is_installed = False
