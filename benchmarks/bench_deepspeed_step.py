"""The cautious step under ZeRO against DeepSpeed's own AdamW: ZeRO-2, with and without offload to the CPU.

    python benchmarks/bench_deepspeed_step.py                  # 2 ranks, 33.6M parameters, bf16
    python benchmarks/bench_deepspeed_step.py --dtype fp32 --layers 16

Prints one JSON object. Each setting has two engines over equal models: one with the configuration's AdamW
(DeepSpeed's FusedAdam, or DeepSpeedCPUAdam under offload), one with an "effx" block beside it. They take
turns, in random order, so that drift hits both alike. `optimizer_ms` is the time of the base optimizer's
step(), all-reduce of the counts included; `engine_step_ms` that of the whole engine.step(): gradients
flattened, norm, clipping, step, gathering of the parameters. A rank's figures are medians over rounds; of
the ranks, the slowest one's. `ratio` is the median over rounds of the cautious one's time over that of
the other in the same round. Operators are compiled before anything is timed, by the ninja that is first on
PATH: put the virtual environment's there, as another version compiles all anew.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WIDTH = 1024
WARM_UP = 3
Record = dict[str, Any]
SETTINGS: dict[str, Record] = {
    "ZeRO-2": {"stage": 2},
    "ZeRO-2, offload": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}},
}


class Weights(torch.nn.Module):
    """Square matrices whose gradients cost next to nothing to compute."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ParameterList(torch.randn(WIDTH, WIDTH) for _ in range(layers))

    def forward(self, factors: torch.Tensor) -> torch.Tensor:
        """A loss of which each value has a gradient of its own sign."""
        terms = [(weight * factors).sum() for weight in self.layers]
        return torch.stack(terms).mean()


class Contender:
    """An engine, and how long its steps took."""

    def __init__(self, zero: Record, dtype: str, layers: int, block: Record) -> None:
        from effx_dist import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 10**9,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "weight_decay": 0.1}},
            "bf16": {"enabled": dtype == "bf16"},
            "zero_optimization": zero,
            **block,
        }
        self.engine, *_ = deepspeed.initialize(model=Weights(layers), config=config)
        self.factors = torch.randn(WIDTH, WIDTH).to(self.engine.module.layers[0].dtype)
        self.optimizer_s: list[float] = []
        self.engine_s: list[float] = []
        optimizer = self.engine.basic_optimizer
        self.kind = type(optimizer).__name__
        optimizer.register_step_pre_hook(self._note_start)
        optimizer.register_step_post_hook(self._note_end)

    def _note_start(self, *_: Any) -> None:
        self._started = time.perf_counter()

    def _note_end(self, *_: Any) -> None:
        self.optimizer_s.append(time.perf_counter() - self._started)

    def step(self) -> None:
        """One, whose times are kept."""
        self.engine.backward(self.engine(self.factors))
        dist.barrier()
        started = time.perf_counter()
        self.engine.step()
        self.engine_s.append(time.perf_counter() - started)


def measure(zero: Record, dtype: str, layers: int, rounds: int) -> Record:
    """One setting, on one rank."""
    plain = Contender(zero, dtype, layers, {})
    ours = Contender(zero, dtype, layers, {"effx": {"cautious": {}}})
    turns = random.Random(0)  # the same on every rank
    for _ in range(WARM_UP + rounds):
        for contender in turns.sample([plain, ours], 2):
            contender.step()
    found: Record = {"contenders": {plain.kind: "DeepSpeed's", ours.kind: "cautious"}}
    for name in ("optimizer", "engine_step"):
        attribute = "optimizer_s" if name == "optimizer" else "engine_s"
        theirs, mine = (getattr(engine, attribute)[WARM_UP:] for engine in (plain, ours))
        found[f"{name}_ms"] = [round(1e3 * statistics.median(each), 2) for each in (theirs, mine)]
        ratios = [m / t for m, t in zip(mine, theirs, strict=True)]
        found[f"{name}_ratio"] = round(statistics.median(ratios), 3)
    for contender in (plain, ours):
        contender.engine.destroy()
    return found


def run_rank(rank: int, world: int, meeting: str, settings: Record) -> None:
    """Measure all settings on one rank; rank 0 prints the slowest rank's figures."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    rows = []
    for name, zero in SETTINGS.items():
        if name not in settings["names"]:
            continue
        mine = measure(zero, settings["dtype"], settings["layers"], settings["rounds"])
        by_rank: list[Record] = [{}] * world
        dist.all_gather_object(by_rank, mine)
        rows.append({"setting": name, **max(by_rank, key=lambda row: row["optimizer_ms"][1])})
    if rank == 0:
        hardware = {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()}
        versions = {name: metadata.version(name) for name in ("torch", "deepspeed")}
        numel = settings["layers"] * WIDTH * WIDTH
        result = {"settings": settings, "parameters": numel, "ranks": world, "hardware": hardware}
        typer.echo(json.dumps({**versions, **result, "rows": rows}, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 2,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32; masters are fp32 in both.")] = "bf16",
    layers: Annotated[int, typer.Option(min=1, help="Matrices of 1024 x 1024.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Steps of each that are counted.")] = 30,
    offload: Annotated[bool, typer.Option(help="Also with offload to the CPU.")] = True,
) -> None:
    """Measure and print JSON."""
    names = [name for name, zero in SETTINGS.items() if offload or len(zero) == 1]
    settings = {"dtype": dtype, "layers": layers, "rounds": rounds, "names": names}
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "store")
        mp.start_processes(run_rank, (ranks, meeting, settings), nprocs=ranks, start_method="spawn")


if __name__ == "__main__":
    typer.run(main)
