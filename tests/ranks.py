"""Ranks as real processes over gloo, for what threads cannot show: FSDP2, DDP, DTensor."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)
PRELOADED = [
    *("tests.bytecode", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"),
    *("effx_dist.checkpoint", "effx_dist.optim"),
]
"""Modules that every rank finds imported; what is added after the first `spawn` comes too late."""


def spawn(world: int, body: Callable[..., Any], folder: Path, *args: Any) -> list[Any]:
    """Run ``body(*args)`` in ``world`` processes that share a gloo group; return its results by
    rank.

    ``body`` is a function of a module, its arguments and results can be pickled. The first rank
    that raises ends the others, and its traceback is raised here.
    """
    # One server imports torch and every rank is forked from it: a new interpreter per rank would
    # spend most of the test importing.
    multiprocessing.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    mp.start_processes(
        _run_rank, (world, body, folder, args), nprocs=world, start_method="forkserver"
    )
    return [pickle.loads(_result_path(folder, rank).read_bytes()) for rank in range(world)]


def _run_rank(
    rank: int, world: int, body: Callable[..., Any], folder: Path, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    try:
        result = body(*args)
        _result_path(folder, rank).write_bytes(pickle.dumps(result))
        dist.barrier()  # a rank that leaves early takes the store's connections with it
    finally:
        dist.destroy_process_group()


def _result_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.pkl"
