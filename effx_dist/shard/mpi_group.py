"""The ranks of an MPI job: what mpirun has started, as the others see them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from effx_dist.errors import ConfigError, MissingEngineError
from effx_dist.shard.group import Group, ReduceOp

T = TypeVar("T")

MAX_MESSAGE_BYTES = 2**30
"""Longer ones are sent in parts: before MPI 4, a message's length is a C int."""
CARRIERS = {torch.bool: torch.int32, torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""What MPI reduces in place of a dtype that not every MPI library can add up."""


class MpiGroup(Group):
    """The ranks of an MPI communicator. Tensors travel through host memory. One thread at a time
    may use the ranks of one communicator.

    What the ranks agree on works as in every other group. A rank that dies is another matter: MPI
    knows no timeouts, and the others would wait for it until mpirun ends the job. So where one rank
    leaves on its own, :meth:`abort` it.

    Args:
        communicator: mpi4py's, such as that of some ranks; None for the whole world.

    Raises:
        MissingEngineError: mpi4py or the MPI library is missing.
    """

    def __init__(self, communicator: Any = None) -> None:
        try:
            from mpi4py import MPI  # initialises MPI
        except (ImportError, RuntimeError) as error:
            raise MissingEngineError(
                f"MPI: needs mpi4py and the MPI library that mpirun belongs to (pip install "
                f"mpi4py): {error}"
            ) from error
        self._mpi = MPI
        self._communicator: Any = MPI.COMM_WORLD if communicator is None else communicator
        self.rank: int = self._communicator.rank
        self.size: int = self._communicator.size

    def require_size(self, size: int) -> None:
        """Refuse to go on where mpirun says that it has started another number of ranks.

        Raises:
            ConfigError: mpirun belongs to another MPI than mpi4py has loaded, so that every rank
                takes itself for the only one.
        """
        if self.size != size:
            library = self._mpi.Get_library_version().strip().splitlines()[0].strip("\0")
            raise ConfigError(
                f"mpirun: says that it has started {size} ranks, and mpi4py sees {self.size}: it "
                f"has loaded another MPI ({library}); start by that one's mpirun, or name the other "
                "in MPI4PY_MPIABI or MPI4PY_LIBMPI"
            )

    def on_this_host(self) -> MpiGroup:
        """The ranks of this group that share this one's memory. Collective."""
        shared = self._communicator.Split_type(self._mpi.COMM_TYPE_SHARED, key=self.rank)
        return MpiGroup(shared)

    def abort(self, exit_code: int = 1) -> None:
        """End the whole job at once, this process included, whatever the other ranks wait for."""
        self._communicator.Abort(exit_code)

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        self.start_all_reduce(tensor, op)()
        return tensor

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> Callable[[], None]:
        carrier = CARRIERS.get(tensor.dtype, tensor.dtype)
        host = tensor.detach().to("cpu", carrier).contiguous()
        mpi_op = getattr(self._mpi, op.upper())
        requests = [
            self._communicator.Iallreduce(self._mpi.IN_PLACE, message.numpy(), mpi_op)
            for message in _messages(host.view(-1))
        ]

        def wait() -> None:
            self._mpi.Request.Waitall(requests)
            if host.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(host)

        return wait

    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        num_received = self._communicator.alltoall([row.numel() for row in send])
        received = [
            torch.empty(num, dtype=row.dtype) for num, row in zip(num_received, send, strict=True)
        ]
        requests = [
            begin(message.view(torch.uint8).numpy(), rank)
            for begin, rows in (
                (self._communicator.Irecv, received),
                (self._communicator.Isend, [row.detach().cpu().contiguous() for row in send]),
            )
            for rank, row in enumerate(rows)
            for message in _messages(row)
        ]
        self._mpi.Request.Waitall(requests)
        return [row.to(sent.device) for row, sent in zip(received, send, strict=True)]

    def all_gather_object(self, value: T) -> list[T]:
        values: list[T] = self._communicator.allgather(value)
        return values

    def broadcast_object(self, value: T, root: int = 0) -> T:
        told: T = self._communicator.bcast(value, root)
        return told

    def barrier(self) -> None:
        self._communicator.Barrier()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MpiGroup) and bool(self._communicator == other._communicator)

    def __hash__(self) -> int:
        return hash((MpiGroup, self.rank, self.size))


def _messages(flat: torch.Tensor) -> Iterator[torch.Tensor]:
    """A contiguous 1-D tensor in pieces that every MPI can send; as many of an empty one as of a
    short one."""
    return iter(flat.split(MAX_MESSAGE_BYTES // flat.element_size()))
