"""A rank in a process of its own that saves when it is told to, and stops or dies in the middle."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from effx_dist.checkpoint import Checkpointer
from tests.fault_checks import CONFIG, save_one
from tests.fault_injection import Operation, die, watch

STOPPED = "stopped"
GO_ON = "go on"
PATIENCE_S = 120.0
"""How long the parent waits for anything before it calls a rank hung."""
CLONE_NEWNET, CLONE_NEWNS = 0x40000000, 0x00020000


@dataclass(frozen=True)
class Setup:
    """How the ranks run.

    Attributes:
        store: a new file for each start, where the ranks meet.
        stop_at: by rank, the operation at which it tells the parent and waits.
        die_at: by rank, the operation at which it is killed.
        saver_dies_at: by rank, the operation at which its saving process is killed.
        namespaces: by rank, the network namespace it lives in, and its network device.
        address: rank 0's, where the ranks meet instead of in a file.
    """

    folder: Path
    store: Path
    world: int = 2
    async_mode: str = "thread"
    timeout_s: float = 2.0
    stop_at: dict[int, Operation] | None = None
    die_at: dict[int, Operation] | None = None
    saver_dies_at: dict[int, Operation] | None = None
    namespaces: tuple[tuple[str, str], ...] = ()
    address: str | None = None


class Ranks:
    """The processes of one start, each at the end of a pipe."""

    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "tests.fault_target"])
        self.processes: list[ForkServerProcess] = []
        self.pipes: list[Connection] = []
        for rank in range(setup.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=obey, args=(setup, rank, theirs))
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def ask(self, *steps: int) -> None:
        """Tell all ranks to save at these steps, one after another."""
        for pipe in self.pipes:
            pipe.send(steps)

    def hear(self, rank: int) -> Any:
        """What a rank says next: STOPPED, or how a save ended (None, or its failures by rank)."""
        assert self.pipes[rank].poll(PATIENCE_S), f"rank {rank} hangs"
        return self.pipes[rank].recv()

    def hear_all(self) -> list[Any]:
        """What all ranks say next."""
        return [self.hear(rank) for rank in range(len(self.pipes))]

    def go_on(self, rank: int) -> None:
        """Release a rank that stopped."""
        self.pipes[rank].send(GO_ON)

    def close(self) -> list[int | None]:
        """Let all ranks end by themselves; their exit codes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(PATIENCE_S)
        return [process.exitcode for process in self.processes]


@contextmanager
def running(setup: Setup) -> Iterator[Ranks]:
    """The ranks of one start; none outlives the block."""
    ranks = Ranks(setup)
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.join()


def obey(setup: Setup, rank: int, parent: Connection) -> None:
    """Entry of a rank's process: save at the steps that the parent sends, until it hangs up."""
    torch.set_num_threads(1)
    if setup.namespaces:
        enter_network(*setup.namespaces[rank])
    if setup.saver_dies_at is not None and rank in setup.saver_dies_at:
        _kill_saving_process(setup, setup.saver_dies_at[rank])
    watch(setup.folder, _fault(setup, rank, parent), pytest.MonkeyPatch())
    timeout = timedelta(seconds=setup.timeout_s)
    if setup.address is None:
        store: dist.Store = dist.FileStore(str(setup.store), setup.world)
    else:
        store = dist.TCPStore(setup.address, 29400, setup.world, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=setup.world)
    config = CONFIG.model_copy(update={"async_mode": setup.async_mode})
    checkpointer = Checkpointer(setup.folder, config, timeout=timeout)
    try:
        while True:
            for step in parent.recv():
                parent.send(_outcome(checkpointer, step))
    except EOFError:
        parent.close()
    checkpointer.close()
    os._exit(0)  # torch.distributed waits for ranks that are dead when it is taken down


def _outcome(checkpointer: Checkpointer, step: int) -> dict[int, str] | str | None:
    try:
        error = save_one(checkpointer, step)
    except RuntimeError as broken:  # torch.distributed's own
        return str(broken)
    return error if error is None else error.failures


def _fault(setup: Setup, rank: int, parent: Connection) -> Callable[[Operation], None]:
    def fault(operation: Operation) -> None:
        if setup.die_at is not None and operation == setup.die_at.get(rank):
            die()
        if setup.stop_at is not None and operation == setup.stop_at.get(rank):
            parent.send(STOPPED)
            assert parent.recv() == GO_ON

    return fault


def _kill_saving_process(setup: Setup, chosen: Operation) -> None:
    """Interpreters that this process starts watch the folder too: Python imports a module of that
    name when it starts."""
    site = setup.store.with_name("site")
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "from pathlib import Path\n"
        "import pytest\n"
        "from tests.fault_injection import Operation, kills_at, watch\n"
        f"watch(Path({str(setup.folder)!r}), kills_at({chosen!r}), pytest.MonkeyPatch())\n"
    )
    os.environ["PYTHONPATH"] = f"{site}:{Path(__file__).parents[1]}"


def enter_network(namespace: str, device: str) -> None:
    """Move this process into a network namespace that is there."""
    with open(f"/run/netns/{namespace}") as file:
        call_libc("setns", file.fileno(), CLONE_NEWNET)
    os.environ["GLOO_SOCKET_IFNAME"] = device


def call_libc(name: str, *args: int) -> None:
    """A function of the C library that Python has no name for. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)


def in_own_mounts(body: Callable[..., None], *args: Any) -> None:
    """Run ``body`` in a process whose mounts are its own and vanish with it."""
    torch.multiprocessing.start_processes(
        _with_own_mounts, (body, args), nprocs=1, start_method="forkserver"
    )


def _with_own_mounts(_: int, body: Callable[..., None], args: tuple[Any, ...]) -> None:
    call_libc("unshare", CLONE_NEWNS)
    mount("--make-rprivate", "/")
    body(*args)


def mount(*args: str | Path) -> None:
    """``mount``, in this process's mount namespace."""
    subprocess.run(["mount", *args], check=True)


KILLED = -signal.SIGKILL
