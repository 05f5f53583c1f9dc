"""Ranks that get the same samples: the pipeline stages, tensor- and context-parallel parts of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.errors import ConfigError, RankFailedError
from effx_dist.shard import Group, SoloGroup
from effx_dist.shard.group import ReduceOp


@dataclass(frozen=True)
class Peers:
    """The ranks that get the same samples as this one. One of them reports the losses of all.

    Each peer plans for itself, together with the ranks that have its place in the other models. For the plans to be
    the same, the scores must be equal to the last bit: what the reporter recorded is sent to its peers before it is
    used.

    Attributes:
        groups: Ranks that hear of each other, in steps: what a rank tells those of the first group, and all of them
            then tell those of the next, reaches every peer. The same number of them on every peer.
        is_reporter: Whether the losses that this rank records are those that count; true of one of the peers.
        has_losses: Whether this rank weighs losses; a rank that does not (an earlier pipeline stage) calls
            `InfoBatchSampler.advance` in place of it. True of the reporter.
    """

    groups: tuple[Group, ...] = ()
    is_reporter: bool = True
    has_losses: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self  # groups of ranks are not copied

    def agree(self, error: Exception | None, consumed: int = 0) -> Exception | None:
        """This rank's ``error``; else one that tells of a peer's; else one if not all have ``consumed`` the same.

        None on all peers, or an error on all. One small gather a group.
        """
        for group in self.groups:
            try:
                counts = group.tell_all(error, consumed, keep_own_error=False)
            except RankFailedError as told:  # names the peers that failed
                error = error or told
                continue
            if min(counts) < max(counts):
                error = ConfigError(
                    f"{', '.join(map(str, counts))} samples of the epoch were consumed by the ranks that get the same "
                    "ones: weigh every micro-batch where there are losses, and call advance after each step where "
                    "there are none"
                )
        return error

    def share(
        self, ids: npt.NDArray[np.int64], losses: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """What the reporter has recorded, on every peer. Two all-to-alls a group."""
        if not self.groups:
            return ids, losses
        num_told = len(ids) if self.is_reporter else 0
        return self._spread(ids[:num_told]), self._spread(losses[:num_told])

    def _spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """One peer's values, on all peers; the others give empty arrays."""
        for group in self.groups:
            sent = [torch.from_numpy(values)] * group.size
            values = torch.cat(group.all_to_all(sent)).numpy()
        return values


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
