"""A checkpoint that does not fit is refused by name, on all ranks, and nothing is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from effx_dist.checkpoint import Checkpointer
from effx_dist.errors import EffxError, LayoutMismatchError, RankFailedError
from effx_dist.shard import Group
from tests.chain_runs import same_bits
from tests.runs import Run, lossless, small_model, two_groups
from tests.thread_ranks import run_ranks


def narrower() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 3, bias=False))


def without_a_layer() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16))


def with_a_layer() -> nn.Module:
    return nn.Sequential(*narrower()[:2], nn.Linear(16, 4, bias=False), nn.Linear(4, 4))


def in_half() -> nn.Module:
    return Run().model.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            narrower,
            r"model\.2\.weight: \(4, 16\) float32 in the checkpoint, \(3, 16\) float32 here",
        ),
        (without_a_layer, r"model\.2\.weight: only in the checkpoint"),
        (with_a_layer, r"model\.3\.bias: not in the checkpoint"),
        (
            in_half,
            r"model\.0\.weight: \(16, 12\) float32 in the checkpoint, \(16, 12\) bfloat16 here",
        ),
    ],
)
def test_another_model_is_refused_by_name_and_untouched(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    run, other = Run(), Run(make, seed=9)
    run.train(1)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, run.model, run.optimizer)
        with pytest.raises(LayoutMismatchError, match=message):
            checkpointer.load(other.model, other.optimizer)
        same_bits(dict(other.model.state_dict()), before)
        checkpointer.save(2, run.model, run.optimizer)


def test_other_parameter_groups_are_refused(tmp_path: Path) -> None:
    run, other = Run(), Run(make_optimizer=two_groups)
    run.train(1)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, run.model, run.optimizer)
        with pytest.raises(LayoutMismatchError, match=r"has 1 parameter groups.*has 2"):
            checkpointer.load(other.model, other.optimizer)


def outcomes(size: int, body: Callable[[Group], Any]) -> list[BaseException | None]:
    """What each rank raised. Afterwards all of them must still be in step with each other."""

    def run(group: Group) -> BaseException | None:
        raised: BaseException | None = None
        try:
            body(group)
        except EffxError as error:
            raised = error
        assert group.all_gather_object("in step") == ["in step"] * size
        return raised

    return run_ranks(size, run, timeout_s=10)


def test_one_rank_with_another_model_is_told_to_all(tmp_path: Path) -> None:
    def body(group: Group) -> None:
        with Checkpointer(tmp_path, lossless(), group=group) as checkpointer:
            checkpointer.save(1, Run().model)
            checkpointer.load(Run(narrower if group.rank == 1 else small_model).model)

    raised = outcomes(2, body)
    assert isinstance(raised[1], LayoutMismatchError)
    assert isinstance(raised[0], RankFailedError)
    assert raised[0].failures.keys() == {1}


class Faulty:
    """Cannot say its state on rank 1."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        if self.rank == 1:
            raise LayoutMismatchError("no state here")
        return {"a": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict == {"a": 1}


def test_one_rank_that_cannot_collect_its_state_is_told_to_all(tmp_path: Path) -> None:
    def body(group: Group) -> None:
        with Checkpointer(tmp_path, lossless(), group=group) as checkpointer:
            checkpointer.save(1, Run().model, stateful={"faulty": Faulty(group.rank)})

    raised = outcomes(2, body)
    assert all(isinstance(error, EffxError) for error in raised)
