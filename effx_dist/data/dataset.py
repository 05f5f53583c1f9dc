"""Sample ids travel in the batch, as integers."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from effx_dist.errors import ConfigError

SAMPLE_ID = "sample_id"


class SampleIdDataset(Dataset[Any]):
    """A map-style dataset whose items carry their index. Made by :func:`with_sample_ids`.

    Attributes of the dataset inside are reached through ``.dataset``: forwarding them would hand out its
    ``__getitems__``, which leaves out the ids.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        sample_id = self._id_of(index)
        return _with_id(self.dataset[sample_id], sample_id)

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """All items of a batch, through the ``__getitems__`` of the dataset inside where it has one."""
        sample_ids = [self._id_of(index) for index in indices]
        fetch = getattr(self.dataset, "__getitems__", None)
        items = fetch(sample_ids) if callable(fetch) else [self.dataset[i] for i in sample_ids]
        return [_with_id(item, i) for item, i in zip(items, sample_ids, strict=True)]

    def _id_of(self, index: Any) -> int:
        number = operator.index(index)
        return number + len(self) if number < 0 else number


def with_sample_ids(dataset: Any) -> SampleIdDataset:
    """Let every item of a map-style dataset carry its index, for ``sampler.weigh``.

    A mapping becomes a dict that gains "sample_id" (an int); ``(x, y)`` becomes ``(x, y, id)``, a list likewise a list;
    anything else, such as a bare tensor, becomes ``(x, id)``. The default collate function turns the ids of a batch
    into an int64 tensor. Ids are indices into ``dataset`` itself: of a ``Subset`` given here, positions in the
    subset; a ``Subset`` of the result keeps the ids of the whole. A dataset that has its ids is returned as it is.

    The result can be pickled if ``dataset`` can.

    Raises:
        ConfigError: ``dataset`` is iterable-style or has no length, so that a sampler cannot choose its samples.
    """
    if isinstance(dataset, SampleIdDataset):
        return dataset
    is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not is_map_style:
        raise ConfigError(
            f"dataset of type {type(dataset).__name__}: must be map-style, with __getitem__ and __len__; samples of an "
            "iterable dataset cannot be chosen by index, so none can be left out"
        )
    return SampleIdDataset(dataset)


def _with_id(item: Any, sample_id: int) -> Any:
    if isinstance(item, Mapping):
        if SAMPLE_ID in item:
            raise ConfigError(
                f'item {sample_id} has a key "{SAMPLE_ID}" already; rename it, as sampler.weigh needs the index'
            )
        return {**item, SAMPLE_ID: sample_id}
    if isinstance(item, list):
        return [*item, sample_id]
    if isinstance(item, tuple):
        return (*item, sample_id)
    return (item, sample_id)
