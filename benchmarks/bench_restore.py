"""Restoring after many links, against one full checkpoint of the same state with torch.distributed.checkpoint.

    python benchmarks/bench_restore.py --megabytes 480 --links 20

Prints one JSON object: best times of several rounds in which the two take turns, each in a process of its own that
holds a live model and optimizer already, and how much memory each process needed beyond those.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed.checkpoint as dcp
import typer
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.bench_checkpoint import Moving
from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig


def save(folder: Path, megabytes: int, links: int, profile: str) -> dict[str, Any]:
    """A base and so many links, and the last state once more in full."""
    run = Moving(megabytes)
    config = ExcpConfig.model_validate(
        {"profile": profile, "async_mode": "sync", "base_every": links + 1, "encoder_threads": 2}
    )
    with Checkpointer(folder / "effx", config) as checkpointer:
        for step in range(links + 1):
            run.step()
            last = checkpointer.save(step, run.model, run.optimizer)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder / "dcp")
    return {"raw_megabytes": round(last.raw_bytes / 1e6, 1), "ratio_of_link": round(last.ratio, 1)}


def load_effx(folder: Path, run: Moving) -> None:
    with Checkpointer(folder / "effx", ExcpConfig(async_mode="sync")) as checkpointer:
        checkpointer.load(run.model, run.optimizer)


def load_dcp(folder: Path, run: Moving) -> None:
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder / "dcp")
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


LOADS = {"effx": load_effx, "dcp": load_dcp}


def measure(name: str, folder: Path, megabytes: int, threads: int, answers: Any) -> None:
    torch.set_num_threads(threads)
    run = Moving(megabytes)
    run.optimizer.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = kilobytes("VmRSS")
    started = time.perf_counter()
    LOADS[name](folder, run)
    seconds = time.perf_counter() - started
    answers.put((seconds, (kilobytes("VmHWM") - before) * 1024 / 1e6))


def kilobytes(field: str) -> int:
    """A field of this process's memory: VmRSS is what it has now, VmHWM the most it had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(
    megabytes: Annotated[int, typer.Option(help="Raw state: weights and two moments.")] = 480,
    links: Annotated[int, typer.Option(help="Links above the base.")] = 20,
    profile: Annotated[str, typer.Option(help="Profile of the links.")] = "balanced",
    threads: Annotated[int, typer.Option(help="torch's threads while loading.")] = 2,
    rounds: Annotated[int, typer.Option(help="Loads of each kind.")] = 3,
    cold: Annotated[
        bool, typer.Option(help="Drop the page cache before each load: from the disk. Needs root.")
    ] = False,
) -> None:
    """Measure both and print JSON."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in LOADS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        facts = save(folder, megabytes, links, profile)
        for _ in range(rounds):
            for kind, results in found.items():
                if cold:
                    os.sync()
                    Path("/proc/sys/vm/drop_caches").write_text("3")
                answers = context.Queue()
                arguments = (kind, folder, megabytes, threads, answers)
                process = context.Process(target=measure, args=arguments)
                process.start()
                results.append(answers.get())
                process.join()
    rows = {
        kind: {
            "load_s": round(min(seconds for seconds, _ in results), 2),
            "memory_beyond_live_state_mb": round(max(grown for _, grown in results)),
        }
        for kind, results in found.items()
    }
    ratio = rows["effx"]["load_s"] / rows["dcp"]["load_s"]
    settings = {"cold": cold, "links": links, "profile": profile, "threads": threads, **facts}
    report = {
        "torch": torch.__version__,
        **settings,
        "rows": rows,
        "effx_over_dcp": round(ratio, 2),
    }
    typer.echo(json.dumps(report, indent=1))


if __name__ == "__main__":
    typer.run(main)
