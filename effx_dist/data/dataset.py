"""Sample ids travel in the batch, as integers."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, default_collate

from effx_dist.errors import ConfigError

SAMPLE_ID = "sample_id"


class SampleIdDataset(Dataset[Any]):
    """A map-style dataset whose items carry their index. Made by :func:`with_sample_ids`.

    Attributes of the dataset inside are reached through ``.dataset``: forwarding them would hand out its
    ``__getitems__``, which leaves out the ids.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._replaces = _has_ids_inside(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        sample_id = self._id_of(index)
        return self._join(self.dataset[sample_id], sample_id)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """All items of a batch, through the ``__getitems__`` of the dataset inside where it has one."""
        sample_ids = [self._id_of(index) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(sample_ids) if callable(fetch) else [self.dataset[i] for i in sample_ids]
        return [self._join(item, i) for item, i in zip(items, sample_ids, strict=True)]

    def _join(self, item: Any, sample_id: int) -> Any:
        return _with_id(item, sample_id, self._replaces)

    def _id_of(self, index: Any) -> int:
        number = operator.index(index)
        return number + len(self) if number < 0 else number


def with_sample_ids(dataset: Any) -> SampleIdDataset:
    """Let every item of a map-style dataset carry its index, for ``sampler.weigh``.

    A mapping becomes a dict that gains "sample_id" (an int); ``(x, y)`` becomes ``(x, y, id)``, a list likewise a list;
    anything else, such as a bare tensor, becomes ``(x, id)``. The default collate function turns the ids of a batch
    into an int64 tensor. Ids are indices into ``dataset`` itself: of a ``Subset`` given here, positions in the
    subset; a ``Subset`` of the result keeps the ids of the whole, which a sampler over the subset does not give: call
    this on the outermost data set, the one that the loader reads. Ids of data sets inside (a ``ConcatDataset`` of data
    sets with ids) are replaced. A dataset that has its ids is returned as it is.

    The result can be pickled if ``dataset`` can.

    Raises:
        ConfigError: ``dataset`` is iterable-style or has no length, so that a sampler cannot choose its samples.
    """
    if isinstance(dataset, SampleIdDataset):
        return dataset
    return SampleIdDataset(_map_style(dataset))


class CollateWithIds:
    """Collates items that :func:`batches_with_ids` put beside their ids: ``collate_fn`` sees the items alone, as they
    come out of the data set, and the batch that it returns gains the ids, int64 ``[batch]``."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, pairs: Sequence[tuple[Any, int]]) -> Any:
        items, sample_ids = zip(*pairs, strict=True)
        return _with_id(self.collate_fn(list(items)), torch.tensor(sample_ids))


def batches_with_ids(
    dataset: Any, collate_fn: Callable[[list[Any]], Any] | None
) -> tuple[SampleIdDataset, Callable[[list[Any]], Any]]:
    """A data set and a collate function for a loader whose batches carry the ids, whatever ``collate_fn`` (None: the
    default one) makes of the items: it need not know of ids. They stand where :func:`with_sample_ids` puts them.

    A data set that has its ids is returned as it is, with its collate function.

    Raises:
        ConfigError: As :func:`with_sample_ids`.
    """
    collate = collate_fn or default_collate
    if isinstance(dataset, SampleIdDataset) or _has_ids_inside(dataset):
        return with_sample_ids(dataset), collate
    return _Pairs(_map_style(dataset)), CollateWithIds(collate)


class _Pairs(SampleIdDataset):
    """Items beside their ids: ``(item, id)`` whatever the item is."""

    def _join(self, item: Any, sample_id: int) -> Any:
        return item, sample_id


def _map_style(dataset: Any) -> Any:
    is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not is_map_style:
        raise ConfigError(
            f"dataset of type {type(dataset).__name__}: must be map-style, with __getitem__ and __len__; samples of an "
            "iterable dataset cannot be chosen by index, so none can be left out"
        )
    return dataset


def _has_ids_inside(dataset: Any) -> bool:
    """Whether a data set is made of ones whose items have ids already (Subset, ConcatDataset, StackDataset alike)."""
    inner = getattr(dataset, "datasets", None) or (getattr(dataset, "dataset", None),)
    parts = inner.values() if isinstance(inner, Mapping) else inner
    if not isinstance(parts, Iterable):
        return False
    return any(isinstance(p, SampleIdDataset) or _has_ids_inside(p) for p in parts if p is not None)


def _with_id(item: Any, sample_id: int | torch.Tensor, replaces: bool = False) -> Any:
    """An item with its id, or a batch with its ids; ``replaces`` the one that it has."""
    if replaces and isinstance(item, list | tuple):
        item = item[:-1]
    if isinstance(item, Mapping):
        if SAMPLE_ID in item and not replaces:
            which = "the batch" if isinstance(sample_id, torch.Tensor) else f"item {sample_id}"
            raise ConfigError(
                f'{which} has a key "{SAMPLE_ID}" already; rename it, as sampler.weigh needs the index'
            )
        if isinstance(item, MutableMapping) and not isinstance(item, dict):
            twin = copy.copy(item)  # its own kind, such as a tokeniser's batch with its methods
            twin[SAMPLE_ID] = sample_id
            return twin
        return {**item, SAMPLE_ID: sample_id}
    if isinstance(item, list):
        return [*item, sample_id]
    if isinstance(item, tuple):
        return (*item, sample_id)
    return (item, sample_id)
