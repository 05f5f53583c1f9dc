"""What a save costs the training beside it: steps per second while one is in flight, and time blocked.

    python benchmarks/bench_async.py                        # 2 ranks, thread and process
    python benchmarks/bench_async.py --ranks 1 --modes thread --megabytes 480

Prints one JSON object. The ranks train a plain network with DistributedDataParallel over gloo, one
compute thread each. Rounds with a save and rounds without take turns, so that drift hits both alike;
`throughput_kept` is the mean time of a step without a save over that of a step that ended while one
was in flight, on the slowest rank. Steps of all ranks move in step, so a rank that has no save left to
write still waits for one that has. `blocked_over_plain_copy` is the median time that async_save keeps
the loop over the median time of a copy of the same tensors into buffers that exist already; both come
right after a training step, as caches are cold there. The first save of each mode, a base into new
buffers, is not counted. `--profile balanced` writes links after it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig

WIDTH = 1024
Record = dict[str, Any]


class Training:
    """Square layers trained on random data; ``megabytes`` of weights and two moments, fp32."""

    def __init__(self, megabytes: int, batch: int) -> None:
        torch.manual_seed(0)
        num_layers = max(1, megabytes * 10**6 // (12 * WIDTH * WIDTH))
        layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(num_layers)]
        self.model = DistributedDataParallel(torch.nn.Sequential(*layers))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.batch = torch.randn(batch, WIDTH)
        self.step()

    def step(self) -> float:
        """One step; the seconds that it took."""
        started = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        return time.perf_counter() - started

    def tensors(self) -> list[torch.Tensor]:
        """All that is saved, but for a few numbers."""
        moments = [t for state in self.optimizer.state.values() for t in state.values()]
        return [*(p.detach() for p in self.model.parameters()), *moments]


def measure(training: Training, config: ExcpConfig, rounds: int, steps: int) -> Record:
    """One mode, on one rank."""
    buffers = [torch.empty_like(tensor) for tensor in training.tensors()]
    free, beside, copies, saves = [], [], [], []
    with tempfile.TemporaryDirectory() as own, Checkpointer(_shared(own), config) as checkpointer:
        checkpointer.save(0, training.model, training.optimizer)
        for number in range(1, rounds + 1):
            free += [training.step() for _ in range(steps)]
            started = time.perf_counter()
            for buffer, tensor in zip(buffers, training.tensors(), strict=True):
                buffer.copy_(tensor)
            copies.append(time.perf_counter() - started)
            training.step()
            pending = checkpointer.async_save(number, training.model, training.optimizer)
            saves.append(pending)
            for _ in range(steps):
                seconds = training.step()
                if not pending.done():
                    beside.append(seconds)
            pending.wait()
        blocked = [pending.blocked_s for pending in saves]
        return {
            "raw_megabytes": round(saves[-1].raw_bytes / 1e6, 1),
            "write_s": round(statistics.median(pending.write_s for pending in saves), 3),
            "steps_beside": len(beside),
            "step_free_s": round(statistics.mean(free), 4),
            "step_beside_s": round(statistics.mean(beside), 4) if beside else None,
            "throughput_kept": round(statistics.mean(free) / statistics.mean(beside), 3)
            if beside
            else None,
            "plain_copy_s": round(statistics.median(copies), 4),
            "blocked_s": round(statistics.median(blocked), 4),
            "blocked_over_plain_copy": round(
                statistics.median(blocked) / statistics.median(copies), 2
            ),
        }


def _shared(folder: str) -> str:
    """Rank 0's folder, on every rank."""
    chosen = [folder]
    dist.broadcast_object_list(chosen)
    return chosen[0]


def run_rank(rank: int, world: int, meeting: str, settings: Record) -> None:
    """Measure all modes on one rank; rank 0 prints the slowest rank's figures."""
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    training = Training(settings["megabytes"], settings["batch"])
    rows = []
    for mode in settings["modes"]:
        config = ExcpConfig.model_validate({"profile": settings["profile"], "async_mode": mode})
        mine = measure(training, config, settings["rounds"], settings["steps"])
        by_rank: list[Record] = [{}] * world
        dist.all_gather_object(by_rank, mine)
        slowest = min(by_rank, key=lambda row: row["throughput_kept"] or 0)
        rows.append({"mode": mode, **slowest})
    if rank == 0:
        hardware = {"cores": os.cpu_count(), "machine": platform.machine(), "load": os.getloadavg()}
        result = {"settings": settings, "ranks": world, "hardware": hardware, "rows": rows}
        typer.echo(json.dumps({"torch": torch.__version__, **result}, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Processes that train together.")] = 2,
    modes: Annotated[str, typer.Option(help="Of thread, process; separated by commas.")] = (
        "thread,process"
    ),
    megabytes: Annotated[int, typer.Option(help="Raw state: weights and two moments.")] = 240,
    batch: Annotated[int, typer.Option(help="Rows of a batch: how much a step computes.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Saves measured for each mode.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a round.")] = 20,
    profile: Annotated[str, typer.Option(help="The excp section's profile.")] = "balanced",
) -> None:
    """Measure and print JSON."""
    settings = {
        "modes": modes.split(","),
        "megabytes": megabytes,
        "batch": batch,
        "rounds": rounds,
        "steps": steps,
        "profile": profile,
    }
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "store")
        mp.start_processes(run_rank, (ranks, meeting, settings), nprocs=ranks, start_method="spawn")


if __name__ == "__main__":
    typer.run(main)
