"""The sampler and the id-carrying dataset inside torch's own loaders."""

from __future__ import annotations

import pickle
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from effx_dist.data import InfoBatchSampler, with_sample_ids
from effx_dist.data.dataset import batches_with_ids
from effx_dist.errors import ConfigError
from tests.data_runs import plain_losses


class Rows(Dataset[dict[str, Any]]):
    """Items that say which they are; module-level, so that a spawned worker can load it."""

    def __len__(self) -> int:
        return 96

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < 96:
            raise IndexError(index)
        return {"x": torch.tensor([float(index)])}


class Fetching(Rows):
    """With the batched access that Subset and other data sets have."""

    def __init__(self) -> None:
        self.num_fetches = 0

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        self.num_fetches += 1
        return [self[i] for i in indices]


def _train(loader: Any, sampler: InfoBatchSampler, dtype: torch.dtype = torch.float32) -> list[int]:
    """One epoch; the ids as they came."""
    seen = []
    for batch in loader:
        ids = batch["sample_id"]
        assert ids.dtype == torch.int64
        assert torch.equal(batch["x"][:, 0].long(), ids)
        sampler.weigh(torch.from_numpy(plain_losses(sampler.epoch, ids.numpy())).to(dtype), ids)
        seen += ids.tolist()
    return seen


@pytest.mark.parametrize("loader_drops", [True, False])
@pytest.mark.parametrize("drop_last", [True, False])
def test_epochs_end_under_the_batch_sampler(drop_last: bool, loader_drops: bool) -> None:
    sampler = InfoBatchSampler(96, batch_size=20, num_epochs=4, drop_last=drop_last)
    loader = DataLoader(with_sample_ids(Rows()), 20, sampler=sampler, drop_last=loader_drops)
    for epoch in range(4):
        sampler.set_epoch(epoch)
        expected = sampler.plan.local_ids.tolist()
        assert len(loader) == len(expected) // 20
        assert _train(loader, sampler, torch.bfloat16) == expected
    assert sampler.finished_epochs == 4


def test_spawned_workers_that_fetch_ahead_and_a_resume_in_mid_epoch() -> None:
    def build() -> tuple[InfoBatchSampler, DataLoader[Any]]:
        sampler = InfoBatchSampler(96, batch_size=8)
        loader = DataLoader(
            with_sample_ids(Rows()),
            8,
            sampler=sampler,
            num_workers=2,
            multiprocessing_context="spawn",
        )
        return sampler, loader

    sampler, loader = build()
    expected = sampler.plan.local_ids.tolist()
    batches, seen = iter(loader), []
    for _ in range(3):
        ids = next(batches)["sample_id"]
        sampler.weigh(torch.ones(8), ids)
        seen += ids.tolist()
    del batches
    assert sampler.position == 24  # not what the workers had fetched
    resumed, _ = build()
    resumed.load_state_dict(sampler.state_dict())
    plain = DataLoader(with_sample_ids(Rows()), 8, sampler=resumed)
    assert seen + _train(plain, resumed) == expected


def _one_ahead(loader: Any) -> Iterator[Any]:
    """As accelerate's loader does: the next batch is fetched before this one is handed out."""
    batches = iter(loader)
    held = next(batches)
    for batch in batches:
        yield held
        held = batch
    yield held


def test_one_batch_of_look_ahead() -> None:
    ahead, plain = (InfoBatchSampler(96, batch_size=8) for _ in range(2))
    for epoch in range(3):
        for sampler, wrap in ((ahead, _one_ahead), (plain, iter)):
            sampler.set_epoch(epoch)
            _train(wrap(DataLoader(with_sample_ids(Rows()), 8, sampler=sampler)), sampler)
    assert ahead.plan.local_ids.tolist() == plain.plan.local_ids.tolist()
    assert ahead.samples_saved == plain.samples_saved > 0


def test_a_loader_that_starts_again_by_itself_walks_through_the_epochs() -> None:
    sampler = InfoBatchSampler(96, batch_size=8, num_epochs=3)
    loader = DataLoader(with_sample_ids(Rows()), 8, sampler=sampler)
    batches, epochs = iter(loader), []
    while sampler.finished_epochs < 3:
        try:
            batch = next(batches)
        except StopIteration:
            batches = iter(loader)
            batch = next(batches)
        epochs.append(sampler.epoch)
        sampler.weigh(
            torch.from_numpy(plain_losses(0, batch["sample_id"].numpy())), batch["sample_id"]
        )
    assert sorted(set(epochs)) == [0, 1, 2]
    assert epochs.count(0) == epochs.count(2) == 12
    assert epochs.count(1) < 12


def test_subsets_inside_and_outside() -> None:
    chosen = [5, 50, 95]
    inside = with_sample_ids(Subset(Rows(), chosen))
    assert [(item["x"].item(), item["sample_id"]) for item in inside] == [(5, 0), (50, 1), (95, 2)]
    outside = Subset(with_sample_ids(Rows()), chosen)
    (batch,) = DataLoader(outside, 3)
    assert batch["sample_id"].tolist() == chosen
    (batch,) = DataLoader(inside, 3)
    assert (batch["sample_id"].tolist(), batch["x"].flatten().tolist()) == ([0, 1, 2], chosen)


def test_batched_access_carries_ids() -> None:
    dataset = Fetching()
    (batch,) = DataLoader(Subset(with_sample_ids(dataset), [4, 2]), 2)
    assert batch["sample_id"].tolist() == [4, 2]
    assert dataset.num_fetches == 1


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (
            TensorDataset(torch.arange(3.0), torch.arange(3)),
            (torch.tensor(1.0), torch.tensor(1), 1),
        ),
        ([torch.tensor(0.0), torch.tensor(7.0)], (torch.tensor(7.0), 1)),
        ([[0, 1], [2, 3]], [2, 3, 1]),
        ([{"a": 1}, {"a": 2}], {"a": 2, "sample_id": 1}),
        (["first", "second"], ("second", 1)),
    ],
)
def test_forms_of_items(dataset: Any, expected: Any) -> None:
    wrapped = with_sample_ids(dataset)
    assert len(wrapped) == len(dataset)
    assert wrapped[1] == expected
    assert type(wrapped[1]) is type(expected)
    assert wrapped[torch.tensor(1)] == expected
    assert wrapped[1 - len(dataset)] == expected  # counted from the end, with the id from the start
    assert (
        type(wrapped[torch.tensor(1)][-1 if not isinstance(expected, dict) else "sample_id"]) is int
    )


def test_the_items_of_the_dataset_are_not_changed() -> None:
    items = [{"a": 1}, [2]]
    wrapped = with_sample_ids(items)
    _ = wrapped[0], wrapped[1]
    assert items == [{"a": 1}, [2]]


def test_pickles_and_is_not_wrapped_twice() -> None:
    wrapped = with_sample_ids(Rows())
    assert pickle.loads(pickle.dumps(wrapped))[3]["sample_id"] == 3
    assert with_sample_ids(wrapped) is wrapped
    assert wrapped.dataset[3].keys() == {"x"}


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize("dataset", [Stream(), iter([1, 2]), {1, 2}])
def test_what_cannot_be_indexed_is_refused(dataset: Any) -> None:
    with pytest.raises(ConfigError, match="must be map-style"):
        with_sample_ids(dataset)


def test_a_key_that_is_there_already_is_refused() -> None:
    with pytest.raises(ConfigError, match="sample_id"):
        with_sample_ids([{"sample_id": 5}])[0]


class Encoding(UserDict[str, Any]):
    """A batch with methods, as tokenisers return it."""


COLLATES: list[tuple[Any, Callable[[Any], Any]]] = [
    (None, lambda batch: batch["sample_id"]),
    (lambda items: Encoding(x=len(items)), lambda batch: batch["sample_id"]),
    (lambda items: torch.stack([item["x"] for item in items]), lambda batch: batch[1]),
    (lambda items: (len(items), "y"), lambda batch: batch[2]),
    (lambda items: [len(items)], lambda batch: batch[1]),
]


@pytest.mark.parametrize(("collate", "ids_of"), COLLATES)
def test_batches_carry_ids_whatever_the_collate_function_returns(
    collate: Any, ids_of: Callable[[Any], Any]
) -> None:
    dataset, collate_with_ids = batches_with_ids(Fetching(), collate)
    batch = next(iter(DataLoader(dataset, 4, sampler=[5, 1, 7, 2], collate_fn=collate_with_ids)))
    assert torch.equal(ids_of(batch), torch.tensor([5, 1, 7, 2]))
    alone = (collate or default_collate)([Rows()[i] for i in (5, 1, 7, 2)])
    if isinstance(alone, dict | UserDict):
        assert type(batch) is type(alone)
        for key, value in alone.items():
            assert torch.equal(torch.as_tensor(batch[key]), torch.as_tensor(value))


def test_a_data_set_with_ids_keeps_its_collate_function() -> None:
    with_ids = with_sample_ids(Rows())
    assert batches_with_ids(with_ids, list) == (with_ids, list)
    inner, collate = batches_with_ids(Subset(with_ids, [3]), None)
    assert collate([inner[0]])["sample_id"].tolist() == [0]


@pytest.mark.parametrize("kind", [lambda x: {"x": x}, lambda x: (x, -x)])
def test_parts_with_ids_of_their_own_get_those_of_the_whole(kind: Callable[[int], Any]) -> None:
    parts = [with_sample_ids([kind(x) for x in range(start, start + 3)]) for start in (0, 3)]
    whole = with_sample_ids(ConcatDataset([Subset(ConcatDataset(parts), [5, 0, 2])]))
    plain = with_sample_ids([kind(x) for x in (5, 0, 2)])
    assert [whole[i] for i in range(3)] == [plain[i] for i in range(3)]
