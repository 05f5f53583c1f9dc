"""`effx verify`: whether every byte of every checkpoint is what was written."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from effx_dist.cli.places import FINDING, Folder, folder_and_step
from effx_dist.cli.ranks import Mpi, Torchrun, tool_ranks
from effx_dist.cli.show import progress, show_line
from effx_dist.report.text import bytes_text, plural

MAX_JOBS = 8
"""Threads that are used unless more are asked for; a disk seldom has more to give."""


def verify(
    folder: Folder,
    step: Annotated[
        int | None, typer.Option(min=0, help="Only this step, with what it builds upon.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads; by default one per core, and one where ranks share the work."
        ),
    ] = None,
    decode: Annotated[
        bool, typer.Option(help="Read every tensor as a load would, too; slower, finds more.")
    ] = False,
    mpi: Mpi = 0,
    torchrun: Torchrun = False,
) -> None:
    """Check every stored byte against its checksum, and every chain down to its base.

    Exit code 0 if all is as it was written, 1 if anything is not: a line per finding names file,
    tensor and block.
    """
    if not (mpi or torchrun):  # a misspelt path should not wait for torch
        folder_and_step(folder, step)
    with tool_ranks(mpi, torchrun) as ranks:
        from effx_dist.checkpoint import verify_folder

        place, step = ranks.everywhere(lambda: folder_and_step(folder, step), keep_own_error=False)
        is_first = ranks.rank == 0
        jobs = jobs or (min(MAX_JOBS, os.cpu_count() or 1) if ranks.size == 1 else 1)
        with progress("verifying", is_first) as on_progress:
            result = verify_folder(
                place, step, jobs=jobs, decode=decode, ranks=ranks, on_progress=on_progress
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
