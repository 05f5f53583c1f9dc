"""The `effx` command: look into checkpoints and runs. Needs no GPU and no engine.

Exit codes: 0 good; 1 a finding (damage, nothing there, a required package missing); 2 wrong usage. Tables are drawn
on a terminal and are plain aligned text in a pipe. What needs torch is imported within the command that needs it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from effx_dist import __version__
from effx_dist.errors import CheckpointNotFoundError, EffxError
from effx_dist.report.run_log import to_jsonable
from effx_dist.report.text import ABSENT, bytes_text, number_text, plural, ratio_text

if TYPE_CHECKING:
    from effx_dist.checkpoint import StepSummary
    from effx_dist.report.doctor import Part

CHECKPOINTS = "checkpoints"
GOOD, FINDING = 0, 1


class _Group(TyperGroup):
    """Turns what the library refuses, and files that cannot be used, into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe has seen enough; typer knows what to do
            raise
        except (EffxError, OSError) as error:
            typer.echo(f"effx: {_printable(str(error))}", err=True)
            raise typer.Exit(FINDING) from None


app = typer.Typer(
    name="effx",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Look into effx_dist checkpoints and runs.",
)

Folder = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Checkpoint folder, or a run's folder that has one called checkpoints/.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder with the run's run.jsonl.")]


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
) -> None:
    """Look into effx_dist checkpoints and runs."""


@app.command()
def inspect(
    folder: Folder,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, for other programs.")
    ] = False,
) -> None:
    """List the checkpoints: bases and links, bytes, ratios, the error of the reconstruction."""
    folder = checkpoint_folder(
        folder
    )  # before the import: a misspelt path should not wait for torch
    from effx_dist.checkpoint import inspect_folder

    steps = inspect_folder(folder)
    if not steps:
        raise CheckpointNotFoundError(
            f"{folder}: holds no checkpoint; give the folder that the run saved to"
        )
    if as_json:
        content = {"folder": folder, "steps": [asdict(step) for step in steps]}
        typer.echo(json.dumps(to_jsonable(content), indent=2))
        return
    show_table(*steps_table(steps))
    typer.echo(steps_line(steps))


@app.command()
def verify(
    folder: Folder,
    step: Annotated[
        int | None, typer.Option(min=0, help="Only this step, with what it builds upon.")
    ] = None,
) -> None:
    """Check every stored byte against its checksum, and every chain down to its base."""
    folder = checkpoint_folder(
        folder
    )  # before the import: a misspelt path should not wait for torch
    from effx_dist.checkpoint import verify_folder

    result = verify_folder(folder, step)
    for finding in result.findings:
        typer.echo(_printable(finding))
    checked = f"{plural(result.num_steps, 'step')}, {plural(result.num_blocks, 'block')}"
    checked = f"{checked}, {bytes_text(result.num_bytes)} checked"
    if result.findings:
        typer.echo(f"{checked}: {plural(len(result.findings), 'finding')}")
        raise typer.Exit(FINDING)
    if not result.num_steps:
        raise CheckpointNotFoundError(
            f"{folder}: holds no committed checkpoint, so nothing was checked"
        )
    typer.echo(f"{checked}: good")


@app.command()
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


@app.command()
def doctor() -> None:
    """Say what is installed here and what will therefore work."""
    from effx_dist.report.doctor import examine

    found = examine()
    show_parts("Machine", found.machine)
    show_parts("Packages", found.packages)
    show_parts("What will work", found.features)
    if found.missing:
        typer.echo(f"effx: required and not usable: {', '.join(found.missing)}", err=True)
        raise typer.Exit(FINDING)


def checkpoint_folder(folder: str) -> str:
    """Return `folder/checkpoints` if it is there, else `folder`; a URL stays as it is.

    Raises:
        CheckpointNotFoundError: There is no such local folder.
    """
    if "://" in folder:
        return folder
    if not Path(folder).is_dir():
        raise CheckpointNotFoundError(f"{folder}: no such folder")
    inner = Path(folder) / CHECKPOINTS
    return str(inner) if inner.is_dir() else folder


def steps_table(steps: Sequence[StepSummary]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of `effx inspect`; a save that never became a checkpoint is "cut off"."""
    columns = ["step", "kind", "parent", "profile", "ranks", "raw", "stored", "ratio", "run ratio"]
    columns += ["error", "saved at"]
    return columns, [_step_row(step, len(columns)) for step in steps]


def _step_row(step: StepSummary, num_columns: int) -> list[str]:
    if not step.committed:
        return [str(step.step), "cut off", *[ABSENT] * (num_columns - 2)]
    return [
        str(step.step),
        step.kind,
        step.parent or ABSENT,
        step.profile,
        str(step.world_size),
        bytes_text(step.raw_bytes),
        bytes_text(step.stored_bytes),
        ratio_text(step.ratio),
        ratio_text(step.run_ratio),
        number_text(step.error, 3),
        step.saved_at[:16].replace("T", " "),  # to the minute
    ]


def steps_line(steps: Sequence[StepSummary]) -> str:
    """Return one line for all committed steps: how many, how many bases, bytes and their ratio."""
    done = [step for step in steps if step.committed]
    raw, stored = sum(step.raw_bytes for step in done), sum(step.stored_bytes for step in done)
    num_bases = sum(step.kind == "base" for step in done)
    line = f"{plural(len(done), 'checkpoint')} ({plural(num_bases, 'base')})"
    return f"{line}: {bytes_text(raw)} stored as {bytes_text(stored)}" + (
        f", {ratio_text(raw / stored)}" if stored else ""
    )


def show_parts(title: str, parts: Sequence[Part]) -> None:
    """Print one table of `effx doctor`."""
    show_table([title, "found", ""], [[part.name, part.found, part.note] for part in parts])
    typer.echo()


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, plain aligned text elsewhere. Text that is not printable shows as "?"."""
    cells = [[_printable(cell) for cell in row] for row in rows]
    is_number = [all(_is_numeric(row[i]) for row in cells) for i in range(len(columns))]
    if sys.stdout.isatty():
        _draw_table(columns, cells, is_number)
        return
    lines = [list(columns), *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, is_number, strict=True)
        ]
        typer.echo("  ".join(parts).rstrip())


def _draw_table(
    columns: Sequence[str], cells: Sequence[Sequence[str]], is_number: Sequence[bool]
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name, right in zip(columns, is_number, strict=True):
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*map(Text, row))  # Text: names from files must not be read as rich markup
    console = Console()
    # A window that is too narrow breaks the lines; squeezed columns could not be read at all.
    needed = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def _is_numeric(cell: str) -> bool:
    is_date = cell[4:5] == "-"
    return cell == ABSENT or (cell[:1].isdigit() and not is_date)


def _printable(text: str) -> str:
    """Names come from files that others wrote: no escape sequence of theirs may reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


if __name__ == "__main__":
    app()
