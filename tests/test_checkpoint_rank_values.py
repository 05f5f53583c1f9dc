"""States that differ between ranks: kept by key, kept for each rank, or refused by name; never one rank's for all."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint import Checkpointer, PerRank, verify_folder
from effx_dist.checkpoint.state.rank_values import agreed
from effx_dist.errors import LayoutMismatchError, RankFailedError
from effx_dist.shard import Group, LocalRows, SoloGroup
from tests.runs import committed, lossless
from tests.thread_ranks import run_ranks


class Kept:
    """Something with a state."""

    def __init__(self, state: Any = None) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.state = state_dict


def saved(folder: Path, world: int, state_of: Any, wrap: Any = lambda kept: kept) -> None:
    """One checkpoint of ``world`` ranks, each with the state of its rank."""

    def body(group: Group) -> None:
        with Checkpointer(folder, lossless(), group=group) as checkpointer:
            kept = wrap(Kept(state_of(group.rank)))
            checkpointer.save(1, torch.nn.Linear(3, 2), stateful={"loader": kept})

    run_ranks(world, body)


def loaded(folder: Path, world: int, wrap: Any = lambda kept: kept) -> list[Any]:
    """What each of ``world`` ranks gets back."""

    def body(group: Group) -> Any:
        kept = Kept("untouched")
        with Checkpointer(folder, lossless(), group=group) as checkpointer:
            checkpointer.load(torch.nn.Linear(3, 2), stateful={"loader": wrap(kept)})
        return kept.state

    return run_ranks(world, body)


def message_of(folder: Path, world: int, state_of: Any) -> str:
    with pytest.raises((LayoutMismatchError, RankFailedError)) as caught:
        saved(folder, world, state_of)
    assert committed(folder) == []
    return str(caught.value)


class TestUnion:
    def test_keys_that_one_rank_has(self, tmp_path: Path) -> None:
        """As torchtitan's loader says it: a pickle of its own under its own key, and what is common."""
        pickles = [pickle.dumps({"at": rank}) for rank in range(3)]
        saved(tmp_path, 3, lambda rank: {f"dp_rank_{rank}": pickles[rank], "world_size": 3})
        expected = {**{f"dp_rank_{r}": pickles[r] for r in range(3)}, "world_size": 3}
        assert loaded(tmp_path, 2) == [expected, expected]

    def test_keys_that_are_no_strings(self, tmp_path: Path) -> None:
        saved(tmp_path, 2, lambda rank: {rank: {"seen": rank}, "all": {(1, 2): None}})
        expected = {0: {"seen": 0}, 1: {"seen": 1}, "all": {(1, 2): None}}
        assert loaded(tmp_path, 1) == [expected]

    def test_tensors_of_one_rank(self, tmp_path: Path) -> None:
        saved(tmp_path, 2, lambda rank: {f"of {rank}": torch.full((400,), rank)})
        [state] = loaded(tmp_path, 1)
        assert {key: value.unique().tolist() for key, value in state.items()} == {
            "of 0": [0],
            "of 1": [1],
        }

    def test_rows_are_parts_of_one(self, tmp_path: Path) -> None:
        saved(tmp_path, 2, lambda rank: {"rows": LocalRows(torch.full((2, 3), rank), 2 * rank, 4)})
        assert verify_folder(tmp_path, decode=True).findings == []


DIFFERENT: dict[str, tuple[Any, str]] = {
    "number": (lambda rank: {"at": rank}, "stateful.loader.at: 0 on rank 0, 1 on rank 1"),
    "kind": (
        lambda rank: {"at": [1, True][rank]},
        "stateful.loader.at: 1 on rank 0, true on rank 1",
    ),
    "nested": (
        lambda rank: {"a": [{"b": "x"}, {"b": f"y{rank}"}]},
        "stateful.loader.a.1.b: y0 on rank 0, y1 on rank 1",
    ),
    "length": (lambda rank: {"a": [0] * (rank + 1)}, "stateful.loader.a: [0] on rank 0"),
    "tensor": (
        lambda rank: {"t": torch.full((300,), rank)},
        "stateful.loader.t: one tensor on rank 0",
    ),
    "bytes": (lambda rank: {"b": bytes([rank])}, "stateful.loader.b"),
    "none": (
        lambda rank: {"n": None if rank else 1.5},
        "stateful.loader.n: 1.5 on rank 0, null on",
    ),
    "tensor and number": (lambda rank: {"n": torch.ones(300) if rank else 1}, "stateful.loader.n"),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_values_that_differ_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    state_of, words = DIFFERENT[kind]
    message = message_of(tmp_path, 2, state_of)
    assert words in message
    assert "PerRank" in message


def test_training_goes_on_after_a_refusal(tmp_path: Path) -> None:
    def body(group: Group) -> list[int]:
        model = torch.nn.Linear(3, 2)
        with Checkpointer(tmp_path, lossless(), group=group) as checkpointer:
            checkpointer.save(1, model, stateful={"s": Kept({"x": 1})})
            with pytest.raises((LayoutMismatchError, RankFailedError)):
                checkpointer.save(2, model, stateful={"s": Kept({"x": group.rank})})
            checkpointer.save(3, model, stateful={"s": Kept({"x": 2})})
        return committed(tmp_path)

    assert run_ranks(2, body) == [[1, 3], [1, 3]]


def test_notes_of_the_caller_are_the_first_ranks_and_it_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def body(group: Group) -> None:
        with Checkpointer(tmp_path, lossless(), group=group) as checkpointer:
            checkpointer.save(1, torch.nn.Linear(3, 2), extra={"loss": group.rank + 0.5})

    run_ranks(2, body)
    assert [r.message for r in caplog.records if "rank 0's" in r.message] == [
        "rank 0's of the values in `extra` that differ are kept: extra.loss: 0.5 on rank 0, 1.5 on rank 1"
    ]
    with Checkpointer(tmp_path, group=SoloGroup()) as checkpointer:
        assert checkpointer.load(torch.nn.Linear(3, 2))["loss"] == 0.5


class TestPerRank:
    def state_of(self, rank: int) -> Any:
        return {"at": rank, "seen": torch.full((300 + rank,), rank), "deep": {"x": [rank, (rank,)]}}

    def test_each_rank_gets_its_own(self, tmp_path: Path) -> None:
        saved(tmp_path, 3, self.state_of, PerRank)
        for rank, state in enumerate(loaded(tmp_path, 3, PerRank)):
            seen = state.pop("seen")
            assert torch.equal(seen, torch.full((300 + rank,), rank))
            assert state == {"at": rank, "deep": {"x": [rank, (rank,)]}}

    @pytest.mark.parametrize("world", [1, 2, 4])
    def test_at_another_size_it_is_refused(self, world: int, tmp_path: Path) -> None:
        saved(tmp_path, 3, self.state_of, PerRank)
        with pytest.raises(
            (LayoutMismatchError, RankFailedError), match=r"loader.*each of 3 ranks"
        ):
            loaded(tmp_path, world, PerRank)

    def test_or_begins_anew_with_a_warning(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        saved(tmp_path, 3, self.state_of, PerRank)
        states = loaded(tmp_path, 2, lambda kept: PerRank(kept, at_other_size="restart"))
        assert states == ["untouched"] * 2
        assert sum("left as it is on every rank" in r.message for r in caplog.records) == 1

    def test_it_is_not_loaded_as_one_state(self, tmp_path: Path) -> None:
        saved(tmp_path, 2, self.state_of, PerRank)
        with pytest.raises((LayoutMismatchError, RankFailedError), match="hand it over as"):
            loaded(tmp_path, 2)

    def test_one_state_is_not_loaded_as_every_ranks_own(self, tmp_path: Path) -> None:
        """What a release before saved was the first rank's."""
        saved(tmp_path, 2, lambda rank: {"at": 0})
        with pytest.raises((LayoutMismatchError, RankFailedError), match="load it without PerRank"):
            loaded(tmp_path, 2, PerRank)

    def test_a_setting_that_is_none_is_refused(self) -> None:
        with pytest.raises(ValueError, match="at_other_size='skip'"):
            PerRank(Kept(), at_other_size="skip")  # type: ignore[arg-type]


KEYS = st.sampled_from(["a", "b", "c", "$tuple", "$per_rank", ""])
SCALARS = st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from(["x", "y"])
TREES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3)
)


def json_of(tree: Any) -> Any:
    from effx_dist.checkpoint.state.tree import tree_to_json

    return tree_to_json(tree, "stateful", {})


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["a", "b"]), TREES, max_size=2), min_size=2, max_size=3
    )
)
def test_a_merge_holds_what_every_rank_said_or_is_refused(trees: list[Any]) -> None:
    from effx_dist.checkpoint.state.tree import tree_from_json

    def body(group: Group) -> Any:
        values = {"stateful": json_of(trees[group.rank])}
        return agreed(values, {}, {}, group)[0]["stateful"]

    try:
        merged = run_ranks(len(trees), body)
    except LayoutMismatchError:
        assert any(json.dumps(json_of(t)) != json.dumps(json_of(trees[0])) for t in trees[1:])
        return
    assert all(tree == merged[0] for tree in merged)
    whole = tree_from_json(merged[0], lambda path: None)  # type: ignore[arg-type, return-value]
    assert all(holds(whole, tree) for tree in trees)


def holds(whole: Any, part: Any) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            k in whole and holds(whole[k], v) for k, v in part.items()
        )
    if isinstance(part, list):
        return isinstance(whole, list) and all(map(holds, whole, part)) and len(whole) == len(part)
    return type(whole) is type(part) and bool(whole == part)
