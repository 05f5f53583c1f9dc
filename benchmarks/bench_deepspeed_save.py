"""How long engine.save_checkpoint keeps a training loop: DeepSpeed's own, and with effx.excp.

    python benchmarks/bench_deepspeed_save.py                     # 100M parameters, ZeRO-2, 2 ranks
    python benchmarks/bench_deepspeed_save.py --stage 3 --ranks 1 --modes thread,process

Prints one JSON object. One engine is saved by both in turn, right after a training step each time, to
folders beside each other on one file system; the first save of each is not counted. `blocked_s` is the
median time of a call on the slowest rank, `over_stock` that over the median of DeepSpeed's own, which
writes before it returns. `write_s` is the time from the start of encoding to the commit. The state is
fp32: a parameter, its master and two moments, of which a checkpoint holds the last three.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

WIDTH = 2048
Record = dict[str, Any]


def make_engine(settings: Record, mode: str) -> Any:
    """Square layers of so many parameters in all, and torch's AdamW."""
    from effx_dist.engines import deepspeed

    torch.manual_seed(0)
    num_layers = max(1, settings["parameters"] // WIDTH**2)
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 10**9,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
        "zero_optimization": {"stage": settings["stage"]},
        "effx": {"excp": {"profile": settings["profile"], "async_mode": mode}},
    }
    return deepspeed.initialize(model=torch.nn.Sequential(*layers), config=config)[0]


def train(engine: Any) -> None:
    """One step."""
    engine.backward(engine(torch.randn(1, WIDTH)).square().mean())
    engine.step()


def seconds(call: Callable[[], Any]) -> float:
    """Of a call, on the slowest rank."""
    dist.barrier()
    started = time.perf_counter()
    call()
    taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def measure(settings: Record, mode: str, folder: Path) -> Record:
    """One mode, in turns with DeepSpeed's own."""
    engine = make_engine(settings, mode)
    ours, stock = folder / f"effx-{mode}", folder / "stock"
    own, deepspeeds = [], []
    for _ in range(settings["rounds"] + 1):
        train(engine)
        deepspeeds.append(seconds(lambda: type(engine).save_checkpoint(engine, str(stock))))
        if dist.get_rank() == 0:
            shutil.rmtree(stock)
        train(engine)
        own.append(seconds(lambda: engine.save_checkpoint(str(ours))))
        pending = engine.effx.checkpoints.last_save.wait()
    row = {
        "mode": mode,
        "raw_megabytes": round(pending.raw_bytes / 1e6, 1),
        "write_s": round(pending.write_s, 3),
        "stock_s": round(statistics.median(deepspeeds[1:]), 3),
        "blocked_s": round(statistics.median(own[1:]), 4),
        "over_stock": round(statistics.median(own[1:]) / statistics.median(deepspeeds[1:]), 3),
    }
    engine.destroy()
    return row


def run_rank(rank: int, world: int, folder: str, settings: Record) -> None:
    """Measure all modes on one rank; rank 0 prints."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"}
    store = dist.FileStore(str(Path(folder) / "meeting"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    rows = [measure(settings, mode, Path(folder)) for mode in settings["modes"]]
    if rank == 0:
        import deepspeed

        hardware = {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()}
        versions = {"torch": torch.__version__, "deepspeed": deepspeed.__version__}
        result = {**versions, "settings": settings, "ranks": world, "hardware": hardware}
        typer.echo(json.dumps({**result, "rows": rows}, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 2,
    stage: Annotated[int, typer.Option(min=0, max=3, help="ZeRO stage.")] = 2,
    modes: Annotated[str, typer.Option(help="Of thread, process; separated by commas.")] = "thread",
    parameters: Annotated[int, typer.Option(help="Of the model.")] = 100_000_000,
    rounds: Annotated[int, typer.Option(min=1, help="Saves measured of each kind.")] = 5,
    profile: Annotated[str, typer.Option(help="The excp section's profile.")] = "balanced",
    folder: Annotated[Path | None, typer.Option(help="Where to save; else a new one.")] = None,
) -> None:
    """Measure and print JSON."""
    settings = {
        "stage": stage,
        "modes": modes.split(","),
        "parameters": parameters,
        "rounds": rounds,
        "profile": profile,
    }
    with tempfile.TemporaryDirectory(dir=folder) as own:
        mp.start_processes(run_rank, (ranks, own, settings), nprocs=ranks, start_method="spawn")


if __name__ == "__main__":
    typer.run(main)
