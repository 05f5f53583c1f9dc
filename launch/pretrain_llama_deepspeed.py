"""Pre-train a Llama with DeepSpeed ZeRO, and with InfoBatch, cautious AdamW and ExCP checkpoints.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/pretrain_llama_deepspeed.py \\
        --deepspeed --deepspeed_config configs/ds_llama_demo_zero3.json
    torchrun --nproc-per-node 2 launch/pretrain_llama_deepspeed.py --deepspeed_config ...
    mpirun -n 2 python launch/pretrain_llama_deepspeed.py --deepspeed_config ...

The techniques stand in the "effx" block of the DeepSpeed configuration; what they add to a plain
DeepSpeed loop is marked (1), (2) and (3) below. Started again on the same folder, a run goes on from
its newest checkpoint, at any number of ranks and any ZeRO stage. Model, data and evaluation are
those of pretrain_llama_fsdp2.py, and so is their settings file.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import effx_dist as effx
from effx_dist.checkpoint import PendingSave
from effx_dist.engines import deepspeed  # (1) (2) (3) In place of: import deepspeed
from effx_dist.engines.deepspeed.data import InfoBatchLoader
from launch.llama import loop
from launch.llama.command import LogSamples, Overrides, make_app, said_in_a_line
from launch.llama.deepspeed_config import read_run
from launch.llama.model import build_llama
from launch.llama.run import Batch, Run
from launch.llama.settings import RunSettings
from launch.ranks import find_ranks

SETTINGS = Path(__file__).resolve().parents[1] / "configs" / "llama_demo_fsdp2.toml"


def join_ranks() -> torch.device:
    """Meet the ranks that the launcher started, whichever it was; returns this rank's device."""
    find_ranks()
    deepspeed.init_distributed()
    accelerator = deepspeed.get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator.set_device(local_rank)
    return torch.device(accelerator.device_name(local_rank))


class Pretraining(Run):
    """One run: everything is built in `__init__`; the loop over epochs and steps is that of `Run`."""

    def __init__(
        self,
        settings: RunSettings,
        config: dict[str, Any],
        run_dir: Path,
        log_samples: bool = False,
    ) -> None:
        super().__init__(settings, run_dir, join_ranks(), log_samples)
        train = settings.train
        model = build_llama(settings.model, settings.data.seq_len, train.seed)
        self.model_config = model.config.to_dict()
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model,
            model_parameters=list(model.parameters()),
            config=config,  # (1) (2) (3) Its "effx" block.
            # The rate follows the data, not the steps: pruning changes the steps of an epoch.
            lr_scheduler=lambda optimizer: effx.ProgressLR(
                optimizer,
                total_epochs=train.num_epochs,
                warmup_epochs=train.warmup_epochs,
                min_ratio=train.min_lr_ratio,
            ),
        )
        self.model, self.cautious = self.engine, self.engine.effx
        # (1) As `training_data=` of initialize would be, but with a number of workers of our own.
        self.loader: InfoBatchLoader = self.engine.effx.deepspeed_io(
            self.data.train, num_local_io_workers=settings.data.num_workers
        )
        self.sampler = self.engine.effx.sampler
        self.checkpoint_dir = run_dir / "checkpoints"
        if settings.checkpoint.every_steps:
            self.checkpointer = self.engine.effx.checkpoints.checkpointer(self.checkpoint_dir)
        self.go_on()

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop at the beginning of each epoch."""
        self.loader.set_epoch(epoch)  # (1) Plans the epoch: all ranks together.

    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step over `accumulation` micro-batches a rank."""
        self.step += 1
        for number, batch in enumerate(batches, start=1):
            inputs = batch["input_ids"].to(self.device, non_blocking=True)
            labels = batch["labels"].to(self.device, non_blocking=True)
            losses = effx.sequence_losses(self.engine(input_ids=inputs).logits, labels)
            # (1) Instead of losses.mean(); the engine divides by the accumulation itself.
            self.engine.backward(self.engine.effx.weigh(losses, batch))
            self.meter.add_losses(losses, labels.numel())
            if number < len(batches):
                self.engine.step()
        with self.meter.optimizer_step(is_timed=self.is_logged):
            self.engine.step()  # (2) Nothing changes here.
        self.samples += self.settings.train.global_batch_size

    def save(self) -> PendingSave | None:
        """Begin a checkpoint; encoding and writing go on behind the next steps."""
        before = self.engine.effx.last_save
        # (3) DeepSpeed's own call; scores and position of the sampler and the schedule go with it.
        self.engine.save_checkpoint(
            self.checkpoint_dir,
            # `effx convert --to safetensors` makes the config.json of it.
            client_state={"samples": self.samples, "config": self.model_config},
        )
        pending: PendingSave | None = self.engine.effx.last_save
        return pending if pending is not before else None

    def resume(self, step: int | None) -> Mapping[str, Any]:
        """Everything is restored in place, whatever the ranks and the stage that saved it."""
        tag = None if step is None else f"global_step{step}"
        _, client_state = self.engine.load_checkpoint(self.checkpoint_dir, tag)  # (3) As ever.
        self.step = self.engine.global_steps
        found: Mapping[str, Any] = client_state
        return found

    def begin(self) -> None:
        """Nothing, but with `seeded_base`."""
        self.engine.effx.checkpoints.begin(self.checkpoint_dir)  # (3)

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self.engine.destroy()


app = make_app()


@app.command()
def main(
    deepspeed_config: Annotated[
        Path, typer.Option("--deepspeed_config", help="DeepSpeed's JSON, with an effx block.")
    ],
    config: Annotated[Path, typer.Option(help="Model, data, evaluation (TOML).")] = SETTINGS,
    run_dir: Annotated[
        Path | None, typer.Option(help="Default: runs/NAME OF THE DEEPSPEED CONFIG.")
    ] = None,
    overrides: Overrides = None,
    log_samples: LogSamples = False,
    _deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Accepted, as DeepSpeed's scripts do.")
    ] = False,
    _local_rank: Annotated[
        int, typer.Option("--local_rank", help="Given by DeepSpeed's launcher.")
    ] = -1,
) -> None:
    """Pre-train a Llama on any number of ranks."""
    with said_in_a_line():
        settings, engine_config = read_run(config, deepspeed_config, overrides or ())
        folder = loop.make_run_folder(run_dir, deepspeed_config, settings)
        Pretraining(settings, engine_config, folder, log_samples).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    app()
