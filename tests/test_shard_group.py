"""SoloGroup, ThreadGroup and TorchGroup behave alike, and a rank that fails holds up no other."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from effx_dist.errors import RankFailedError
from effx_dist.shard import Group, SoloGroup, TorchGroup, as_group
from tests.conformance import group as conformance
from tests.ranks import spawn
from tests.thread_ranks import ThreadGroup, run_ranks


def test_solo_group_conforms() -> None:
    conformance.check(SoloGroup())


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_thread_group_conforms(size: int) -> None:
    run_ranks(size, conformance.check)


def test_the_conformance_suite_notices_a_sum_through_floating_point() -> None:
    class FloatGroup(ThreadGroup):
        def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
            reduced = super().all_reduce(tensor.double(), op)  # type: ignore[arg-type]
            return tensor.copy_(reduced)

    def body(group: Group) -> None:
        assert isinstance(group, ThreadGroup)
        conformance.check_all_reduce(FloatGroup(group.rank, group._slots, group._barrier))

    with pytest.raises((AssertionError, RankFailedError)):
        run_ranks(2, body)


def test_run_ranks_returns_results_by_rank() -> None:
    assert run_ranks(5, lambda group: group.rank**2) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_rank_that_raises_releases_the_others_and_its_error_surfaces(failing: int) -> None:
    released: dict[int, BaseException] = {}

    def body(group: Group) -> None:
        if group.rank == failing:
            raise KeyError("the reason")
        try:
            group.barrier()
        except RankFailedError as error:
            released[group.rank] = error
            raise

    with pytest.raises(KeyError, match="the reason"):
        run_ranks(3, body)
    assert sorted(released) == [rank for rank in range(3) if rank != failing]


def test_a_rank_that_leaves_early_ends_the_wait_of_the_others() -> None:
    def body(group: Group) -> None:
        if group.rank != 1:
            group.barrier()

    with pytest.raises(RankFailedError, match="left early"):
        run_ranks(3, body, timeout_s=0.2)


def test_no_thread_outlives_run_ranks() -> None:
    before = threading.active_count()
    run_ranks(3, lambda group: group.barrier())
    assert threading.active_count() == before


def test_every_solo_group_is_the_same_group() -> None:
    assert SoloGroup() == SoloGroup()
    assert len({SoloGroup(), SoloGroup()}) == 1


def test_as_group_keeps_a_group_and_falls_back_to_one_process() -> None:
    solo = SoloGroup()
    assert as_group(solo) is solo
    assert as_group(None) == SoloGroup()


def _torch_body() -> None:
    world = TorchGroup()
    conformance.check(world)
    dedicated = TorchGroup.dedicated(timedelta(seconds=30))
    conformance.check(dedicated)
    _check_beside(world, dedicated)
    assert world == TorchGroup() == as_group(None) == as_group(dist.group.WORLD)
    assert hash(world) == hash(TorchGroup())
    assert world != dedicated
    assert dedicated != SoloGroup()
    _check_part_of_the_world()


def _check_beside(world: TorchGroup, dedicated: TorchGroup) -> None:
    """Two threads, each with its own group and in its own pace, do not get each other's values."""
    assert (dedicated.rank, dedicated.size) == (world.rank, world.size)
    background: list[int] = []
    errors: list[BaseException] = []

    def save() -> None:
        try:
            for turn in range(30):
                reduced = dedicated.all_reduce(torch.tensor([1000 + turn], dtype=torch.int64))
                background.append(int(reduced.item()))
                assert dedicated.all_gather_object("save") == ["save"] * dedicated.size
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=save)
    thread.start()
    for turn in range(50):
        reduced = world.all_reduce(torch.tensor([turn], dtype=torch.int64))
        assert reduced.item() == turn * world.size
        assert world.all_gather_object("train") == ["train"] * world.size
    thread.join()
    assert not errors, errors
    assert background == [(1000 + turn) * dedicated.size for turn in range(30)]


def _check_part_of_the_world() -> None:
    """A group of some ranks counts them from 0."""
    members = list(range(1, dist.get_world_size()))
    process_group = dist.new_group(members)
    if dist.get_rank() in members:
        group = TorchGroup(process_group)
        assert group.rank == dist.get_rank() - 1
        assert group.size == len(members)
        conformance.check(group)


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 3])
def test_torch_group_conforms(world: int, tmp_path: Path) -> None:
    spawn(world, _torch_body, tmp_path)
