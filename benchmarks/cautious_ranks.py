"""The step on several ranks under FSDP2, for bench_cautious.py: time, collectives and bytes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from benchmarks.cautious_contenders import FUSED, LR
from benchmarks.cautious_workloads import Tensors, meta_llama
from effx_dist.optim import CautiousAdamW

MODEL = "llama_60m"
WARM_UP = 2


def measure_ranks(
    world: int, device_type: str, dtype_name: str, rounds: int
) -> list[dict[str, Any]] | str:
    """One record per optimizer; or why this many ranks cannot run here."""
    if device_type == "cuda" and torch.cuda.device_count() < world:
        return f"needs {world} GPUs, there are {torch.cuda.device_count()}"
    # One server imports torch and every rank is forked from it: they would spend their time importing.
    multiprocessing.set_forkserver_preload(
        ["torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
    )
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, device_type, dtype_name, rounds, Path(folder))
        mp.start_processes(_run_rank, arguments, nprocs=world, start_method="forkserver")
        found: list[dict[str, Any]] = json.loads((Path(folder) / "records.json").read_text())
    return found


def _run_rank(
    rank: int, world: int, device_type: str, dtype_name: str, rounds: int, folder: Path
) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        store=dist.FileStore(str(folder / "store"), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),
    )
    try:
        tensors = _sharded_llama(device, getattr(torch, dtype_name))
        records = _measure(tensors, device, rounds)
        if rank == 0:
            (folder / "records.json").write_text(json.dumps(records))
        dist.barrier()  # a rank that leaves early takes the store's connections with it
    finally:
        dist.destroy_process_group()


def _sharded_llama(device: torch.device, dtype: torch.dtype) -> Tensors:
    """The model's parameters as fully_shard cuts them, with random values and gradients."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = meta_llama(MODEL).to(dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device=device)
    params = list(model.parameters())
    for param in params:
        assert isinstance(param, DTensor), "fully_shard makes DTensors"
        param.grad = torch.empty_like(param)
        for part in (param, param.grad):
            part.detach().to_local().normal_()
    return Tensors(params)


def _measure(tensors: Tensors, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    params = tensors.params
    optimizers: dict[str, torch.optim.Optimizer] = {
        FUSED: torch.optim.AdamW(params, lr=LR, fused=True),
        "torch AdamW foreach": torch.optim.AdamW(params, lr=LR, foreach=True),
        "effx CautiousAdamW auto": CautiousAdamW(params, lr=LR),
    }
    for optimizer in optimizers.values():
        optimizer.step()
        tensors.share_moments(optimizer)
    traffic = {name: _traffic_of(optimizer.step) for name, optimizer in optimizers.items()}
    samples: dict[str, list[float]] = {name: [] for name in optimizers}
    order = list(optimizers)
    shuffle = random.Random(0).shuffle  # the same on every rank
    for number in range(WARM_UP + rounds):
        shuffle(order)
        for name in order:
            elapsed_ms = _one_step_ms(optimizers[name], device)
            if number >= WARM_UP:
                samples[name].append(elapsed_ms)
    slowest = {name: _slowest_rank(values) for name, values in samples.items()}
    return [{"name": name, "samples_ms": slowest[name], **traffic[name]} for name in optimizers]


def _one_step_ms(optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    _synchronize(device)
    dist.barrier()
    started = time.perf_counter()
    optimizer.step()
    _synchronize(device)
    return (time.perf_counter() - started) * 1e3


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest_rank(samples: list[float]) -> list[float]:
    """The step of all ranks ends when the last one's does."""
    by_rank: list[list[float]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, samples)
    return [max(of_round) for of_round in zip(*by_rank, strict=True)]


@dataclass
class _Calls:
    """Bytes that each call of dist.all_reduce was given."""

    num_bytes: list[int] = field(default_factory=list)


@contextlib.contextmanager
def _all_reduces_counted() -> Iterator[_Calls]:
    calls = _Calls()
    inner = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.num_bytes.append(tensor.nbytes)
        return inner(tensor, *args, **kwargs)

    with mock.patch.object(dist, "all_reduce", counted):
        yield calls


def _traffic_of(step: Callable[[], object]) -> dict[str, int]:
    """What one step sends: collectives of any kind as torch sees them, and the all-reduces' bytes."""
    with _all_reduces_counted() as calls, CommDebugMode() as seen:
        step()
    return {
        "collectives": seen.get_total_counts(),
        "all_reduces": len(calls.num_bytes),
        "all_reduce_bytes": sum(calls.num_bytes),
    }
