"""Pre-train a Llama with FSDP2, and with InfoBatch, cautious AdamW and ExCP checkpoints.

    torchrun --nproc-per-node 2 launch/pretrain_llama_fsdp2.py \\
        --config configs/llama_demo_fsdp2.toml
    mpirun -n 2 python launch/pretrain_llama_fsdp2.py --config configs/llama_demo_fsdp2.toml
    python launch/pretrain_llama_fsdp2.py --config configs/llama_demo_fsdp2.toml --set train.lr=1e-3

What each technique adds to a plain training loop is marked (1), (2) and (3) below. Started again
on the same folder, a run goes on from its newest checkpoint, at any number of ranks. Without an
[effx.*] section in the settings the same script is the plain run: AdamW and all samples.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import effx_dist as effx
from effx_dist.checkpoint import PendingSave
from effx_dist.engines import fsdp2
from launch.llama import loop
from launch.llama.command import Config, LogSamples, Overrides, RunDir, make_app, said_in_a_line
from launch.llama.model import build_llama
from launch.llama.run import Batch, Run
from launch.llama.settings import RunSettings
from launch.ranks import find_ranks


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


class Pretraining(Run):
    """One run: everything is built in `__init__`; the loop over epochs and steps is that of `Run`."""

    def __init__(self, settings: RunSettings, run_dir: Path, log_samples: bool = False) -> None:
        find_ranks()
        mesh = fsdp2.init()
        super().__init__(settings, run_dir, fsdp2.device_of(mesh), log_samples)
        train = settings.train
        model = build_llama(settings.model, settings.data.seq_len, train.seed)
        self.model_config = json.loads(model.config.to_json_string())
        self.model = fsdp2.shard(
            model, mesh, layers=model.model.layers, mixed_precision=self.device.type != "cpu"
        )
        # (1) InfoBatch chooses the samples of each epoch; switched off, it takes them all.
        self.sampler = effx.InfoBatchSampler.from_config(
            settings.infobatch_config(),
            len(self.data.train),
            train.micro_batch_size,
            self.accumulation,
            fsdp2.data_group(mesh),
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
        self.cautious = self.optimizer
        # (1) The sampler yields ids, and an id travels with its sample to where its loss is known.
        self.loader = DataLoader(
            effx.with_sample_ids(self.data.train),
            batch_size=train.micro_batch_size,
            sampler=self.sampler,
            num_workers=settings.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        self.go_on()

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop at the beginning of each epoch."""
        self.sampler.set_epoch(epoch)  # (1) Plans the epoch: all ranks together.

    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step over `accumulation` micro-batches a rank."""
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
        with self.meter.optimizer_step(is_timed=self.is_logged):
            self.optimizer.step()  # (2) Nothing else changes.
        self.optimizer.zero_grad()
        self.samples += self.settings.train.global_batch_size

    def save(self) -> PendingSave:
        """Begin a checkpoint; encoding and writing go on behind the next steps."""
        assert self.checkpointer is not None, "the caller looks"
        # (3) One call; the sampler's scores and position and the schedule go with the weights.
        return self.checkpointer.async_save(
            self.step,
            self.model,
            self.optimizer,
            stateful={"sampler": self.sampler, "schedule": self.schedule},
            # `effx convert --to safetensors` makes the config.json of it.
            extra={"samples": self.samples, "config": self.model_config},
        )

    def resume(self, step: int | None) -> Mapping[str, Any]:
        """Everything is restored in place, whatever the number of ranks that saved it."""
        assert self.checkpointer is not None, "the caller looks"
        extra = self.checkpointer.load(  # (3)
            self.model,
            self.optimizer,
            step=step,
            stateful={"sampler": self.sampler, "schedule": self.schedule},
        )
        self.step = extra["step"]
        return extra

    def begin(self) -> None:
        """Nothing, but with `seeded_base`."""
        if self.checkpointer is not None:
            self.checkpointer.begin(self.model)  # (3)

    def close(self) -> None:
        """Wait for the last checkpoint."""
        if self.checkpointer:
            self.checkpointer.close()


app = make_app()


@app.command()
def main(
    config: Config,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    log_samples: LogSamples = False,
) -> None:
    """Pre-train a Llama on any number of ranks."""
    with said_in_a_line():
        settings = RunSettings.from_file(config, overrides or ())
        folder = loop.make_run_folder(run_dir, config, settings)
        Pretraining(settings, folder, log_samples).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    app()
