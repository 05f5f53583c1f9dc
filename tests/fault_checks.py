"""What must hold after every fault: one set of checks for the whole matrix of faults.

The run that is disturbed is a function of the step alone, so that whatever loads can be compared
with a run that nothing ever happened to.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
from torch import nn

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.places import location
from effx_dist.checkpoint.storage.steps import (
    LATEST,
    MANIFEST,
    MANIFEST_SHA256,
    MERGED,
    MOMENTS_REMOVED,
    PINNED,
    committed_steps,
    is_moments_file,
    newest_step,
    step_name,
)
from effx_dist.config import ExcpConfig
from effx_dist.errors import RankFailedError
from effx_dist.shard import Group, SoloGroup
from tests.chain_runs import same_bits
from tests.runs import Run, lossless
from tests.thread_ranks import run_ranks

Outcomes = dict[int, RankFailedError | None]
"""How each save ended, by step."""
Contents = dict[int, dict[str, bytes]]
"""Every file of every committed step."""
CONFIG = lossless(base_every=3)


def two_layers() -> nn.Module:
    """Of two ranks, each writes weights and moments."""
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))


def small_run(num_steps: int = 0, seed: int = 0) -> Run:
    """The run after so many steps; from other weights with another seed."""
    run = Run(two_layers, seed=seed)
    for _ in range(num_steps):
        run.train(1)
    return run


@functools.cache
def state_at(step: int) -> dict[str, torch.Tensor]:
    """What the run is at a step."""
    return small_run(step).state()


def saves(
    folder: Path, steps: Iterable[int], config: ExcpConfig = CONFIG
) -> Callable[[Group], Outcomes]:
    """A rank that saves the run at these steps from the start of it, come what may."""

    def body(group: Group) -> Outcomes:
        outcomes: Outcomes = {}
        with Checkpointer(folder, config, group=group) as checkpointer:
            for step in steps:
                outcomes[step] = save_one(checkpointer, step)
        return outcomes

    return body


def save_one(checkpointer: Checkpointer, step: int) -> RankFailedError | None:
    """Save the run at ``step``; the failure that this rank is told of."""
    run = small_run(step)
    try:
        checkpointer.save(step, run.model, run.optimizer)
    except RankFailedError as error:
        return error
    return None


def contents(folder: Path) -> Contents:
    """The files as they are now."""
    return {
        step: {p.name: p.read_bytes() for p in (folder / step_name(step)).iterdir() if p.is_file()}
        for step in committed_steps(folder)
    }


def check_told(folder: Path, told: list[Outcomes]) -> None:
    """All ranks say the same of each save: it is committed, or it failed and who failed, and why."""
    for step, outcome in told[0].items():
        failures = [None if o[step] is None else o[step].failures for o in told]  # type: ignore[union-attr]
        assert failures.count(failures[0]) == len(failures), failures
        assert (outcome is None) == (step in committed_steps(folder)), (step, outcome)


def check_survival(folder: Path, before: Contents, may_go: Collection[int] = ()) -> int:
    """Nothing committed is lost or changed, all of it verifies, and the newest loads; its step.

    Args:
        may_go: steps that retention may have removed.
    """
    now = contents(folder)
    newest = newest_step(folder)
    assert newest >= max(before, default=newest)
    for step, files in before.items():
        if step in may_go and newest > max(before):
            files = files if step in now else {}
        if MOMENTS_REMOVED in now.get(step, {}):
            files = {name: data for name, data in files.items() if not is_moments_file(name)}
        kept = {name: now.get(step, {}).get(name) for name in files}
        assert kept == files, f"step {step} is not what it was"
    assert verify_folder(folder, decode=True).findings == []
    check_loads(folder, newest)
    return newest


def check_loads(folder: Path, step: int) -> None:
    """The newest checkpoint is ``step``, and it is the state that an undisturbed run has then."""
    run = small_run(seed=5)
    with Checkpointer(folder, lossless(), group=SoloGroup()) as checkpointer:
        assert checkpointer.load(run.model, run.optimizer)["step"] == step
    same_bits(run.state(), state_at(step))


def check_next_start(folder: Path, config: ExcpConfig = CONFIG) -> None:
    """A new job loads the newest, saves upon it, and leaves nothing behind that is not its own."""

    step, _ = run_ranks(2, lambda group: resume(folder, config, group))
    assert verify_folder(folder, decode=True).findings == []
    check_loads(folder, step)
    check_clean(folder)


def resume(folder: Path, config: ExcpConfig, group: Group) -> int:
    """One rank of a job that loads the newest checkpoint and saves the next, whose step it is."""
    run = small_run(seed=5)
    with Checkpointer(folder, config, group=group) as checkpointer:
        step = int(checkpointer.load(run.model, run.optimizer)["step"]) + 1
        run.train(1)
        checkpointer.save(step, run.model, run.optimizer)
    return step


def check_clean(folder: Path, others: Collection[str] = ()) -> None:
    """No file of the folder is without a purpose, none is still open, and no thread is at work.

    Args:
        others: names in the folder that are not of checkpoints, and stay.
    """
    expected = {LATEST, "owner.json", *others, *map(step_name, committed_steps(folder))}
    assert {p.name for p in folder.iterdir()} <= expected
    assert (folder / LATEST).read_text() == f"{step_name(committed_steps(folder)[-1])}\n"
    for step in committed_steps(folder):
        path = folder / step_name(step)
        manifest, _ = read_manifest(location(path))
        named = {file.name for file in manifest.files}
        own = {MANIFEST, MANIFEST_SHA256, MOMENTS_REMOVED, PINNED, MERGED, *named}
        assert {p.name for p in path.iterdir()} <= own
    opened = [os.readlink(d) for d in Path("/proc/self/fd").iterdir() if d.is_symlink()]
    assert [path for path in opened if path.startswith(str(folder))] == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("effx")] == []
