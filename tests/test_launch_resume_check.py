"""The check that the demo trusts must itself catch every fault it is there for."""

import json
from pathlib import Path

import pytest

from launch.resume_check import GlobalBatch, check_resume, read_global_batches

RESTORED = 3


def halves() -> tuple[dict[int, GlobalBatch], dict[int, GlobalBatch]]:
    """Steps 1 and 2 are epoch 0, 3 to 5 are epoch 1; the first half ran to step 4."""
    whole = {
        1: GlobalBatch(0, (0, 1)),
        2: GlobalBatch(0, (2, 3)),
        3: GlobalBatch(1, (1, 3)),
        4: GlobalBatch(1, (0, 5)),
        5: GlobalBatch(1, (2, 4)),
        6: GlobalBatch(2, (0, 1)),
    }
    before = {step: batch for step, batch in whole.items() if step <= 4}
    return before, {step: batch for step, batch in whole.items() if step > RESTORED}


def test_a_right_resume_passes() -> None:
    check = check_resume(*halves(), RESTORED, num_planned=6)
    assert check.is_good
    assert (check.num_before, check.num_after, check.num_redone_steps) == (2, 4, 1)
    assert str(check).startswith("passed")


@pytest.mark.parametrize(
    ("step", "batch"),
    [
        (5, GlobalBatch(1, (2, 3))),  # 3 again, 4 never
        (5, GlobalBatch(1, (2,))),  # 4 never
        (5, GlobalBatch(1, (2, 4, 4))),  # 4 twice
        (5, GlobalBatch(1, (2, 4, 6))),  # more than were planned
        (5, GlobalBatch(2, (2, 4))),  # the epoch ends early
        (4, GlobalBatch(1, (0, 2))),  # a redone step on other samples
    ],
)
def test_every_fault_is_seen(step: int, batch: GlobalBatch) -> None:
    before, after = halves()
    check = check_resume(before, {**after, step: batch}, RESTORED, num_planned=6)
    assert not check.is_good
    assert str(check).startswith("FAILED")


def test_records_of_ranks_are_joined_and_torn_lines_left_out(tmp_path: Path) -> None:
    def line(step: int, *ids: int) -> str:
        return json.dumps({"step": step, "epoch": 0, "ids": ids}) + "\n"

    files = [tmp_path / "samples.rank-0.jsonl", tmp_path / "samples.rank-1.jsonl"]
    files[0].write_text(line(1, 4, 2) + line(2, 1, 0) + line(3, 6, 7))
    files[1].write_text(line(1, 3, 5) + line(2, 9, 8) + line(3, 10)[:-6])
    assert read_global_batches(files) == {
        1: GlobalBatch(0, (2, 3, 4, 5)),
        2: GlobalBatch(0, (0, 1, 8, 9)),
    }
