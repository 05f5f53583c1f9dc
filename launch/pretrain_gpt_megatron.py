"""Pre-train a Llama with Megatron-core, and with InfoBatch, cautious AdamW and ExCP checkpoints.

    torchrun --nproc-per-node 8 launch/pretrain_gpt_megatron.py \\
        --config configs/megatron_llama_demo.toml
    mpirun -n 8 python launch/pretrain_gpt_megatron.py --config configs/megatron_llama_demo.toml

What the techniques add to a plain Megatron loop is marked (1), (2) and (3) below. Started again on
the same folder, a run goes on from its newest checkpoint, at any tensor-, pipeline- and data-parallel
size. Data and settings are those of pretrain_llama_fsdp2.py, and [megatron] beside them.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import effx_dist as effx
from effx_dist.checkpoint import PendingSave
from effx_dist.engines.megatron import attach
from effx_dist.errors import ConfigError
from launch.llama import loop
from launch.llama.command import Config, LogSamples, Overrides, RunDir, make_app, said_in_a_line
from launch.llama.evaluate import held_out_batches, loss_totals
from launch.llama.megatron_model import DTYPES, build_stage, transformer_config
from launch.llama.megatron_settings import MegatronRunSettings, MegatronSettings
from launch.llama.run import Batch, Run
from launch.ranks import find_ranks


def join_ranks(megatron: MegatronSettings, seed: int) -> torch.device:
    """Meet the ranks that the launcher started, and lay them out; returns this rank's device."""
    find_ranks()
    local_rank = int(os.environ["LOCAL_RANK"])
    # So that Megatron's collectives begin in the order in which they overlap best with its kernels.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    try:
        torch.cuda.set_device(local_rank % max(1, torch.cuda.device_count()))
    except (AssertionError, AttributeError, RuntimeError) as error:  # as torch was built
        raise ConfigError(
            "no CUDA device: Megatron-core computes on GPUs only; on this machine use "
            "launch/pretrain_llama_fsdp2.py or launch/pretrain_llama_deepspeed.py"
        ) from error
    dist.init_process_group(megatron.distributed_backend)
    model_ranks = megatron.tensor_model_parallel_size * megatron.pipeline_model_parallel_size
    if dist.get_world_size() % model_ranks:
        raise ConfigError(
            f"{dist.get_world_size()} ranks: must be a multiple of "
            "megatron.tensor_model_parallel_size x megatron.pipeline_model_parallel_size = "
            f"{model_ranks}"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=megatron.tensor_model_parallel_size,
        pipeline_model_parallel_size=megatron.pipeline_model_parallel_size,
    )
    model_parallel_cuda_manual_seed(seed)
    return torch.device(torch.cuda.current_device())


def make_model(settings: MegatronRunSettings, device: torch.device) -> DistributedDataParallel:
    """This rank's part of the model, with buffers for its gradients."""
    megatron, config = settings.megatron, transformer_config(settings)
    module: Any = build_stage(settings, config).to(device)
    if config.bf16:
        module = Float16Module(config, module)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=megatron.use_distributed_optimizer,
        overlap_grad_reduce=megatron.overlap_grad_reduce,
        grad_reduce_in_fp32=True,
    )
    model = DistributedDataParallel(config, ddp_config, module)
    config.finalize_model_grads_func = finalize_model_grads
    if megatron.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
    return model


def make_optimizer(settings: MegatronRunSettings, model: DistributedDataParallel) -> Any:
    """Megatron's mixed-precision AdamW."""
    train, megatron = settings.train, settings.megatron
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.lr * train.min_lr_ratio,
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_eps=train.eps,
        clip_grad=train.clip_norm,
        bf16=megatron.precision == "bf16",
        params_dtype=DTYPES[megatron.precision],
        use_distributed_optimizer=megatron.use_distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, [model])
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def make_schedule(
    settings: MegatronRunSettings, optimizer: Any, num_samples: int
) -> OptimizerParamScheduler:
    """Linear warm-up and a cosine, counted in samples of the data, whether trained on or left out."""
    train = settings.train
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.lr * train.min_lr_ratio,
        lr_warmup_steps=round(train.warmup_epochs * num_samples),
        lr_decay_steps=train.num_epochs * num_samples,
        lr_decay_style="cosine",
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


class Pretraining(Run):
    """One run: everything is built in `__init__`; the loop over epochs and steps is that of `Run`."""

    settings: MegatronRunSettings
    model: Any

    def __init__(
        self, settings: MegatronRunSettings, run_dir: Path, log_samples: bool = False
    ) -> None:
        device = join_ranks(settings.megatron, settings.train.seed)
        train, num_data_ranks = settings.train, parallel_state.get_data_parallel_world_size()
        is_first_of_model = dist.get_rank(parallel_state.get_model_parallel_group()) == 0
        super().__init__(
            settings, run_dir, device, log_samples and is_first_of_model, num_data_ranks
        )
        init_num_microbatches_calculator(
            self.rank, None, train.global_batch_size, train.micro_batch_size, num_data_ranks
        )
        self.model = make_model(settings, device)
        self.optimizer = make_optimizer(settings, self.model)
        num_samples = len(self.data.train)
        self.schedule = make_schedule(settings, self.optimizer, num_samples)
        # Switched off, InfoBatch takes every sample.
        infobatch = settings.infobatch_config()
        config = settings.effx_config().model_copy(update={"infobatch": infobatch})
        # (1) (2) (3) The optimizer's step is cautious from here on.
        self.handle = attach(
            self.optimizer, [self.model], config, vocab_size=settings.model.vocab_size
        )
        # (1) In the place of MegatronPretrainingSampler.
        self.batch_sampler = self.handle.make_sampler(
            num_samples,
            micro_batch_size=train.micro_batch_size,
            global_batch_size=train.global_batch_size,
        )
        self.sampler = self.batch_sampler.inner
        self.cautious = self.handle
        # The sampler gives all ranks of one model the same samples: each reads them for itself.
        self.loader = DataLoader(
            effx.with_sample_ids(self.data.train),
            batch_sampler=self.batch_sampler,
            num_workers=settings.data.num_workers,
            pin_memory=self.device.type == "cuda",
        )
        self.checkpoint_dir = run_dir / "checkpoints"
        if settings.checkpoint.every_steps:
            self.checkpointer = self.handle.checkpointer(self.checkpoint_dir)
        self.go_on()

    def set_epoch(self, epoch: int) -> None:
        """Called by the loop at the beginning of each epoch."""
        self.batch_sampler.set_epoch(epoch)  # (1) Plans the epoch: all ranks together.

    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step over `accumulation` micro-batches a rank."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.run_schedule(batches, self.weighed_loss, forward_only=False)
        # (1) Instead of schedule.step(increment): pruning changes the steps of an epoch. Before the
        # optimizer's step, so that the first of the warm-up is not taken at rate 0.
        self.handle.advance(self.schedule)
        self.step += 1
        with self.meter.optimizer_step(is_timed=self.is_logged):
            self.optimizer.step()  # (2) Nothing changes here.
        self.samples += self.settings.train.global_batch_size

    def run_schedule(
        self, batches: list[Batch], loss_func: Callable[..., Any], forward_only: bool
    ) -> list[Any]:
        """Megatron's schedule for the layout; what `loss_func` returned second, on the last stage."""
        reported: list[Any] = get_forward_backward_func()(
            forward_step_func=partial(self.forward_step, loss_func),
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=self.settings.data.seq_len,
            micro_batch_size=len(batches[0]["labels"]),
            forward_only=forward_only,
        )
        return reported

    def forward_step(
        self, loss_func: Callable[..., Any], data_iterator: Iterator[Batch], model: Any
    ) -> tuple[torch.Tensor, Callable[..., Any]]:
        """One micro-batch through this rank's stage, and how its loss is computed on the last."""
        batch = next(data_iterator)
        tokens = batch["input_ids"].to(self.device, non_blocking=True)
        labels = batch["labels"].to(self.device, non_blocking=True)
        positions = torch.arange(tokens.shape[1], device=self.device).expand_as(tokens)
        output = model(tokens, positions, None, labels=labels)
        return output, partial(loss_func, batch, labels)

    def weighed_loss(
        self, batch: Batch, labels: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """The loss of one micro-batch in training."""
        losses = self.handle.sample_losses(output, labels != -100)
        loss = self.handle.weigh(losses, batch["sample_id"])  # (1) Instead of losses.mean().
        is_first_part = parallel_state.get_tensor_model_parallel_rank() == 0
        self.meter.add_losses(losses, labels.numel() if is_first_part else 0)
        return loss, {}

    def held_out_totals(
        self, _: Batch, labels: torch.Tensor, output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of one batch of held-out documents, and what it adds to sum and count."""
        losses = self.handle.sample_losses(output, labels != -100)
        return losses.mean(), loss_totals(losses, labels)

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Mean loss per token of the held-out documents; they are shared out among the models."""
        rank, world = (
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        batch_size, held_out = self.settings.eval.batch_size, self.data.held_out
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.model.eval()
        for batch, is_counted in held_out_batches(held_out, batch_size, rank, world):
            for added in self.run_schedule([batch], self.held_out_totals, forward_only=True):
                totals += added * is_counted
        self.model.train()
        dist.all_reduce(totals)  # The ranks of a tensor-parallel group count alike.
        return float(totals[0] / totals[1])

    def save(self) -> PendingSave:
        """Begin a checkpoint; encoding and writing go on behind the next steps."""
        # (3) Each rank writes what it holds; the sampler's scores and position go with it.
        return self.handle.save_checkpoint(
            self.checkpoint_dir, self.step, self.schedule, extra={"samples": self.samples}
        )

    def resume(self, step: int | None) -> Mapping[str, Any]:
        """Everything is restored in place, whatever the layout that saved it."""
        extra = self.handle.load_checkpoint(
            self.checkpoint_dir, self.schedule, iteration=step
        )  # (3)
        self.step = extra["step"]
        return extra

    def begin(self) -> None:
        """Nothing, but with `seeded_base`."""
        self.handle.begin(self.checkpoint_dir)  # (3)

    def close(self) -> None:
        """Wait for the last checkpoint."""
        self.handle.close()


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
        settings = MegatronRunSettings.from_file(config, overrides or ())
        folder = loop.make_run_folder(run_dir, config, settings)
        Pretraining(settings, folder, log_samples).train()
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    app()
