"""How much memory a load adds, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
MODELS = {
    "many tensors": "nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(16)))",
    "one tensor": "nn.Embedding(16384, 1024)",
}
NUM_WEIGHTS = 2**24
WEIGHTS_BYTES = 4 * NUM_WEIGHTS  # the moments are as much again, twice: 192 MiB in all
SLACK_BYTES = {"many tensors": 64 * MIB, "one tensor": 256 * MIB}
"""What a load may hold beside its pieces and references: blocks on their way, and what the step of
zero gradients that makes a fresh optimizer's state needs for its largest tensor."""

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch import nn
from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig

torch.set_num_threads(1)
action, profile, folder, with_optimizer = sys.argv[1:]
model = {model}
optimizer = torch.optim.AdamW(model.parameters())
config = ExcpConfig(profile=profile, async_mode="sync", keep_latest_k=0)

def peak_bytes():  # of this program alone: ru_maxrss begins with what its parent had
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

before = peak_bytes()
with Checkpointer(folder, config) as checkpointer:
    if action == "load":
        checkpointer.load(model, optimizer if with_optimizer == "yes" else None)
        print(peak_bytes() - before)
    else:
        for step in (1, 2):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            checkpointer.save(step, model, optimizer)
"""


def run(model: str, *arguments: str) -> str:
    program = PROGRAM.format(model=MODELS[model])
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "model", ["many tensors", pytest.param("one tensor", marks=pytest.mark.slow)]
)
def test_a_load_adds_its_pieces_and_references_and_little_else(model: str, tmp_path: Path) -> None:
    """The weights are there before; moments and references of the weights are what it makes."""
    run(model, "save", "balanced", str(tmp_path), "yes")
    whole = int(run(model, "load", "balanced", str(tmp_path), "yes"))
    assert 2 * WEIGHTS_BYTES < whole <= 3 * WEIGHTS_BYTES + SLACK_BYTES[model]
    weights = int(run(model, "load", "balanced", str(tmp_path), "no"))
    assert weights <= WEIGHTS_BYTES + SLACK_BYTES[model]
