"""The `effx` command: look into checkpoints and runs. Needs no GPU and no engine.

Exit codes: 0 good; 1 a finding (damage, nothing there, a required package missing, two checkpoints
that differ); 2 wrong usage. Tables are drawn on a terminal and are plain aligned text in a pipe;
progress goes to a terminal's stderr only. What needs torch is imported within the command that needs
it. A command is a function in a file of its own and a line here.
"""

from __future__ import annotations

from typing import Annotated

import typer

from effx_dist.cli.compress import compress
from effx_dist.cli.convert import convert
from effx_dist.cli.diff import diff
from effx_dist.cli.inspect import inspect
from effx_dist.cli.keep import compact, pin, unpin
from effx_dist.cli.places import GOOD, EffxGroup
from effx_dist.cli.runs import doctor, report
from effx_dist.cli.verify import verify
from effx_dist.launchers import MPI_RANK, MPI_SIZE
from effx_dist.version import __version__

app = typer.Typer(
    name="effx",
    cls=EffxGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Look into effx_dist checkpoints and runs.",
)
for command in (inspect, verify, diff, convert, compress, compact, pin, unpin, report, doctor):
    app.command()(command)


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"effx_dist {__version__}")
        raise typer.Exit(GOOD)


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    max_decoded_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Refuse checkpoints whose tensors are declared to be larger than this together (64 TiB).",
        ),
    ] = None,
    mpi_size: Annotated[int, typer.Option(hidden=True, envvar=MPI_SIZE)] = 1,
    mpi_rank: Annotated[int, typer.Option(hidden=True, envvar=MPI_RANK)] = 0,
) -> None:
    """Look into effx_dist checkpoints and runs."""
    if max_decoded_bytes is not None:
        from effx_dist.checkpoint import set_max_decoded_bytes

        set_max_decoded_bytes(max_decoded_bytes)
