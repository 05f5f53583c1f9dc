"""Counts of whole parameters, summed over the ranks that hold pieces of them.

The same counts tell of a gradient that some ranks of a parameter have and others lack. A whole that is
cut by a DTensor is in the counts of every one of its ranks, so that the number of ranks without a gradient
tells "all of them lack it" (frozen, unused) from "some do". How many ranks hold
pieces of a whole in a shard map is not known, so there nothing is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from effx_dist.errors import LayoutMismatchError
from effx_dist.optim.param_layout import ParamLayout
from effx_dist.shard import start_sum

_COUNT_BITS = 46
"""The bits of an int64 that count elements: enough for 7e13 of one parameter. The bits above them count the
ranks without a gradient, up to 2^17."""
_LAG = 2
"""Steps after which an accelerator's answer is read: it has arrived by then, and nobody waits for it."""


def count_wholes(
    layout: ParamLayout,
    count_into: Callable[[int, torch.Tensor], None],
    idle: Collection[int] = (),
    with_flags: bool = False,
) -> torch.Tensor:
    """Agreeing elements of the whole parameters by slot: int64 [num slots], on the layout's device.

    ``count_into(bucket, counts)`` adds this rank's, bucket after bucket; each bucket's all-reduce is
    under way while the next is counted. One all-reduce per bucket that is spread over ranks.

    Args:
        idle: indices of the wholes that have no gradient on this rank. Their number of ranks travels in
            the upper bits of the counts: LayoutMismatchError on all ranks where it is neither none nor
            all of those that hold a DTensor.
        with_flags: sum the slots behind the buckets too, which ``count_into`` has set.
    """
    counts = torch.zeros(layout.num_slots, dtype=torch.int64, device=layout.device)
    _mark(layout, counts, idle)
    waits = []
    for index, bucket in enumerate(layout.buckets):
        count_into(index, counts)
        stop = bucket.stop + 1 if with_flags else bucket.stop
        waits.append(start_sum(bucket.groups, counts[bucket.start : stop]))
    for wait in waits:
        wait()
    _unmark(layout, counts)
    return counts


def _mark(layout: ParamLayout, counts: torch.Tensor, idle: Collection[int]) -> None:
    """Mark this rank's idle wholes in ``counts``, which are zero. Raises LayoutMismatchError for what an
    accelerator found out some steps ago."""
    if len(layout.late_marks) >= _LAG:
        marks, event = layout.late_marks.popleft()
        event.synchronize()
        _refuse(layout, marks)
    if not layout.of_tensors:
        return
    spread = [layout.slots[whole] for whole in idle if layout.num_ranks_of(whole) > 1]
    if spread:
        counts[torch.tensor(spread, device=counts.device)] = 1 << _COUNT_BITS


def _unmark(layout: ParamLayout, counts: torch.Tensor) -> None:
    """Take the marks out of the summed ``counts``. Raises LayoutMismatchError, on all ranks alike, where
    some ranks lack a gradient that others have."""
    if not layout.of_tensors or max((b.num_ranks for b in layout.buckets), default=1) == 1:
        return
    marks = counts >> _COUNT_BITS
    counts &= (1 << _COUNT_BITS) - 1
    if counts.device.type == "cpu":
        _refuse(layout, marks)
        return
    host = marks.to("cpu", non_blocking=True)
    event = torch.get_device_module(counts.device).Event()
    event.record()
    layout.late_marks.append((host, event))


def _refuse(layout: ParamLayout, marks: torch.Tensor) -> None:
    if not marks.any():
        return
    found = marks.tolist()
    some = [
        f"{layout.shard_map.wholes[whole].name} ({found[slot]} of {ranks} ranks)"
        for whole, slot in enumerate(layout.slots)
        if 0 < found[slot] < (ranks := layout.num_ranks_of(whole))
    ]
    if some:
        shown = ", ".join(some[:4]) + (f" and {len(some) - 4} more" if len(some) > 4 else "")
        raise LayoutMismatchError(
            f"no gradient on some ranks only: {shown}. Others would step their pieces without them; give every "
            "rank a gradient (zeros where the parameter was not used) or none"
        )
