"""Where saves run: in the call, in a thread, or in a process of their own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from effx_dist.checkpoint.saver import Loaded, SaveJob, Saver, SaveResult
from effx_dist.checkpoint.saving_process import meet, socket_pair
from effx_dist.config import ExcpConfig
from effx_dist.errors import RankFailedError
from effx_dist.shard import Group


class SaveExecutor(ABC):
    """Runs one save at a time."""

    @abstractmethod
    def submit(self, job: SaveJob) -> Future[SaveResult]:
        """Start a save; the job's tensors must not change before it is done."""

    @abstractmethod
    def restart(self, loaded: Loaded) -> None:
        """Go on from a loaded checkpoint. No save is in flight."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was submitted and let go of threads and processes."""


class InlineExecutor(SaveExecutor):
    """Saves inside :meth:`submit`."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver

    def submit(self, job: SaveJob) -> Future[SaveResult]:
        future: Future[SaveResult] = Future()
        try:
            future.set_result(self._saver.save(job))
        except Exception as error:
            future.set_exception(error)
        return future

    def restart(self, loaded: Loaded) -> None:
        self._saver.restart(loaded)

    def close(self) -> None:
        """Nothing to finish: every save ended inside :meth:`submit`."""


class ThreadExecutor(SaveExecutor):
    """Saves in one background thread. Hashing, compression and file writes run outside the
    interpreter lock."""

    def __init__(self, saver: Saver) -> None:
        self._saver = saver
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="effx-save")

    def submit(self, job: SaveJob) -> Future[SaveResult]:
        return self._pool.submit(self._saver.save, job)

    def restart(self, loaded: Loaded) -> None:
        self._pool.submit(self._saver.restart, loaded).result()

    def close(self) -> None:
        self._pool.shutdown(wait=True)


class ProcessExecutor(SaveExecutor):
    """Saves in one child process per rank, which holds the references and talks to the other ranks'
    children.

    The child ends when this process does, also when it is killed. Tensors reach it through shared memory (/dev/shm must
    hold one copy of the local state). Collective over ``group``: the ranks agree on a place to
    meet.
    """

    def __init__(self, folder: Path, config: ExcpConfig, group: Group, timeout: timedelta) -> None:
        self._store, rendezvous = meet(group, timeout)
        self._rank = group.rank
        self._connection, child = socket_pair()
        # a fresh interpreter, not multiprocessing's spawn, which would run an unguarded training script again
        call = f"main({child.fileno()}, parent={os.getpid()})"
        program = f"from effx_dist.checkpoint.saving_process import main; {call}"
        self._process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[child.fileno()])
        child.close()
        self._connection.send_bytes(multiprocessing.current_process().authkey)
        self._connection.send((folder, config, rendezvous))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="effx-save")

    def submit(self, job: SaveJob) -> Future[SaveResult]:
        return self._pool.submit(self._ask, "save", job)

    def restart(self, loaded: Loaded) -> None:
        self._pool.submit(self._ask, "restart", loaded).result()

    def _ask(self, request: str, argument: Any) -> Any:
        try:
            self._connection.send((request, argument))
            answer, error = self._connection.recv()
        except (EOFError, OSError) as lost:
            reason = f"its saving process ended (exit code {self._process.wait()})"
            raise RankFailedError({self._rank: reason}) from lost
        if error is not None:
            raise error
        return answer

    def close(self) -> None:
        self._pool.shutdown(wait=True)
        self._connection.close()  # the child's end of the pipe closes, and it leaves its loop
        self._process.wait()


def make_executor(
    folder: Path, config: ExcpConfig, group: Group, timeout: timedelta
) -> SaveExecutor:
    """The executor that ``config.async_mode`` asks for. Collective over ``group`` for "process"."""
    match config.async_mode:
        case "process":
            return ProcessExecutor(folder, config, group, timeout)
        case "thread":
            return ThreadExecutor(Saver(folder, config, group))
        case "sync":
            return InlineExecutor(Saver(folder, config, group))
