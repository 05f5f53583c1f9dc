"""`effx compact`, `effx pin` and `effx unpin`: what stays in a folder of checkpoints."""

from __future__ import annotations

from typing import Annotated

import typer

from effx_dist.cli.places import Folder, folder_and_step
from effx_dist.cli.show import progress
from effx_dist.errors import ConfigError
from effx_dist.report.text import bytes_text, plural

Step = Annotated[
    int | None, typer.Option(min=0, help="The checkpoint's step, if DIR does not name it.")
]


def compact(
    folder: Folder,
    step: Annotated[
        int | None, typer.Option(min=0, help="The step to make a base of; the newest if not given.")
    ] = None,
) -> None:
    """Make a base of a checkpoint's weights, so that what lies below it is no longer needed.

    Works beside a job that saves to the folder, and changes no checkpoint: the next retention of
    that job removes what nothing needs any more.
    """
    folder, step = folder_and_step(folder, step)
    from effx_dist.checkpoint.tools.compact import compact as merge

    with progress("merging") as on_progress:
        done = merge(folder, step, on_progress)
    if done is None:
        typer.echo("nothing to do: it builds upon nothing below it")
        return
    links, size = plural(done.num_links, "link"), bytes_text(done.stored_bytes)
    typer.echo(f"step {done.step}: {links} merged into a base of {size}")


def pin(folder: Folder, step: Step = None) -> None:
    """Keep a checkpoint, and what it builds upon, whatever the retention's settings say."""
    _set(folder, step, is_pinned=True)


def unpin(folder: Folder, step: Step = None) -> None:
    """Leave a pinned checkpoint to the retention again."""
    _set(folder, step, is_pinned=False)


def _set(folder: str, step: int | None, is_pinned: bool) -> None:
    folder, step = folder_and_step(folder, step)
    if step is None:
        raise ConfigError(f"{folder}: say which checkpoint, with --step or as DIR/step-N")
    from effx_dist.checkpoint.saving.retention import pin as set_pin

    set_pin(folder, step, is_pinned)
    typer.echo(f"step {step}: {'pinned' if is_pinned else 'no longer pinned'}")
