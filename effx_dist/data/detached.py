"""What stands in for the ranks in a copy that was pickled: a process group cannot travel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn, TypeVar

import torch

from effx_dist.errors import ConfigError
from effx_dist.shard import Group, SoloGroup
from effx_dist.shard.group import ReduceOp

T = TypeVar("T")


class DetachedGroup(Group):
    """Knows its rank and size, and refuses to communicate."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def all_reduce(self, tensor: torch.Tensor, op: ReduceOp = "sum") -> torch.Tensor:
        self._refuse()

    def all_to_all(self, send: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._refuse()

    def all_gather_object(self, value: T) -> list[T]:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"group: this sampler was unpickled and has lost its group of {self.size} ranks; it can finish its epoch, "
            "but not plan or save. Make a new one with group=... and load_state_dict into it"
        )


def detached(group: Group) -> Group:
    """What stands in for ``group`` in a copy: one process alone is its own."""
    return group if isinstance(group, SoloGroup) else DetachedGroup(group.rank, group.size)
