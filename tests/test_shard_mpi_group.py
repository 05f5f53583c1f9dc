"""MpiGroup: like the other groups, under a real mpirun."""

from __future__ import annotations

import sys

import pytest
import torch

from effx_dist.errors import ConfigError, MissingEngineError
from effx_dist.shard import Group, MpiGroup, SoloGroup, mpi_group
from effx_dist.shard.group import ReduceOp, reduce_tensors
from tests.conformance import group as conformance
from tests.mpi_runs import needs_mpi, start_mpi

DTYPES = [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8]


def _body(world: Group) -> None:
    assert isinstance(world, MpiGroup)
    conformance.check(world)
    for op in ("sum", "max", "min"):
        for dtype in DTYPES:
            _check_dtype(world, dtype, op)
    _check_two_at_once(world)
    _check_identity(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpi_group, "MAX_MESSAGE_BYTES", 16)  # one to sixteen numbers each
        conformance.check(world)


def _check_dtype(group: Group, dtype: torch.dtype, op: ReduceOp) -> None:
    """As where the ranks are threads; halves, so that no order of adding matters."""
    rows = [torch.arange(6).add(rank).remainder(4).div(2).to(dtype) for rank in range(group.size)]
    mine = rows[group.rank].clone().view(2, 3)
    assert group.all_reduce(mine, op) is mine
    expected = reduce_tensors(rows, op).view(2, 3)
    assert mine.dtype == dtype
    assert torch.equal(mine, expected), (dtype, op)


def _check_two_at_once(group: Group) -> None:
    first, second = torch.full((3,), group.rank), torch.ones(2, 2).t()
    wait_first, wait_second = group.start_all_reduce(first, "max"), group.start_all_reduce(second)
    wait_second()
    wait_first()
    assert first.tolist() == [group.size - 1] * 3
    assert second.tolist() == [[group.size] * 2] * 2


def _check_identity(world: MpiGroup) -> None:
    assert world == MpiGroup()
    assert hash(world) == hash(MpiGroup())
    assert world != SoloGroup()
    here = world.on_this_host()
    assert here != world
    assert (here.rank, here.size) == (world.rank, world.size), "all ranks are on this machine"
    conformance.check(here)
    world.require_size(world.size)
    with pytest.raises(ConfigError, match=rf"{world.size + 1} ranks.*sees {world.size}: "):
        world.require_size(world.size + 1)


@needs_mpi
@pytest.mark.ranks
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_it_conforms(num_ranks: int) -> None:
    done = start_mpi(num_ranks, _body)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_mpi4py_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(MissingEngineError, match="pip install mpi4py"):
        MpiGroup()
