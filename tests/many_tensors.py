"""Saves a model of many tensors by a saving process, under the descriptors that the shell allows.

python -m tests.many_tensors FOLDER NUM_TENSORS: prints how many descriptors were open at most, or the error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from torch import nn

from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig


def num_open() -> int:
    return len(os.listdir("/proc/self/fd"))


def main() -> None:
    folder, num_tensors = Path(sys.argv[1]), int(sys.argv[2])
    model = nn.ParameterList(nn.Parameter(torch.randn(20, 30)) for _ in range(num_tensors))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    config = ExcpConfig(profile="balanced", async_mode="process", base_every=10, keep_latest_k=0)
    most = 0
    with Checkpointer(folder, config) as checkpointer:
        for step in range(1, 4):
            for parameter in model:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            checkpointer.async_save(step, model, optimizer)
            most = max(most, num_open())
            checkpointer.wait()
    with Checkpointer(folder, config) as checkpointer:  # its references are handed over, too
        checkpointer.load(model, optimizer)
        pending = checkpointer.save(4, model, optimizer)
        most = max(most, num_open())
    print(most, pending.result.kind)


if __name__ == "__main__":
    main()
