"""C-AdamW against AdamW on a small Llama, each at its own best learning rate, on fresh seeds.

    OMP_NUM_THREADS=1 python benchmarks/experiment_cautious.py runs/cautious
    python benchmarks/experiment_cautious.py runs/cautious_60m --config 60m --device cuda \\
        --steps 3000 --set data.source=FOLDER

One process. Both optimizers get the same initial weights, batches, clipping and schedule: linear
warm-up, then a cosine to 10 %. The learning rate of each is chosen from one grid on a seed that is
not reported, the grid grows while a best one lies at its edge, and both optimizers run on the
reported seeds at either's chosen rate. `--length` adds runs of other lengths, to see what becomes
of the difference. Each finished run is a line of FOLDER/runs.jsonl and is not repeated when the
script is started again; the tables are made from that file and printed as Markdown.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import effx_dist
from effx_dist import CautiousAdamW, sequence_losses
from launch.llama.blocks import BlockDataset, PreparedData, prepare
from launch.llama.loop import accumulation_steps
from launch.llama.model import build_llama
from launch.llama.settings import RunSettings

ROOT = Path(__file__).resolve().parents[1]
ADAMW, CAUTIOUS = "adamw", "c_adamw"
WARMUP_SHARE = 0.1
Run = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """What tells the runs of one experiment apart."""

    optimizer: str
    lr: float
    seed: int
    steps: int


def batches_of(data: BlockDataset, size: int, seed: int) -> Iterator[list[int]]:
    """Sample ids of one step after another: a new permutation each epoch, from the seed alone."""
    rng = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    while True:
        while len(ids) < size:
            ids += torch.randperm(len(data), generator=rng).tolist()
        yield ids[:size]
        ids = ids[size:]


def lr_share(step: int, steps: int, min_share: float) -> float:
    """Linear warm-up, then a cosine from 1 to `min_share`, for steps 0 to `steps` - 1."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return min_share + (1 - min_share) * 0.5 * (1 + math.cos(math.pi * progress))


class Trial:
    """One model, one optimizer, one seed."""

    def __init__(
        self, key: Key, settings: RunSettings, data: PreparedData, device: torch.device
    ) -> None:
        self.key, self.settings, self.data, self.device = key, settings, data, device
        model: torch.nn.Module = build_llama(settings.model, settings.data.seq_len, key.seed)
        self.model, train = model.to(device), settings.train
        common: dict[str, Any] = {
            "lr": key.lr,
            "betas": train.betas,
            "eps": train.eps,
            "weight_decay": train.weight_decay,
        }
        self.optimizer: torch.optim.Optimizer
        if key.optimizer == ADAMW:
            self.optimizer = torch.optim.AdamW(model.parameters(), fused=True, **common)
        else:
            self.optimizer = CautiousAdamW(model.parameters(), **common)

    def losses(self, data: BlockDataset, ids: Sequence[int]) -> torch.Tensor:
        """Mean loss per token of each sample, float32[len(ids)], in nats."""
        samples = [data[index] for index in ids]
        inputs = torch.stack([sample["input_ids"] for sample in samples]).to(self.device)
        labels = torch.stack([sample["labels"] for sample in samples]).to(self.device)
        is_cuda = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=is_cuda):
            logits = self.model(input_ids=inputs).logits
        return sequence_losses(logits, labels)

    def step(self, step: int, ids: Sequence[int], num_passes: int) -> float:
        """One optimizer step. Returns the mean training loss before it."""
        train = self.settings.train
        total = 0.0
        for part in range(num_passes):
            loss = self.losses(self.data.train, ids[part::num_passes]).mean() / num_passes
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.key.lr * lr_share(step, self.key.steps, train.min_lr_ratio)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    @torch.no_grad()
    def held_out(self) -> list[float]:
        """Loss of each held-out sample; all are of one length, so their mean is that per token."""
        data, size = self.data.held_out, self.settings.eval.batch_size
        starts = range(0, len(data), size)
        parts = [self.losses(data, range(s, min(s + size, len(data)))) for s in starts]
        return [float(loss) for loss in torch.cat(parts)]

    def alignment(self) -> float | None:
        """Share of all elements that the mask let through at the last step."""
        if not isinstance(self.optimizer, CautiousAdamW):
            return None
        numels = dict(enumerate(p.numel() for p in self.model.parameters()))
        shares = self.optimizer.alignment
        return sum(share * numels[int(i)] for i, share in shares.items()) / sum(numels.values())

    def run(self, num_evals: int) -> Run:
        """Train to the end, or until the loss is no number. The curve is on the held-out set."""
        started = time.perf_counter()
        marks = {round(self.key.steps * (i + 1) / num_evals) for i in range(num_evals)}
        train, curve, since = self.settings.train, [], list[float]()
        num_passes = accumulation_steps(train, world=1)
        batches = batches_of(self.data.train, train.global_batch_size, self.key.seed)
        losses: list[float] = []
        for step in range(self.key.steps):
            since.append(self.step(step, next(batches), num_passes))
            if not math.isfinite(since[-1]):
                losses = []
                break
            if step + 1 in marks:
                losses = self.held_out()
                point = {"held_out": statistics.fmean(losses), "train": statistics.fmean(since)}
                curve.append({"step": step + 1, "alignment": self.alignment(), **point})
                since = []
        return {
            **vars(self.key),
            "final": statistics.fmean(losses) if losses else None,
            "curve": curve,
            "final_by_sample": [round(loss, 5) for loss in losses],
            "seconds": round(time.perf_counter() - started, 1),
        }


class Experiment:
    """All runs of one setup, in one file."""

    def __init__(
        self, folder: Path, settings: RunSettings, device: torch.device, num_evals: int
    ) -> None:
        self.path = folder / "runs.jsonl"
        self.settings, self.device, self.num_evals = settings, device, num_evals
        self.data = prepare(settings.data, settings.model.vocab_size, folder / "data")
        described = [settings.to_toml(), device.type, num_evals]
        self.setup = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:12]
        self.runs: dict[Key, Run] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._take(json.loads(line))

    def _take(self, run: Run) -> None:
        if run["setup"] == self.setup:
            names = ("optimizer", "lr", "seed", "steps")
            self.runs[Key(**{name: run[name] for name in names})] = run

    def get(self, optimizer: str, lr: float, seed: int, steps: int) -> Run:
        """A run from the file, or run now and added to it."""
        key = Key(optimizer, lr, seed, steps)
        if key not in self.runs:
            run = Trial(key, self.settings, self.data, self.device).run(self.num_evals)
            run |= {"setup": self.setup, "device": self.device.type, "versions": versions()}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run) + "\n")
            self._take(run)
            typer.echo(f"{key} final={run['final']} {run['seconds']} s", err=True)
        return self.runs[key]


def versions() -> dict[str, str]:
    """Of what the figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "effx_dist": effx_dist.__version__,
    }


def final(run: Run) -> float:
    """Final held-out loss; infinite for a run that ended early."""
    return math.inf if run["final"] is None else float(run["final"])


def mean_sd(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    sd = statistics.stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else 0.0
    return f"{statistics.fmean(values):.4f} ± {sd:.4f}"


def first_step_at(curve: Sequence[dict[str, Any]], loss: float) -> float | None:
    """Where the held-out curve first reaches `loss`, between evaluations by a straight line."""
    for before, after in pairwise(curve):
        if after["held_out"] <= loss < before["held_out"]:
            share = (before["held_out"] - loss) / (before["held_out"] - after["held_out"])
            return float(before["step"] + share * (after["step"] - before["step"]))
    return None


def row(*cells: object) -> None:
    """Print one line of a Markdown table."""
    typer.echo("| " + " | ".join(map(str, cells)) + " |")


def header(*cells: str) -> None:
    """Print the first two lines of a Markdown table, after an empty one."""
    typer.echo()
    row(*cells)
    typer.echo("|" + "---|" * len(cells))


def choose(
    experiment: Experiment, grid: list[float], seed: int, steps: int
) -> tuple[list[float], dict[str, int]]:
    """Index into the grid of the best learning rate of each optimizer on `seed`.

    Both optimizers run at every rate. Returns the grid with it, widened until no best rate lies at
    an edge.
    """
    grid, ratio = sorted(grid), max(grid) / sorted(grid)[-2]
    while True:
        losses = {
            name: [final(experiment.get(name, lr, seed, steps)) for lr in grid]
            for name in (ADAMW, CAUTIOUS)
        }
        best = {name: values.index(min(values)) for name, values in losses.items()}
        if 0 in best.values():
            grid = [float(f"{grid[0] / ratio:.3g}"), *grid]
        elif len(grid) - 1 in best.values():
            grid = [*grid, float(f"{grid[-1] * ratio:.3g}")]
        else:
            break
    header(f"lr (seed {seed}, for the choice only)", "AdamW", "C-AdamW")
    for index, lr in enumerate(grid):
        cells = [f"{losses[name][index]:.4f}" for name in losses]
        marked = [
            f"**{c}**" if i == index else c for c, i in zip(cells, best.values(), strict=True)
        ]
        row(f"{lr:g}", *marked)
    return grid, best


def report_rates(
    experiment: Experiment, lrs: dict[str, float], seeds: list[int], steps: int
) -> None:
    """Both optimizers at either's chosen rate: their difference at one and the same rate."""
    header("lr", "AdamW", "C-AdamW", "gap at this lr", "perplexity")
    for lr in sorted(set(lrs.values())):
        losses = [[final(experiment.get(n, lr, seed, steps)) for seed in seeds] for n in lrs]
        gaps = [c - a for a, c in zip(*losses, strict=True)]
        percent = f"{100 * math.expm1(statistics.fmean(gaps)):+.2f} %"
        row(f"{lr:g}", *map(mean_sd, losses), mean_sd(gaps), percent)


def report_pair(
    experiment: Experiment, lrs: dict[str, float], seed: int, steps: int
) -> tuple[float, list[float]]:
    """One table row: the final losses, and where each curve reaches the other's end.

    Returns C-AdamW minus AdamW: the mean, and by held-out sample.
    """
    runs = [experiment.get(name, lrs[name], seed, steps) for name in (ADAMW, CAUTIOUS)]
    losses = [final(run) for run in runs]
    gap = losses[1] - losses[0]
    reached = []
    for run, target in zip(reversed(runs), losses, strict=True):
        at = first_step_at(run["curve"], target)
        reached.append("never" if at is None else f"step {at:.0f} ({at / steps:.3f})")
    cells = [f"{loss:.4f}" for loss in losses]
    row(steps, seed, *cells, f"{gap:+.4f}", f"{100 * math.expm1(gap):+.2f} %", *reached)
    pairs = zip(*(run["final_by_sample"] for run in runs), strict=True)
    return gap, [c - a for a, c in pairs]


PAIR_COLUMNS = (
    *("steps", "seed", "AdamW", "C-AdamW", "gap", "perplexity"),
    *("C-AdamW at AdamW's end", "AdamW at C-AdamW's end"),
)


def report_best(
    experiment: Experiment, lrs: dict[str, float], seeds: list[int], steps: int
) -> None:
    """Best against best, by seed."""
    header(*PAIR_COLUMNS)
    rows = [report_pair(experiment, lrs, seed, steps) for seed in seeds]
    gaps = [gap for gap, _ in rows]
    means = [statistics.fmean(column) for column in zip(*(by for _, by in rows), strict=True)]
    error = statistics.stdev(means) / math.sqrt(len(means))
    percent = 100 * math.expm1(statistics.fmean(gaps))
    typer.echo(
        f"\nGap {mean_sd(gaps)} over seeds (perplexity {percent:+.2f} %); standard error of its mean "
        f"over the {len(means)} held-out samples {error:.4f}."
    )


def report_curves(
    experiment: Experiment, lrs: dict[str, float], seeds: list[int], steps: int
) -> None:
    """Means over seeds along training."""
    header("step", "AdamW", "C-AdamW", "gap", "alignment, mean (range over seeds)")
    runs = {n: [experiment.get(n, lrs[n], seed, steps) for seed in seeds] for n in lrs}
    for points in zip(*(run["curve"] for name in runs for run in runs[name]), strict=True):
        adamw, cautious = points[: len(seeds)], points[len(seeds) :]
        losses = [statistics.fmean(p["held_out"] for p in part) for part in (adamw, cautious)]
        shares = [p["alignment"] for p in cautious]
        spread = f"{statistics.fmean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
        cells = [f"{loss:.4f}" for loss in losses]
        row(points[0]["step"], *cells, f"{losses[1] - losses[0]:+.4f}", spread)


def report_lengths(
    experiment: Experiment, lrs: dict[str, float], seed: int, lengths: list[int]
) -> None:
    """Whole schedules of other lengths, at the rates chosen for the main one."""
    if lengths:
        header(*PAIR_COLUMNS)
        for steps in lengths:
            report_pair(experiment, lrs, seed, steps)


def main(
    folder: Annotated[Path, typer.Argument(help="Where runs.jsonl and the tokens are kept.")],
    config: Annotated[str, typer.Option(help="configs/llama_NAME_fsdp2.toml.")] = "demo",
    overrides: Annotated[list[str] | None, typer.Option("--set", help="section.key=value")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda (bf16 autocast).")] = "cpu",
    steps: Annotated[int, typer.Option(min=20)] = 500,
    num_evals: Annotated[int, typer.Option(min=2, help="Held-out evaluations of a run.")] = 10,
    lr: Annotated[list[float] | None, typer.Option(help="The grid; repeat it.")] = None,
    choice_seed: Annotated[int, typer.Option(help="The seed that chooses the rates.")] = 100,
    seed: Annotated[list[int] | None, typer.Option(help="Reported seeds; repeat it.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Other numbers of steps, first seed only; repeat it.")
    ] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Run what is missing and print the tables."""
    torch.set_num_threads(threads)
    # The whole text: the samples that a demo is cut down to would be repeated many times.
    texts = ["data.max_samples=0", "data.max_heldout_samples=512"]
    if config == "demo":
        texts += ["train.global_batch_size=16", "train.micro_batch_size=16"]
    path = ROOT / "configs" / f"llama_{config}_fsdp2.toml"
    settings = RunSettings.from_file(path, [*texts, *(overrides or [])])
    folder.mkdir(parents=True, exist_ok=True)
    experiment = Experiment(folder, settings, torch.device(device), num_evals)
    seeds = seed or [0, 1, 2]
    if choice_seed in seeds:
        raise typer.BadParameter(f"--choice-seed {choice_seed} is among the reported seeds")
    epochs = steps * settings.train.global_batch_size / len(experiment.data.train)
    typer.echo(f"{versions()} setup {experiment.setup}: {epochs:.2f} epochs")
    grid, best = choose(experiment, lr or [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], choice_seed, steps)
    lrs = {name: grid[index] for name, index in best.items()}
    report_best(experiment, lrs, seeds, steps)
    report_curves(experiment, lrs, seeds, steps)
    report_lengths(experiment, lrs, seeds[0], length or [])
    report_rates(experiment, lrs, seeds, steps)


if __name__ == "__main__":
    typer.run(main)
