"""What a checkpoint costs: time blocked against a plain copy, encoding and restoring speed, ratio.

    python benchmarks/bench_checkpoint.py --megabytes 240

Prints one JSON object. One process, synthetic weights that move a little between saves; ratios of real training are
in results/excp_quantisers_cpu_202611.md.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from effx_dist.checkpoint import Checkpointer
from effx_dist.config import ExcpConfig


class Moving:
    """A model of square layers whose weights and moments move as under Adam."""

    def __init__(self, megabytes: int, width: int = 1024) -> None:
        torch.manual_seed(0)
        num_layers = max(1, megabytes * 10**6 // (12 * width * width))
        layers = [torch.nn.Linear(width, width, bias=False) for _ in range(num_layers)]
        self.model = torch.nn.Sequential(*layers)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.step()

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter) * torch.rand(1024, 1).pow(4)
        self.optimizer.step()

    def tensors(self) -> list[torch.Tensor]:
        moments = [t for s in self.optimizer.state.values() for t in s.values()]
        return [*self.model.parameters(), *moments]


def plain_copy_s(tensors: list[torch.Tensor]) -> float:
    """Best of three copies into buffers that exist already."""
    buffers = [torch.empty_like(t) for t in tensors]
    times = []
    for _ in range(3):
        started = time.perf_counter()
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor.detach())
        times.append(time.perf_counter() - started)
    return min(times)


def measure(folder: Path, profile: str, megabytes: int, saves: int) -> dict[str, Any]:
    run = Moving(megabytes)
    config = ExcpConfig.model_validate({"profile": profile, "async_mode": "thread"})
    results = []
    with Checkpointer(folder, config) as checkpointer:
        for index in range(saves):
            for _ in range(3):
                run.step()
            pending = checkpointer.async_save(index, run.model, run.optimizer).wait()
            results.append(pending)
        last = results[-1]
        started = time.perf_counter()
        checkpointer.load(run.model, run.optimizer)
        load_s = time.perf_counter() - started
    return {
        "profile": profile,
        "raw_megabytes": round(last.raw_bytes / 1e6, 1),
        "ratio_link": round(last.ratio, 2),
        "blocked_over_plain_copy": round(
            min(r.blocked_s for r in results[1:]) / plain_copy_s(run.tensors()), 2
        ),
        "base_mb_per_s": round(results[0].raw_bytes / 1e6 / results[0].write_s, 1),
        "link_mb_per_s": round(last.raw_bytes / 1e6 / min(r.write_s for r in results[1:]), 1),
        "links_read": saves - 1,
        "load_mb_per_s": round(last.raw_bytes / 1e6 / load_s, 1),
    }


def main(
    megabytes: Annotated[int, typer.Option(help="Raw state: weights and two moments.")] = 120,
    saves: Annotated[int, typer.Option(help="One base and then links.")] = 4,
) -> None:
    """Measure every profile and print JSON."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(Path(folder) / profile, profile, megabytes, saves)
            for profile in ("balanced", "excp", "lossless")
        ]
    typer.echo(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
