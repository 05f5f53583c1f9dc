"""The plumbing of a training loop: batches, measurements, finished saves, sample records."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from effx_dist.errors import ConfigError
from launch.llama.files import written_whole
from launch.llama.metrics import Metrics
from launch.llama.settings import RunSettings, TrainSettings

if TYPE_CHECKING:
    from effx_dist import Checkpointer
    from effx_dist.checkpoint import PendingSave

T = TypeVar("T")


def accumulation_steps(train: TrainSettings, world: int) -> int:
    """Micro-batches per optimizer step and rank, so that the global batch is as set.

    Raises ConfigError if the global batch cannot be cut that way.
    """
    per_pass = train.micro_batch_size * world
    if train.global_batch_size % per_pass:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size}: must be a multiple of "
            f"train.micro_batch_size x ranks = {train.micro_batch_size} x {world} = {per_pass}; "
            "set train.micro_batch_size to a divisor of what one rank takes"
        )
    return train.global_batch_size // per_pass


def windows(batches: Iterable[T], size: int) -> Iterator[list[T]]:
    """The micro-batches of one optimizer step after another; `size` divides their number."""
    window: list[T] = []
    for batch in batches:
        window.append(batch)
        if len(window) == size:
            yield window
            window = []


def make_run_folder(given: Path | None, config: Path, settings: RunSettings) -> Path:
    """Make the run's folder, `given` or `runs/NAME` after the settings file.

    The settings are written into it; every rank writes the same bytes, by rename.
    """
    folder = given if given is not None else Path("runs") / config.stem
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / "config.toml") as temporary:
        temporary.write_text(settings.to_toml(), encoding="utf-8")
    return folder


def resume_step(checkpointer: "Checkpointer", settings: RunSettings, folder: Path) -> int | None:
    """The step to load, or None for a fresh start.

    Raises ConfigError for `resume = "never"` on a folder that holds checkpoints, because the new
    ones would land among the old.
    """
    newest: int | None = checkpointer.newest()
    resume = settings.checkpoint.resume
    if resume == "never":
        if newest is not None:
            raise ConfigError(
                f'checkpoint.resume="never", but {folder} holds step {newest}; '
                'give another --run-dir, or set checkpoint.resume="auto"'
            )
        return None
    return newest if resume == "auto" else int(resume)


class StepMeter:
    """Sums up the optimizer steps since the last report; losses stay on their device until then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.reset()

    def reset(self) -> None:
        """Start anew, from now."""
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self.num_losses = self.num_steps = self.num_tokens = 0
        self.optimizer_s = self.outside_s = 0.0
        self.since = time.perf_counter()

    def add_losses(self, losses: torch.Tensor, num_tokens: int) -> None:
        """Count one micro-batch: losses[batch] of its sequences, before any weight.

        Where several ranks have the same losses, all of them count them and one the tokens.
        """
        self.loss_sum += losses.detach().double().sum()
        self.num_losses += losses.numel()
        self.num_tokens += num_tokens

    @contextmanager
    def optimizer_step(self, is_timed: bool) -> Iterator[None]:
        """Time one optimizer step; on an accelerator only if asked to, as it waits for the device."""
        if self._device.type != "cpu" and not is_timed:
            yield
            return
        _synchronize(self._device)
        start = time.perf_counter()
        yield
        _synchronize(self._device)
        self.optimizer_s += time.perf_counter() - start
        self.num_steps += 1

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Keep what happens inside (an evaluation) out of the token rate."""
        start = time.perf_counter()
        yield
        self.outside_s += time.perf_counter() - start

    def report(self) -> dict[str, float]:
        """Means over all ranks since the last report, and start anew.

        One all-reduce of three numbers.
        """
        counts = self.loss_sum.new_tensor([float(self.num_losses), float(self.num_tokens)])
        totals = torch.cat([self.loss_sum.reshape(1), counts])
        if dist.is_initialized():
            dist.all_reduce(totals)
        elapsed_s = time.perf_counter() - self.since - self.outside_s
        values = {
            "train/loss": float(totals[0] / totals[1]),
            "tokens_per_s": float(totals[2]) / max(elapsed_s, 1e-9),
        }
        if self.num_steps:
            values["optimizer_step_s"] = self.optimizer_s / self.num_steps
        self.reset()
        return values


class SampleRecord:
    """Appends the sample ids of each optimizer step to `samples.rank-R.jsonl`, or does nothing."""

    def __init__(self, run_dir: Path, rank: int, wanted: bool) -> None:
        path = run_dir / f"samples.rank-{rank}.jsonl"
        self._file = path.open("a", encoding="utf-8") if wanted else None

    def write(self, step: int, epoch: int, ids: Iterable[torch.Tensor]) -> None:
        """Record what this rank consumed in `step`; the line is whole even if it dies next."""
        if self._file is not None:
            flat = [int(number) for part in ids for number in part]
            self._file.write(json.dumps({"step": step, "epoch": epoch, "ids": flat}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


Saves = list[tuple[int, "PendingSave"]]


def log_finished_saves(saves: Saves, metrics: Metrics, wait: bool = False) -> None:
    """Log each save that is done and drop it from `saves`; a failed one is said aloud, not raised.

    Training goes on after a failed save: the checkpoint before it still stands. (If it is the last
    one of the run, closing the Checkpointer raises.)
    """
    for entry in list(saves):
        step, pending = entry
        if not wait and not pending.done():
            continue
        saves.remove(entry)
        if pending.skipped:
            metrics.event("checkpoint_skipped", step=step)
            continue
        try:
            pending.wait()
        except Exception as error:
            metrics.event("checkpoint_failed", step=step, error=str(error))
            metrics.say(f"step {step}: the checkpoint failed, training goes on: {error}")
            continue
        metrics.log(step, pending.metrics())


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
