"""How the launch scripts learn which rank they are, whatever started them."""

import os
import socket

from effx_dist.launchers import MPI_SIZE
from effx_dist.shard import MpiGroup

LOCALHOST = "127.0.0.1"


def find_ranks() -> None:
    """Set the variables from which torch.distributed joins the ranks (RANK, WORLD_SIZE, LOCAL_RANK,
    MASTER_ADDR, MASTER_PORT), where no launcher has: call it before init_process_group.

    torchrun and deepspeed have set them, and nothing changes. Under mpirun, MPI is asked; a
    MASTER_ADDR and MASTER_PORT that are there are kept. Collective over the ranks of MPI, which is
    then let go of. Started by hand, this process is the only rank.

    Raises:
        MissingEngineError: mpi4py or the MPI library is missing.
        ConfigError: mpirun belongs to another MPI than mpi4py.
    """
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return
    num_started = int(next((os.environ[name] for name in MPI_SIZE if name in os.environ), 1))
    if num_started > 1:
        _ask_mpi(num_started)
    else:
        _tell(rank=0, size=1, local_rank=0, address=LOCALHOST, port="0")  # 0: any that is free


def free_port() -> str:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def _ask_mpi(num_started: int) -> None:
    world = MpiGroup()
    world.require_size(num_started)
    here = world.on_this_host()
    host = LOCALHOST if here.size == world.size else socket.gethostname()
    address, port = world.broadcast_object(
        (os.environ.get("MASTER_ADDR", host), os.environ.get("MASTER_PORT", free_port()))
    )
    _tell(world.rank, world.size, here.rank, address, port)
    from mpi4py import MPI

    # A rank that fails ends at once, and the others see it: MPI would make it wait for them.
    MPI.Finalize()


def _tell(rank: int, size: int, local_rank: int, address: str, port: str) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=port,
    )
