"""`RunLog` writes what a run measures, one JSON object a line; `read_run` reads it back.

A line is either `{"t": unix seconds, "step": int, "samples": int, "train/loss": 3.2, ...}` or
`{"t": unix seconds, "event": "resume", "step": 100, ...}`. Every line is handed to the operating system as one
write, so a killed process loses at most the line it was writing. JSON has no NaN or infinity: they are stored as
the strings "NaN", "Infinity" and "-Infinity". No torch is imported here except for TensorBoard, when it is used.
"""

from __future__ import annotations

import json
import math
import operator
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeGuard

from effx_dist.errors import ConfigError, EffxError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "run.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_RESERVED = frozenset({"t", "step", "samples", "event"})
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class RunNotFoundError(EffxError, FileNotFoundError):
    """A folder holds no record of a run (`run.jsonl`). The message names the folder."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that was measured at one step; where a value was logged twice, the later one."""

    step: int
    t: float
    """Unix seconds of the last line for this step."""
    samples: int | None
    """Samples processed by all ranks up to and with this step; None if it was not logged."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened once: "start", "resume", "end", or any other kind."""

    kind: str
    t: float
    fields: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """What `run.jsonl` says about the run that stands, steps redone after a kill counted once."""

    folder: Path
    records: tuple[Record, ...]
    """One a step, by rising step."""
    events: tuple[Event, ...]
    """The events, in the order of the file."""
    num_superseded: int
    """Records of steps that a resumed (or restarted) run went back over; they are not in `records`."""
    num_unreadable_lines: int
    """Lines that are not a record: torn by a kill, or foreign."""

    def series(self, name: str) -> list[tuple[int, float]]:
        """Return (step, value) of one metric, by rising step; empty if it was never logged."""
        return [(r.step, r.metrics[name]) for r in self.records if name in r.metrics]

    def latest(self, name: str) -> float | None:
        """Return the metric's value at the highest step that has one, else None."""
        return next((r.metrics[name] for r in reversed(self.records) if name in r.metrics), None)

    def metric_names(self) -> list[str]:
        """Return every metric's name, in the order in which they first appear by step."""
        return list(dict.fromkeys(name for record in self.records for name in record.metrics))

    def events_of(self, kind: str) -> list[Event]:
        """Return the events of one kind, in the order of the file."""
        return [event for event in self.events if event.kind == kind]


class RunLog:
    """Append a run's metrics and events to `folder/run.jsonl`, and its metrics to TensorBoard.

    Only one rank may write to a folder: the caller makes a `RunLog` on rank 0 and nowhere else. No communication
    is performed. A write that fails (full disk) warns once and is given up: training must not end for its log.

    Args:
        folder: The run's folder; made if it is absent. An existing `run.jsonl` is appended to.
        tensorboard: Also write scalars under `folder/tensorboard`. Where the tensorboard package is missing, this
            warns once and goes on without.
    """

    def __init__(self, folder: str | Path, tensorboard: bool = True) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / FILE_NAME
        self._is_torn = _ends_torn(path)
        self._file = path.open("ab", buffering=0)
        self._wants_tensorboard = tensorboard
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        self._has_warned = False

    def log(self, step: int, metrics: Mapping[str, float], samples: int | None = None) -> None:
        """Write the metrics of one step; calls for the same step add up.

        What a background save reports belongs to the step that was saved, even when it is known only later.

        Args:
            step: Optimizer steps done.
            metrics: Name to number (or one-element tensor, which is waited for).
            samples: Samples processed by all ranks so far, those left out by pruning not counted.

        Raises:
            ConfigError: A metric has one of the names that the record itself uses.
        """
        if taken := sorted(_RESERVED.intersection(metrics)):
            raise ConfigError(f"metrics: {', '.join(taken)}: names of the record's own; use others")
        step = operator.index(step)
        values = {name: float(value) for name, value in metrics.items()}
        line: dict[str, Any] = {"t": time.time(), "step": step}
        if samples is not None:
            line["samples"] = operator.index(samples)
        self._write(line | values)
        self._log_tensorboard(step, values)

    def event(self, kind: str, **fields: object) -> None:
        """Write an event, such as `event("resume", step=100, world_size=2)`.

        After "resume", earlier records of steps beyond its `step` no longer count. Fields may be nested; what JSON
        has no word for (paths, dtypes) is stored as its string.
        """
        if taken := sorted({"t", "event"}.intersection(fields)):
            raise ConfigError(
                f"event fields: {', '.join(taken)}: names of the record's own; use others"
            )
        if kind == "resume" and isinstance(step := fields.get("step"), int):
            self._purge_step = step + 1
        self._write({"t": time.time(), "event": kind} | fields)

    def close(self) -> None:
        """Close the file and TensorBoard's. A second call does nothing."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        text = json.dumps(to_jsonable(line), allow_nan=False, separators=(",", ":"))
        data = (b"\n" if self._is_torn else b"") + text.encode() + b"\n"
        try:
            self._is_torn = self._file.write(data) < len(data)
        except OSError as error:
            self._is_torn = True  # how much of the line got out is unknown
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(f"{self._file.name}: lines are being lost: {error}", stacklevel=3)

    def _log_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        if not self._wants_tensorboard:
            return
        if self._writer is None:
            self._writer = _tensorboard_writer(self.folder / TENSORBOARD_FOLDER, self._purge_step)
        if self._writer is None:
            self._wants_tensorboard = False
            return
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def read_run(folder: str | Path) -> RunRecords:
    """Read `folder/run.jsonl`, also while the run is still writing it or after it was killed.

    A "resume" event withdraws the earlier records of the steps beyond its own; a "start" that no "resume" follows
    is a run from scratch, and withdraws from its first step on. Within a step the later value wins. Lines that are
    not records are counted and passed over.

    Raises:
        RunNotFoundError: The folder has no `run.jsonl`.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise RunNotFoundError(
            f"{folder}: holds no {FILE_NAME}; give the folder that RunLog wrote to"
        )
    history = _History()
    with path.open("rb") as lines:
        for line in lines:
            history.add(_parse(line))
    return RunRecords(
        folder=Path(folder),
        records=tuple(history.by_step[step] for step in sorted(history.by_step)),
        events=tuple(history.events),
        num_superseded=history.num_superseded,
        num_unreadable_lines=history.num_unreadable,
    )


@dataclass
class _History:
    """The file's lines so far, seen from its end."""

    by_step: dict[int, Record] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    num_superseded: int = 0
    num_unreadable: int = 0
    # "start" and "resume" may come in either order; whichever it is, a resume decides where the run goes on.
    _is_after_start: bool = False
    _is_after_resume: bool = False

    def add(self, line: Record | Event | None) -> None:
        if line is None:
            self.num_unreadable += 1
        elif isinstance(line, Record):
            if self._is_after_start and not self._is_after_resume:
                self._rewind(line.step - 1)
            self._is_after_start = self._is_after_resume = False
            self._merge(line)
        else:
            self.events.append(line)
            self._is_after_start |= line.kind == "start"
            if line.kind == "resume" and _is_int(step := line.fields.get("step")):
                self._is_after_resume = True
                self._rewind(step)

    def _rewind(self, last_step: int) -> None:
        kept = {step: record for step, record in self.by_step.items() if step <= last_step}
        self.num_superseded += len(self.by_step) - len(kept)
        self.by_step = kept

    def _merge(self, new: Record) -> None:
        old = self.by_step.get(new.step)
        if old is not None:
            samples = old.samples if new.samples is None else new.samples
            metrics = {**old.metrics, **new.metrics}
            new = Record(step=new.step, t=new.t, samples=samples, metrics=metrics)
        self.by_step[new.step] = new


def _parse(line: bytes) -> Record | Event | None:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict):
        return None
    t, kind, step = _number(values.get("t")), values.get("event"), values.get("step")
    if t is None or not math.isfinite(t):
        return None
    if isinstance(kind, str):
        fields = {name: value for name, value in values.items() if name not in ("t", "event")}
        return Event(kind=kind, t=t, fields=fields)
    if not _is_int(step):
        return None
    numbers = {name: _number(value) for name, value in values.items() if name not in _RESERVED}
    metrics = {name: number for name, number in numbers.items() if number is not None}
    samples = values.get("samples")
    return Record(step=step, t=t, samples=samples if _is_int(samples) else None, metrics=metrics)


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def to_jsonable(value: object) -> Any:
    """Return the value with non-finite numbers as strings and everything foreign to JSON as its string."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _non_finite_name(value)
    if isinstance(value, Mapping):
        return {str(name): to_jsonable(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_jsonable(item) for item in value]
    return str(value)


def _non_finite_name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(value: object) -> float | None:
    """Undo `to_jsonable` for a number; None where the value is not one."""
    if isinstance(value, str):
        return _NON_FINITE.get(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _ends_torn(path: Path) -> bool:
    """Whether the last run was killed within a line, so that the next one must begin with a line break."""
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # absent, empty, or not a plain file
        return False


def _tensorboard_writer(folder: Path, purge_step: int | None) -> SummaryWriter | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        warnings.warn(
            f"no TensorBoard scalars are written ({error}); pip install tensorboard, or pass "
            f"tensorboard=False. {FILE_NAME} is written all the same",
            stacklevel=4,
        )
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)
