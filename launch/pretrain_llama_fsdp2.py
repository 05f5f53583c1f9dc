"""Pre-train a Llama with FSDP2, and with InfoBatch, cautious AdamW and ExCP checkpoints.

    torchrun --nproc-per-node 2 launch/pretrain_llama_fsdp2.py \\
        --config configs/llama_demo_fsdp2.toml
    python launch/pretrain_llama_fsdp2.py --config configs/llama_demo_fsdp2.toml --set train.lr=1e-3

What each technique adds to a plain training loop is marked (1), (2) and (3) below. Started again
on the same folder, a run goes on from its newest checkpoint, at any number of ranks. Without an
[effx.*] section in the settings the same script is the plain run: AdamW and all samples.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import effx_dist as effx
from effx_dist.config import InfoBatchConfig
from effx_dist.engines import fsdp2
from effx_dist.errors import ConfigError
from effx_dist.shard import Group
from launch.llama import loop
from launch.llama.blocks import prepare
from launch.llama.evaluate import held_out_loss
from launch.llama.metrics import Metrics
from launch.llama.model import build_llama
from launch.llama.settings import RunSettings

Batch = dict[str, torch.Tensor]


def make_sampler(
    settings: RunSettings, num_samples: int, accumulation: int, group: Group
) -> effx.InfoBatchSampler:
    """(1) InfoBatch chooses the samples of each epoch; switched off, it takes them all."""
    train, config = settings.train, settings.effx_config().infobatch
    if config is None:
        config = InfoBatchConfig(num_epochs=train.num_epochs, seed=train.seed, enabled=False)
    if not config.enabled:
        config = config.model_copy(update={"prune_ratio": 0.0})
    return effx.InfoBatchSampler.from_config(
        config, num_samples, train.micro_batch_size, accumulation, group
    )


def make_optimizer(settings: RunSettings, model: nn.Module) -> torch.optim.Optimizer:
    """(2) Cautious AdamW takes the place of AdamW, with the same arguments."""
    train, cautious = settings.train, settings.effx_config().cautious
    common: dict[str, Any] = {
        "lr": train.lr,
        "betas": train.betas,
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }
    if cautious is None or not cautious.enabled:
        return torch.optim.AdamW(model.named_parameters(), **common)
    return effx.CautiousAdamW(
        model.named_parameters(),
        cautious_weight_decay=cautious.cautious_weight_decay,
        implementation=cautious.implementation,
        **common,
    )


def make_checkpointer(settings: RunSettings, folder: Path) -> effx.Checkpointer | None:
    """(3) ExCP compresses each checkpoint; switched off, they are whole and exact."""
    if not settings.checkpoint.every_steps:
        return None
    return effx.Checkpointer(folder, settings.effx_config().excp)


class Pretraining:
    """One run: everything is built in `__init__`, and `train` is the loop."""

    def __init__(self, settings: RunSettings, run_dir: Path, log_samples: bool = False) -> None:
        self.settings, train = settings, settings.train
        mesh = fsdp2.init()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = fsdp2.device_of(mesh)
        torch.manual_seed(train.seed)
        self.accumulation = loop.accumulation_steps(train, self.world)
        cache_dir = Path(settings.data.cache_dir or run_dir / "data")
        self.data = prepare(settings.data, settings.model.vocab_size, cache_dir)

        model = build_llama(settings.model, settings.data.seq_len, train.seed)
        self.model_config = json.loads(model.config.to_json_string())
        self.model = fsdp2.shard(
            model, mesh, layers=model.model.layers, mixed_precision=self.device.type != "cpu"
        )
        self.sampler = make_sampler(  # (1)
            settings, len(self.data.train), self.accumulation, fsdp2.data_group(mesh)
        )
        self.optimizer = make_optimizer(settings, self.model)  # (2)
        self.checkpointer = make_checkpointer(settings, run_dir / "checkpoints")  # (3)
        # The rate follows the data, not the steps: pruning changes the steps of an epoch.
        self.schedule = effx.ProgressLR(
            self.optimizer,
            total_epochs=train.num_epochs,
            warmup_epochs=train.warmup_epochs,
            min_ratio=train.min_lr_ratio,
        )
        self.step = self.samples = self.last_saved = 0
        self.saves: loop.Saves = []
        self.meter = loop.StepMeter(self.device)
        self.metrics = Metrics(run_dir, self.rank, train.num_epochs, settings.log.tensorboard)
        self.record = loop.SampleRecord(run_dir, self.rank, log_samples)
        self.metrics.event("start", world_size=self.world, settings=settings.model_dump())
        self.resume(run_dir)

    def train(self) -> None:
        """All epochs (or `max_steps`), then the last checkpoint and the last evaluation."""
        train = self.settings.train
        # (1) The sampler yields ids, and an id travels with its sample to where its loss is known.
        loader: DataLoader[Batch] = DataLoader(
            effx.with_sample_ids(self.data.train),
            batch_size=train.micro_batch_size,
            sampler=self.sampler,
            num_workers=self.settings.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        self.meter.reset()
        for epoch in range(self.sampler.epoch, train.num_epochs):
            if self.is_cut_short():
                break
            self.sampler.set_epoch(epoch)  # (1) Plans the epoch: all ranks together.
            self.say_plan(epoch)
            for batches in loop.windows(loader, self.accumulation):
                self.train_step(batches)
                self.record.write(self.step, epoch, (batch["sample_id"] for batch in batches))
                self.after_step()
                if self.is_cut_short():
                    break
        self.finish()

    def is_cut_short(self) -> bool:
        """Whether `max_steps` are done, or the scheduler wants the machine back (save_on_sigterm)."""
        if self.checkpointer and self.checkpointer.should_stop:  # (3) The same on all ranks.
            return True
        return 0 < self.settings.train.max_steps <= self.step

    def train_step(self, batches: list[Batch]) -> None:
        """One optimiser step over `accumulation` micro-batches a rank."""
        for index, batch in enumerate(batches):
            fsdp2.set_gradient_sync(self.model, index == len(batches) - 1)
            inputs = batch["input_ids"].to(self.device, non_blocking=True)
            labels = batch["labels"].to(self.device, non_blocking=True)
            losses = effx.sequence_losses(self.model(input_ids=inputs).logits, labels)
            loss = self.sampler.weigh(losses, batch["sample_id"])  # (1) Instead of losses.mean().
            (loss / len(batches)).backward()
            self.meter.add_losses(losses, labels.numel())
        if self.settings.train.clip_norm:
            fsdp2.clip_grad_norm(self.model.parameters(), self.settings.train.clip_norm)
        self.schedule.step(self.sampler.progress)
        self.step += 1
        is_logged = self.step % self.settings.log.every_steps == 0
        with self.meter.optimizer_step(is_timed=is_logged):
            self.optimizer.step()  # (2) Nothing else changes.
        self.optimizer.zero_grad()
        self.samples += self.settings.train.global_batch_size

    def after_step(self) -> None:
        """What is done every so many steps."""
        settings = self.settings
        if self.step % settings.log.every_steps == 0:
            self.log_step()
        if settings.eval.every_steps and self.step % settings.eval.every_steps == 0:
            self.evaluate()
        if self.checkpointer and self.step % settings.checkpoint.every_steps == 0:
            self.save()
        loop.log_finished_saves(self.saves, self.metrics)

    def save(self) -> None:
        """Begin a checkpoint; encoding and writing go on behind the next steps."""
        if self.checkpointer is None or self.last_saved == self.step:
            return
        # (3) One call; the sampler's scores and position and the schedule go with the weights.
        pending = self.checkpointer.async_save(
            self.step,
            self.model,
            self.optimizer,
            stateful={"sampler": self.sampler, "schedule": self.schedule},
            # `effx convert --to safetensors` makes the config.json of it.
            extra={"samples": self.samples, "config": self.model_config},
        )
        self.last_saved = self.step
        self.saves.append((self.step, pending))

    def resume(self, run_dir: Path) -> None:
        """Go on from a checkpoint if there is one, whatever the number of ranks that wrote it."""
        if self.checkpointer is None:
            return
        step = loop.resume_step(self.checkpointer, self.settings, run_dir)
        if step is None:
            self.checkpointer.begin(self.model)  # (3) Does something with `seeded_base` only.
            return
        # (3) Everything is restored in place.
        extra = self.checkpointer.load(
            self.model,
            self.optimizer,
            step=None if self.settings.checkpoint.resume == "auto" else step,
            stateful={"sampler": self.sampler, "schedule": self.schedule},
        )
        self.step = self.last_saved = int(extra["step"])
        self.samples = int(extra["samples"])
        self.metrics.event("resume", step=self.step, world_size=self.world)
        self.metrics.say(f"resumed from step {self.step} on {self.world} rank(s)")

    def say_plan(self, epoch: int) -> None:
        """Record what InfoBatch keeps of this epoch; after a resume within it, again as an event."""
        planned = len(self.sampler) * self.world
        self.metrics.event("epoch", epoch=epoch, step=self.step, planned_samples=planned)
        if self.sampler.position:
            return
        values = {
            "effx/infobatch/kept_fraction": self.sampler.kept_fraction,
            "effx/infobatch/threshold": self.sampler.threshold_value,
            "effx/infobatch/samples_saved": self.sampler.samples_saved,
        }
        known = {name: float(value) for name, value in values.items() if value is not None}
        self.metrics.log(self.step, known, self.samples)
        self.metrics.say(f"epoch {epoch}: {self.sampler.kept_fraction:.1%} of the samples")

    def log_step(self) -> None:
        """Record and show the mean of the steps since the last time."""
        values = self.meter.report()
        values["lr"] = float(self.optimizer.param_groups[0]["lr"])
        values["epoch"] = float(self.sampler.progress)
        alignment = getattr(self.optimizer, "alignment", None)
        if alignment:
            means = [float(value) for value in alignment.values()]
            values["effx/cautious/alignment"] = sum(means) / len(means)
        self.metrics.log(self.step, values, self.samples)
        self.metrics.show(
            values["epoch"],
            f"step {self.step}  loss {values['train/loss']:.4f}  lr {values['lr']:.1e}  "
            f"{values['tokens_per_s']:,.0f} tokens/s",
        )

    def evaluate(self) -> None:
        """Loss on the held-out documents."""
        with self.meter.not_counted():
            loss = held_out_loss(
                self.model, self.data.held_out, self.settings.eval.batch_size, self.device
            )
        self.metrics.log(self.step, {"eval/loss": loss}, self.samples)
        self.metrics.say(f"step {self.step}: held-out loss {loss:.4f}")

    def finish(self) -> None:
        """Take the last checkpoint and the last evaluation, and see both written."""
        if self.meter.num_losses:
            self.log_step()
        self.save()
        self.evaluate()
        loop.log_finished_saves(self.saves, self.metrics, wait=True)
        if self.checkpointer:
            self.checkpointer.close()
        self.metrics.event("end", step=self.step, samples=self.samples)
        self.metrics.close()
        self.record.close()


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="Settings of the run (TOML).")],
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/NAME OF THE CONFIG.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="section.key=value, repeatable.")
    ] = None,
    log_samples: Annotated[bool, typer.Option(help="Record the sample ids of each step.")] = False,
) -> None:
    """Pre-train a Llama on any number of ranks."""
    try:
        settings = RunSettings.from_file(config, overrides or ())
        folder = loop.make_run_folder(run_dir, config, settings)
        Pretraining(settings, folder, log_samples).train()
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    dist.destroy_process_group()


if __name__ == "__main__":
    app()
