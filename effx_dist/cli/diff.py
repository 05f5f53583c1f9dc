"""`effx diff`: what two checkpoints differ in."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from effx_dist.cli.places import FINDING, USAGE, AsJson, complain, folder_and_step
from effx_dist.cli.show import progress, show_json, show_line, show_table
from effx_dist.errors import EffxError
from effx_dist.report.text import ABSENT, number_text, percent_text, plural, shape_text

if TYPE_CHECKING:
    from effx_dist.checkpoint.tools.compare import CheckpointDifference, TensorDifference


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="Checkpoint folder, or a step's folder.")],
    b: Annotated[str | None, typer.Argument(metavar="[B]", help="Another; A if not given.")] = None,
    step_a: Annotated[int | None, typer.Option(min=0, help="Step of A; else the newest.")] = None,
    step_b: Annotated[int | None, typer.Option(min=0, help="Step of B; else the newest.")] = None,
    top: Annotated[int, typer.Option(min=0, help="Show so many tensors; 0 for all.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Compare two checkpoints, tensor by tensor; the largest relative change ||B - A|| / ||A|| first.

    Exit code as that of diff: 0 the same bit for bit, 1 different, 2 could not be compared.
    """
    try:
        found = _compare(a, step_a, a if b is None else b, step_b)
    except (EffxError, OSError) as error:
        complain(error)
        raise typer.Exit(USAGE) from None
    if as_json:
        tensors = [asdict(tensor) for tensor in found.changed[: top or None]]
        show_json({"identical": found.identical, "tensors": tensors, "values": found.values})
    else:
        _show(found, top)
    if not found.identical:
        raise typer.Exit(FINDING)


def _compare(a: str, step_a: int | None, b: str, step_b: int | None) -> CheckpointDifference:
    place_a, place_b = folder_and_step(a, step_a), folder_and_step(b, step_b)
    from effx_dist.checkpoint.format.reader import open_checkpoint
    from effx_dist.checkpoint.tools.compare import compare_checkpoints

    with (
        open_checkpoint(*place_a) as chain_a,
        open_checkpoint(*place_b) as chain_b,
        progress("comparing") as on_progress,
    ):
        return compare_checkpoints(chain_a, chain_b, on_progress)


def _show(found: CheckpointDifference, top: int) -> None:
    shown = found.changed[: top or None]
    if shown:
        columns = ["tensor", "dtype", "shape", "relative", "largest", "changed", "difference"]
        show_table(columns, [_row(tensor) for tensor in shown])
    for path in found.values:
        show_line(f"not the same: {path}")
    num_tensors, num_changed = len(found.tensors), len(found.changed)
    rest = f", {num_changed - len(shown)} not shown" if len(shown) < num_changed else ""
    same = f"{num_tensors - num_changed} the same"
    typer.echo(f"{plural(num_changed, 'tensor')} of {num_tensors} differ{rest}; {same}")


def _row(tensor: TensorDifference) -> list[str]:
    numel = 1
    for size in tensor.shape:
        numel *= size
    comparable = tensor.relative is not None
    return [
        tensor.name,
        tensor.dtype,
        shape_text(tensor.shape),
        number_text(tensor.relative, 3),
        number_text(tensor.largest, 3),
        percent_text(tensor.num_changed / numel) if comparable and numel else ABSENT,
        f"{tensor.kind} {tensor.other}".strip(),
    ]
