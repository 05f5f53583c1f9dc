"""A gradient that some ranks of a parameter have and others lack, found in the counts that travel anyway."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from effx_dist.errors import LayoutMismatchError

if TYPE_CHECKING:
    from effx_dist.optim.layout import Layout

_COUNT_BITS = 46
"""Of an int64 count: 7e13 elements of one parameter. Above them lie the ranks without a gradient, up to 2^17."""
_LAG = 2
"""Steps after which an accelerator's answer is looked at: it is there by then, and nobody waits for it."""


class MissingGradients:
    """Marks in the counts of one layout.

    A whole that is cut over ranks by a DTensor is in the counts of every one of them, so that the number
    of ranks tells "all of them lack it" (frozen, unused) from "some do". Pieces of a shard map are not:
    nobody knows there how many ranks hold some, and nothing is marked.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._ranks = [math.prod(group.size for group in b.groups) for b in layout.buckets]
        self._is_known = layout.of_tensors
        self._pending: deque[tuple[torch.Tensor, Any]] = deque()

    def mark(self, counts: torch.Tensor, idle: Collection[int]) -> None:
        """Put this rank's into ``counts`` (int64 [num slots], zeros). Raises LayoutMismatchError for what
        an accelerator found out some steps ago."""
        if len(self._pending) >= _LAG:
            found, event = self._pending.popleft()
            event.synchronize()
            self._refuse(found)
        if idle and self._is_known:
            bucket_of, slots = self._layout.bucket_of, self._layout.slots
            spread = [slots[whole] for whole in idle if self._ranks[bucket_of[whole]] > 1]
            if spread:
                counts[torch.tensor(spread, device=counts.device)] = 1 << _COUNT_BITS

    def settle(self, counts: torch.Tensor) -> None:
        """Take the marks out of the summed ``counts``. Raises LayoutMismatchError, on all ranks alike,
        where some ranks lack a gradient that others have."""
        if not self._is_known or max(self._ranks, default=1) == 1:
            return
        marks = counts >> _COUNT_BITS
        counts &= (1 << _COUNT_BITS) - 1
        if counts.device.type == "cpu":
            self._refuse(marks)
            return
        host = marks.to("cpu", non_blocking=True)
        event = torch.get_device_module(counts.device).Event()
        event.record()
        self._pending.append((host, event))

    def _refuse(self, marks: torch.Tensor) -> None:
        if not marks.any():
            return
        layout = self._layout
        found = marks.tolist()
        some = [
            f"{layout.shard_map.wholes[whole].name} ({found[slot]} of {ranks} ranks)"
            for whole, slot in enumerate(layout.slots)
            if 0 < found[slot] < (ranks := self._ranks[layout.bucket_of[whole]])
        ]
        if some:
            shown = ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")
            raise LayoutMismatchError(
                f"no gradient on some ranks only: {shown}. Others would step their pieces without them; give every "
                "rank a gradient (zeros where the parameter was not used) or none"
            )
