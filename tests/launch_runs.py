"""Starts of the launch scripts, and what they leave in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from effx_dist.checkpoint.storage.steps import committed_steps
from effx_dist.report.run_log import RunRecords, read_run
from launch.processes import Job, run_to_end, run_until
from launch.resume_check import GlobalBatch, read_global_batches

_HELD = Path(__file__).with_name("held_launch.py")
_LOG = "run.jsonl"
_SAMPLES = "samples.rank-*.jsonl"


def records_of(job: Job, run_dir: Path) -> RunRecords:
    """Run a job to its end; what it has recorded in ``run_dir``."""
    run_to_end(job, run_dir / _LOG, lambda: None)
    return read_run(run_dir)


def batches_of(run_dir: Path) -> dict[int, GlobalBatch]:
    """The samples of each step."""
    return read_global_batches(sorted(run_dir.glob(_SAMPLES)))


def take_batches(run_dir: Path) -> dict[int, GlobalBatch]:
    """The same, removed: whoever goes on in the folder records its own under the same names."""
    found = batches_of(run_dir)
    for file in run_dir.glob(_SAMPLES):
        file.unlink()
    return found


def held_by(launcher: Sequence[str], step: int) -> list[str]:
    """A launcher of scripts that wait within a step to be killed."""
    return [*launcher, str(_HELD), str(step)]


def killed_when_held(job: Job, run_dir: Path, saved: int, held: int) -> dict[int, GlobalBatch]:
    """Kill a job that is :func:`held_by` its launcher at the step ``held``, once the checkpoint of the step
    ``saved`` is there; the samples of its steps, taken. Both steps lie within the first pruned epoch."""

    def is_enough() -> bool:
        is_saved = saved in committed_steps(run_dir / "checkpoints")
        return is_saved and held in batches_of(run_dir)

    run_until(job, run_dir / _LOG, lambda: None, is_enough)
    before = take_batches(run_dir)
    assert before[saved].epoch == before[held].epoch == 1
    return before
