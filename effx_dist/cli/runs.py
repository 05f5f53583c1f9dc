"""`effx report` and `effx doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from effx_dist.cli.places import FINDING
from effx_dist.cli.show import show_table

if TYPE_CHECKING:
    from effx_dist.report.doctor import Entry

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder with the run's run.jsonl.")]


def report(
    run: RunFolder,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; RUN/report.html if not given."),
    ] = None,
    baseline: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Another run, drawn into the same charts.")
    ] = None,
) -> None:
    """Draw a run as one HTML file that needs no network."""
    from effx_dist.report.page import write_report

    typer.echo(str(write_report(run, out or run / "report.html", baseline)))


def doctor() -> None:
    """Say what is installed here and what will therefore work."""
    from effx_dist.report.doctor import examine

    found = examine()
    _show_entries("Machine", found.machine)
    _show_entries("Packages", found.packages)
    _show_entries("What will work", found.features)
    if found.missing:
        typer.echo(f"effx: required and not usable: {', '.join(found.missing)}", err=True)
        raise typer.Exit(FINDING)


def _show_entries(title: str, entries: Sequence[Entry]) -> None:
    show_table([title, "found", ""], [[entry.name, entry.found, entry.note] for entry in entries])
    typer.echo()
