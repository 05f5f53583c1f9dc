"""What the commands are given and what they end with: folders, steps, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from effx_dist.cli.show import printable
from effx_dist.errors import CheckpointNotFoundError, ConfigError, EffxError

CHECKPOINTS = "checkpoints"
GOOD, FINDING, USAGE = 0, 1, 2


class EffxGroup(TyperGroup):
    """Turns what the library refuses, and files that cannot be used, into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader of a pipe has seen enough; typer knows what to do
            raise
        except (EffxError, OSError) as error:
            complain(error)
            raise typer.Exit(FINDING) from None
        except Exception as error:
            is_usage = getattr(error, "exit_code", GOOD) == USAGE
            if is_usage and ctx.params["mpi_rank"]:  # the first rank says it
                raise typer.Exit(USAGE) from None
            raise


def complain(error: Exception) -> None:
    """Say on stderr what went wrong, in one line."""
    typer.echo(f"effx: {printable(str(error))}", err=True)


Folder = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Checkpoint folder or its URL, a run's folder that has one called checkpoints/, or one "
        "step's folder.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for other programs.")]


def read_json(path: Path) -> Any:
    """What a file of JSON holds. Raises ConfigError where it is none, and OSError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error


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


def folder_and_step(folder: str, step: int | None) -> tuple[str, int | None]:
    """Return the folder of checkpoints and the step: `run/step-300` is step 300 of `run`, and `run/best`
    the step with that tag.

    Raises:
        CheckpointNotFoundError: There is no such local folder.
        ConfigError: Two different steps were given.
    """
    folder = checkpoint_folder(folder)
    from effx_dist.checkpoint.storage.places import location
    from effx_dist.checkpoint.storage.steps import TAG, step_of, tagged_step

    path = folder.rstrip("/") if "://" in folder else str(Path(folder).absolute())
    parent, _, name = path.rpartition("/")
    named = step_of(name)
    if named is None and location(path).has_file(TAG):
        named = tagged_step(parent, name)
    if named is None:
        return folder, step
    if step is not None and step != named:
        raise ConfigError(f"--step {step}: {folder} is another step; leave one of the two out")
    return parent, named
