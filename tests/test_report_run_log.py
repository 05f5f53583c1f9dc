"""What `RunLog` writes is what `read_run` gives back, through kills, resumes, restarts and hostile bytes."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.errors import ConfigError, EffxError
from effx_dist.report import RunLog, RunNotFoundError, RunRecords, read_run
from effx_dist.report.run_log import FILE_NAME

ROOT = Path(__file__).parents[1]
NAMES = st.text(min_size=1).filter(lambda name: name not in ("t", "step", "samples", "event"))
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)
LOGS = st.lists(
    st.tuples(st.integers(0, 9), st.dictionaries(NAMES, NUMBERS, max_size=3)), max_size=12
)


def steps_of(run: RunRecords) -> list[int]:
    return [record.step for record in run.records]


def is_same(left: float, right: float) -> bool:
    return left == right or (math.isnan(left) and math.isnan(right))


@given(logs=LOGS)
def test_reads_back_what_was_logged_with_the_later_value_winning(
    logs: list[tuple[int, dict[str, float]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    expected: dict[int, dict[str, float]] = {}
    with RunLog(folder, tensorboard=False) as log:
        for step, metrics in logs:
            log.log(step, metrics)
            expected.setdefault(step, {}).update(metrics)

    run = read_run(folder)

    assert steps_of(run) == sorted(expected)
    for record in run.records:
        wanted = expected[record.step]
        assert record.metrics.keys() == wanted.keys()
        assert all(is_same(record.metrics[name], value) for name, value in wanted.items())
    assert run.num_unreadable_lines == 0


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.1}, samples=16)
        log.event("start", config={"lr": math.inf, "path": Path("x"), "list": (1, 2)}, world_size=2)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first.keys() == {"t", "step", "samples", "a", "b", "c", "d"}
    assert second["config"] == {"lr": "Infinity", "path": "x", "list": [1, 2]}


def test_values_may_be_tensors_and_numpy_scalars(tmp_path: Path) -> None:
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(
            numpy.int64(3),
            {"a": torch.tensor(1.5), "b": numpy.float32(0.5)},
            samples=numpy.int64(7),
        )

    (record,) = read_run(tmp_path).records
    assert (record.step, record.samples, record.metrics) == (3, 7, {"a": 1.5, "b": 0.5})


@pytest.mark.parametrize("name", ["t", "step", "samples", "event"])
def test_a_metric_cannot_take_the_name_of_the_records_own(name: str, tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log, pytest.raises(ConfigError, match=name):
        log.log(1, {name: 1.0})
    assert read_run(tmp_path).records == ()


def test_an_event_cannot_take_the_name_of_the_records_own(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log, pytest.raises(ConfigError, match="event"):
        log.event("start", event="x")


def test_every_cut_of_the_file_reads_as_a_prefix_of_the_run(tmp_path: Path) -> None:
    """A kill may come after any byte."""
    with RunLog(tmp_path / "whole", tensorboard=False) as log:
        for step in range(3):
            log.log(step, {"train/loss": step / 3, "ü": math.nan})
    data = (tmp_path / "whole" / FILE_NAME).read_bytes()
    ends = [place + 1 for place, byte in enumerate(data) if byte == ord("\n")]
    (tmp_path / "cut").mkdir()
    for size in range(len(data)):
        (tmp_path / "cut" / FILE_NAME).write_bytes(data[:size])
        run = read_run(tmp_path / "cut")
        # A last line that lacks only its line break is whole.
        assert steps_of(run) == list(range(sum(size >= end - 1 for end in ends)))
        assert run.num_unreadable_lines == (size not in (0, *ends) and size + 1 not in ends)


def test_a_killed_process_loses_no_line_that_was_logged(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from effx_dist.report import RunLog\n"
        "log = RunLog(sys.argv[1], tensorboard=False)\n"
        "log.event('start')\n"
        "for step in range(100): log.log(step, {'train/loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert steps_of(read_run(tmp_path)) == list(range(100))


def test_a_run_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(1, {"a": 1.0})
    with (tmp_path / FILE_NAME).open("ab") as file:
        file.write(b'{"t":1,"step":2,"a":')
    with RunLog(tmp_path, tensorboard=False) as log:
        log.event("resume", step=1, world_size=1)
        log.log(2, {"a": 2.0})

    run = read_run(tmp_path)

    assert run.series("a") == [(1, 1.0), (2, 2.0)]
    assert run.num_unreadable_lines == 1
    assert len(run.events_of("resume")) == 1


def test_a_resume_withdraws_the_later_steps_of_the_killed_run(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.event("start", world_size=2)
        for step in range(1, 8):
            log.log(step, {"a": 1.0, "only/first": 1.0})
    with RunLog(tmp_path, tensorboard=False) as log:
        log.event("resume", step=4, world_size=1)
        log.log(6, {"a": 2.0})  # the second run logs every other step

    run = read_run(tmp_path)

    assert run.series("a") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (6, 2.0)]
    assert run.series("only/first")[-1] == (4, 1.0)
    assert run.num_superseded == 3
    assert [event.kind for event in run.events] == ["start", "resume"]


@pytest.mark.parametrize("kinds", [("start", "resume"), ("resume", "start"), ("resume",)])
def test_a_resumed_process_may_also_say_start(kinds: tuple[str, ...], tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.event("start")
        for step in (1, 2, 3):
            log.log(step, {"a": 1.0})
        for kind in kinds:
            log.event(kind, **({"step": 2} if kind == "resume" else {}))
        log.log(5, {"a": 2.0})
    assert steps_of(read_run(tmp_path)) == [1, 2, 5]


def test_a_start_that_no_resume_follows_is_a_new_run(tmp_path: Path) -> None:
    for value, steps in ((1.0, (1, 2, 3, 4)), (2.0, (1, 2))):
        with RunLog(tmp_path, tensorboard=False) as log:
            log.event("start")
            for step in steps:
                log.log(step, {"a": value})
    assert read_run(tmp_path).series("a") == [(1, 2.0), (2, 2.0)]


def test_the_newest_value_is_that_of_the_highest_step_that_has_one(tmp_path: Path) -> None:
    with RunLog(tmp_path, tensorboard=False) as log:
        log.log(2, {"a": 2.0, "b": 5.0})
        log.log(1, {"a": 1.0})
        log.log(3, {"b": 6.0})
    run = read_run(tmp_path)
    assert (run.latest("a"), run.latest("b"), run.latest("c")) == (2.0, 6.0, None)
    assert run.metric_names() == ["a", "b"]


@given(
    lines=st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=6)
)
def test_arbitrary_bytes_are_passed_over(
    lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / FILE_NAME).write_bytes(b'{"t":1,"step":1,"a":2}\n' + b"\n".join(lines))
    assert read_run(folder).series("a") == [(1, 2.0)]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"t":1,"step":' + "9" * 5_000 + "}",
        '{"t":1,"step":true}',
        '{"t":1,"step":1.5}',
        '{"t":1,"step":"1"}',
        '{"t":"NaN","step":1}',
        '{"step":1}',
        '{"t":1}',
        '{"t":1,"event":["start"]}',
        "[1]",
        "null",
    ],
)
def test_a_line_that_is_not_a_record_is_counted(line: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(line + "\n")
    run = read_run(tmp_path)
    assert (run.records, run.events, run.num_unreadable_lines) == ((), (), 1)


def test_a_value_that_is_not_a_number_is_left_out(tmp_path: Path) -> None:
    values = '"a":"x","b":[1],"c":true,"d":null,"e":{"f":1},"g":1e999,"h":1' + "0" * 400 + ',"i":2'
    (tmp_path / FILE_NAME).write_text(f'{{"t":1,"step":1,"samples":"many",{values}}}\n')
    (record,) = read_run(tmp_path).records
    assert record.metrics == {"g": math.inf, "h": math.inf, "i": 2.0}
    assert record.samples is None


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError, match=FILE_NAME) as caught:
        read_run(tmp_path / "absent")
    assert "absent" in str(caught.value)
    assert isinstance(caught.value, EffxError)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full"
)
def test_a_full_disk_warns_once_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).symlink_to("/dev/full")
    with RunLog(tmp_path, tensorboard=False) as log:
        with pytest.warns(UserWarning, match="lines are being lost"):
            log.log(1, {"a": 1.0})
        log.log(2, {"a": 1.0})  # a second warning would be an error here


def test_reading_and_writing_import_neither_torch_nor_numpy(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from effx_dist.report import RunLog, read_run, write_report\n"
        "with RunLog(sys.argv[1], tensorboard=False) as log: log.log(1, {'a': 1.0})\n"
        "write_report(sys.argv[1], sys.argv[1] + '/r.html')\n"
        "assert not {'torch', 'numpy', 'tensorboard'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=True)


def test_without_tensorboard_it_warns_once_and_still_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with RunLog(tmp_path) as log:
        with pytest.warns(UserWarning, match="pip install tensorboard"):
            log.log(1, {"a": 1.0})
        log.log(2, {"a": 1.0})
    assert steps_of(read_run(tmp_path)) == [1, 2]


def test_tensorboard_holds_the_same_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # tensorboard and protobuf use names of their own that are deprecated
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        with RunLog(tmp_path) as log:
            log.event("start")
            for step in (1, 2, 3):
                log.log(step, {"train/loss": step / 4})
        with RunLog(tmp_path) as log:
            log.event("resume", step=2, world_size=1)
            log.log(3, {"train/loss": 8.0})
        events = EventAccumulator(os.fspath(tmp_path / "tensorboard")).Reload()

    found = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert found == read_run(tmp_path).series("train/loss") == [(1, 0.25), (2, 0.5), (3, 8.0)]


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tensorboard=False)
    log.close()
    log.close()
