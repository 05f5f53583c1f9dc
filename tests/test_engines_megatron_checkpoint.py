"""Checkpoints of Megatron jobs at other layouts: the same bits, and training goes on.

All that needs one number of ranks runs in one spawn: 2 ranks save, 1 and 4 ranks load.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import inspect_folder, verify_folder
from tests.megatron_processes import call, needs_megatron
from tests.ranks import spawn

pytestmark = [pytest.mark.ranks, pytest.mark.megatron, needs_megatron]

MODULE = "megatron_checkpoint_runs"
RATE = 1e-2
USUAL = ["dp", "dp, overlap", "tp", "pp"]
DTYPES = ("fp32", "bf16")
Results = dict[str, Any]


def run_all(calls: dict[str, tuple[Any, ...]]) -> Results:
    return {name: call(MODULE, function, *args) for name, (function, *args) in calls.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    calls: dict[str, tuple[Any, ...]] = {
        "save": ("save_first", folder),
        "load": ("load_at", folder, USUAL),
        "chain": ("chain", folder / "lossless", "lossless", "thread", "bf16"),
        "lossy chain": ("chain", folder / "lossy", "balanced", "thread", "fp32"),
        "reconstruct": ("same_reconstruction", folder, "fp32", ["dp", "pp"]),
        "errors": ("errors", folder),
        "padded": ("padded", folder / "padded", "bf16"),
        "weights": ("weights_alone", folder),
        "companions": ("companions", folder / "companions"),
    }
    return spawn(2, run_all, tmp_path_factory.mktemp("ranks"), calls)


@pytest.fixture(scope="module")
def four(
    two: list[Results], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Results]:
    calls = {
        "load": ("load_at", folder, ["tp", "tp pp"]),
        "reconstruct": ("same_reconstruction", folder, "fp32", ["tp"]),
    }
    return spawn(4, run_all, tmp_path_factory.mktemp("ranks"), calls)


@pytest.fixture(scope="module")
def one(
    two: list[Results], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Results]:
    calls = {"load": ("load_at", folder, ["dp"])}
    return spawn(1, run_all, tmp_path_factory.mktemp("ranks"), calls)


def check_loaded(found: dict[str, Any], name: str) -> None:
    assert found["is_same"], name
    assert found["is_rounded"], name
    check_near(found, name)


def check_near(found: dict[str, Any], name: str) -> None:
    """The next step, beside that of the job that was saved. A wrong number of steps taken would show in
    every element: after three, the first step's bias correction changes updates by a factor of 1.6."""
    largest, mean = found["distance"]
    if name.endswith("fp32"):
        assert largest < 1e-4 * RATE, name
    else:  # few elements, of which rounding decides on the sign of the gradient
        assert mean < 0.02 * RATE, name


class TestOtherLayouts:
    def test_two_ranks(self, two: list[Results]) -> None:
        for of_rank in two:
            assert set(of_rank["load"]) == {f"{lay}, {dtype}" for lay in USUAL for dtype in DTYPES}
            for name, found in of_rank["load"].items():
                check_loaded(found, name)
                assert found["extra"] == {"note": 7, "step": 3}

    def test_at_its_own_layout_the_next_step_is_the_same_bit_for_bit(
        self, two: list[Results]
    ) -> None:
        for dtype in DTYPES:
            assert two[0]["load"][f"dp, {dtype}"]["distance"] == (0, 0)

    def test_four_ranks(self, four: list[Results]) -> None:
        for of_rank in four:
            assert len(of_rank["load"]) == 4
            for name, found in of_rank["load"].items():
                check_loaded(found, name)

    def test_one_rank(self, one: list[Results]) -> None:
        assert len(one[0]["load"]) == 2
        for name, found in one[0]["load"].items():
            check_loaded(found, name)

    def test_the_folder_is_sound(self, two: list[Results], folder: Path) -> None:
        for name in ("fp32", "lossless", "lossy"):
            assert verify_folder(folder / name, decode=True).findings == []
            assert [step.step for step in inspect_folder(folder / name)]


class TestChains:
    def test_links_of_other_layouts_are_exact(self, two: list[Results]) -> None:
        assert [of_rank["chain"]["is_same"] for of_rank in two] == [[True] * 4] * 2

    def test_links_are_differences_whatever_the_layouts(
        self, two: list[Results], folder: Path
    ) -> None:
        for name in ("lossless", "lossy"):
            steps = inspect_folder(folder / name)
            kinds = [step.kind for step in sorted(steps, key=lambda step: step.step)]
            assert set(kinds[1:]) == {"link"}, kinds

    def test_lossy_ones_are_near(self, two: list[Results]) -> None:
        for of_rank in two:
            for largest, mean in of_rank["lossy chain"]["errors"]:
                assert 0 < mean < RATE
                assert largest < 5 * RATE

    def test_the_layout_that_saved_is_not_to_be_seen(
        self, two: list[Results], four: list[Results], folder: Path
    ) -> None:
        first, *others = [
            torch.load(folder / f"{name}.pt", weights_only=False)
            for name in ("dp, 2", "pp, 2", "tp, 4")
        ]
        for other in others:
            for expected, found in zip(first, other, strict=True):
                assert expected["steps"] == found["steps"]
                pairs = [(expected["mains"], found["mains"])]
                pairs += [
                    (kept, found["moments"][key]) for key, kept in expected["moments"].items()
                ]
                for a, b in pairs:
                    assert a.keys() == b.keys()
                    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_errors_name_what_is_wrong_on_all_ranks(two: list[Results]) -> None:
    expected = {
        "nothing there": ("CheckpointNotFoundError", "holds no committed checkpoint"),
        "no such step": ("CheckpointNotFoundError", "step 9 is not"),
        "another model": ("LayoutMismatchError", "model.decoder.layers.2.mlp.linear_fc1.weight"),
        "another shape": ("LayoutMismatchError", "(96, 32) float32 in the checkpoint, (128, 32)"),
        "a rank's file is missing": ("CorruptCheckpointError", "rank-00001.effx: cannot be opened"),
    }
    for of_rank in two:
        assert of_rank["errors"].keys() == expected.keys()
        for cause, (kind, words) in expected.items():
            found_kind, text = of_rank["errors"][cause]
            assert found_kind == kind, text
            assert words in text


def test_padded_vocabularies_share_what_both_have(two: list[Results], folder: Path) -> None:
    for of_rank in two:
        assert of_rank["padded"] == {"1: 128": [], "2: 80": [], "3: 96": [], "4: 100": []}
    assert verify_folder(folder / "padded", decode=True).findings == []


def test_weights_alone(two: list[Results]) -> None:
    for of_rank in two:
        assert of_rank["weights"] == dict.fromkeys(of_rank["weights"], True)
        assert len(of_rank["weights"]) == 5


def test_what_travels_with_the_run(two: list[Results]) -> None:
    for found in (of_rank["companions"] for of_rank in two):
        assert found["resumed"]
        assert found["rolled back"]
        assert found["drawn again"] == found["drawn"]
        assert found["left alone"], "random states of another layout"


@pytest.mark.slow
def test_other_contents(tmp_path: Path) -> None:
    calls: dict[str, tuple[Any, ...]] = {
        "others": ("other_contents", tmp_path / "others"),
        "padded": ("padded", tmp_path / "padded", "fp32"),
        "in a process": ("chain", tmp_path / "process", "lossless", "process", "fp32"),
    }
    for of_rank in spawn(2, run_all, tmp_path / "ranks", calls):
        assert of_rank["others"].pop("sgd") == 0
        for name, found in of_rank["others"].items():
            assert found["is_same"], name
            assert found["is_rounded"] or name == "frozen", name
            check_near(found, f"{name}, {'fp32' if name == 'whole later' else 'bf16'}")
        assert not any(of_rank["padded"].values())
        assert of_rank["in a process"]["is_same"] == [True] * 4


@pytest.mark.slow
def test_every_layout_on_four_ranks(two: list[Results], folder: Path, tmp_path: Path) -> None:
    layouts = [*USUAL, "dp, whole", "tp, whole", "tp pp"]
    for of_rank in spawn(4, run_all, tmp_path, {"load": ("load_at", folder, layouts)}):
        for name, found in of_rank["load"].items():
            check_loaded(found, name)
