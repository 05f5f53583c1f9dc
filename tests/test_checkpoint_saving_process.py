"""The process that saves: it must not outlive a trainer that was killed."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TRAINER = """
import sys
import torch
from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig

model = torch.nn.Linear(4, 4)
checkpointer = Checkpointer(sys.argv[1], ExcpConfig(profile="lossless", async_mode="process"))
checkpointer.save(1, model)
print(checkpointer._executor._process.pid, flush=True)
sys.stdin.read()
"""


def test_a_killed_trainer_takes_its_saving_process_with_it(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as trainer:
        assert trainer.stdout is not None
        child = int(trainer.stdout.readline())
        watched = os.pidfd_open(child)
        os.kill(trainer.pid, signal.SIGKILL)
        trainer.wait()
    try:
        ended = _wait_for_end(watched, timeout_s=30)
    finally:
        os.close(watched)
    assert ended, f"process {child} is still there"


def _wait_for_end(watched: int, timeout_s: float) -> bool:
    readable, _, _ = select.select([watched], [], [], timeout_s)
    return bool(readable)


def test_it_ends_also_while_it_is_busy(tmp_path: Path) -> None:
    """The watcher does not depend on the loop that answers requests."""
    program = (
        "import os, sys, threading\n"
        "from effx_dist.checkpoint.saving_process import end_with\n"
        "end_with(os.getppid())\n"
        "print(os.getpid(), flush=True)\n"
        "threading.Event().wait()\n"
    )
    parent = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {program!r}])\n"
        "child.wait()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            watched = os.pidfd_open(child)
        except ProcessLookupError:
            pytest.fail("the child ended before its parent")
        process.kill()
    try:
        assert _wait_for_end(watched, timeout_s=30), f"process {child} is still there"
    finally:
        os.close(watched)
