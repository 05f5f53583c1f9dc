"""The demo: a plain run, then one with all three techniques that is killed, resumed and compared.

    python launch/demo.py                   # what `make demo` runs; minutes on two cores

(a) A small Llama is trained on real English by AdamW on all samples. (b) The same is trained with
InfoBatch, cautious AdamW and ExCP checkpoints, and killed within an epoch. (c) It is resumed from
its newest compressed checkpoint on one rank and finished. Both runs are then laid side by side.
"""

import json
import os
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effx_dist.checkpoint.storage.steps import committed_steps
from effx_dist.errors import EffxError
from effx_dist.report import write_report
from effx_dist.report.run_log import RunRecords, read_run
from launch.llama.settings import RunSettings, TrainSettings
from launch.processes import Job, RunFailedError, run_to_end, run_until, torchrun
from launch.resume_check import ResumeCheck, check_resume, read_global_batches

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "launch" / "pretrain_llama_fsdp2.py"
CONFIG = ROOT / "configs" / "llama_demo_fsdp2.toml"
MARKER = ".effx_demo"
STEPS_PAST_CHECKPOINT = 4
KILL_EPOCH = 1
"""The first epoch that InfoBatch prunes, so the resume has scores and a plan to restore. A machine too fast
for the kill to come in it is killed in a later one."""

PLAIN = (
    "effx.infobatch.enabled=false",
    "effx.cautious.enabled=false",
    "effx.excp.enabled=false",
    "checkpoint.every_steps=0",
)


@dataclass
class Demo:
    """Folders, settings and outcome of one demo."""

    out: Path
    num_ranks: int
    settings: tuple[str, ...]
    train: TrainSettings
    console: Console
    on_cpu: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def plain_dir(self) -> Path:
        """Folder of run (a)."""
        return self.out / "plain"

    @property
    def effx_dir(self) -> Path:
        """Folder of run (b), in which (c) goes on."""
        return self.out / "effx"

    def job(self, name: str, run_dir: Path, num_ranks: int, extra: tuple[str, ...] = ()) -> Job:
        """A start of the training script, with the cores shared out among its ranks."""
        global_batch = global_batch_of(self.train, self.num_ranks)
        micro_batch = micro_batch_of(self.train, global_batch // num_ranks)
        batches = (
            f"train.global_batch_size={global_batch}",
            f"train.micro_batch_size={micro_batch}",
        )
        arguments = ["--config", str(CONFIG), "--run-dir", str(run_dir), "--log-samples"]
        cache = f"data.cache_dir={self.out / 'data'}"
        for setting in (cache, *batches, *self.settings, *extra):
            arguments += ["--set", setting]
        threads = max(1, (os.cpu_count() or 1) // num_ranks)
        command = torchrun(sys.executable, num_ranks, SCRIPT, arguments)
        env = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        if self.on_cpu:
            env["CUDA_VISIBLE_DEVICES"] = ""
        return Job(name, command, self.out / f"{name}.log", env)

    def run(self, title: str, run_dir: Path, work: Callable[[Callable[[], None]], None]) -> None:
        """Do `work` with its progress shown, and take its time."""
        start = time.monotonic()
        with self.console.status(title) as status:
            work(lambda: status.update(f"{title}: {progress_of(run_dir)}"))
        self.seconds[title] = time.monotonic() - start
        self.console.print(f"{title}: {progress_of(run_dir)} ({self.seconds[title]:.0f} s)")


def global_batch_of(train: TrainSettings, num_ranks: int) -> int:
    """The multiple of the number of ranks that is next to the config's global batch."""
    return num_ranks * max(1, round(train.global_batch_size / num_ranks))


def micro_batch_of(train: TrainSettings, num_per_rank: int) -> int:
    """The largest micro-batch, up to the config's, that divides a rank's part of a global batch."""
    largest = min(train.micro_batch_size, num_per_rank)
    return next(size for size in range(largest, 0, -1) if num_per_rank % size == 0)


def progress_of(run_dir: Path) -> str:
    """The last measured step of a run, in words."""
    if not (run_dir / "run.jsonl").exists():
        return "starting"
    records = read_run(run_dir)
    step = records.records[-1].step if records.records else 0
    epoch, loss = records.latest("epoch"), records.latest("train/loss")
    if epoch is None or loss is None:
        return f"step {step}"
    return f"step {step}, epoch {epoch:.2f}, loss {loss:.3f}"


def run_plain(demo: Demo) -> None:
    """(a) AdamW, all samples, no checkpoints."""
    job = demo.job("plain", demo.plain_dir, demo.num_ranks, PLAIN)
    log = demo.plain_dir / "run.jsonl"
    title = f"(a) plain run, {demo.num_ranks} ranks"
    demo.run(title, demo.plain_dir, lambda show: run_to_end(job, log, show))


def run_and_kill(demo: Demo) -> None:
    """(b) All three techniques, until a checkpoint of a pruned epoch and a few steps more exist."""
    job = demo.job("effx-killed", demo.effx_dir, demo.num_ranks)
    log = demo.effx_dir / "run.jsonl"
    title = f"(b) effx run, {demo.num_ranks} ranks, killed"
    demo.run(
        title,
        demo.effx_dir,
        lambda show: run_until(job, log, show, lambda: is_time_to_kill(demo.effx_dir)),
    )
    # The resumed run records its samples under the same names.
    before = demo.out / "samples-before-kill"
    before.mkdir()
    for file in demo.effx_dir.glob("samples.rank-*.jsonl"):
        file.rename(before / file.name)


def run_resumed(demo: Demo) -> None:
    """(c) The same run on one rank, from its newest committed checkpoint to the end."""
    job = demo.job("effx-resumed", demo.effx_dir, 1)
    log = demo.effx_dir / "run.jsonl"
    title = "(c) effx run, resumed on 1 rank"
    demo.run(title, demo.effx_dir, lambda show: run_to_end(job, log, show))


def is_time_to_kill(run_dir: Path) -> bool:
    """A committed checkpoint lies within `KILL_EPOCH` or a later epoch, which has gone on for some steps since."""
    committed = max(committed_steps(run_dir / "checkpoints"), default=0)
    batches = read_global_batches(sorted(run_dir.glob("samples.rank-*.jsonl")))
    if committed not in batches:
        return False
    last = max(batches)
    return (
        batches[committed].epoch == batches[last].epoch >= KILL_EPOCH
        and last >= committed + STEPS_PAST_CHECKPOINT
    )


def verify_resume(demo: Demo) -> ResumeCheck:
    """Hold the sample records of (b) against those of (c)."""
    before = read_global_batches(sorted((demo.out / "samples-before-kill").iterdir()))
    after = read_global_batches(sorted(demo.effx_dir.glob("samples.rank-*.jsonl")))
    events = read_run(demo.effx_dir).events
    resumes = [event for event in events if event.kind == "resume"]
    if len(resumes) != 1:
        raise RunFailedError(f"the effx run was resumed {len(resumes)} times, and not once")
    restored = int(resumes[0].fields["step"])
    epoch = before[restored].epoch
    plans = {
        int(event.fields["planned_samples"])
        for event in events
        if event.kind == "epoch" and event.fields["epoch"] == epoch
    }
    if len(plans) != 1:
        raise RunFailedError(f"epoch {epoch} was planned with {sorted(plans)} samples")
    return check_resume(before, after, restored, plans.pop())


def results_table(demo: Demo, check: ResumeCheck) -> Table:
    """Both runs side by side."""
    plain, effx = read_run(demo.plain_dir), read_run(demo.effx_dir)
    table = Table(title="plain run against effx run", show_lines=True)
    for heading in ("", "plain (a)", "effx (b) + (c)"):
        table.add_column(heading)
    losses = [require(run, "eval/loss") for run in (plain, effx)]
    table.add_row("final held-out loss", f"{losses[0]:.4f}", f"{losses[1]:.4f}")
    table.add_row("samples processed", *sample_cells(plain, effx))
    table.add_row("kept per epoch", "100 %", kept_cell(effx))
    table.add_row(
        f"optimizer step on {demo.num_ranks} ranks",
        *(optimizer_cell(run, check.restored_step) for run in (plain, effx)),
    )
    for row in checkpoint_rows(effx):
        table.add_row(row[0], "none taken", row[1])
    table.add_row("resume on 1 rank", "", str(check))
    table.caption = (
        f"One seed, {effx.records[-1].step} and {plain.records[-1].step} optimizer steps. "
        "This model is far from converged on its data, and there leaving samples out is not free: "
        "InfoBatch is not lossless in that regime, and in a pilot on this text plain training for "
        "fewer epochs did at least as well on as many samples. Where the effx run ends lower the "
        "cautious optimizer is the likely reason; this is no ablation. Saved and pruned differ "
        "by what did not fill a global batch. InfoBatch pays where the model knows much of its data already."
    )
    return table


def sample_cells(plain: RunRecords, effx: RunRecords) -> tuple[str, str]:
    """Samples processed by each run, and what the second saved."""
    plain_samples, effx_samples = (
        max(record.samples or 0 for record in run.records) for run in (plain, effx)
    )
    saved = plain_samples - effx_samples
    share = saved / plain_samples
    pruned = [value for _, value in effx.series("effx/infobatch/samples_saved")]
    by_pruning = f"; {max(pruned):,.0f} pruned" if pruned else ""
    return f"{plain_samples:,}", f"{effx_samples:,} ({saved:,} = {share:.1%} saved{by_pruning})"


def kept_cell(effx: RunRecords) -> str:
    """Kept share of each epoch."""
    kept = [value for _, value in effx.series("effx/infobatch/kept_fraction")]
    return ", ".join(f"{value:.0%}" for value in kept)


def optimizer_cell(run: RunRecords, last_step: int) -> str:
    """Median time of an optimizer step, up to the step at which the number of ranks changed."""
    times = [value for step, value in run.series("optimizer_step_s") if step <= last_step]
    return f"{1e3 * statistics.median(times):.1f} ms"


def checkpoint_rows(effx: RunRecords) -> list[tuple[str, str]]:
    """Sizes and times of the saves that stand."""
    series = {
        name: [value for _, value in effx.series(f"effx/checkpoint/{name}")]
        for name in ("ratio", "raw_bytes", "stored_bytes", "blocked_s", "write_s")
    }
    if not series["ratio"]:
        raise RunFailedError("the effx run recorded no checkpoint")
    ratios = ", ".join(f"{value:.3g}x" for value in series["ratio"])
    raw, stored = sum(series["raw_bytes"]), sum(series["stored_bytes"])
    blocked, written = (statistics.median(series[name]) for name in ("blocked_s", "write_s"))
    return [
        ("checkpoint ratio per save", ratios),
        (
            "whole run, bases included",
            f"{raw / stored:.1f}x ({raw / 1e6:.1f} MB as {stored / 1e6:.2f} MB)",
        ),
        (
            "training blocked per save",
            f"{1e3 * blocked:.0f} ms (encoded and written in {1e3 * written:.0f} ms behind it)",
        ),
    ]


def require(run: RunRecords, name: str) -> float:
    """The last value of a metric; RunFailedError if the run has none."""
    value = run.latest(name)
    if value is None:
        raise RunFailedError(f"{run.folder}: no {name} was recorded")
    return value


def empty_folder(out: Path) -> None:
    """Make the demo's folder, empty; a folder that is no demo's is refused."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise RunFailedError(
                f"--out {out}: holds files that are no demo's; give another folder"
            )
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def run_demo(demo: Demo) -> bool:
    """All of it; returns whether the resume check passed."""
    empty_folder(demo.out)
    start = time.monotonic()
    run_plain(demo)
    run_and_kill(demo)
    run_resumed(demo)
    check = verify_resume(demo)
    demo.console.print(results_table(demo, check))
    report = demo.out / "report.html"
    write_report(demo.effx_dir, report, baseline=demo.plain_dir)
    record = {"seconds": demo.seconds, "resume": vars(check), "resume_passed": check.is_good}
    (demo.out / "demo.json").write_text(json.dumps(record, indent=2) + "\n")
    demo.console.print(f"report: {report}  ({time.monotonic() - start:.0f} s in all)")
    return check.is_good


def main(
    seed: Annotated[int, typer.Option(help="Of the initial weights and the order.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of (a) and (b).")] = 2,
    profile: Annotated[str, typer.Option(help="Checkpoint profile of (b) and (c).")] = "balanced",
    out: Annotated[Path | None, typer.Option(help="Default: runs/demo-...")] = None,
) -> None:
    """Train, kill, resume on one rank, and compare with a plain run."""
    folder = out or ROOT / "runs" / f"demo-{profile}-ranks{ranks}-seed{seed}"
    settings = (f"train.seed={seed}", f"effx.excp.profile={profile}")
    # NCCL takes no two ranks on one device.
    on_cpu = torch.cuda.device_count() < ranks
    train = RunSettings.from_file(CONFIG).train
    demo = Demo(folder, ranks, settings, train, Console(), on_cpu)
    # A termination request unwinds as Ctrl-C does, so that no run is left behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        is_good = run_demo(demo)
    except (RunFailedError, EffxError) as error:
        message = f"the demo failed: {error}"
        demo.console.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        demo.console.print("interrupted; all runs were ended")
        raise typer.Exit(130) from error
    raise typer.Exit(0 if is_good else 1)


if __name__ == "__main__":
    typer.run(main)
