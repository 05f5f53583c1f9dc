"""Other processes, seen from a test: held, asked, gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import termios
from pathlib import Path


def stop(pid: int) -> None:
    """SIGSTOP; on return it has reached every thread, one after another."""
    os.kill(pid, signal.SIGSTOP)
    while not _is_stopped(pid):
        os.sched_yield()


def _is_stopped(pid: int) -> bool:
    states = Path(f"/proc/{pid}/task").glob("*/stat")
    with contextlib.suppress(FileNotFoundError):  # a thread that ended just now
        return all(state.read_text().rpartition(")")[2].split()[0] == "T" for state in states)
    return False


def is_gone(pid: int) -> bool:
    """Whether a process ends within half a minute."""
    with contextlib.suppress(ProcessLookupError):
        watched = os.pidfd_open(pid)
        try:
            return has_ended(watched)
        finally:
            os.close(watched)
    return True


def has_ended(watched: int) -> bool:
    """Whether the process of a pidfd ends within half a minute."""
    return bool(select.select([watched], [], [], 30)[0])


def wait_for_unread(descriptor: int) -> None:
    """Return when something that was sent on this socket has not been read at its other end."""
    unread = struct.pack("i", 0)
    while struct.unpack("i", unread) == (0,):
        unread = fcntl.ioctl(descriptor, termios.TIOCOUTQ, unread)
        os.sched_yield()
