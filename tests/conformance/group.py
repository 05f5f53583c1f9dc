"""What every Group must do. :func:`check` is called by all ranks of the group, with a group to test.

An assertion that fails on one rank ends the run on all of them, by threads or by processes.
"""

from __future__ import annotations

import math

import pytest
import torch

from effx_dist.errors import RankFailedError
from effx_dist.shard import Group

LARGE = 2**53 + 1
"""The first integer that a float64 cannot hold: shows sums that went through floating point."""

DTYPES = [
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float64,
    torch.float32,
    torch.bfloat16,
]


def check(group: Group) -> None:
    """Run the whole suite on this rank of ``group``."""
    check_place(group)
    check_all_reduce(group)
    check_all_reduce_of_odd_shapes(group)
    for dtype in DTYPES:
        check_all_to_all(group, dtype)
    check_all_to_all_of_nothing(group)
    check_objects(group)
    check_failures(group)
    check_order(group)
    check_sessions(group)


def check_place(group: Group) -> None:
    assert 0 <= group.rank < group.size
    assert group.all_gather_object(group.rank) == list(range(group.size))
    assert group == group
    assert hash(group) == hash(group)


def check_all_reduce(group: Group) -> None:
    ranks = range(group.size)
    for dtype in (torch.int64, torch.float64):
        sign = [(-1) ** r for r in ranks]
        rows = [[r, sign[r] * (r + 1), LARGE if dtype == torch.int64 else 0.5] for r in ranks]
        expected = {
            "sum": [sum(column) for column in zip(*rows, strict=True)],
            "max": [max(column) for column in zip(*rows, strict=True)],
            "min": [min(column) for column in zip(*rows, strict=True)],
        }
        for op, columns in expected.items():
            tensor = torch.tensor(rows[group.rank], dtype=dtype)
            returned = group.all_reduce(tensor, op)  # type: ignore[arg-type]
            assert returned is tensor, "in place, and returned"
            assert tensor.dtype == dtype
            assert tensor.tolist() == columns, (op, dtype)
    tensor = torch.tensor([1], dtype=torch.int64)
    assert group.all_reduce(tensor).item() == group.size, "the sum is the default"


def check_all_reduce_of_odd_shapes(group: Group) -> None:
    whole = torch.arange(24, dtype=torch.int64).reshape(4, 6)
    for view in (
        lambda t: t,
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[1],
        lambda t: t[0, 0],
    ):
        mine = whole + 100 * group.rank
        expected = view(whole * group.size + 100 * math.comb(group.size, 2)).clone()
        untouched = mine.clone()
        reduced = group.all_reduce(view(mine))
        assert torch.equal(reduced, expected)
        assert torch.equal(view(mine), expected), "in place, also through a view"
        view(untouched).copy_(view(mine))
        assert torch.equal(untouched, mine), "only the view"
    nothing = torch.empty(0, dtype=torch.int64)
    assert group.all_reduce(nothing).shape == (0,)


def _part(source: int, target: int, dtype: torch.dtype) -> torch.Tensor:
    """Of another length for every pair of ranks, and empty for some."""
    length = (3 * source + 2 * target) % 5
    return (torch.arange(length) + 7 * source + target).to(dtype)


def check_all_to_all(group: Group, dtype: torch.dtype) -> None:
    send = [_part(group.rank, target, dtype) for target in range(group.size)]
    kept = [part.clone() for part in send]
    received = group.all_to_all(send)
    assert isinstance(received, list)
    assert len(received) == group.size
    for source, part in enumerate(received):
        assert part.dtype == dtype
        assert part.dim() == 1
        assert torch.equal(part, _part(source, group.rank, dtype)), (source, dtype)
    for part in received:
        part.zero_()  # what was received belongs to the receiver
    group.barrier()
    assert all(torch.equal(a, b) for a, b in zip(send, kept, strict=True))


def check_all_to_all_of_nothing(group: Group) -> None:
    received = group.all_to_all([torch.empty(0, dtype=torch.int64)] * group.size)
    assert [part.numel() for part in received] == [0] * group.size
    only_first_sends = [torch.full((3,), t) if group.rank == 0 else torch.empty(0, dtype=torch.int64)
                        for t in range(group.size)]  # fmt: skip
    received = group.all_to_all(only_first_sends)
    assert [part.tolist() for part in received] == [[group.rank] * 3] + [[]] * (group.size - 1)


def check_objects(group: Group) -> None:
    mine = {"rank": group.rank, "odd": (group.rank % 2 == 1, None), "large": LARGE}
    gathered = group.all_gather_object(mine)
    assert gathered == [
        {"rank": r, "odd": (r % 2 == 1, None), "large": LARGE} for r in range(group.size)
    ]
    for root in range(group.size):
        assert group.broadcast_object(f"from {group.rank}", root) == f"from {root}"
    assert group.broadcast_object(group.rank) == 0
    assert group.broadcast_object(None) is None
    assert group.barrier() is None


def check_failures(group: Group) -> None:
    assert group.tell_all(None, group.rank) == list(range(group.size))
    failed = [r for r in range(group.size) if r % 2 == 0]
    own = ValueError(f"disk {group.rank} is full") if group.rank in failed else None
    with pytest.raises(RankFailedError) as caught:
        group.tell_all(own, None, keep_own_error=False)
    assert caught.value.failures == {r: f"ValueError: disk {r} is full" for r in failed}
    assert caught.value.__cause__ is own
    for rank in failed:
        assert f"rank {rank}: ValueError: disk {rank} is full" in str(caught.value)
    group.barrier()  # the group is as good as before


def check_order(group: Group) -> None:
    """Calls that follow each other do not mix."""
    for turn in range(20):
        total = group.all_reduce(torch.tensor([turn + group.rank], dtype=torch.int64))
        assert total.item() == turn * group.size + math.comb(group.size, 2)
        assert group.all_gather_object((turn, group.rank)) == [(turn, r) for r in range(group.size)]


def check_sessions(group: Group) -> None:
    """One after another; one that fails on all ranks does not spoil the next."""
    for number in (1, 2):
        with group.session(number):
            assert group.all_gather_object(number) == [number] * group.size
    with pytest.raises(RankFailedError), group.session(3):
        group.tell_all(ValueError("on all ranks"), None, keep_own_error=False)
    with group.session(4):
        total = group.all_reduce(torch.tensor([group.rank]))
        assert total.item() == math.comb(group.size, 2)
    group.barrier()
