"""A run apart from its engine: what is measured, said, evaluated and recorded while it trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import effx_dist as effx
from effx_dist.checkpoint import PendingSave
from effx_dist.core.cautious import alignment_metrics
from launch.llama import loop
from launch.llama.blocks import prepare
from launch.llama.evaluate import held_out_loss
from launch.llama.metrics import Metrics
from launch.llama.settings import RunSettings

Batch = dict[str, torch.Tensor]


class Run(ABC):
    """What the training scripts have in common; each adds its engine, its step and its checkpoints.

    The ranks have found each other before it is made: preparing the data is a collective.
    """

    model: nn.Module
    """What computes logits, sharded or not."""
    sampler: effx.InfoBatchSampler
    loader: Iterable[Batch]
    optimizer: Any
    """What has the parameter groups, and so the learning rate."""
    cautious: Any
    """What has `alignment` if the step is cautious."""
    checkpointer: effx.Checkpointer | None = None

    def __init__(
        self,
        settings: RunSettings,
        run_dir: Path,
        device: torch.device,
        log_samples: bool,
        num_data_ranks: int | None = None,
    ) -> None:
        """`num_data_ranks` see different samples; None: all do. Of those that see the same, one gets `log_samples`."""
        self.settings, self.run_dir, train = settings, run_dir, settings.train
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = device
        torch.manual_seed(train.seed)
        self.accumulation = loop.accumulation_steps(train, num_data_ranks or self.world)
        cache_dir = Path(settings.data.cache_dir or run_dir / "data")
        self.data = prepare(settings.data, settings.model.vocab_size, cache_dir)
        self.step = self.samples = self.last_saved = self.last_logged = 0
        self.saves: loop.Saves = []
        self.meter = loop.StepMeter(device)
        self.metrics = Metrics(run_dir, self.rank, train.num_epochs, settings.log.tensorboard)
        self.record = loop.SampleRecord(run_dir, self.rank, log_samples)
        self.metrics.event("start", world_size=self.world, settings=settings.model_dump())

    @abstractmethod
    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step over the micro-batches of this rank."""

    @abstractmethod
    def save(self) -> PendingSave | None:
        """Begin a checkpoint of this step; None where the engine has one of it already."""

    @abstractmethod
    def resume(self, step: int | None) -> Mapping[str, Any]:
        """Load the checkpoint of `step`, or the newest; returns what was saved beside the state."""

    @abstractmethod
    def begin(self) -> None:
        """Called at the start of a run that does not resume."""

    def set_epoch(self, epoch: int) -> None:
        """Plan the epoch: all ranks together."""
        self.sampler.set_epoch(epoch)

    def train(self) -> None:
        """All epochs (or `max_steps`), then the last checkpoint and the last evaluation."""
        self.meter.reset()
        for epoch in range(self.sampler.epoch, self.settings.train.num_epochs):
            if self.is_cut_short():
                break
            self.set_epoch(epoch)
            self.say_plan(epoch)
            for batches in loop.windows(self.loader, self.accumulation):
                self.train_step(batches)
                self.after_step(epoch, batches)
                if self.is_cut_short():
                    break
        if not self.is_cut_short():
            self.sampler.check_epoch()  # no other epoch follows that would tell
        self.finish()

    def is_cut_short(self) -> bool:
        """Whether `max_steps` are done, or the scheduler wants the machine back (save_on_sigterm).

        The same on all ranks, which ask each other.
        """
        if self.checkpointer is not None and self.checkpointer.should_stop:
            return True
        return 0 < self.settings.train.max_steps <= self.step

    def go_on(self) -> None:
        """Go on from a checkpoint if there is one, whatever the number of ranks that wrote it."""
        if self.checkpointer is None:
            return
        step = loop.resume_step(self.checkpointer, self.settings, self.run_dir)
        if step is None:
            self.begin()
            return
        extra = self.resume(None if self.settings.checkpoint.resume == "auto" else step)
        self.samples = int(extra["samples"])
        self.say_resumed()

    def save_once(self) -> None:
        """Begin a checkpoint, unless there is one of this step."""
        if self.checkpointer is not None and self.last_saved != self.step:
            self.last_saved = self.step
            if (pending := self.save()) is not None:
                self.saves.append((self.step, pending))

    def say_resumed(self) -> None:
        """Record that the run goes on from the checkpoint of `step`."""
        self.last_saved = self.last_logged = self.step
        self.metrics.event("resume", step=self.step, world_size=self.world)
        self.metrics.say(f"resumed from step {self.step} on {self.world} rank(s)")

    def say_plan(self, epoch: int) -> None:
        """Record what InfoBatch keeps of this epoch; after a resume within it, again as an event."""
        planned = len(self.sampler) * self.sampler.group.size
        self.metrics.event("epoch", epoch=epoch, step=self.step, planned_samples=planned)
        if self.sampler.position:
            return
        self.metrics.log(self.step, self.sampler.metrics(), self.samples)
        self.metrics.say(f"epoch {epoch}: {self.sampler.kept_fraction:.1%} of the samples")

    @property
    def is_logged(self) -> bool:
        """Whether `step` is one whose measurements are logged."""
        return self.step % self.settings.log.every_steps == 0

    def after_step(self, epoch: int, batches: list[Batch]) -> None:
        """Record the samples of a step that was taken, and do what is done every so many steps."""
        settings = self.settings
        self.record.write(self.step, epoch, (batch["sample_id"] for batch in batches))
        if self.is_logged:
            self.log_step()
        if settings.eval.every_steps and self.step % settings.eval.every_steps == 0:
            self.evaluate()
        every_steps = settings.checkpoint.every_steps
        if every_steps and self.step % every_steps == 0:
            self.save_once()
        loop.log_finished_saves(self.saves, self.metrics)

    def log_step(self) -> None:
        """Record and show the mean of the steps since the last time."""
        self.last_logged = self.step
        values = self.meter.report()
        values["lr"] = float(self.optimizer.param_groups[0]["lr"])
        values["epoch"] = float(self.sampler.progress)
        values |= alignment_metrics(getattr(self.cautious, "alignment", {}))
        self.metrics.log(self.step, values, self.samples)
        self.metrics.show(
            values["epoch"],
            f"step {self.step}  loss {values['train/loss']:.4f}  lr {values['lr']:.1e}  "
            f"{values['tokens_per_s']:,.0f} tokens/s",
        )

    def evaluate(self) -> None:
        """Loss on the held-out documents."""
        with self.meter.not_counted():
            loss = self.held_out_loss()
        self.metrics.log(self.step, {"eval/loss": loss}, self.samples)
        self.metrics.say(f"step {self.step}: held-out loss {loss:.4f}")

    def held_out_loss(self) -> float:
        """Mean loss per token of the held-out documents, on every rank."""
        batch_size = self.settings.eval.batch_size
        return held_out_loss(self.model, self.data.held_out, batch_size, self.device)

    def finish(self) -> None:
        """Take the last checkpoint and the last evaluation, and see both written."""
        if self.last_logged < self.step:
            self.log_step()
        self.save_once()
        self.evaluate()
        loop.log_finished_saves(self.saves, self.metrics, wait=True)
        self.close()
        self.metrics.event("end", step=self.step, samples=self.samples)
        self.metrics.close()
        self.record.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of what the engine holds; raises where the last checkpoint failed."""
