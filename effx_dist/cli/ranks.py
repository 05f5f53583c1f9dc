"""The ranks that share the work of a command: started by mpirun or torchrun, or one alone."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from effx_dist.cli.places import FINDING, complain
from effx_dist.errors import ConfigError, EffxError, RankFailedError

if TYPE_CHECKING:
    from effx_dist.shard import Group


LAST_WORDS_S = 1.0
"""What a rank says before it ends the job has so long to get out: mpirun drops what it has not passed on."""


def _told_by_mpirun(context: typer.Context, is_asked: bool) -> int:
    """How many ranks mpirun has started, or 1 if that is not known but asked for. A scheduler says
    so of a shell, too, but then it is one rank."""
    num_ranks: int = context.find_root().params["mpi_size"]
    return num_ranks if num_ranks > 1 else int(is_asked)


Mpi = Annotated[
    int,
    typer.Option(
        "--mpi",
        count=True,
        metavar="",
        show_default=False,
        callback=_told_by_mpirun,
        help="Share the work by MPI. Of itself under mpirun: mpirun -n 4 effx ...",
    ),
]
Torchrun = Annotated[
    bool,
    typer.Option(
        "--torchrun",
        help="Share the work under torchrun: torchrun --nproc-per-node 4 -m effx_dist.cli ...",
    ),
]


@contextmanager
def tool_ranks(mpi: int, torchrun: bool) -> Iterator[Group]:
    """The processes that share the work of a command; this one alone by default.

    What can fail within is to fail on all ranks, by :meth:`~effx_dist.shard.Group.everywhere` or by
    a function that does so itself. What all ranks have been told by a RankFailedError, the first
    one says, and all end with the same exit code. What one rank alone raises ends an MPI job and
    all its ranks; torchrun does so by itself.

    Args:
        mpi: started by MPI; more than 1: by an mpirun that says it has started that many.
        torchrun: started by torchrun.

    Raises:
        ConfigError: both, or not started by what was named.
        MissingEngineError: mpi4py or the MPI library is missing.
    """
    if torchrun:
        if mpi == 1:
            raise ConfigError(
                "--mpi, --torchrun: are two ways to start; give the one that was used"
            )
        ranks = _of_torchrun()
    else:
        ranks = _of_mpirun(mpi) if mpi else _alone()
    try:
        with ranks as group:
            yield group
    except RankFailedError as error:
        if group.rank:
            raise typer.Exit(FINDING) from None
        is_same = len(error.failures) == group.size and len(set(error.failures.values())) == 1
        own: BaseException | None = error
        while isinstance(own, RankFailedError):  # told once more on its way out
            own = own.__cause__
        if is_same and own is not None:
            raise own from None  # once is enough
        raise


@contextmanager
def _alone() -> Iterator[Group]:
    from effx_dist.shard import SoloGroup

    yield SoloGroup()


@contextmanager
def _of_torchrun() -> Iterator[Group]:
    import torch.distributed as dist

    # First of all, what commands import: parts of torch that are imported after the ranks have
    # joined keep the process group for ever, as a default argument, and gloo's threads, which live
    # as long, abort the process where they outlive Python.
    import effx_dist.checkpoint  # noqa: F401
    from effx_dist.shard import TorchGroup

    try:
        dist.init_process_group("gloo")
    except ValueError as error:
        raise ConfigError(f"--torchrun: was not started by torchrun: {error}") from error
    try:
        yield TorchGroup()
    finally:
        dist.destroy_process_group()


@contextmanager
def _of_mpirun(num_ranks: int) -> Iterator[Group]:
    from effx_dist.shard import MpiGroup

    group = MpiGroup()
    if num_ranks > 1:
        group.require_size(num_ranks)
    try:
        yield group
    except (typer.Exit, RankFailedError):
        raise  # on all ranks
    except BaseException as error:
        if group.size == 1:
            raise
        # the others wait in a collective that this rank will not come to
        if isinstance(error, (EffxError, OSError)):
            complain(error)
        else:
            traceback.print_exc()
        sys.stderr.flush()
        time.sleep(LAST_WORDS_S)
        group.abort(FINDING)
        raise typer.Exit(FINDING) from None
