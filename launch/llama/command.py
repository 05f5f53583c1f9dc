"""The command line that the launch scripts share, and how they say what is wrong with it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from effx_dist.errors import ConfigError

Config = Annotated[Path, typer.Option(help="Settings of the run (TOML).")]
RunDir = Annotated[Path | None, typer.Option(help="Default: runs/NAME OF THE CONFIG.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")
]
LogSamples = Annotated[bool, typer.Option(help="Record the sample ids of each step.")]


def make_app() -> typer.Typer:
    """Tracebacks are Python's own: those of torch are long enough."""
    return typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@contextmanager
def said_in_a_line() -> Iterator[None]:
    """A ConfigError ends the script with one line and exit code 2."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
