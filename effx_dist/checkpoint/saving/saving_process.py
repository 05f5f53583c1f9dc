"""The child process that saves: what it runs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.multiprocessing  # makes connections pass tensors through shared memory

from effx_dist.checkpoint.saving.saver import Saver
from effx_dist.errors import EffxError

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
        del (
            request,
            packed,
            arguments,
            answer,
        )  # the parent's tensors and files go when a save is done
    saver.close()


def _portable(error: Exception) -> Exception:
    """The error as the parent can unpickle it."""
    return (
        error if isinstance(error, EffxError) else RuntimeError(f"{type(error).__name__}: {error}")
    )


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
