"""`write_report` draws a run as one HTML file that needs no network and no server.

Tables and figures are HTML already and can be read without JavaScript; the charts are drawn by `assets/page.js`
with the vendored uPlot 1.6.32 (MIT, from the npm registry) out of the JSON that stands in the page. A content
security policy in the page lets those two scripts run and nothing else, and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from effx_dist.report.run_log import RunRecords, read_run, to_jsonable
from effx_dist.report.summary import (
    CONFIG_FIELDS,
    Card,
    Save,
    cards,
    config_of,
    epochs,
    flatten,
    samples_at,
    saves,
)
from effx_dist.report.text import bytes_text, number_text, plural, ratio_text, seconds_text

PAYLOAD_ID = "effx-data"
Points = list[tuple[int, float]]
PER_PARAMETER = "effx/cautious/alignment/"
FORMAT = 1
# A page of more than some ten MB no longer scrolls well, so long series are thinned. There are hundreds of the
# second kind, one a parameter, and they must keep the same steps to stand in one picture.
MAX_POINTS = 20_000
MAX_POINTS_PER_PARAMETER = 400


def write_report(
    run_dir: str | Path, out_html: str | Path, baseline: str | Path | None = None
) -> Path:
    """Write the page of a run, and return where it stands.

    Args:
        run_dir: The folder that `RunLog` wrote to. The run may still be going on.
        out_html: The file to write; replaced as a whole if it exists.
        baseline: The folder of another run, drawn into the same loss charts.

    Raises:
        RunNotFoundError: One of the two folders has no `run.jsonl`.
    """
    run = read_run(run_dir)
    other = None if baseline is None else read_run(baseline)
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.write_bytes(render(run, other).encode("utf-8", "replace"))  # a lone surrogate becomes "?"
    return draft.replace(out)


def render(run: RunRecords, baseline: RunRecords | None = None) -> str:
    """Return the page's HTML. Every string that comes from the records is escaped."""
    library, script = _asset("uPlot.iife.min.js"), _asset("page.js")
    return Template(_asset("page.html")).substitute(
        policy=_policy([library, script]),
        title=escape(_name(run)),
        style=_asset("uPlot.min.css") + _asset("page.css"),
        subtitle=_subtitle(run, baseline),
        cards=_cards(cards(run, baseline)),
        checkpoints=_checkpoint_table(saves(run)),
        history=_history_table(run),
        config=_pairs_table("Resolved config", config_of(run)),
        payload_id=PAYLOAD_ID,
        payload=_script_safe_json(payload(run, baseline)),
        library=library,
        script=script,
    )


def payload(run: RunRecords, baseline: RunRecords | None = None) -> dict[str, Any]:
    """Return the data in the page: plain JSON, non-finite numbers as in `run.jsonl`."""
    runs = {"run": run} if baseline is None else {"run": run, "baseline": baseline}
    return {"format": FORMAT} | {
        role: to_jsonable(_data(records)) for role, records in runs.items()
    }


def _data(run: RunRecords) -> dict[str, Any]:
    samples = samples_at(run)
    return {
        "name": _name(run),
        "series": {name: _series(run, name, samples) for name in run.metric_names()},
        "epochs": [asdict(epoch) for epoch in epochs(run)],
        "saves": [asdict(save) for save in saves(run)],
        "events": [{"t": e.t, "event": e.kind, "fields": e.fields} for e in run.events],
    }


def _series(run: RunRecords, name: str, samples: dict[int, float]) -> dict[str, Any]:
    """Return a metric's columns; for a thinned one also the means of what lies between, under "mean"."""
    points = run.series(name)
    if name.startswith(PER_PARAMETER):
        return _columns(points[:: math.ceil(len(points) / MAX_POINTS_PER_PARAMETER)], samples)
    if len(points) <= MAX_POINTS:
        return _columns(points, samples)
    means = _columns(stretch_means(points, MAX_POINTS // 10), samples)
    return _columns(thin(points, MAX_POINTS), samples) | {"mean": means}


def _columns(points: Points, samples: dict[int, float]) -> dict[str, list[Any]]:
    return {
        "step": [step for step, _ in points],
        "samples": [samples.get(step) for step, _ in points],
        "value": [value for _, value in points],
    }


def thin(points: Points, max_points: int) -> Points:
    """Return at most `max_points` points (>= 2) with the lowest and the highest of every stretch among them."""
    if len(points) <= max_points:
        return points
    stretches = _stretches(points, max_points // 2)
    ends = [{min(part, key=_low_first), max(part, key=_low_first)} for part in stretches]
    return [point for pair in ends for point in sorted(pair)]


def stretch_means(points: Points, num_stretches: int) -> Points:
    """Return the mean of the finite values of every stretch, at its middle step; NaN where there are none."""
    means: Points = []
    for part in _stretches(points, num_stretches):
        values = [value for _, value in part if math.isfinite(value)]
        mean = math.fsum(values) / len(values) if values else math.nan
        means.append((part[len(part) // 2][0], mean))
    return means


def _stretches(points: Points, num_stretches: int) -> list[Points]:
    edges = [len(points) * place // num_stretches for place in range(num_stretches + 1)]
    return [points[start:end] for start, end in pairwise(edges)]


def _low_first(point: tuple[int, float]) -> float:
    return math.inf if math.isnan(point[1]) else point[1]  # a NaN is what one would look for


def _name(run: RunRecords) -> str:
    return run.folder.resolve().name or str(run.folder)


def _asset(name: str) -> str:
    return files("effx_dist.report").joinpath("assets", name).read_text(encoding="utf-8")


def _policy(scripts: Iterable[str]) -> str:
    digests = [
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts
    ]
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {sources}"


def _script_safe_json(value: object) -> str:
    """Return JSON in which no byte can end the script element or open a comment; it parses back equal."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _subtitle(run: RunRecords, baseline: RunRecords | None) -> str:
    parts = [plural(len(run.records), "record")]
    times = [event.t for event in run.events] + [record.t for record in run.records]
    if times:
        parts = [
            _time_text(min(times)),
            f"{seconds_text(max(times) - min(times))} from first to last",
            *parts,
        ]
    if baseline is not None:
        parts.append(f"baseline {_name(baseline)}")
    if run.num_superseded:
        parts.append(f"{plural(run.num_superseded, 'record')} redone after a resume, not shown")
    if run.num_unreadable_lines:
        parts.append(f"{plural(run.num_unreadable_lines, 'line')} not readable")
    return " · ".join(map(escape, parts))


def _time_text(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):  # a clock that was never set
        return f"t = {seconds:g} s"


def _cards(figures: Sequence[Card]) -> str:
    if not figures:
        return '<p class="empty">Nothing has been recorded yet.</p>'
    return "\n".join(
        f'<div class="card"><span class="label">{escape(card.label)}</span>'
        f'<span class="value">{escape(card.value)}</span>'
        f'<span class="note">{escape(card.note)}</span></div>'
        for card in figures
    )


def _checkpoint_table(done: Sequence[Save]) -> str:
    columns = [
        "Step",
        "Raw",
        "Stored",
        "Ratio",
        "Run ratio",
        "Largest error",
        "Blocked",
        "Written in",
    ]
    rows = [
        [
            f"{save.step:,}",
            bytes_text(save.raw_bytes),
            bytes_text(save.stored_bytes),
            ratio_text(save.ratio),
            ratio_text(save.run_ratio),
            number_text(save.error, 3),
            seconds_text(save.blocked_s),
            seconds_text(save.write_s),
        ]
        for save in done
    ]
    return _section("Checkpoint table", _table(columns, rows, "numbers")) if rows else ""


def _history_table(run: RunRecords) -> str:
    rows = [
        [
            _time_text(event.t),
            event.kind,
            _details({k: v for k, v in event.fields.items() if k not in CONFIG_FIELDS}),
        ]
        for event in run.events
    ]
    return _section("History", _table(["Time", "Event", "Details"], rows)) if rows else ""


def _details(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in flatten(values).items())


def _pairs_table(title: str, pairs: dict[str, str]) -> str:
    rows = [[name, value] for name, value in pairs.items()]
    return _section(title, _table(["Key", "Value"], rows, "pairs")) if rows else ""


def _section(title: str, body: str) -> str:
    return f"<details open>\n<summary>{escape(title)}</summary>\n{body}\n</details>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "\n".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
