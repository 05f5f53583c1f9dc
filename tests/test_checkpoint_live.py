"""A state in a layout of its own, such as flat ranges of all parameters, saved and loaded as torch's is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import Checkpointer, Fragment
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.state.live import LiveState, OptimizerState, StateByName
from effx_dist.checkpoint.state.torch_state import live_state
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.errors import ConfigError, LayoutMismatchError, RankFailedError
from effx_dist.shard import Group, Piece, WholeTensor, pieces_of_flat_range
from tests.runs import Run, lossless
from tests.thread_ranks import run_ranks

State = dict[str, torch.Tensor]
Cut = Sequence[int]
MOMENTS = ("exp_avg", "exp_avg_sq")
NUMEL = 12 * 16 + 16 + 16 + 16 + 16 * 4
"""Of the small model's parameters."""
CUTS: dict[str, Cut] = {
    "whole": (0, NUMEL),
    "in mid-row": (0, 101, 202, NUMEL),
    "uneven": (0, 1, 7, 300, NUMEL),
    "a rank with nothing": (0, 150, 150, NUMEL),
}
"""Where the row of all parameters is cut for the ranks."""


class Flat(LiveState):
    """The parameters of the small model in one row, of which each rank has a range; and its moments."""

    has_optimizer = True

    def __init__(self, rank: int, cut: Cut) -> None:
        self.run = Run(seed=5)
        start, stop = cut[rank], cut[rank + 1]
        self.masters = torch.full((stop - start,), -1.0)
        self.moments = {key: torch.full((stop - start,), -1.0) for key in MOMENTS}
        self.steps: State = {}
        self.calls: list[str] = []
        self.pieces: dict[str, tuple[WholeTensor, tuple[Piece, ...]]] = {}
        begin = 0
        for name, parameter in self.run.model.named_parameters():
            whole = WholeTensor(name, tuple(parameter.shape))
            low, high = (min(max(at - begin, 0), whole.numel) for at in (start, stop))
            place = begin + low - start
            self.pieces[name] = whole, pieces_of_flat_range(whole, low, high, place)
            begin += whole.numel
        assert begin == NUMEL

    def _fragment(self, name: str, local: torch.Tensor) -> Fragment:
        whole, pieces = self.pieces[name]
        parts = [(piece.box, piece.view(local)) for piece in pieces]
        return Fragment(whole.shape, local.dtype, parts)

    def model_state(self) -> dict[str, Any]:
        masters = {name: self._fragment(name, self.masters) for name in self.pieces}
        return {**dict(self.run.model.named_buffers()), **masters}

    def tied_names(self) -> dict[str, str]:
        return {}

    def take_model_values(self, values: Mapping[str, Any]) -> None:
        raise AssertionError("the model has none")

    def _by_name(self) -> StateByName:
        return {
            name: {
                "step": self.steps.setdefault(name, torch.tensor(-1.0)),
                **{key: self._fragment(name, self.moments[key]) for key in MOMENTS},
            }
            for name in self.pieces
        }

    def optimizer_state(self) -> OptimizerState:
        return OptimizerState(self._by_name(), [list(self.pieces)], [{"lr": 0.5}])

    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        return self._by_name(), True

    def take_optimizer_state(self, state: StateByName) -> None:
        self.calls.append("state")
        self.taken = state

    @property
    def num_groups(self) -> int:
        return 1

    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        self.calls.append("options")
        self.options = options

    def finish(self) -> None:
        self.calls.append("finish")

    def held(self) -> dict[str, list[tuple[Any, torch.Tensor]]]:
        """Copies of this rank's boxes of everything, by name as in a checkpoint."""
        found = {f"model.{name}": value for name, value in self.model_state().items()}
        for name, entries in self._by_name().items():
            found |= {f"optimizer.{name}.{key}": value for key, value in entries.items()}
        return {
            name: [(box, part.clone()) for box, part in Fragment.of(name, value).pieces]
            for name, value in found.items()
        }


def trained() -> Run:
    run = Run(lr=0.1)
    run.train(3)
    return run


def load_flat(folder: Path, cut: Cut, then_save: int | None = None) -> State:
    """Load the newest step as flat ranges; returns whole tensors, put together from all ranks."""

    def rank(group: Group) -> dict[str, list[tuple[Any, torch.Tensor]]]:
        live = Flat(group.rank, cut)
        with Checkpointer(folder, lossless(), group=group) as checkpoints:
            checkpoints.load(live)
            assert live.calls == ["state", "options", "finish"]
            assert set(live.taken) == set(live.pieces)
            if then_save is not None:
                checkpoints.save(then_save, live)
        return live.held()

    of_ranks = run_ranks(len(cut) - 1, rank)
    whole = {name: torch.full_like(value, torch.nan) for name, value in floats(trained()).items()}
    for held in of_ranks:
        for name, parts in held.items():
            for box, part in parts:
                if name in whole:
                    whole[name][box.slices] = part
    return whole


def floats(run: Run) -> State:
    return {name: value for name, value in run.state().items() if value.dtype.is_floating_point}


def assert_same(found: State, run: Run) -> None:
    expected = floats(run)
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
class TestFlatRanges:
    def test_hold_what_torch_saved(self, cut: Cut, tmp_path: Path) -> None:
        run = trained()
        with Checkpointer(tmp_path, lossless()) as checkpoints:
            checkpoints.save(3, run.model, run.optimizer)
        assert_same(load_flat(tmp_path, cut), run)

    @pytest.mark.parametrize("other", CUTS.values(), ids=CUTS)
    def test_save_what_torch_and_other_cuts_load(
        self, cut: Cut, other: Cut, tmp_path: Path
    ) -> None:
        run = trained()
        with Checkpointer(tmp_path, lossless()) as checkpoints:
            checkpoints.save(3, run.model, run.optimizer)
        load_flat(tmp_path, cut, then_save=4)
        manifest, _ = read_manifest(tmp_path / step_name(4))
        assert manifest.kind == "link", "it goes on from what was loaded"
        again = Run(seed=9, lr=0.3)
        with Checkpointer(tmp_path, lossless()) as checkpoints:
            assert checkpoints.load(again.model, again.optimizer)["step"] == 4
        assert_same(floats(again), run)
        assert again.optimizer.param_groups[0]["lr"] == 0.5
        assert_same(load_flat(tmp_path, other), run)


def test_one_ranks_refusal_ends_the_load_of_all(tmp_path: Path) -> None:
    """Before any of them goes on to what all do together."""
    run = trained()
    with Checkpointer(tmp_path, lossless()) as checkpoints:
        checkpoints.save(3, run.model, run.optimizer)

    class Refusing(Flat):
        def take_optimizer_state(self, state: StateByName) -> None:
            raise LayoutMismatchError("not this one")

    calls: dict[int, list[str]] = {}

    def rank(group: Group) -> None:
        live = (Refusing if group.rank == 1 else Flat)(group.rank, CUTS["in mid-row"])
        expected = LayoutMismatchError if group.rank == 1 else RankFailedError
        with (
            Checkpointer(tmp_path, lossless(), group=group) as checkpoints,
            pytest.raises(expected, match="not this one"),
        ):
            checkpoints.load(live)
        calls[group.rank] = live.calls

    run_ranks(3, rank)
    assert not any("finish" in called for called in calls.values())


def test_an_optimizer_beside_a_live_state_is_refused() -> None:
    run = Run()
    with pytest.raises(ConfigError, match="optimizer=AdamW: a Flat holds its own"):
        live_state(Flat(0, CUTS["whole"]), run.optimizer)
