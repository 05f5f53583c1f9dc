"""Rows of a whole tensor that is spread over ranks by contiguous ranges of its first dimension."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effx_dist.errors import LayoutMismatchError
from effx_dist.shard.box import Box


@dataclass(frozen=True, slots=True, eq=False)
class LocalRows:
    """Rows ``[start, start + len(local))`` of a whole tensor of ``global_rows`` rows.

    A leaf that a ``state_dict()`` may hold: a checkpoint saves each rank's rows and, at another
    world size, fills ``local`` in place with the rows that the new layout asks for.
    """

    local: torch.Tensor
    start: int
    global_rows: int

    def __post_init__(self) -> None:
        stop = self.start + self.local.shape[0]
        if not 0 <= self.start <= stop <= self.global_rows:
            raise LayoutMismatchError(
                f"rows [{self.start}, {stop}) must lie in [0, {self.global_rows})"
            )

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return (self.global_rows, *self.local.shape[1:])

    @property
    def box(self) -> Box:
        """Where the local rows lie in the whole tensor."""
        offsets = (self.start, *(0 for _ in self.local.shape[1:]))
        return Box(offsets, tuple(self.local.shape))
