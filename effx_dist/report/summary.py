"""What the records of a run add up to: epochs, saves, and the figures at the head of the page. Pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

from effx_dist.report.run_log import Record, RunRecords
from effx_dist.report.text import (
    bytes_text,
    count_text,
    number_text,
    percent_text,
    plural,
    ratio_text,
    seconds_text,
)

EVAL_LOSS = "eval/loss"
TRAIN_LOSS = "train/loss"
INFOBATCH = "effx/infobatch/"
CHECKPOINT = "effx/checkpoint/"
CONFIG_FIELDS = ("config", "settings")
"""What a "start" event may call the resolved settings of the run."""

Metrics = Mapping[str, float]
Groups = dict[int, list[Metrics]]


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The plan of one epoch."""

    epoch: int
    kept_fraction: float | None
    threshold: float | None


@dataclass(frozen=True, kw_only=True)
class Save:
    """One checkpoint, as it was reported while the run went on; None for what was not."""

    step: int
    raw_bytes: float | None
    stored_bytes: float | None
    ratio: float | None
    run_ratio: float | None
    error: float | None
    blocked_s: float | None
    write_s: float | None


@dataclass(frozen=True)
class Card:
    """One figure at the head of the page, with a line that puts it into proportion."""

    label: str
    value: str
    note: str = ""


def epochs(run: RunRecords) -> list[Epoch]:
    """Return what was kept in each epoch, by epoch; empty without InfoBatch.

    An epoch begins where an "epoch" event (fields epoch, step) says so. A run without such events is cut by its
    "epoch" metric, an index or progress with a fraction; without either the result is empty.
    """
    rows = [r for r in run.records if INFOBATCH + "kept_fraction" in r.metrics]
    groups = _by_epoch_event(rows, run) or _by_epoch_metric([row.metrics for row in rows])
    return [
        Epoch(
            epoch=epoch,
            kept_fraction=_commonest(group, INFOBATCH + "kept_fraction"),
            threshold=_commonest(group, INFOBATCH + "threshold"),
        )
        for epoch, group in sorted(groups.items())
        if group
    ]


def _by_epoch_event(rows: list[Record], run: RunRecords) -> Groups:
    found = [
        (event.fields.get("epoch"), event.fields.get("step")) for event in run.events_of("epoch")
    ]
    starts: dict[int, int] = {}
    for epoch, step in found:
        if isinstance(epoch, int) and isinstance(step, int):  # a resume names its epoch again
            starts[epoch] = min(step, starts.get(epoch, step))
    order = sorted(starts)
    groups: Groups = {}
    for place, epoch in enumerate(order):
        end = starts[order[place + 1]] if place + 1 < len(order) else math.inf
        groups[epoch] = [row.metrics for row in rows if starts[epoch] <= row.step < end]
    return groups


def _by_epoch_metric(rows: list[Metrics]) -> Groups:
    """Cut by progress; the commonest value of a stretch counts, as its ends may speak of a neighbour."""
    rows = [row for row in rows if math.isfinite(row.get("epoch", math.nan))]
    groups: Groups = {}
    for row in rows:
        groups.setdefault(math.floor(row["epoch"]), []).append(row)
    if len(groups) > 1 and _is_only_the_end(rows[-1]["epoch"], groups, rows):
        del groups[math.floor(rows[-1]["epoch"])]
    return groups


def _is_only_the_end(last: float, groups: Groups, rows: list[Metrics]) -> bool:
    """Whether progress of exactly 4.0 means that the fourth epoch ended, not that a fifth began."""
    has_fractions = any(row["epoch"] % 1 for row in rows)
    return has_fractions and last % 1 == 0 and len(groups[math.floor(last)]) == 1


def _commonest(group: list[Metrics], name: str) -> float | None:
    values = Counter(row[name] for row in group if math.isfinite(row.get(name, math.nan)))
    return values.most_common(1)[0][0] if values else None


def saves(run: RunRecords) -> list[Save]:
    """Return every step that reported on a checkpoint, by step."""
    names = [f.name for f in fields(Save) if f.name != "step"]
    found = [
        {name: record.metrics.get(CHECKPOINT + name) for name in names} | {"step": record.step}
        for record in run.records
    ]
    return [
        Save(**values)  # type: ignore[arg-type]  # the keys are the fields' own names
        for values in found
        if any(values[name] is not None for name in names)
    ]


def samples_at(run: RunRecords) -> dict[int, float]:
    """Return samples processed by step, in a straight line between the steps that logged them.

    Steps before the first and after the last logged value are left out; empty if none was logged.
    """
    known = [(r.step, float(r.samples)) for r in run.records if r.samples is not None]
    steps, found, place = [r.step for r in run.records], dict(known), 0
    for (left, low), (right, high) in pairwise(known):
        while place < len(steps) and steps[place] < right:
            if (step := steps[place]) > left:
                found[step] = low + (high - low) * (step - left) / (right - left)
            place += 1
    return found


def config_of(run: RunRecords) -> dict[str, str]:
    """Return the newest "start" event's settings, nesting turned into dotted keys; empty if there are none."""
    starts = run.events_of("start")
    values = [starts[-1].fields.get(name) for name in CONFIG_FIELDS] if starts else []
    return next((flatten(value) for value in values if value), {})


def flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Return `{"a": {"b": 1}}` as `{"a.b": "1"}`; lists stay on one line."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, str] = {}
        for name, item in value.items():
            flat |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
        return flat
    return {prefix: value if isinstance(value, str) else str(value)} if prefix else {}


def cards(run: RunRecords, baseline: RunRecords | None = None) -> list[Card]:
    """Return the figures at the head of the page; one that was not measured is left out."""
    found = [
        _held_out_card(run, baseline),
        _samples_card(run, baseline),
        _saved_card(run),
        *_checkpoint_cards(run),
        _resume_card(run),
        _length_card(run),
    ]
    return [card for card in found if card is not None]


def _held_out_card(run: RunRecords, baseline: RunRecords | None) -> Card | None:
    loss = run.latest(EVAL_LOSS)
    if loss is None:
        return None
    other = None if baseline is None else baseline.latest(EVAL_LOSS)
    if other is None:
        return Card("Held-out loss", f"{loss:.4f}", f"at step {run.series(EVAL_LOSS)[-1][0]:,}")
    return Card("Held-out loss", f"{loss:.4f}", f"baseline {other:.4f} ({loss - other:+.4f})")


def _num_samples(run: RunRecords | None) -> int | None:
    if run is None:
        return None
    return next((r.samples for r in reversed(run.records) if r.samples is not None), None)


def _samples_card(run: RunRecords, baseline: RunRecords | None) -> Card | None:
    done, other = _num_samples(run), _num_samples(baseline)
    if done is None:
        return None
    return Card(
        "Samples processed", count_text(done), "" if other is None else f"baseline {other:,}"
    )


def _saved_card(run: RunRecords) -> Card | None:
    saved, done = run.latest(INFOBATCH + "samples_saved"), _num_samples(run)
    if saved is None or not math.isfinite(saved):
        return None
    if not done:
        return Card("Samples saved", count_text(saved))
    note = f"{count_text(saved)} of {count_text(saved + done)} left out"
    return Card("Samples saved", percent_text(saved / (saved + done)), note)


def _checkpoint_cards(run: RunRecords) -> list[Card | None]:
    done = saves(run)
    raw, stored = _total(done, "raw_bytes"), _total(done, "stored_bytes")
    blocked, run_ratio = _total(done, "blocked_s"), run.latest(CHECKPOINT + "run_ratio")
    num_saves = plural(len(done), "save")
    ratio = run_ratio if run_ratio is not None else raw / stored if raw and stored else None
    note = f"{bytes_text(raw)} stored as {bytes_text(stored)}, {num_saves}"
    return [
        None if ratio is None else Card("Checkpoint ratio", ratio_text(ratio), note),
        None
        if blocked is None
        else Card("Training blocked", seconds_text(blocked), f"by {num_saves}"),
    ]


def _total(done: list[Save], name: str) -> float | None:
    values = [value for save in done if (value := getattr(save, name)) is not None]
    return math.fsum(values) if values and all(map(math.isfinite, values)) else None


def _resume_card(run: RunRecords) -> Card | None:
    """Say how often the run was taken up again, and on how many ranks each time."""
    if not run.events:
        return None
    resumes = run.events_of("resume")
    started = [event.fields for event in run.events if event.kind in ("start", "resume")]
    sizes = [size for values in started if (size := _world_size(values)) is not None]
    changes = [size for place, size in enumerate(sizes) if place == 0 or size != sizes[place - 1]]
    noun = "rank" if changes == [1] else "ranks"
    return Card(
        "Resumes", str(len(resumes)), f"{' → '.join(map(str, changes))} {noun}" if changes else ""
    )


def _world_size(values: Mapping[str, Any]) -> int | None:
    size = values.get("world_size")
    return size if isinstance(size, int) and not isinstance(size, bool) else None


def _length_card(run: RunRecords) -> Card | None:
    if not run.records:
        return None
    loss = run.latest(TRAIN_LOSS)
    note = "" if loss is None else f"last training loss {number_text(loss)}"
    return Card("Steps", count_text(run.records[-1].step), note)
