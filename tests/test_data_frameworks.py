"""The sampler in other people's loops, real ones on two processes at their defaults: what is planned is trained."""

from __future__ import annotations

from typing import Any

import pytest

from tests.framework_runs import Call, Part, many, on_a_mesh, plain, planned, trained
from tests.ranks import spawn

pytestmark = pytest.mark.ranks
Epochs = dict[int, list[int]]
Parts = dict[str, list[Part]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Epochs:
    """The uninterrupted run, by torch's own loader: a loop of two lines."""
    return trained(spawn(2, plain, tmp_path_factory.mktemp("whole")))


def run(calls: dict[str, Call], factory: pytest.TempPathFactory, world: int = 2) -> Parts:
    """The parts of all ranks, by name; what a loader keeps is left out."""
    folder = factory.mktemp("runs")
    ranks = spawn(world, many, folder, calls, str(folder))
    found = {key: [of_rank[key] for of_rank in ranks] for key in calls}
    return {k: [p[0] if isinstance(p, tuple) else p for p in parts] for k, parts in found.items()}


def assert_goes_on(before: list[Part], rest: list[Part], whole: Epochs) -> None:
    """Both together trained every planned sample once, in every epoch."""
    assert [part.error for part in [*before, *rest]] == [""] * len([*before, *rest])
    assert trained([*before, *rest]) == whole


def on_one_rank(
    name: str, settings: dict[str, Any], before: list[Part], factory: pytest.TempPathFactory
) -> list[Part]:
    """The rest of a run of two ranks on one."""
    settings = settings | {"states": [part.state for part in before]}
    return run({"rest": Call(name, settings)}, factory, world=1)["rest"]


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    name = "with_accelerate"
    calls = {
        "whole": Call(name),
        "split": Call(name, {"settings": {"split_batches": True}}),
        "dispatched": Call(name, {"settings": {"dispatch_batches": True}}),
        "to 33": Call(name, {"stop_at": 33}),
        "from 33": Call(name, after="to 33"),
        "from 33, 8 skipped": Call(name, {"skip": 8}, "to 33"),
        "to 25": Call(name, {"stop_at": 25}),
        "from 25, 25 skipped": Call(name, {"skip": 25}, "to 25"),
        "untold": Call(name, {"told": False}, "to 33"),
        "only skipped": Call(name, {"skip": 7}),
    }
    return run(calls, tmp_path_factory)


class TestAccelerate:
    @pytest.mark.parametrize("how", ["whole", "split"])
    def test_prepare_shards_once(self, accelerated: Parts, whole: Epochs, how: str) -> None:
        assert [part.error for part in accelerated[how]] == ["", ""]
        assert trained(accelerated[how]) == whole == planned(accelerated[how])

    @pytest.mark.parametrize(
        ("before", "rest"),
        [("to 33", "from 33"), ("to 33", "from 33, 8 skipped"), ("to 25", "from 25, 25 skipped")],
    )
    def test_a_resume_by_state_with_and_without_skipping(
        self, accelerated: Parts, whole: Epochs, before: str, rest: str
    ) -> None:
        assert_goes_on(accelerated[before], accelerated[rest], whole)

    def test_on_another_number_of_processes(
        self, accelerated: Parts, whole: Epochs, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        before = accelerated["to 33"]
        rest = on_one_rank("with_accelerate", {"skip": 8}, before, tmp_path_factory)
        assert_goes_on(before, rest, whole)

    @pytest.mark.parametrize(
        ("how", "told"),
        [
            ("untold", "set_epoch(0): the sampler stands in epoch 1"),
            ("only skipped", "56 of the 200 samples"),
            ("only skipped", "7 batches were skipped"),
            ("dispatched", "dispatch_batches=True"),
        ],
    )
    def test_what_cannot_be_right_is_refused_on_both(
        self, accelerated: Parts, how: str, told: str
    ) -> None:
        assert all(told in part.error for part in accelerated[how])


@pytest.fixture(scope="module")
def by_trainer(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    calls = {"whole": Call("with_trainer", {"folder": "FOLDER/whole"})}
    for stop_at in (10, 25, 33, 47):
        folder = f"FOLDER/{stop_at}"
        calls[f"to {stop_at}"] = Call("with_trainer", {"folder": folder, "stop_at": stop_at})
        calls[f"from {stop_at}"] = Call(
            "with_trainer", {"folder": folder, "resume": True}, f"to {stop_at}"
        )
    return run(calls, tmp_path_factory)


class TestTrainer:
    def test_whole(self, by_trainer: Parts, whole: Epochs) -> None:
        assert [part.error for part in by_trainer["whole"]] == ["", ""]
        assert trained(by_trainer["whole"]) == whole

    @pytest.mark.parametrize("stop_at", [10, 25, 33, 47])
    def test_resumed_by_both(self, by_trainer: Parts, whole: Epochs, stop_at: int) -> None:
        assert_goes_on(by_trainer[f"to {stop_at}"], by_trainer[f"from {stop_at}"], whole)


@pytest.fixture(scope="module")
def by_lightning(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    name = "with_lightning"
    calls = {
        "whole": Call(name),
        "to 33": Call(name, {"stop_at": 33}),
        "from 33": Call(name, after="to 33"),
        "to 25": Call(name, {"stop_at": 25}),
        "from 25": Call(name, after="to 25"),
        "limited": Call(name, {"limit": 5}),
        "declared": Call(name, {"limit": 5, "is_declared": True}),
    }
    return run(calls, tmp_path_factory)


class TestLightning:
    def test_whole_and_resumed(
        self, by_lightning: Parts, whole: Epochs, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        assert trained(by_lightning["whole"]) == whole
        for stop_at in (33, 25):
            assert_goes_on(by_lightning[f"to {stop_at}"], by_lightning[f"from {stop_at}"], whole)
        before = by_lightning["to 33"]
        rest = on_one_rank("with_lightning", {}, before, tmp_path_factory)
        assert_goes_on(before, rest, whole)

    def test_an_epoch_cut_short_is_an_error_unless_it_is_declared(
        self, by_lightning: Parts
    ) -> None:
        assert all("160 of the 200 samples" in part.error for part in by_lightning["limited"])
        assert all("end_epoch" in part.error for part in by_lightning["limited"])
        assert [part.error for part in by_lightning["declared"]] == ["", ""]
        assert [len(samples) for samples in trained(by_lightning["declared"]).values()] == [40] * 4


@pytest.fixture(scope="module")
def by_stateful_loader(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    name, calls = "with_stateful_loader", {}
    for workers in (0, 2):
        how = {"workers": workers}
        calls |= {
            f"to 33 {workers}": Call(name, how | {"stop_at": 33}),
            f"both {workers}": Call(name, how | {"of_loader": True}, f"to 33 {workers}"),
        }
    alone = {"workers": 0, "of_sampler": False, "of_loader": True}
    calls |= {
        "sampler 0": Call(name, {"workers": 0}, "to 33 0"),
        "loader 33": Call(name, alone, "to 33 0"),
        "to 7": Call(name, {"workers": 0, "stop_at": 7}),
        "loader 7": Call(name, alone, "to 7"),
    }
    return run(calls, tmp_path_factory)


class TestStatefulDataLoader:
    @pytest.mark.parametrize(
        ("before", "rest"), [("to 33 0", "both 0"), ("to 33 2", "both 2"), ("to 33 0", "sampler 0")]
    )
    def test_resumed_by_both_states_or_by_the_samplers(
        self, by_stateful_loader: Parts, whole: Epochs, before: str, rest: str
    ) -> None:
        assert_goes_on(by_stateful_loader[before], by_stateful_loader[rest], whole)

    def test_by_the_loaders_state_alone(self, by_stateful_loader: Parts, whole: Epochs) -> None:
        """The first epoch needs no scores; a later one does."""
        assert (
            trained([*by_stateful_loader["to 7"], *by_stateful_loader["loader 7"]])[0] == whole[0]
        )
        assert all(
            "load the sampler's own state" in part.error for part in by_stateful_loader["loader 33"]
        )


def test_ranks_of_a_mesh_differ_in_samples_along_data_dimensions_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    ranks = spawn(4, on_a_mesh, tmp_path_factory.mktemp("mesh"))
    for rank in ranks:
        everything, unnamed, unknown = rank["refused"]
        assert "{'tp': 2}" in everything
        assert "(without names)" in unnamed
        assert "dimensions x, tp" in unknown
    by_peer = [[r["part"] for r in ranks if r["peer"] == peer] for peer in (0, 1)]
    assert sorted(r["data"] for r in ranks) == [0, 0, 1, 1]
    assert [p.trained for p in by_peer[0]] == [p.trained for p in by_peer[1]]
    assert trained(by_peer[0]) == planned(by_peer[0])
    assert 0 < len(trained(by_peer[0])[1]) <= 200


def test_one_rank_saves_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    first, second = run({"saved": Call("one_rank_saves")}, tmp_path_factory)["saved"]
    assert first is not None
    assert second is None
