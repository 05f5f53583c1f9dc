"""The figures at the head of the page are what the records add up to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.report import Event, Record, RunRecords
from effx_dist.report.page import stretch_means, thin
from effx_dist.report.summary import cards, config_of, epochs, flatten, samples_at, saves
from effx_dist.report.text import (
    ABSENT,
    bytes_text,
    number_text,
    percent_text,
    ratio_text,
    seconds_text,
)

KEPT, THRESHOLD = "effx/infobatch/kept_fraction", "effx/infobatch/threshold"


def run_of(
    metrics: Mapping[int, Mapping[str, float]],
    samples: Mapping[int, int] | None = None,
    events: tuple[Event, ...] = (),
) -> RunRecords:
    at = samples or {}
    records = [
        Record(step=step, t=float(step), samples=at.get(step), metrics=values)
        for step, values in sorted(metrics.items())
    ]
    return RunRecords(
        folder=Path("run"),
        records=tuple(records),
        events=events,
        num_superseded=0,
        num_unreadable_lines=0,
    )


def figures(run: RunRecords, baseline: RunRecords | None = None) -> dict[str, tuple[str, str]]:
    return {card.label: (card.value, card.note) for card in cards(run, baseline)}


@pytest.mark.parametrize("is_progress", [True, False])
def test_epochs_give_what_each_kept(is_progress: bool) -> None:
    kept, steps_per_epoch = [1.0, 0.6, 0.75, 1.0], 5
    metrics = {
        step: {
            "epoch": step / steps_per_epoch
            if is_progress
            else float((step - 1) // steps_per_epoch),
            KEPT: kept[(step - 1) // steps_per_epoch],
            THRESHOLD: math.nan
            if step <= steps_per_epoch
            else float((step - 1) // steps_per_epoch),
        }
        for step in range(1, 4 * steps_per_epoch + 1)
    }
    found = epochs(run_of(metrics))
    assert [epoch.epoch for epoch in found] == [0, 1, 2, 3]
    assert [epoch.kept_fraction for epoch in found] == kept
    assert [epoch.threshold for epoch in found] == [None, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("is_logged_again", [True, False])
def test_epoch_events_say_where_an_epoch_begins(is_logged_again: bool) -> None:
    """The plan may be logged once, at the step that ended the epoch before; a resume plans again."""
    kept = {0: 1.0, 10: 0.6, 18: 1.0} | ({15: 0.6} if is_logged_again else {})
    metrics = {
        step: {"epoch": step / 10} | ({KEPT: kept[step]} if step in kept else {})
        for step in range(25)
    }
    starts = [(0, 0), (1, 10), (2, 18), (1, 15), (2, 18)]
    events = [Event(kind="epoch", t=0.0, fields={"epoch": e, "step": step}) for e, step in starts]
    found = epochs(run_of(metrics, events=tuple(events)))
    assert [(epoch.epoch, epoch.kept_fraction) for epoch in found] == [(0, 1.0), (1, 0.6), (2, 1.0)]


@pytest.mark.parametrize("name", ["config", "settings"])
def test_the_newest_settings_stand_in_the_page(name: str) -> None:
    events = [Event(kind="start", t=0.0, fields={name: {"a": {"b": value}}}) for value in (1, 2)]
    assert config_of(run_of({}, events=tuple(events))) == {"a.b": "2"}
    assert config_of(run_of({})) == {}


def test_a_run_without_pruning_has_no_epochs() -> None:
    assert epochs(run_of({1: {"epoch": 0.0, "train/loss": 1.0}})) == []
    assert epochs(run_of({1: {KEPT: 1.0}})) == []


@given(st.dictionaries(st.integers(0, 50), st.none() | st.integers(0, 10**6), max_size=20))
def test_samples_are_exact_where_logged_and_monotone_between(logged: dict[int, int | None]) -> None:
    known = {step: samples for step, samples in logged.items() if samples is not None}
    rising = dict(zip(sorted(known), sorted(known.values()), strict=True))
    found = samples_at(run_of({step: {} for step in logged}, rising))
    assert {step: found[step] for step in rising} == rising
    between = [step for step in sorted(logged) if rising and min(rising) <= step <= max(rising)]
    assert sorted(found) == between
    values = [found[step] for step in between]
    assert values == sorted(values)


def test_saves_take_what_was_reported() -> None:
    prefix = "effx/checkpoint/"
    found = saves(
        run_of(
            {
                1: {"a": 1.0},
                2: {prefix + "raw_bytes": 8.0, prefix + "ratio": 4.0},
                3: {"effx/x": 1.0},
            }
        )
    )
    assert [(save.step, save.raw_bytes, save.ratio, save.stored_bytes) for save in found] == [
        (2, 8.0, 4.0, None)
    ]


def test_cards_add_up() -> None:
    prefix = "effx/checkpoint/"
    save = {prefix + "raw_bytes": 700e6, prefix + "stored_bytes": 10e6, prefix + "blocked_s": 0.2}
    saved = {"effx/infobatch/samples_saved": 300.0, "eval/loss": 3.25}
    run = run_of(
        {5: save, 10: {**save, **saved}},
        {5: 350, 10: 700},
        (
            Event(kind="start", t=0.0, fields={"world_size": 2}),
            Event(kind="start", t=1.0, fields={"world_size": 1}),
            Event(kind="resume", t=1.0, fields={"step": 5, "world_size": 1}),
            Event(kind="end", t=2.0, fields={}),
        ),
    )
    found = figures(run, run_of({10: {"eval/loss": 3.5}}, {10: 1000}))
    assert found["Held-out loss"] == ("3.2500", "baseline 3.5000 (-0.2500)")
    assert found["Samples processed"] == ("700", "baseline 1,000")
    assert found["Samples saved"] == ("30 %", "300 of 1,000 left out")
    assert found["Checkpoint ratio"] == ("70x", "1.40 GB stored as 20.0 MB, 2 saves")
    assert found["Training blocked"] == ("400 ms", "by 2 saves")
    assert found["Resumes"] == ("1", "2 → 1 ranks")


def test_the_ratio_of_the_whole_run_is_preferred() -> None:
    prefix = "effx/checkpoint/"
    values = {prefix + "raw_bytes": 70.0, prefix + "stored_bytes": 1.0, prefix + "run_ratio": 12.0}
    assert figures(run_of({1: values}))["Checkpoint ratio"][0] == "12x"


def test_no_records_make_no_cards() -> None:
    assert cards(run_of({})) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_odd_values_break_no_card(value: float) -> None:
    names = ["raw_bytes", "stored_bytes", "ratio", "run_ratio", "blocked_s", "write_s", "error"]
    metrics = {f"effx/checkpoint/{name}": value for name in names} | {
        "effx/infobatch/samples_saved": value,
        "eval/loss": value,
        "train/loss": value,
        "epoch": value,
        KEPT: value,
        THRESHOLD: value,
    }
    run = run_of({1: metrics}, {1: 0})
    assert cards(run, run)
    assert len(epochs(run)) == math.isfinite(value)


def test_flatten_spells_nested_keys_with_dots() -> None:
    nested = {"a": {"b": {"c": 1}, "d": "x"}, "e": [1, {"f": 2}], "g": {}, "h": None}
    assert flatten(nested) == {
        "a.b.c": "1",
        "a.d": "x",
        "e": "[1, {'f': 2}]",
        "g": "{}",
        "h": "None",
    }
    assert flatten("not a mapping") == {}


@given(st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), max_size=200), st.integers(2, 20))
def test_thinning_keeps_order_extremes_and_the_bound(values: list[float], max_points: int) -> None:
    points = list(enumerate(values))
    kept = thin(points, max_points)
    assert len(kept) <= max(max_points, 2)
    assert [step for step, _ in kept] == sorted({step for step, _ in kept})
    assert {step for step, _ in kept} <= {step for step, _ in points}
    finite = [value for value in values if not math.isnan(value)]
    if finite:
        assert min(finite) in [value for _, value in kept]
    if finite == values and values:
        assert max(values) in [value for _, value in kept]


@given(
    st.lists(st.floats(-1e3, 1e3) | st.just(math.nan), min_size=1, max_size=99), st.integers(1, 20)
)
def test_the_means_of_the_stretches_add_up(values: list[float], num_stretches: int) -> None:
    num_stretches = min(num_stretches, len(values))
    points = [(10 * i, value) for i, value in enumerate(values)]
    means = stretch_means(points, num_stretches)
    assert len(means) == num_stretches
    assert [step for step, _ in means] == sorted({step for step, _ in means})
    edges = [len(values) * place // num_stretches for place in range(num_stretches + 1)]
    total = 0.0
    for (_, mean), start, end in zip(means, edges[:-1], edges[1:], strict=True):
        finite = [value for value in values[start:end] if not math.isnan(value)]
        assert math.isnan(mean) == (not finite)
        total += mean * len(finite) if finite else 0.0
    finite = [value for value in values if not math.isnan(value)]
    assert total == pytest.approx(sum(finite), abs=1e-6)


def test_numbers_read_as_people_write_them() -> None:
    assert [bytes_text(value) for value in (0, 999, 1000, 12_345_678, 999_600, None)] == [
        "0 B", "999 B", "1.00 kB", "12.3 MB", "1.00 MB", ABSENT,
    ]  # fmt: skip
    assert [seconds_text(value) for value in (0.0042, 4.2, 61, 3600, 7322)] == [
        "4.2 ms", "4.2 s", "1 min 1 s", "1 h 0 min", "2 h 2 min",
    ]  # fmt: skip
    assert [ratio_text(value) for value in (1.234, 71.29, 1234.5)] == ["1.23x", "71.3x", "1,234x"]
    assert (percent_text(0.2831), number_text(1.2e-5), number_text(None)) == (
        "28.3 %",
        "1.2e-05",
        ABSENT,
    )
