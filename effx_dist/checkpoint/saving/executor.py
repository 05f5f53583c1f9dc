"""Where saves run: in the call, in a thread, or in a process of their own."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
import torch.multiprocessing  # makes connections pass tensors through shared memory

from effx_dist.checkpoint.saving.saver import Loaded, Packed, SaveJob, Saver, SaveResult
from effx_dist.checkpoint.storage.ownership import Ownership
from effx_dist.checkpoint.storage.places import Location
from effx_dist.config import ExcpConfig
from effx_dist.errors import EffxError, RankFailedError
from effx_dist.shard import Group, Rendezvous, Worker

logger = logging.getLogger(__name__)
T = TypeVar("T")

ABANDON_S = 5.0
"""How long an abandoned save may take to end. A block is encoded in milliseconds; only a file system
that hangs takes longer, and that is not waited for."""


class SaveExecutor(ABC):
    """Runs one save at a time. ``session``: the save's number, equal on all ranks."""

    @abstractmethod
    def submit(self, job: SaveJob, session: int) -> Future[SaveResult]:
        """Start a save; the job's tensors must not change before it is done."""

    @abstractmethod
    def give_up(self, session: int, error: BaseException) -> None:
        """Tell the other ranks that this one does not come to a save. No save is in flight."""

    @abstractmethod
    def restart(self, loaded: Loaded) -> None:
        """Go on from a loaded checkpoint. No save is in flight."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was submitted and let go of threads and processes."""

    @abstractmethod
    def abandon(self) -> None:
        """Stop a save in flight, uncommitted unless it was just being committed, and let go of
        threads and processes. The other ranks are told. Returns within seconds."""


class _Here:
    """Takes the place of a Worker and runs each call within :meth:`submit`."""

    def submit(self, body: Callable[..., T], *args: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(body(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """Every call has ended inside :meth:`submit`."""

    def join(self, timeout_s: float | None = None) -> None:
        """As :meth:`close`."""

    interrupt = close


class LocalExecutor(SaveExecutor):
    """Saves in this process: inside :meth:`submit`, or in one background thread, where hashing,
    compression and file writes run outside the interpreter lock."""

    def __init__(self, saver: Saver, in_thread: bool) -> None:
        self._saver = saver
        self._worker = Worker("effx-save") if in_thread else _Here()

    def submit(self, job: SaveJob, session: int) -> Future[SaveResult]:
        return self._worker.submit(self._saver.save, job, session)

    def give_up(self, session: int, error: BaseException) -> None:
        self._worker.submit(self._saver.give_up, session, error).result()

    def restart(self, loaded: Loaded) -> None:
        self._worker.submit(self._saver.restart, loaded).result()

    def close(self) -> None:
        self._end(None)

    def abandon(self) -> None:
        self._worker.interrupt()
        self._end(ABANDON_S)

    def _end(self, timeout_s: float | None) -> None:
        self._worker.submit(self._saver.close)
        self._worker.close()
        self._worker.join(timeout_s)


class _ProcessEnded(Exception):
    """The pipe to the saving process is closed at its end."""


class ProcessExecutor(SaveExecutor):
    """Saves in one child process per rank, which holds the references and talks to the other ranks'
    children.

    The child ends when this process does, also when it is killed, and outlives the signals that a
    terminal or a scheduler sends to all processes of a job. One that ended by itself is replaced at
    the next save, which then is a base. Tensors reach it through shared memory (/dev/shm must hold
    one copy of the local state).
    """

    def __init__(self, folder: Location, config: ExcpConfig, rendezvous: Rendezvous) -> None:
        self._ownership = Ownership(folder)
        self._config = config
        self._rendezvous = rendezvous
        self._loaded: Loaded | None = None  # what a new child has to be told
        self._is_abandoned = False
        # no child may be started after the last one was abandoned
        self._replacing = threading.Lock()
        self._start_process()
        self._worker = Worker("effx-save")

    def submit(self, job: SaveJob, session: int) -> Future[SaveResult]:
        return self._worker.submit(self._save, job, session)

    def give_up(self, session: int, error: BaseException) -> None:
        reason = f"{type(error).__name__}: {error}"
        self._tell_others(session, {self._rendezvous.rank: reason})

    def restart(self, loaded: Loaded) -> None:
        self._worker.submit(self._restart, loaded).result()

    def close(self) -> None:
        self._worker.close()
        self._worker.join()
        self._connection.close()  # the child's end of the pipe closes, and it leaves its loop
        self._process.wait()

    def abandon(self) -> None:
        with self._replacing:
            self._is_abandoned = True
            self._process.kill()
        self._worker.close()
        self._worker.join(ABANDON_S)
        self._connection.close()
        self._process.wait()

    def _start_process(self) -> None:
        """Start the child and tell it what it is for. One that is gone again at once (no memory, a broken
        installation) is found out by the next request, which tells the other ranks."""
        ours, theirs = socket_pair()
        # a fresh interpreter, not multiprocessing's spawn, which would run an unguarded training script again
        call = f"main({theirs.fileno()}, parent={os.getpid()})"
        program = f"from effx_dist.checkpoint.saving.executor import main; {call}"
        # blocked signals are inherited: the child is never without this protection
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, KEPT_SIGNALS)
        try:
            process = subprocess.Popen([sys.executable, "-c", program], pass_fds=[theirs.fileno()])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
        self._process, self._connection = process, ours
        with suppress(ConnectionError):
            ours.send_bytes(multiprocessing.current_process().authkey)
            ours.send((self._ownership, self._config, self._rendezvous))

    def _restart(self, loaded: Loaded) -> None:
        try:
            self._ensure_process()
            self._ask("restart", loaded)
        except _ProcessEnded as lost:
            raise self._failure() from lost
        self._loaded = replace(loaded, references={})

    def _save(self, job: SaveJob, session: int) -> SaveResult:
        try:
            self._ensure_process()
            result: SaveResult = self._ask("save", job, session)
            self._ownership.is_taken = True
        except _ProcessEnded as lost:
            failure = self._failure()
            self._tell_others(session, failure.failures)
            raise failure from lost
        self._loaded = None
        return result

    def _ensure_process(self) -> None:
        with self._replacing:
            if self._process.poll() is None:
                return
            if self._is_abandoned:
                raise _ProcessEnded
            logger.warning(
                "the saving process has ended (exit code %s); starting another, whose first save is a base",
                self._process.returncode,
            )
            self._connection.close()
            self._start_process()
        if self._loaded is not None:
            self._ask("restart", self._loaded)

    def _ask(self, request: str, value: SaveJob | Loaded, *arguments: Any) -> Any:
        try:
            self._connection.send((request, Packed.of(value), arguments))
            answer, error, trace = self._connection.recv()
        except (EOFError, OSError) as lost:
            raise _ProcessEnded from lost
        if error is not None:
            error.add_note(trace)
            raise error
        return answer

    def _failure(self) -> RankFailedError:
        """The error for a saving process that has closed its end of the pipe, and is therefore about to end."""
        try:
            code = self._process.wait(ABANDON_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        reason = f"its saving process ended (exit code {code})"
        return RankFailedError({self._rendezvous.rank: reason})

    def _tell_others(self, session: int, failures: dict[int, str]) -> None:
        with closing(self._rendezvous.join()) as group:
            group.give_up(failures, session)


def make_executor(
    folder: Location, config: ExcpConfig, rendezvous: Rendezvous, group: Group | None
) -> SaveExecutor:
    """The executor that ``config.async_mode`` asks for. Its saves talk over ``group`` where one is
    given ("process": a single rank only), else over the rendezvous. No communication is
    performed."""
    if config.async_mode == "process":
        return ProcessExecutor(folder, config, rendezvous)
    saver = Saver(Ownership(folder), config, group if group is not None else rendezvous.join())
    return LocalExecutor(saver, in_thread=config.async_mode == "thread")


KEPT_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
"""What a terminal or a scheduler sends to all processes of a job. The child is started with them
blocked: the parent decides what becomes of a save."""

NICENESS = 12
"""How far the child steps back: a core that training uses as well is given to it for about a fifteenth of the
time. A thread of the trainer could not step back so: it would hold the interpreter lock meanwhile."""


def socket_pair() -> tuple[Connection, Connection]:
    """Two ends of a pipe that can also pass file descriptors."""
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), Connection(theirs.detach())


def serve(connection: Connection) -> None:
    """Answer requests until the parent's end of the pipe is gone."""
    multiprocessing.current_process().authkey = connection.recv_bytes()
    ownership, config, rendezvous = connection.recv()
    saver = Saver(ownership, config, rendezvous.join())
    actions: dict[str, Callable[..., Any]] = {"save": saver.save, "restart": saver.restart}
    while True:
        try:
            request, packed, arguments = connection.recv()
        except (EOFError, ConnectionError):
            break
        answer: tuple[Any, Exception | None, str]
        try:
            answer = (actions[request](packed.unpack(), *arguments), None, "")
        except Exception as error:
            answer = (None, _portable(error), "".join(traceback.format_exception(error)))
        connection.send(answer)
        # the parent's tensors and files go when a save is done
        del request, packed, arguments, answer
    saver.close()


def _portable(error: Exception) -> Exception:
    """The error as the parent can unpickle it."""
    is_own = isinstance(error, EffxError)
    return error if is_own else RuntimeError(f"{type(error).__name__}: {error}")


def end_with(parent: int) -> None:
    """End this process, whatever it is doing, soon after the process ``parent`` is gone.

    A trainer that was killed must not be survived by a save that commits while the next run starts.
    """

    def watch() -> None:
        never = threading.Event()
        while os.getppid() == parent:
            never.wait(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="effx-parent").start()


def main(descriptor: int, parent: int) -> None:
    """Run the child on the inherited end of a pipe, with KEPT_SIGNALS blocked by its parent."""
    end_with(parent)
    torch.set_num_threads(1)  # the trainer keeps its cores
    os.nice(NICENESS)  # and, where all are busy, most of their time
    serve(Connection(descriptor))
