"""InfoBatch in other people's loops, at their default settings: what each rank trained, part by part.

Every function runs on all ranks (see `tests.ranks.spawn`). A part is a process's life: from a fresh or a loaded sampler
up to where it is interrupted, or the end.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from effx_dist.data import InfoBatchSampler, with_sample_ids
from effx_dist.errors import ConfigError
from tests.data_runs import plain_losses

NUM_SAMPLES, GLOBAL_BATCH, NUM_EPOCHS = 200, 8, 4


@dataclass
class Part:
    """What one rank did."""

    trained: list[tuple[int, int]] = field(default_factory=list)
    """(epoch, sample) as they were weighed."""
    planned: dict[int, list[int]] = field(default_factory=dict)
    """This rank's plan of each epoch as it began there, or as the part went on in it."""
    state: Any = None
    error: str = ""


class Rows(Dataset[dict[str, torch.Tensor]]):
    """A number each, which is its own index."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([float(index)])}


class Model(nn.Module):
    """One weight; its output is not used for the losses, which are those of the tests."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).flatten()


def say_ranks() -> None:
    """What launchers put into the environment."""
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
        "LOCAL_WORLD_SIZE": str(world),
    }


def batch() -> int:
    """Samples of a micro-batch: the global batch is the same on any number of ranks."""
    return GLOBAL_BATCH // dist.get_world_size()


def make_sampler(states: Any = None, **settings: Any) -> InfoBatchSampler:
    """The run's sampler, where the states say; of every rank that saved."""
    sampler = InfoBatchSampler(NUM_SAMPLES, batch(), num_epochs=NUM_EPOCHS, seed=2, **settings)
    if states is not None:
        sampler.load_state_dict(states)
    return sampler


def losses_of(sampler: InfoBatchSampler, ids: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The losses of the tests, with the graph of a model's output."""
    losses = torch.from_numpy(plain_losses(sampler.epoch, ids.cpu().numpy())).to(output.device)
    return losses + (output - output.detach())


def weigh(part: Part, sampler: InfoBatchSampler, ids: torch.Tensor, output: torch.Tensor) -> Any:
    """A loss to call backward on; notes what was trained."""
    part.planned.setdefault(sampler.epoch, sampler.plan.local_ids.tolist())
    part.trained += [(sampler.epoch, i) for i in ids.tolist()]
    return sampler.weigh(losses_of(sampler, ids, output), ids)


def epochs_of(sampler: InfoBatchSampler) -> range:
    """Those that are left."""
    return range(sampler.epoch, NUM_EPOCHS)


def plain() -> Part:
    """The whole run, by torch's own loader."""
    part, sampler = Part(), make_sampler()
    loader = DataLoader(with_sample_ids(Rows()), batch(), sampler=sampler)
    for epoch in epochs_of(sampler):
        sampler.set_epoch(epoch)
        for item in loader:
            weigh(part, sampler, item["sample_id"], item["x"].flatten().requires_grad_())
    sampler.check_epoch()
    return part


def one_rank_saves() -> Any:
    """Rank 0's state, which the other does not help to make."""
    sampler = make_sampler()
    sampler.set_epoch(0)
    return sampler.state_dict() if dist.get_rank() == 0 else None


def with_accelerate(
    stop_at: int = 0,
    states: Any = None,
    skip: int = 0,
    told: bool = True,
    workers: int = 0,
    settings: dict[str, Any] | None = None,
) -> Part:
    """`accelerator.prepare(loader)`, as its examples do it.

    Args:
        stop_at: Batches after which the part is interrupted; 0: never.
        states: Of every rank that saved.
        skip: Batches that `accelerator.skip_first_batches` leaves out in the first epoch.
        told: Whether `loader.set_epoch` is called.
        workers: Of the loader.
        settings: Of its DataLoaderConfiguration.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DataLoaderConfiguration

    say_ranks()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    how = DataLoaderConfiguration(**settings or {})
    accelerator, part = Accelerator(cpu=True, dataloader_config=how), Part()
    sampler, model = make_sampler(states), Model()
    loader = DataLoader(with_sample_ids(Rows()), batch(), sampler=sampler, num_workers=workers)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), loader
    )
    num_batches, first = 0, sampler.epoch
    try:
        for epoch in epochs_of(sampler):
            if told:
                loader.set_epoch(epoch)
            batches = loader
            if skip and epoch == first:
                batches = accelerator.skip_first_batches(loader, skip)
            for item in batches:
                loss = weigh(part, sampler, item["sample_id"], model(item["x"]))
                accelerator.backward(loss)
                optimizer.step()
                num_batches += 1
                if num_batches == stop_at:
                    part.state = sampler.state_dict()
                    return part
        sampler.check_epoch()
    except Exception as error:  # said by name, which is what is looked at
        part.error = f"{type(error).__name__}: {error}"
    return part


def on_a_mesh() -> dict[str, Any]:
    """accelerate's ParallelismConfig of two tensor-parallel ranks, and its loader on it. (The Accelerator itself takes
    none on a CPU.)"""
    from accelerate import Accelerator
    from accelerate.data_loader import prepare_data_loader
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState
    from torch.distributed.device_mesh import init_device_mesh

    say_ranks()
    AcceleratorState._reset_state(reset_partial_state=True)
    config = ParallelismConfig(tp_size=2, dp_shard_size=dist.get_world_size() // 2)
    mesh = config.get_device_mesh("cpu")
    Accelerator(cpu=True).state.device_mesh = mesh  # as it does itself
    refused = []
    for group in (
        None,
        init_device_mesh("cpu", (2, 2)),
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("x", "tp")),
    ):
        with pytest.raises(ConfigError) as caught:
            InfoBatchSampler(NUM_SAMPLES, 4, group=group)
        refused.append(str(caught.value))
    part, sampler = Part(), InfoBatchSampler(NUM_SAMPLES, 4, NUM_EPOCHS, seed=2, group=mesh)
    loader = prepare_data_loader(
        DataLoader(with_sample_ids(Rows()), 4, sampler=sampler), torch_device_mesh=mesh
    )
    noise = float(mesh["tp"].get_local_rank())  # peers whose losses differ
    for epoch in epochs_of(sampler):
        loader.set_epoch(epoch)
        for item in loader:
            weigh(part, sampler, item["sample_id"], torch.zeros(4, requires_grad=True) + noise)
            sampler.weigh(torch.full((4,), noise), item["sample_id"])
    sampler.check_epoch()
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"part": part, "refused": refused, "data": sampler.group.rank, "peer": int(noise)}


def with_stateful_loader(
    stop_at: int = 0, states: Any = None, loader_state: Any = None, workers: int = 2
) -> tuple[Part, Any]:
    """torchdata's StatefulDataLoader; its own state beside what was done."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    part, sampler = Part(), make_sampler(states)
    loader = StatefulDataLoader(
        with_sample_ids(Rows()), batch(), sampler=sampler, num_workers=workers
    )
    if loader_state is not None:
        loader.load_state_dict(loader_state[dist.get_rank()])
    output, num_batches = torch.zeros(batch(), requires_grad=True), 0
    try:
        for epoch in epochs_of(sampler):
            sampler.set_epoch(epoch)
            for item in loader:
                weigh(part, sampler, item["sample_id"], output)
                num_batches += 1
                if num_batches == stop_at:
                    part.state = sampler.state_dict()
                    return part, loader.state_dict()
        sampler.check_epoch()
    except Exception as error:
        part.error = f"{type(error).__name__}: {error}"
    return part, None


def with_trainer(
    folder: str, stop_at: int = 0, states: Any = None, resume: bool = False, strict: bool = True
) -> Part:
    """transformers.Trainer with our sampler and loss, and all else as it is.

    Args:
        folder: Where its checkpoints go.
        stop_at: Steps after which it saves and stops.
        states: Of every rank that saved.
        resume: Whether Trainer itself resumes from its checkpoint.
        strict: Of the sampler.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainerCallback, TrainingArguments

    say_ranks()
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    part, sampler = Part(), make_sampler(states, strict=strict)

    class OurTrainer(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return sampler

        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return weigh(part, sampler, inputs["sample_id"], model(inputs["x"]))

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop_at:
                part.state = sampler.state_dict()
                control.should_save = control.should_training_stop = True

    arguments = TrainingArguments(
        folder,
        num_train_epochs=NUM_EPOCHS,
        per_device_train_batch_size=batch(),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        save_strategy="no",
    )
    trainer = OurTrainer(
        Model(), arguments, train_dataset=with_sample_ids(Rows()), callbacks=[Stop()]
    )
    try:
        trainer.train(resume_from_checkpoint=resume or None)
        if part.state is None:
            sampler.check_epoch()
    except Exception as error:
        part.error = f"{type(error).__name__}: {error}"
    return part


def with_lightning(
    stop_at: int = 0, states: Any = None, limit: int | None = None, is_declared: bool = False
) -> Part:
    """lightning.Trainer, DDP, which replaces samplers that are not distributed ones."""
    import lightning as L

    say_ranks()
    part, sampler = Part(), make_sampler(states)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def training_step(self, item: Any, _: int) -> Any:
            loss = weigh(part, sampler, item["sample_id"], self.model(item["x"]))
            if sampler.position and self.global_step + 1 == stop_at:
                part.state = sampler.state_dict()
                self.trainer.should_stop = True
            return loss

        def on_train_epoch_end(self) -> None:
            if is_declared:
                sampler.end_epoch()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=dist.get_world_size(),
        strategy="ddp" if dist.get_world_size() > 1 else "auto",
        max_epochs=NUM_EPOCHS,
        limit_train_batches=limit,
        min_epochs=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    progress = trainer.fit_loop.epoch_progress.current  # as its own checkpoint would bring it back
    progress.ready = progress.started = progress.processed = progress.completed = sampler.epoch
    try:
        loader = DataLoader(with_sample_ids(Rows()), batch(), sampler=sampler)
        trainer.fit(Module(), loader)
        if part.state is None:
            sampler.check_epoch()
    except Exception as error:
        part.error = f"{type(error).__name__}: {error}"
    return part


@dataclass(frozen=True)
class Call:
    """One part of `many`: a function of this module, by name, and what it is called with."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    after: str = ""
    """The part whose states of all ranks it begins with."""


def many(calls: dict[str, Call], folder: str) -> dict[str, Any]:
    """Several parts in one process, one after the other; "FOLDER" in settings is a folder of the test's own."""
    found: dict[str, Any] = {}
    for key, call in calls.items():
        settings = {
            k: v.replace("FOLDER", folder) if isinstance(v, str) else v
            for k, v in call.settings.items()
        }
        if call.after:
            before = found[call.after]
            part, loader = before if isinstance(before, tuple) else (before, None)
            settings |= _gathered("states", part.state) if settings.pop("of_sampler", True) else {}
            settings |= (
                _gathered("loader_state", loader) if settings.pop("of_loader", False) else {}
            )
        found[key] = globals()[call.name](**settings)
    return found


def _gathered(name: str, value: Any) -> dict[str, list[Any]]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return {name: values}


def trained(parts: list[Part]) -> dict[int, list[int]]:
    """What all ranks trained of each epoch, ascending."""
    found: dict[int, list[int]] = {}
    for part in parts:
        for epoch, sample in part.trained:
            found.setdefault(epoch, []).append(sample)
    return {epoch: sorted(samples) for epoch, samples in found.items()}


def planned(parts: list[Part]) -> dict[int, list[int]]:
    """What was planned of each epoch for all ranks, ascending."""
    found: dict[int, list[int]] = {}
    for part in parts:
        for epoch, samples in part.planned.items():
            found.setdefault(epoch, []).extend(samples)
    return {epoch: sorted(samples) for epoch, samples in found.items()}
