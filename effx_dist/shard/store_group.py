"""Ranks that talk through a key-value store: every wait is bounded, and who failed has a name.

A process group of torch.distributed is broken for good by the first wait that ends too late. Ranks
that talk through a store meet again: what they say in one session (one save) has that session's
number in its keys, and a rank that gives a session up leaves a mark that the others see while they
wait.
"""

from __future__ import annotations

import pickle
import socket
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from effx_dist.errors import RankFailedError
from effx_dist.shard.group import Group, ReduceOp, SoloGroup, reduce_tensors
from effx_dist.shard.worker import Worker

T = TypeVar("T")
Connect = Callable[[], dist.Store]

SERVER_RANK = 0
"""Whose process serves the store, and who reduces."""
LONGEST_PAUSE_S = 0.1
"""Between two looks at the store. A waiting rank looks again instead of blocking, so that it also
sees that another gave up; the pause grows with the time waited already."""
GRACE_S = 5.0
"""What a rank that gives up may still take to say so."""
FAREWELL_S = 10.0
"""How long rank 0 keeps the store for ranks that have not read the last answers yet."""
LARGE_BYTES = 1 << 15
"""Objects from this size on are compressed: every rank reads every other's."""


class StoreGroup(Group):
    """Ranks over a store of torch.distributed: a TCPStore, or a HashStore for threads.

    ``all_reduce`` is done by rank 0. Keys are deleted as soon as every rank has read them. One
    thread at a time may use a group.

    Args:
        connect: makes this rank's own client. Called at the first use, and again after the store
            could not be reached.
        rank, size: this rank's place.
        timeout: how long a collective waits for the other ranks.

    Raises:
        RankFailedError: in every collective, within about ``timeout``: ranks that did not answer, a
            rank that gave the session up, or the store's rank where the store is gone.
    """

    def __init__(self, connect: Connect, rank: int, size: int, timeout: timedelta) -> None:
        self.rank, self.size = rank, size
        self._connect = connect
        self._timeout_s = timeout.total_seconds()
        self._session = self._turn = 0
        self._last_left: int | None = None
        self._deadline = 0.0
        self._garbage: list[str] = []  # own keys that others may still have to read
        self._worker: Worker | None = None
        self._store: dist.Store | None = None

    @contextmanager
    def session(self, number: int) -> Iterator[None]:
        """What the ranks do together under one number, the same on all of them and never used
        before. A rank that comes late to a session that was given up fails at its first collective.
        """
        self._session, self._turn = number, 0
        try:
            yield
        except RankFailedError:
            raise  # the others know: they were told together, or they are the ones who said so
        except BaseException as error:
            self.give_up({self.rank: f"{type(error).__name__}: {error}"})
            raise
        with suppress(RankFailedError):  # what was done together stands
            self._begin(GRACE_S)
            self._call("set", f"left/{self.rank}", str(number))
            self._last_left = number

    def give_up(self, failures: dict[int, str], session: int | None = None) -> dict[int, str]:
        """Make all ranks fail in this session, or in another; returns the failures that it counts
        as failed by, which are those of the first that gave up. Where the store is gone, there is
        nobody left to tell."""
        key = self._mark(self._session if session is None else session)
        self._garbage.append(key)
        self._begin(GRACE_S)
        try:
            marked = self._call("compare_set", key, "", pickle.dumps(failures))
        except RankFailedError:
            return failures
        told: dict[int, str] = pickle.loads(marked)
        return told

    def close(self) -> None:
        """Let go of the client. Rank 0 first waits, a few seconds at most, until the other ranks
        have read the last answers: the store may end with its process."""
        if self._worker is None:
            return
        with suppress(RankFailedError):
            if self.rank == SERVER_RANK and self._last_left == self._session:
                self._await_farewells()
        self._disconnect()

    def all_gather_object(self, value: T) -> list[T]:
        return [_unpack(packed) for packed in self._gather(_pack(value))]

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        self._next_turn()
        is_reducer, result = self.rank == SERVER_RANK, self._key("reduced")
        self._post(self._key(self.rank), b"" if is_reducer else _bytes_of(tensor))
        if is_reducer:
            others = self._read([self._key(r) for r in range(self.size) if r != self.rank])
            tensors = [tensor, *(_tensor_like(tensor, sent) for sent in others)]
            tensor.copy_(reduce_tensors(tensors, op))
            self._post(result, _bytes_of(tensor))
        else:
            [reduced] = self._read([result])
            tensor.copy_(_tensor_like(tensor, reduced))
        self._end_turn()
        return tensor

    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        rows = self.all_gather_object([_bytes_of(part) for part in send])
        return [_vector(row[self.rank], send[0].dtype) for row in rows]

    def _gather(self, value: bytes) -> list[bytes]:
        self._next_turn()
        self._post(self._key(self.rank), value)
        values = self._read([self._key(rank) for rank in range(self.size)])
        self._end_turn()
        return values

    def _next_turn(self) -> None:
        self._turn += 1
        self._begin()

    def _end_turn(self) -> None:
        """All ranks have come to this turn, so all have read what belongs to earlier ones."""
        turn = f"{self._session}/{self._turn}/"
        done = [key for key in self._garbage if not key.startswith(turn)]
        self._garbage = [key for key in self._garbage if key.startswith(turn)]
        for key in done:
            self._call("delete_key", key)

    def _key(self, part: int | str) -> str:
        return f"{self._session}/{self._turn}/{part}"

    @staticmethod
    def _mark(session: int) -> str:
        return f"{session}/given-up"

    def _post(self, key: str, value: bytes) -> None:
        self._garbage.append(key)
        self._call("set", key, value)

    def _read(self, keys: list[str]) -> list[bytes]:
        """The values under ``keys``, once they are all there and unless the session was given
        up."""
        pause = 0.0005
        while not (complete := self._call("check", keys)) and time.monotonic() < self._deadline:
            self._raise_if_given_up()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
        if not complete:
            self._raise_absent()
        self._raise_if_given_up()
        values: list[bytes] = self._call("multi_get", keys) if keys else []
        return values

    def _raise_if_given_up(self) -> None:
        key = self._mark(self._session)
        if self._call("check", [key]):
            self._garbage.append(key)
            raise RankFailedError(pickle.loads(self._call("get", key)))

    def _raise_absent(self) -> NoReturn:
        """If every rank has come to this turn, it is the reduction that is missing."""
        absent = [r for r in range(self.size) if not self._call("check", [self._key(r)])]
        reason = f"did not answer within {self._timeout_s:g} s"
        raise RankFailedError(self.give_up(dict.fromkeys(absent or [SERVER_RANK], reason)))

    def _await_farewells(self) -> None:
        self._begin(min(FAREWELL_S, self._timeout_s))
        left, last = [f"left/{rank}" for rank in range(self.size)], str(self._session).encode()
        while time.monotonic() < self._deadline:
            present = self._call("check", left)
            if present and all(value == last for value in self._call("multi_get", left)):
                return
            time.sleep(LONGEST_PAUSE_S / 10)

    def _begin(self, timeout_s: float | None = None) -> None:
        self._deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)

    def _call(self, method: str, *args: Any) -> Any:
        """One call of the client, in a thread of its own: a call to a server that is frozen or out
        of reach never returns."""
        if self._worker is None:
            self._worker, self._store = Worker("effx-store"), None
        future = self._worker.submit(self._run, self._worker, method, args)
        try:
            return future.result(max(self._deadline - time.monotonic(), 0) + GRACE_S)
        except TimeoutError:
            reason = f"its store does not answer within {self._timeout_s:g} s"
        except (RuntimeError, OSError) as error:
            reason = f"its store is gone: {str(error).splitlines()[0]}"
        self._disconnect()
        raise RankFailedError({SERVER_RANK: reason})

    def _run(self, worker: Worker, method: str, args: tuple[Any, ...]) -> Any:
        store = self._store
        if store is None:
            store = self._connect()
            if self._worker is worker:  # else this thread was given up while it connected
                self._store = store
        return getattr(store, method)(*args)

    def _disconnect(self) -> None:
        worker, self._worker, self._store = self._worker, None, None
        if worker is not None:
            worker.close()


@dataclass(frozen=True)
class Rendezvous:
    """Where all ranks find rank 0's store, and this rank's place; ``port`` is None for a single
    rank. Can be pickled: the process that talks may be a child of the rank's own."""

    rank: int
    size: int
    host: str
    port: int | None
    timeout: timedelta

    def join(self) -> Group:
        """The group. No communication is performed before its first use."""
        if self.port is None:
            return SoloGroup()
        connect = partial(
            dist.TCPStore,
            self.host,
            self.port,
            is_master=False,
            timeout=self.timeout,
            wait_for_workers=False,
        )
        return StoreGroup(connect, self.rank, self.size, self.timeout)


def meet(group: Group, timeout: timedelta) -> tuple[dist.TCPStore | None, Rendezvous]:
    """A store that rank 0's process serves beside the one of torch.distributed: a blocking wait
    there would hold up torch's own use of it. It lasts as long as the object.

    Two gathers over ``group``; none for a single rank.
    """
    if group.size == 1:
        return None, Rendezvous(0, 1, "", None, timeout)
    hosts = group.all_gather_object(socket.gethostname())
    server = None
    if group.rank == SERVER_RANK:
        server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port = group.broadcast_object(server.port if server is not None else None, SERVER_RANK)
    host = _rank_0_host() or ("localhost" if len(set(hosts)) == 1 else hosts[SERVER_RANK])
    return server, Rendezvous(group.rank, group.size, host, port, timeout)


def _rank_0_host() -> str | None:
    """The address under which this rank found rank 0 when torch.distributed was started over
    TCP."""
    if not dist.is_initialized():
        return None
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store.host if isinstance(store, dist.TCPStore) else None


def _pack(value: Any) -> bytes:
    packed = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    if len(packed) < LARGE_BYTES:
        return b"p" + packed
    return b"z" + zlib.compress(packed, 1)


def _unpack(packed: bytes) -> Any:
    content = packed[1:] if packed[:1] == b"p" else zlib.decompress(packed[1:])
    return pickle.loads(content)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _vector(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    if not content:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype)


def _tensor_like(tensor: torch.Tensor, content: bytes) -> torch.Tensor:
    return _vector(content, tensor.dtype).view(tensor.shape).to(tensor.device)
