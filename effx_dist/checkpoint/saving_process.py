"""The child process that saves: what it runs, and how the ranks' children find each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing  # makes connections pass tensors through shared memory

from effx_dist.checkpoint.saver import Saver
from effx_dist.errors import EffxError
from effx_dist.shard import Group, SoloGroup, TorchGroup


@dataclass(frozen=True)
class Rendezvous:
    """Where the saving processes of all ranks meet; ``port`` is None for a single rank."""

    rank: int
    size: int
    host: str
    port: int | None
    timeout_s: float


def meet(group: Group, timeout: timedelta) -> tuple[dist.TCPStore | None, Rendezvous]:
    """A store that rank 0's process serves for the children. Two gathers; none for a single
    rank."""
    timeout_s = timeout.total_seconds()
    if group.size == 1:
        return None, Rendezvous(0, 1, "", None, timeout_s)
    hosts = group.all_gather_object(socket.gethostname())
    host = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    store = None
    if group.rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
    port = group.broadcast_object(store.port if store is not None else None)
    return store, Rendezvous(group.rank, group.size, host, port, timeout_s)


def socket_pair() -> tuple[Connection, Connection]:
    """Two ends of a pipe that can also pass file descriptors."""
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), Connection(theirs.detach())


def _group_of(rendezvous: Rendezvous) -> Group:
    if rendezvous.port is None:
        return SoloGroup()
    timeout = timedelta(seconds=rendezvous.timeout_s)
    store = dist.TCPStore(rendezvous.host, rendezvous.port, timeout=timeout)
    dist.init_process_group(
        "gloo", store=store, rank=rendezvous.rank, world_size=rendezvous.size, timeout=timeout
    )
    return TorchGroup()


def serve(connection: Connection) -> None:
    """Answer requests until the parent's end of the pipe is gone."""
    multiprocessing.current_process().authkey = connection.recv_bytes()
    folder, config, rendezvous = connection.recv()
    saver = Saver(folder, config, _group_of(rendezvous))
    actions: dict[str, Callable[[Any], Any]] = {"save": saver.save, "restart": saver.restart}
    while True:
        try:
            request, argument = connection.recv()
        except (EOFError, ConnectionError):
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (actions[request](argument), None)
        except Exception as error:
            answer = (None, _portable(error))
        connection.send(answer)


def _portable(error: Exception) -> Exception:
    """The error as the parent can unpickle it, with the child's traceback as a note."""
    kept = isinstance(error, EffxError)
    portable = error if kept else RuntimeError(f"{type(error).__name__}: {error}")
    portable.add_note("".join(traceback.format_exception(error)))
    return portable


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
    """Run the child on the inherited end of a pipe."""
    end_with(parent)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides
    torch.set_num_threads(1)  # the trainer keeps its cores
    serve(Connection(descriptor))
