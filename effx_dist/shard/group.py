"""The ranks that talk to each other: one interface, for a rank alone or over torch.distributed.

Every method but ``rank`` and ``size`` is a collective: all ranks of the group call it in the same
order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from effx_dist.errors import EffxError, RankFailedError

ReduceOp = Literal["sum", "max", "min"]
T = TypeVar("T")

_REDUCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sum": lambda stacked: stacked.sum(dim=0, dtype=stacked.dtype),
    "max": lambda stacked: stacked.amax(dim=0),
    "min": lambda stacked: stacked.amin(dim=0),
}


def reduce_tensors(tensors: Sequence[torch.Tensor], op: ReduceOp) -> torch.Tensor:
    """What the ranks' tensors come to, in their own dtype."""
    return _REDUCE[op](torch.stack(list(tensors)))


class Group(ABC):
    """Ranks ``0 .. size - 1`` and this one's place among them."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        """Reduce ``tensor`` (same shape and dtype on every rank) in place; return it."""

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> Callable[[], None]:
        """Begin to reduce ``tensor`` in place. It may be read once the returned function has been
        called: that waits, on an accelerator for its stream and not for the host.

        This default has reduced it on return.
        """
        self.all_reduce(tensor, op)
        return lambda: None

    @abstractmethod
    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Send the 1-D ``send[r]`` to rank r; return what each rank sent here. Lengths may differ,
        dtypes not."""

    @abstractmethod
    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's ``value``, by rank. For small host objects."""

    def broadcast_object(self, value: T, root: int = 0) -> T:
        """Rank ``root``'s ``value``, on every rank."""
        return self.all_gather_object(value if self.rank == root else None)[root]  # type: ignore[return-value]

    def barrier(self) -> None:
        """Wait for every rank."""
        self.all_gather_object(None)

    def session(self, number: int) -> AbstractContextManager[None]:
        """What the ranks do together under one ``number``, new each time and equal on all. Where
        they can meet again after a failure, one that leaves it by an exception releases the others;
        by default it means nothing. No communication is performed by this default."""
        return nullcontext()

    def give_up(self, failures: dict[int, str], session: int | None = None) -> dict[int, str]:
        """Release the ranks that wait in ``session`` with these failures, where the group can."""
        return failures

    def close(self) -> None:  # noqa: B027  most groups hold nothing
        """Let go of what the group holds beside torch.distributed. No communication is performed
        by this default."""

    def everywhere(self, body: Callable[[], T], keep_own_error: bool = True) -> T:
        """Run ``body`` on every rank; this rank's result, or an error on all ranks if one of them
        failed, as :meth:`tell_all` raises it. One small gather."""
        error, value = _outcome(body)
        self.tell_all(error, None, keep_own_error)
        return cast(T, value)

    def gather_to_first(self, body: Callable[[], T], keep_own_error: bool = True) -> list[T] | None:
        """Run ``body`` on every rank; all results by rank on rank 0 and None elsewhere, or an error
        on all ranks if one of them failed, as :meth:`tell_all` raises it. One gather."""
        error, value = _outcome(body)
        values = self.tell_all(error, cast(T, value), keep_own_error)
        return values if self.rank == 0 else None

    def from_first(self, body: Callable[[], T], keep_own_error: bool = True) -> T:
        """Run ``body`` on rank 0 alone; its result on every rank. One broadcast.

        Where it fails, every rank raises: with ``keep_own_error`` rank 0 its own error, and so do
        the others if it is one of this package, since they would have found the same; else all of
        them RankFailedError.
        """
        error, value = _outcome(body) if self.rank == 0 else (None, None)
        shared = error if isinstance(error, EffxError) and keep_own_error else None
        told, shared, value = self.broadcast_object((_told(self.rank, error), shared, value))
        if told and keep_own_error and (own := error or shared) is not None:
            raise own
        if told:
            raise RankFailedError(told) from error
        return cast(T, value)

    def tell_all(self, error: Exception | None, value: T, keep_own_error: bool = True) -> list[T]:
        """Tell all ranks of one rank's ``error``, or else its ``value``; every rank's value by rank.

        One gather. Called between the stages of what all ranks do together, so that no rank waits
        for one that gave up: if there is an error, all ranks raise RankFailedError, but for a rank
        that failed itself and is to ``keep_own_error``, which raises that.
        """
        heard = self.all_gather_object((_told(self.rank, error), value))
        failures = {rank: why for told, _ in heard for rank, why in told.items()}
        if failures and error is not None and keep_own_error:
            raise error
        if failures:
            raise RankFailedError(failures) from error
        return [value for _, value in heard]


def _outcome(body: Callable[[], T]) -> tuple[Exception | None, T | None]:
    try:
        return None, body()
    except Exception as error:  # told to all ranks and raised there
        return error, None


def _told(rank: int, error: Exception | None) -> dict[int, str]:
    """What the others hear of an error, by the rank that it came from."""
    if isinstance(error, RankFailedError):  # who failed is who it names, not who passes it on
        return error.failures
    return {} if error is None else {rank: f"{type(error).__name__}: {error}"}


class SoloGroup(Group):
    """One process on its own. No communication is performed."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        return tensor

    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [send[0].clone()]

    def all_gather_object(self, value: T) -> list[T]:
        return [value]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SoloGroup)

    def __hash__(self) -> int:
        return hash(SoloGroup)


class TorchGroup(Group):
    """A torch.distributed process group. Host tensors travel through the device that its backend
    needs."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        chosen = process_group if process_group is not None else dist.group.WORLD
        assert chosen is not None, "torch.distributed is initialised"
        self._process_group = chosen
        self.rank = dist.get_rank(chosen)
        self.size = dist.get_world_size(chosen)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """What torch.distributed knows it by."""
        return self._process_group

    @cached_property
    def _devices(self) -> set[str]:
        """Kinds of device whose tensors the backend takes as they are."""
        config = dist.get_backend_config(self.process_group)  # "cpu:gloo,cuda:nccl"
        backends = dict(pair.split(":") for pair in config.split(","))
        return {device for device, name in backends.items() if device == "cpu" or name != "gloo"}

    @classmethod
    def dedicated(cls, timeout: timedelta = timedelta(minutes=10)) -> TorchGroup:
        """A gloo group over all ranks that nothing else uses. Collective; every wait ends after
        ``timeout``."""
        return cls(dist.new_group(backend="gloo", timeout=timeout))

    def _transport(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where this group's backend can take it: as it is if possible."""
        if tensor.device.type in self._devices:
            return tensor.contiguous()
        if "cpu" in self._devices:
            return tensor.cpu()
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        self.start_all_reduce(tensor, op)()
        return tensor

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> Callable[[], None]:
        moved = self._transport(tensor)
        reduce_op = getattr(dist.ReduceOp, op.upper())
        work = dist.all_reduce(moved, reduce_op, group=self.process_group, async_op=True)

        def wait() -> None:
            if work is not None:  # None on a rank outside the group
                work.wait()
            if moved is not tensor:
                tensor.copy_(moved)

        return wait

    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        num_sent = torch.tensor([row.numel() for row in send], dtype=torch.int64)
        num_received = self._exchange_flat(num_sent, [1] * self.size, [1] * self.size).tolist()
        flat = torch.cat([row.reshape(-1) for row in send])
        received = self._exchange_flat(flat, num_sent.tolist(), num_received)
        return list(received.split(num_received))

    def _exchange_flat(
        self, flat: torch.Tensor, num_sent: list[int], num_received: list[int]
    ) -> torch.Tensor:
        source = self._transport(flat)
        target = source.new_empty(sum(num_received))
        dist.all_to_all_single(target, source, num_received, num_sent, group=self.process_group)
        return target.to(flat.device)

    def all_gather_object(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TorchGroup) and other.process_group is self.process_group

    def __hash__(self) -> int:
        return hash(id(self.process_group))


def separate_group(timeout: timedelta = timedelta(minutes=10)) -> Group:
    """A group of all ranks that nothing else uses, for what ranks say to each other beside the training loop.

    Collective over torch.distributed where it is initialised; this process alone otherwise.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchGroup.dedicated(timeout)
    return SoloGroup()


def as_group(group: Group | dist.ProcessGroup | None) -> Group:
    """A Group from what callers have: one already, a process group, or None for all ranks there
    are."""
    if isinstance(group, Group):
        return group
    if group is not None or (dist.is_available() and dist.is_initialized()):
        return TorchGroup(group)
    return SoloGroup()


_made: dict[tuple[int, ...], tuple[dist.ProcessGroup | None, dist.ProcessGroup]] = {}
"""For each set of ranks, the process group that was made for it, and the default group at that time."""


class JointGroup(TorchGroup):
    """Ranks that no axis of a mesh has together. Their process group is made on first use.

    That makes the first collective one over these ranks in which the group is made; ranks that
    share several such sets use them in the same order.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = tuple(sorted(ranks))
        self.rank = self.ranks.index(dist.get_rank())
        self.size = len(self.ranks)

    @property
    def process_group(self) -> dist.ProcessGroup:
        world = dist.group.WORLD
        made_in, group = _made.get(self.ranks, (None, None))
        if group is None or made_in is not world:  # the default group was destroyed in between
            group = dist.new_group(list(self.ranks), use_local_synchronization=True)
            _made[self.ranks] = (world, group)
        return group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, JointGroup) and other.ranks == self.ranks

    def __hash__(self) -> int:
        return hash(self.ranks)


def group_of_axes(mesh: DeviceMesh, axes: Sequence[int]) -> TorchGroup:
    """The ranks that differ from this one, a rank of the mesh, in ``axes`` (one at least) alone.

    An axis on its own has a group already, and so have all ranks there are. No communication is
    performed.
    """
    if len(axes) == 1:
        return TorchGroup(mesh.get_group(axes[0]))
    coordinate = mesh.get_coordinate()
    assert coordinate is not None, "callers ask on ranks of the mesh"
    within = tuple(slice(None) if axis in axes else at for axis, at in enumerate(coordinate))
    return group_of_ranks(mesh.mesh[within].flatten().tolist())


def group_of_ranks(ranks: Sequence[int]) -> TorchGroup:
    """These ranks of the default group, this one among them. No communication is performed."""
    return TorchGroup() if len(ranks) == dist.get_world_size() else JointGroup(ranks)
