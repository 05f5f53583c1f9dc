"""`effx verify`: whether every byte of every checkpoint is what was written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from effx_dist.cli.places import FINDING, Folder, folder_and_step
from effx_dist.cli.show import progress, show_line
from effx_dist.errors import ConfigError, MissingEngineError
from effx_dist.report.text import bytes_text, plural

if TYPE_CHECKING:
    from effx_dist.checkpoint.verify import Ranks

MAX_JOBS = 8
"""Threads that are used unless more are asked for; a disk seldom has more to give."""
T = TypeVar("T")


def verify(
    folder: Folder,
    step: Annotated[
        int | None, typer.Option(min=0, help="Only this step, with what it builds upon.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Threads; by default one per core, and one with --mpi."),
    ] = None,
    decode: Annotated[
        bool, typer.Option(help="Read every tensor as a load would, too; slower, finds more.")
    ] = False,
    mpi: Annotated[
        bool, typer.Option("--mpi", help="Share the work: mpirun -n 4 effx verify --mpi DIR.")
    ] = False,
    torchrun: Annotated[
        bool,
        typer.Option(
            "--torchrun",
            help="The same under torchrun: torchrun --nproc-per-node 4 -m effx_dist.cli verify "
            "--torchrun DIR.",
        ),
    ] = False,
) -> None:
    """Check every stored byte against its checksum, and every chain down to its base.

    Exit code 0 if all is as it was written, 1 if anything is not: a line per finding names file,
    tensor and block.
    """
    if mpi and torchrun:
        raise ConfigError("--mpi, --torchrun: are two ways to start; give the one that was used")
    # before the imports: a misspelt path should not wait for torch
    folder, step = folder_and_step(folder, step)
    from effx_dist.checkpoint import verify_folder

    with _ranks(mpi, torchrun) as ranks:
        is_first = ranks is None or ranks.rank == 0
        jobs = jobs or (min(MAX_JOBS, os.cpu_count() or 1) if ranks is None else 1)
        with progress("verifying") if is_first else nullcontext() as on_progress:
            result = verify_folder(
                folder, step, jobs=jobs, decode=decode, ranks=ranks, on_progress=on_progress
            )
    checked = f"{plural(result.num_steps, 'step')}, {plural(result.num_blocks, 'block')}"
    checked = f"{checked}, {bytes_text(result.num_bytes)} checked"
    if is_first:
        for finding in result.findings:
            show_line(finding)
        found = plural(len(result.findings), "finding") if result.findings else "good"
        typer.echo(f"{checked}: {found}")
    if result.findings:
        raise typer.Exit(FINDING)


@contextmanager
def _ranks(mpi: bool, torchrun: bool) -> Iterator[Ranks | None]:
    """The processes that the launcher has started, as it says itself."""
    if mpi:
        yield MpiRanks()
    elif torchrun:
        import torch.distributed as dist

        from effx_dist.shard import TorchGroup

        try:
            dist.init_process_group("gloo")
        except ValueError as error:
            raise ConfigError(f"--torchrun: was not started by torchrun: {error}") from error
        try:
            yield TorchGroup()
        finally:
            dist.destroy_process_group()
    else:
        yield None


class MpiRanks:
    """The processes of MPI's world communicator. Initialises MPI.

    Raises MissingEngineError where mpi4py or the MPI library is missing.
    """

    def __init__(self) -> None:
        try:
            from mpi4py import MPI
        except (ImportError, RuntimeError) as error:
            raise MissingEngineError(
                f"--mpi: needs mpi4py and the MPI that mpirun belongs to (pip install mpi4py): {error}"
            ) from error
        self._world: Any = MPI.COMM_WORLD
        self.rank: int = self._world.rank
        self.size: int = self._world.size

    def all_gather_object(self, value: T) -> list[T]:
        """Every process's ``value``, by rank. Collective."""
        found: list[T] = self._world.allgather(value)
        return found
