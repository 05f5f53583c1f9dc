"""`effx inspect`: what is in a folder of checkpoints, in one checkpoint, in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from effx_dist.cli.places import AsJson, Folder, folder_and_step
from effx_dist.cli.show import bar, show_json, show_line, show_table
from effx_dist.errors import CheckpointNotFoundError
from effx_dist.report.text import (
    ABSENT,
    bytes_text,
    count_text,
    number_text,
    plural,
    ratio_text,
    shape_text,
)

if TYPE_CHECKING:
    from effx_dist.checkpoint import StepSummary
    from effx_dist.checkpoint.tools.tensor_detail import Histogram, TensorDetail, TensorSummary


def inspect(
    folder: Folder,
    step: Annotated[
        int | None, typer.Option(min=0, help="List the tensors of this checkpoint.")
    ] = None,
    tensor: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Look at one tensor (of the newest checkpoint, or of --step): its pieces, its "
            "quantiser, a histogram.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the checkpoints: bases and links, bytes, ratios, the error of the reconstruction."""
    folder, step = folder_and_step(folder, step)
    if tensor is not None:
        _inspect_tensor(folder, step, tensor, as_json)
    elif step is not None:
        _inspect_step(folder, step, as_json)
    else:
        _inspect_folder(folder, as_json)


def _inspect_folder(folder: str, as_json: bool) -> None:
    from effx_dist.checkpoint import inspect_folder

    steps = inspect_folder(folder)
    if not steps:
        raise CheckpointNotFoundError(
            f"{folder}: holds no checkpoint; give the folder that the run saved to"
        )
    if as_json:
        show_json({"folder": folder, "steps": [asdict(step) for step in steps]})
        return
    show_table(*steps_table(steps))
    typer.echo(steps_line(steps))


def steps_table(steps: Sequence[StepSummary]) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of `effx inspect`; a save that never became a checkpoint is "cut off"."""
    columns = ["step", "kind", "parent", "base", "profile", "ranks", "raw", "stored", "ratio"]
    columns += ["run ratio", "error", "saved at", "by", "note"]
    return columns, [_step_row(step, len(columns)) for step in steps]


def _step_row(step: StepSummary, num_columns: int) -> list[str]:
    if not step.committed:
        return [str(step.step), "cut off", *[ABSENT] * (num_columns - 2)]
    return [
        str(step.step),
        step.kind,
        step.parent or ABSENT,
        step.base or ABSENT,
        step.profile,
        str(step.world_size),
        bytes_text(step.raw_bytes),
        bytes_text(step.stored_bytes),
        ratio_text(step.ratio),
        ratio_text(step.run_ratio),
        number_text(step.error, 3),
        step.saved_at[:16].replace("T", " "),  # to the minute
        step.writer or ABSENT,
        _notes(step) or ABSENT,
    ]


def _notes(step: StepSummary) -> str:
    notes = {"pinned": step.pinned, "merged": step.merged, "no moments": step.moments_removed}
    held = [note for note, holds in notes.items() if holds]
    return ", ".join([*(f"tag {tag}" for tag in step.tags), *held])


def steps_line(steps: Sequence[StepSummary]) -> str:
    """Return one line for all committed steps: how many, how many bases, bytes and their ratio."""
    done = [step for step in steps if step.committed]
    raw, stored = sum(step.raw_bytes for step in done), sum(step.stored_bytes for step in done)
    num_bases = sum(step.kind == "base" for step in done)
    line = f"{plural(len(done), 'checkpoint')} ({plural(num_bases, 'base')})"
    return f"{line}: {bytes_text(raw)} stored as {bytes_text(stored)}" + (
        f", {ratio_text(raw / stored)}" if stored else ""
    )


def _inspect_step(folder: str, step: int, as_json: bool) -> None:
    from effx_dist.checkpoint.format.reader import open_checkpoint
    from effx_dist.checkpoint.tools.tensor_detail import list_tensors

    with open_checkpoint(folder, step) as chain:
        tensors = list_tensors(chain)
        aliases = chain.top.manifest.aliases
    if as_json:
        listed = [asdict(tensor) for tensor in tensors]
        show_json({"folder": folder, "step": step, "tensors": listed, "aliases": aliases})
        return
    columns = ["tensor", "dtype", "shape", "coding", "pieces", "raw", "stored", "ratio", "error"]
    show_table(columns, [_tensor_row(tensor) for tensor in tensors])
    for alias, name in sorted(aliases.items()):
        show_line(f"{alias} is {name}")


def _tensor_row(tensor: TensorSummary) -> list[str]:
    return [
        tensor.name,
        tensor.dtype,
        shape_text(tensor.shape),
        tensor.coding,
        str(tensor.num_pieces),
        bytes_text(tensor.raw_bytes),
        bytes_text(tensor.stored_bytes),
        ratio_text(tensor.raw_bytes / max(tensor.stored_bytes, 1)),
        number_text(tensor.error, 3),
    ]


def _inspect_tensor(folder: str, step: int | None, name: str, as_json: bool) -> None:
    from effx_dist.checkpoint.format.reader import open_checkpoint
    from effx_dist.checkpoint.tools.tensor_detail import describe_tensor

    with open_checkpoint(folder, step) as chain:
        detail = describe_tensor(chain, name)
    if as_json:
        show_json({"folder": folder, **asdict(detail)})
        return
    show_table(["tensor", detail.name], _facts(detail))
    typer.echo()
    columns = ["piece", "offsets", "sizes", "file", "blocks", "stored"]
    show_table(columns, _piece_rows(detail))
    typer.echo()
    _show_histogram(detail.histogram)


def _facts(detail: TensorDetail) -> list[list[str]]:
    facts: dict[str, Any] = {"stored as": detail.stored_as} if _is_alias(detail) else {}
    facts |= {
        "step": detail.step,
        "dtype": detail.dtype,
        "shape": shape_text(detail.shape),
        "coding": detail.coding,
        "difference to": detail.parent or ABSENT,
        "raw": bytes_text(detail.raw_bytes),
        "stored": bytes_text(detail.stored_bytes),
        "ratio": ratio_text(detail.raw_bytes / max(detail.stored_bytes, 1)),
    }
    for key, value in (detail.quantiser or {}).items():
        text = number_text(value) if isinstance(value, float) else str(value)
        facts[f"quantiser {key}"] = text
    return [[key, str(value)] for key, value in facts.items()]


def _is_alias(detail: TensorDetail) -> bool:
    return detail.name != detail.stored_as


def _piece_rows(detail: TensorDetail) -> list[list[str]]:
    return [
        [
            str(i),
            ", ".join(map(str, piece.offsets)) or "()",
            shape_text(piece.sizes),
            piece.file or "in the manifest",
            str(piece.num_blocks),
            bytes_text(piece.stored_bytes),
        ]
        for i, piece in enumerate(detail.pieces)
    ]


def _show_histogram(histogram: Histogram) -> None:
    beside = f"{count_text(histogram.num_zeros)} are 0"
    if histogram.num_not_finite:
        beside += f", {count_text(histogram.num_not_finite)} are not finite"
    show_line(f"{histogram.of}: {beside}; the others:")
    largest = max(histogram.counts, default=0)
    rows = [
        [number_text(low, 3), number_text(high, 3), count_text(count), bar(count, largest)]
        for low, high, count in zip(
            histogram.edges, histogram.edges[1:], histogram.counts, strict=False
        )
    ]
    if rows:
        show_table(["from", "to", "count", ""], rows)
