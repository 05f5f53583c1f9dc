"""InfoBatch under DeepSpeed: its loaders, weighing, and what reaches its monitor."""

from __future__ import annotations

import csv
import multiprocessing
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from effx_dist.data import EffxWarning, with_sample_ids
from effx_dist.errors import ConfigError
from effx_dist.shard import SoloGroup
from tests.data_runs import Merged, make, merge_runs, plain_losses, train
from tests.deepspeed_runs import be_a_rank, merged, needs_deepspeed
from tests.ranks import spawn

T = TypeVar("T")

pytestmark = [needs_deepspeed, pytest.mark.deepspeed, pytest.mark.ranks]

NUM_SAMPLES, NUM_EPOCHS, WORLD, MICRO, ACCUMULATED = 96, 4, 2, 3, 2
GLOBAL = WORLD * MICRO * ACCUMULATED
SETTINGS: dict[str, Any] = {"num_epochs": NUM_EPOCHS, "delta": 0.75, "seed": 3}
BASE: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": MICRO,
    "gradient_accumulation_steps": ACCUMULATED,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "effx": {"infobatch": SETTINGS},
}
HALF: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "fp16": {"enabled": True, "initial_scale_power": 9},
    "zero_optimization": {"stage": 2},
    "steps_per_print": 5,
    "effx": {"cautious": {}, "excp": {"profile": "lossless", "async_mode": "sync"}},
}
NUM_BEFORE_SAVE = 11
"""Steps before the checkpoint: within epoch 1, the first that is pruned."""


class Rows(Dataset[tuple[torch.Tensor, float]]):
    """Samples ``(x, y)``, of which y says which it is."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, float]:
        return features(torch.tensor(index)), float(index)


class NamedRows(Rows):
    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return {"x": x, "y": y}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        yield 1


def features(ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([ids / NUM_SAMPLES, torch.ones(ids.shape)], dim=-1)


def pairs_only(items: list[Any]) -> Any:
    """A collate function as users have it: it knows of no ids."""
    xs, ys = zip(*items, strict=True)
    return torch.stack(xs), torch.tensor(ys)


def start(config: dict[str, Any], **arguments: Any) -> Any:
    from effx_dist.engines import deepspeed

    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    return deepspeed.initialize(model=model, config=config, **arguments)


def take(engine: Any, x: torch.Tensor, y: torch.Tensor, batch: Any) -> list[int]:
    """One micro-batch, whose losses depend on sample and epoch and have x as gradient; its ids."""
    ids = y.long()
    output = engine(x.to(engine.module.weight.dtype))[:, 0]
    known = torch.from_numpy(plain_losses(engine.effx.sampler.epoch, ids.numpy()))
    engine.backward(engine.effx.weigh(known + output - output.detach(), batch))
    engine.step()
    return [int(id_) for id_ in ids]


def plain_loop(folder: Path) -> dict[str, Any]:
    """`training_data`, and epochs as most scripts write them."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "plain"}
    config = merged(BASE, {"zero_optimization": {"stage": 1}, "csv_monitor": monitor})
    engine, _, loader, _ = start(
        config, optimizer=torch.optim.SGD, training_data=Rows(), collate_fn=pairs_only
    )
    epochs, lengths, weights = [], [], [engine.module.weight.detach().clone()]
    for epoch in range(NUM_EPOCHS):
        loader.set_epoch(epoch)
        lengths.append(len(loader))
        batches = []
        for batch in loader:
            x, y, ids = batch
            assert torch.equal(ids, y.long())
            batches.append(take(engine, x, y, batch))
            if engine.micro_steps % ACCUMULATED == 0:
                weights.append(engine.module.weight.detach().clone())
        epochs.append(batches)
    return {"epochs": epochs, "lengths": lengths, "weights": torch.cat(weights)}


def repeating_loop(folder: Path) -> dict[str, Any]:
    """RepeatingLoader, fp16 with a loss scale, all three techniques; resumed from within an epoch."""
    from deepspeed.runtime.dataloader import RepeatingLoader

    monitor = {"enabled": True, "output_path": str(folder), "job_name": "repeating"}
    engine, *_ = start(merged(BASE, HALF, {"csv_monitor": monitor}))
    loader = engine.effx.deepspeed_io(NamedRows(), num_local_io_workers=0)
    batches, num_planned = [], {0: len(loader)}
    repeating = RepeatingLoader(loader)
    while len(batches) < sum(num_planned.values()) or len(num_planned) < NUM_EPOCHS:
        batch = next(repeating)
        num_planned[engine.effx.sampler.epoch] = len(loader)
        batches.append(take(engine, batch["x"], batch["y"], batch))
        if len(batches) == NUM_BEFORE_SAVE * ACCUMULATED:
            engine.save_checkpoint(folder / "checkpoints")
    scale = engine.optimizer.loss_scale

    loader = engine.effx.deepspeed_io(NamedRows(), num_local_io_workers=0)
    repeating = RepeatingLoader(loader)  # before the checkpoint is loaded, as scripts do
    engine.load_checkpoint(folder / "checkpoints")
    resumed = []
    while len(resumed) < len(batches) - NUM_BEFORE_SAVE * ACCUMULATED:
        batch = next(repeating)
        resumed.append(take(engine, batch["x"], batch["y"], batch["sample_id"]))
    return {"batches": batches, "resumed": resumed, "scale": scale} | odd_uses(engine)


def odd_uses(engine: Any) -> dict[str, Any]:
    """Another epoch within one; epochs without weighing; the user's own loader; what is refused."""
    loader = engine.effx.deepspeed_io(NamedRows(), num_local_io_workers=0)
    batches = iter(loader)
    first = next(batches)
    take(engine, first["x"], first["y"], first)
    for epoch in range(1, NUM_EPOCHS):
        engine.effx.sampler.end_epoch()
        loader.set_epoch(epoch)
    last_epoch = [id_ for batch in batches for id_ in batch["sample_id"].tolist()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in loader:
            pass
    told = [str(warning.message) for warning in caught if warning.category is EffxWarning]

    sampler = engine.effx.make_sampler(NUM_SAMPLES)
    own = DataLoader(with_sample_ids(Rows()), MICRO, sampler=sampler)
    taken = [take(engine, x, y, ids) for x, y, ids in own]
    refused = []
    group, engine.data_parallel_group = engine.data_parallel_group, None
    for attempt in (
        lambda: engine.effx.deepspeed_io(Stream()),
        lambda: engine.effx.weigh(torch.ones(2), {"x": torch.ones(2)}),
        lambda: engine.effx.make_sampler(NUM_SAMPLES),
    ):
        with pytest.raises(ConfigError) as error:
            attempt()
        refused.append(str(error.value))
    engine.data_parallel_group = group
    return {"last_epoch": last_epoch, "told": told, "own": taken, "refused": refused}


def without_infobatch() -> dict[str, Any]:
    """With the section off, DeepSpeed's own loader, and the mean of the losses."""
    config = merged(
        BASE,
        HALF,
        {
            "fp16": {"enabled": False},
            "effx": {"infobatch": {"enabled": False}, "excp": {"enabled": False}},
        },
    )
    engine, _, loader, _ = start(config, training_data=Rows(), collate_fn=pairs_only)
    x, _ = next(iter(loader))
    losses = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    weighed = engine.effx.weigh(losses, None)
    return {"loader": type(loader).__name__, "rows": len(x), "weighed": weighed}


def body(folder: Path) -> dict[str, Any]:
    be_a_rank()
    # As where a launcher starts the rank: its loader's workers come from the rank itself.
    multiprocessing.set_start_method("fork", force=True)
    return {
        "plain": plain_loop(folder),
        "repeating": repeating_loop(folder),
        "off": without_infobatch(),
    }


def column(folder: Path, job: str, name: str) -> list[tuple[int, float]]:
    with (folder / job / f"{name}.csv").open(newline="") as file:
        return [(int(step), float(value)) for step, value in list(csv.reader(file))[1:]]


def joined(lists: Iterable[list[T]]) -> list[T]:
    return list(chain.from_iterable(lists))


def global_batches(of_ranks: list[list[list[int]]]) -> list[list[int]]:
    """Ids of every optimizer step, sorted, from each rank's micro-batches."""
    micro = [joined(parts) for parts in zip(*of_ranks, strict=True)]
    steps = range(0, len(micro), ACCUMULATED)
    return [sorted(joined(micro[step : step + ACCUMULATED])) for step in steps]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deepspeed_data")


@pytest.fixture(scope="module")
def ran(folder: Path) -> list[dict[str, Any]]:
    return spawn(WORLD, body, folder / "ranks", folder)


@pytest.fixture(scope="module")
def alone() -> list[Merged]:
    """What the sampler itself plans, in one process with the same global batch."""
    sampler = make(SoloGroup(), (1, GLOBAL, 1), num_samples=NUM_SAMPLES, **SETTINGS)
    epochs = merge_runs([train(sampler, plain_losses)])
    assert len(epochs[0].ids) > len(epochs[1].ids)  # something is pruned
    return epochs


@pytest.fixture(scope="module")
def steps(alone: list[Merged]) -> list[list[int]]:
    ids = [epoch.ids for epoch in alone]
    return [sorted(e[i : i + GLOBAL]) for e in ids for i in range(0, len(e), GLOBAL)]


def test_epochs_are_those_of_one_process(
    ran: list[dict[str, Any]], alone: list[Merged], steps: list[list[int]]
) -> None:
    epochs = [rank["plain"]["epochs"] for rank in ran]
    assert global_batches([joined(of_rank) for of_rank in epochs]) == steps
    for number, epoch in enumerate(alone):
        taken = [id_ for rank in epochs for batch in rank[number] for id_ in batch]
        assert len(taken) == len(set(taken))
        assert set(taken) == epoch.kept
        for rank in ran:
            assert rank["plain"]["lengths"][number] == len(epoch.ids) // (WORLD * MICRO)


def test_step_is_that_of_the_weighed_mean_over_the_global_batch(
    ran: list[dict[str, Any]], alone: list[Merged]
) -> None:
    known = [
        (torch.tensor(epoch.ids[i : i + GLOBAL]), torch.tensor(epoch.weights[i : i + GLOBAL]))
        for epoch in alone
        for i in range(0, len(epoch.ids), GLOBAL)
    ]
    weights = ran[0]["plain"]["weights"]
    assert len(weights) == len(known) + 1
    lr = 1e-3  # of torch.optim.SGD
    for (before, after), (ids, weight) in zip(pairwise(weights), known, strict=True):
        gradient = (weight[:, None] * features(ids)).sum(0) / GLOBAL
        torch.testing.assert_close(before - after, lr * gradient, atol=1e-7, rtol=1e-4)


def test_repeating_loader_goes_through_the_run_and_losses_are_recorded_unscaled(
    ran: list[dict[str, Any]], steps: list[list[int]]
) -> None:
    assert ran[0]["repeating"]["scale"] > 1
    assert global_batches([rank["repeating"]["batches"] for rank in ran]) == steps


def test_resume_within_an_epoch_repeats_and_skips_nothing(
    ran: list[dict[str, Any]], steps: list[list[int]]
) -> None:
    assert len(steps[0]) * NUM_BEFORE_SAVE > NUM_SAMPLES
    resumed = global_batches([rank["repeating"]["resumed"] for rank in ran])
    assert resumed == steps[NUM_BEFORE_SAVE:]


def test_odd_uses(ran: list[dict[str, Any]]) -> None:
    for rank in ran:
        found = rank["repeating"]
        assert len(found["last_epoch"]) == NUM_SAMPLES // WORLD
        assert any("no loss of it was weighed" in told for told in found["told"])
        assert len(found["own"]) == NUM_SAMPLES // (WORLD * MICRO)
        iterable, no_ids, no_group = found["refused"]
        assert "dataset of type Stream" in iterable
        assert "sample_id" in no_ids
        assert "data-parallel group" in no_group


def test_without_infobatch_it_is_deepspeeds_loader(ran: list[dict[str, Any]]) -> None:
    assert ran[0]["off"]["loader"] == "DeepSpeedDataLoader"
    assert ran[0]["off"]["rows"] == MICRO
    assert ran[0]["off"]["weighed"].dtype == torch.float32
    assert ran[0]["off"]["weighed"] == 1.5


def test_monitor_gets_the_figures_over_samples(
    ran: list[dict[str, Any]], alone: list[Merged], folder: Path
) -> None:
    lengths = np.array([len(epoch.ids) for epoch in alone])
    starts = np.cumsum(lengths) - lengths
    kept = column(folder, "plain", "effx_infobatch_kept_fraction")
    assert [samples for samples, _ in kept] == [int(at) + GLOBAL for at in starts]
    for (_, fraction), length in zip(kept, lengths, strict=True):
        assert length <= fraction * NUM_SAMPLES < length + GLOBAL
    thresholds = column(folder, "plain", "effx_infobatch_threshold")
    expected = [epoch.threshold for epoch in alone if epoch.threshold is not None]
    assert [value for _, value in thresholds] == pytest.approx(expected)
    assert not (folder / "plain" / "effx_cautious_alignment.csv").exists()

    alignment = column(folder, "repeating", "effx_cautious_alignment")
    assert [samples for samples, _ in alignment[:3]] == [5 * GLOBAL, 10 * GLOBAL, 15 * GLOBAL]
    assert all(0 <= value <= 1 for _, value in alignment)
    ratios = column(folder, "repeating", "effx_checkpoint_ratio")
    assert [samples for samples, _ in ratios] == [(NUM_BEFORE_SAVE + 1) * GLOBAL]
