"""Ranks that are late, dead or gone with the store: the others say who, soon, and are not hung."""

from __future__ import annotations

from pathlib import Path

import pytest

from effx_dist.checkpoint.storage.steps import committed_steps
from tests import fault_checks as checks
from tests.fault_injection import Operation
from tests.fault_target import KILLED, STOPPED, Setup, running

pytestmark = pytest.mark.ranks
PATIENT_S, IMPATIENT_S = 100.0, 5.0
"""Where nobody is to run into the timeout: the interpreters of saving processes start at leisure."""


def data_file(step: int, rank: int) -> Operation:
    """When a rank begins to write."""
    return Operation("create", f"writing-*-step-{step}/rank-{rank:05d}.effx.*.part", 0)


def test_a_slow_rank_is_named_and_rejoins(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with running(Setup(folder, tmp_path / "store", stop_at={1: data_file(2, 1)})) as ranks:
        ranks.ask(1, 2)
        assert [ranks.hear(0), ranks.hear(1)] == [None, None]
        before = checks.contents(folder)
        assert ranks.hear(1) == STOPPED
        failures = ranks.hear(0)
        assert list(failures) == [1]
        assert "did not answer within 2 s" in failures[1]
        assert checks.check_survival(folder, before) == 1
        ranks.go_on(1)
        late = ranks.hear(1)
        assert late, "a rank that was given up cannot have saved"
        ranks.ask(3)
        assert ranks.hear_all() == [None, None]
        assert ranks.close() == [0, 0]
    assert checks.check_survival(folder, before) == 3
    checks.check_next_start(folder)


@pytest.mark.parametrize(
    ("async_mode", "dead"),
    [
        ("thread", 0),
        ("thread", 1),
        pytest.param("process", 0, marks=pytest.mark.slow),
        pytest.param("process", 1, marks=pytest.mark.slow),
    ],
)
def test_a_rank_dies_while_the_other_waits(async_mode: str, dead: int, tmp_path: Path) -> None:
    """Rank 0 takes the store along, with which it is the one to be named."""
    folder, other = tmp_path / "run", 1 - dead
    setup = Setup(folder, tmp_path / "store", async_mode=async_mode, timeout_s=IMPATIENT_S)
    with running(setup) as ranks:
        ranks.ask(1)
        assert ranks.hear_all() == [None, None]
        before = checks.contents(folder)
        ranks.processes[dead].kill()
        ranks.processes[dead].join()
        ranks.pipes[other].send((2,))
        assert set(ranks.hear(other)) == {dead}
        codes = ranks.close()
    assert codes[dead] == KILLED
    assert codes[other] == 0
    assert checks.check_survival(folder, before) == 1
    checks.check_next_start(folder)


@pytest.mark.parametrize(
    ("dead", "operation", "left"),
    [
        (0, data_file(2, 0), [1]),
        (1, data_file(2, 1), [1]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (0, Operation("mkdir", "writing-*-step-2", 0), [1]),
                (1, Operation("write", "writing-*-step-2/rank-00001.effx.*.part", 1), [1]),
                (1, Operation("fsync", "writing-*-step-2/rank-00001.effx.*.part", 0), [1]),
                (1, Operation("rename", "writing-*-step-2/rank-00001.effx", 0), [1]),
                (0, Operation("create", "writing-*-step-2/manifest.json.*.part", 0), [1]),
                (0, Operation("rename", "writing-*-step-2/manifest.json", 0), [1]),
                (0, Operation("rename", "step-2", 0), [1]),
                (0, Operation("create", "latest.*.part", 1), [1, 2]),
                (0, Operation("rename", "latest", 1), [1, 2]),
            ]
        ),
    ],
    ids=str,
)
def test_a_rank_dies_in_the_middle_of_a_save(
    dead: int, operation: Operation, left: list[int], tmp_path: Path
) -> None:
    folder, other = tmp_path / "run", 1 - dead
    setup = Setup(folder, tmp_path / "store", die_at={dead: operation})
    with running(setup) as ranks:
        ranks.ask(1, 2)
        assert ranks.hear_all() == [None, None]
        before = checks.contents(folder)
        failures = ranks.hear(other)
        assert list(failures) == [dead], failures
        codes = ranks.close()
    assert codes[dead] == KILLED
    assert codes[other] == 0
    assert committed_steps(folder) == left
    checks.check_survival(folder, before)
    checks.check_next_start(folder)


@pytest.mark.slow
def test_a_saving_process_dies_and_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    setup = Setup(
        folder,
        tmp_path / "store",
        async_mode="process",
        timeout_s=PATIENT_S,
        saver_dies_at={1: data_file(2, 1)},
    )
    with running(setup) as ranks:
        ranks.ask(1, 2)
        assert ranks.hear_all() == [None, None]
        before = checks.contents(folder)
        for failures in ranks.hear_all():
            assert failures == {1: "its saving process ended (exit code -9)"}
        assert checks.check_survival(folder, before) == 1
        ranks.ask(3)
        assert ranks.hear_all() == [None, None]
        assert ranks.close() == [0, 0]
    assert checks.check_survival(folder, before) == 3
    checks.check_next_start(folder)
