"""Tables, bars and progress: drawn on a terminal, plain text in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import typer

from effx_dist.report.run_log import to_jsonable
from effx_dist.report.text import ABSENT


def show_json(content: object) -> None:
    """Print JSON, with non-finite numbers as strings."""
    typer.echo(json.dumps(to_jsonable(content), indent=2))


def show_line(text: str) -> None:
    """Print one line; what is not printable in it shows as "?"."""
    typer.echo(printable(text))


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table: drawn on a terminal, plain aligned text elsewhere. Text that is not printable shows as "?"."""
    cells = [[printable(cell) for cell in row] for row in rows]
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
    return cell == ABSENT or (cell.lstrip("-")[:1].isdigit() and not is_date)


def printable(text: str) -> str:
    """Names come from files that others wrote: no escape sequence of theirs may reach the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def bar(count: int, largest: int, width: int = 40) -> str:
    """A bar as long as `count`, of `width` characters for `largest`; something for anything but 0."""
    return "#" * max(round(width * count / max(largest, 1)), count > 0)


@contextmanager
def progress(label: str, is_first: bool = True) -> Iterator[Callable[[int, int], None] | None]:
    """Show bytes done of bytes there are on the first rank's stderr, if that is a terminal; None elsewhere."""
    if not (is_first and sys.stderr.isatty()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    console = Console(stderr=True)
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as shown:
        task = shown.add_task(label, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)
