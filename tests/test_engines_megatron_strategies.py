"""Megatron's own dist_checkpointing calls on this library's checkpoints, as a Megatron-LM script makes
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from effx_dist.checkpoint import verify_folder
from tests.megatron_processes import call, needs_megatron
from tests.ranks import spawn

pytestmark = [pytest.mark.ranks, pytest.mark.megatron, needs_megatron]

RATE, STEPS = 1e-2, 3
USUAL: dict[str, tuple[Any, ...]] = {
    "same": ("dp", ["dp"]),
    "async": ("dp", ["dp"], True),
    "other": ("dp", ["dp", "tp"]),
}
MORE: dict[str, tuple[Any, ...]] = {
    "tied": ("pp", ["pp", "dp, tied"]),
    "tp": ("tp", ["tp", "dp"]),
    "whole": ("whole", ["whole"]),
    "whole, tp": ("fp32, tp, whole", ["fp32, tp, whole"]),
    "async, other": ("tp", ["tp", "dp"], True),
}


def run_all(folder: Path, trips: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    module = "megatron_strategy_runs"
    found = {name: call(module, "round_trip", folder / name, *args) for name, args in trips.items()}
    found["model alone"] = call(module, "model_alone", folder / "model")
    found["one rank"] = call(module, "asked_by_one_rank", folder / "one")
    found["refusals"] = call(module, "refusals", folder / "refusals")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(2, run_all, tmp_path_factory.mktemp("ranks"), folder, USUAL)


def check(trips: dict[str, tuple[Any, ...]], ranks: list[dict[str, Any]]) -> None:
    for of_rank in ranks:
        for trip, (saving, loading, *_) in trips.items():
            assert list(of_rank[trip]) == loading
            for name, found in of_rank[trip].items():
                assert found["is_same"], (trip, name)
                assert found["is_rounded"], (trip, name)
                assert found["iteration"] == STEPS
                assert found["steps"] == STEPS + 1, "the schedule has gone on"
                assert {decay for _, decay in found["rates"]} == {0, 0.1}
                largest, mean = found["distance"]
                if name == saving:
                    assert largest == 0, (trip, name)
                    assert found["drawn"] == [STEPS, STEPS]
                else:
                    assert mean < 0.02 * RATE, (trip, name)


def test_round_trips(ranks: list[dict[str, Any]], folder: Path) -> None:
    check(USUAL, ranks)
    assert verify_folder(folder / "same" / "effx", decode=True).findings == []


def test_the_model_alone(ranks: list[dict[str, Any]]) -> None:
    for found in (of_rank["model alone"] for of_rank in ranks):
        assert found["is_rounded"]
        assert found["is_master_same"]
        assert found["no state"]
        assert found["backend"] == "effx"
        assert "model.embedding.word_embeddings.weight" in found["metadata"]


def test_the_optimizer_where_one_rank_alone_asks(ranks: list[dict[str, Any]]) -> None:
    assert [of_rank["one rank"] for of_rank in ranks] == [{"is_same": True}] * 2


def test_refusals(ranks: list[dict[str, Any]]) -> None:
    words = {
        "stranger on one rank": "stranger: is no tensor of the model chunks",
        "no number": "its name must hold the iteration",
        "not there": "holds no committed checkpoint",
        "another's": "backend 'torch_dist' is not 'effx'",
        "newer": "version 9 is newer",
    }
    for of_rank in ranks:
        assert of_rank["refusals"].keys() == words.keys()
        for cause, (_, text) in of_rank["refusals"].items():
            assert words[cause] in text


@pytest.mark.slow
def test_more_round_trips(tmp_path: Path) -> None:
    check(MORE, spawn(2, run_all, tmp_path / "ranks", tmp_path / "checkpoints", MORE))
