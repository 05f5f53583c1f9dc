"""Time and memory of planning one pruned epoch, for instance with `--num-samples 10000000 --ranks 8`.

The ranks are threads of one process that exchange real messages in memory; what a network adds is not measured. Seconds
are processor time of each rank's thread, since the ranks share the machine's cores; memory is the growth of the
process's peak, which all ranks reach together, divided by the number of ranks. `epoch` is a whole change of epoch
(losses to their owners, scores, plan), `plan` the planning alone.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import resource
import time
import warnings
from typing import Annotated, Any

import numpy as np
import torch
import typer

from effx_dist.data import EffxWarning, InfoBatchSampler
from effx_dist.shard import Group
from tests.thread_ranks import run_ranks


def main(
    num_samples: Annotated[int, typer.Option(help="Samples of the data set.")] = 1_000_000,
    ranks: Annotated[int, typer.Option(help="Ranks, as threads.")] = 8,
    score: Annotated[str, typer.Option(help='"loss" or "relative".')] = "loss",
) -> None:
    """Print a JSON object with the seconds and bytes per rank."""
    plan_s, plan_bytes = _in_own_process(_plan_only, num_samples, ranks, score)
    epoch_s, epoch_bytes = _in_own_process(_change_of_epoch, num_samples, ranks, score)
    record = {
        "num_samples": num_samples,
        "ranks": ranks,
        "how": "ranks as threads; processor seconds of the slowest rank; growth of peak memory / ranks",
        "score": score,
        "plan_s": round(plan_s, 4),
        "plan_peak_bytes": plan_bytes,
        "epoch_s": round(epoch_s, 4),
        "epoch_peak_bytes": epoch_bytes,
        "cpu": platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    typer.echo(json.dumps(record, indent=2))


def _in_own_process(body: Any, *arguments: Any) -> tuple[float, int]:
    """A process of its own, since the peak of a process never falls."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, num_bytes = pool.apply(_per_rank, (body, *arguments))
    return float(seconds), int(num_bytes)


def _per_rank(body: Any, num_samples: int, ranks: int, score: str) -> tuple[float, int]:
    """Seconds of the slowest rank, and bytes by which the peak of the process grew, per rank."""
    warnings.simplefilter("ignore", EffxWarning)
    torch.set_num_threads(1)
    before_bytes = _peak_bytes()
    seconds = run_ranks(ranks, lambda group: body(group, num_samples, score), timeout_s=600)
    return max(seconds), (_peak_bytes() - before_bytes) // ranks


def _sampler(group: Group, num_samples: int, score: Any) -> InfoBatchSampler:
    return InfoBatchSampler(num_samples, batch_size=32, num_epochs=8, score=score, group=group)


def _plan_only(group: Group, num_samples: int, score: str) -> float:
    sampler = _sampler(group, num_samples, score)
    scores = np.random.default_rng(group.rank).exponential(size=len(sampler._book.scores))
    sampler._book.scores[:] = scores.astype(np.float32)
    del scores
    start = time.thread_time()
    sampler._planner.begin(1, sampler._book, sampler._messages)
    return time.thread_time() - start


def _change_of_epoch(group: Group, num_samples: int, score: str) -> float:
    sampler = _sampler(group, num_samples, score)
    sampler.set_epoch(0)
    ids = torch.from_numpy(sampler.plan.local_ids)
    generator = torch.Generator().manual_seed(group.rank)
    for batch in ids.split(1 << 16):
        losses = torch.empty(len(batch)).exponential_(generator=generator)
        sampler.weigh(losses, batch)
    del ids, batch  # they hold the old plan's memory
    start = time.thread_time()
    sampler.set_epoch(1)
    return time.thread_time() - start


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    typer.run(main)
