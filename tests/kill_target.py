"""A training run that is there to be killed: saves after every step, tells its parent how far it is.

It resumes from the newest checkpoint, checks what it loaded against what the saved run said of
itself, and trains until it is told to stop or is killed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig
from effx_dist.optim import CautiousAdamW

SHAPES = ((65, 48), (33,), (3, 40), (24, 24))
MAX_ERROR = {"lossless": 0.0, "balanced": 0.1}


@dataclass(frozen=True)
class Job:
    """Where and how to train. ``store``: a new file for each start, where the ranks meet."""

    folder: Path
    store: Path
    world: int = 1
    profile: str = "lossless"
    async_mode: str = "thread"

    @property
    def config(self) -> ExcpConfig:
        """Short chains and few kept steps, so that bases and removals are hit as well."""
        return ExcpConfig.model_validate(
            {
                "profile": self.profile,
                "async_mode": self.async_mode,
                "base_every": 5,
                "keep_latest_k": 3,
            }
        )


class Training:
    """Whole gradients, equal on all ranks, by step: the state is a function of the step alone."""

    def __init__(self, world: int) -> None:
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in SHAPES]
        self.model = torch.nn.ParameterList(parameters)
        self.step = 0
        if world > 1:
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world,)))
        self.optimizer = CautiousAdamW(self.model.parameters(), lr=1e-2)

    def advance(self) -> None:
        """One step."""
        generator = torch.Generator().manual_seed(self.step)
        for parameter in self.model.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                grad = distribute_tensor(grad, mesh, placements, src_data_rank=None)
            parameter.grad = grad
        self.optimizer.step()
        self.step += 1

    def weights(self) -> torch.Tensor:
        """All weights, flat and whole. Collective."""
        return torch.cat([_whole(p).reshape(-1) for p in self.model.parameters()])

    def state(self) -> dict[str, torch.Tensor]:
        """All weights and moments, whole. Collective."""
        found = {}
        for index, parameter in enumerate(self.model.parameters()):
            found[f"{index}"] = _whole(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"{index}.{key}"] = _whole(value)
        return found

    def load(self, checkpointer: Checkpointer, profile: str) -> None:
        """Resume, and check the weights against the exact copy that the checkpoint carries."""
        extra = checkpointer.load(self.model, self.optimizer)
        self.step = extra["count"]
        assert extra["step"] == self.step
        error = (self.weights() - extra["weights"]).norm() / extra["weights"].norm()
        assert error <= MAX_ERROR[profile], f"step {self.step}: {error=}"


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def train(job: Job, rank: int, parent: Connection) -> None:
    """Train and save until ``parent`` sends anything. Rank 0 sends each committed step."""
    torch.set_num_threads(1)
    if job.world > 1:
        store = dist.FileStore(str(job.store), job.world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world)
    training = Training(job.world)
    with Checkpointer(job.folder, job.config) as checkpointer:
        if checkpointer.newest() is not None:
            training.load(checkpointer, job.profile)
        stop = False
        while not stop:
            training.advance()
            stop = _is_told_to_stop(parent, rank)
            extra: dict[str, Any] = {"count": training.step, "weights": training.weights()}
            checkpointer.async_save(training.step, training.model, training.optimizer, extra=extra)
            parent.send(training.step)
    if job.world > 1:
        dist.destroy_process_group()


def _is_told_to_stop(parent: Connection, rank: int) -> bool:
    told = torch.tensor(int(rank == 0 and parent.poll()))
    if dist.is_initialized():
        dist.broadcast(told, 0)
    return bool(told)


def start(job: Job, rank: int, parent: Connection, group: int | None) -> None:
    """Entry of a forked process: into the process group of rank 0 (None: one of its own)."""
    os.setpgid(0, group or 0)
    parent.send("started")
    train(job, rank, parent)
    parent.close()
