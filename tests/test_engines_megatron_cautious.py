"""Cautious optimizers under Megatron equal one process bit for bit, with the gradients that Megatron's
optimizers step with, and so do the optimizers that they take the place of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.megatron_processes import call, needs_megatron
from tests.ranks import spawn

pytestmark = [pytest.mark.ranks, pytest.mark.megatron, needs_megatron]

MODULE = "megatron_cautious_runs"
ONE = ["dp, fp32", "dp, bf16"]
TWO = ["dp, fp32", "tp, bf16", "pp, tied, bf16", "overlap", "SGD", "FusedAdam, bf16", "fp16"]
FOUR = ["tp, fp32", "tp, bf16", "pp, fp32"]
NUM_STEPS, LARGEST_RATE = 3, 1e-2
Runs = list[dict[str, tuple[dict[str, Any], dict[str, Any] | None]]]


def start(
    factory: pytest.TempPathFactory, world: int, names: list[str], function: str = "everything"
) -> Runs:
    return spawn(world, call, factory.mktemp("ranks"), MODULE, function, names)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return start(tmp_path_factory, 1, ONE)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return start(tmp_path_factory, 2, TWO)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return start(tmp_path_factory, 4, FOUR)


def check(name: str, runs: Runs) -> None:
    """One scenario on all ranks."""
    for ours, control in (of_rank[name] for of_rank in runs):
        for run in (ours, control):
            if run is None:
                continue
            assert run["differing"] == [], name
            num_skipped = 1 if name.startswith("fp16") else 0
            assert run["skipped"] == [1] * num_skipped, name
            assert run["num_steps"] == NUM_STEPS - num_skipped
            assert run["num_hook_calls"] == run["num_steps"], name
            assert run["rates"] == sorted(run["rates"]), "the schedule warms up"
            assert len(set(run["rates"])) == run["num_steps"]
        assert ours["is_same_optimizer"]
        assert all(kind.startswith("MegatronCautious") for kind in ours["kinds"])
        assert len(ours["alignment"]) > 5, name
        assert any(mean < 1 for mean in ours["alignment"].values()), name
        if control is not None:
            assert not any(kind.startswith("MegatronCautious") for kind in control["kinds"])
            assert set(map(tuple, control["sent"])) == {()}


def check_close(runs: Runs, alone: Runs) -> None:
    """Master weights beside those of one process that computed the gradients itself."""
    for name, (ours, control) in runs[0].items():
        dtype = name.split(", ")[-1]
        if name not in ("dp, fp32", "tp, fp32", "tp, bf16", "pp, fp32", "dp, bf16", "pp, bf16"):
            continue
        assert control is not None
        alone_ours, alone_control = alone[0][f"dp, {dtype}"]
        assert alone_control is not None
        difference = differences(ours["mains"], alone_ours["mains"])
        of_control = differences(control["mains"], alone_control["mains"])
        if dtype == "fp32":
            assert difference.max() <= 2 * of_control.max() + 1e-7, name
            assert of_control.max() < 1e-3 * LARGEST_RATE, name
        else:  # a gradient's rounded sign decides on its whole step: some steps differ, in the control too
            assert difference.mean() <= 5 * of_control.mean() + 1e-7, name
            assert of_control.mean() < 0.1 * LARGEST_RATE, name


def differences(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> torch.Tensor:
    assert found.keys() == expected.keys()
    return torch.cat([(found[name] - expected[name]).abs().flatten() for name in expected])


def test_one_process(one: Runs) -> None:
    for name in ONE:
        check(name, one)
        assert one[0][name][0]["sent"] == [[], []]


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_equal_one_process(name: str, two: Runs) -> None:
    check(name, two)


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_equal_one_process(name: str, four: Runs) -> None:
    check(name, four)


def test_one_all_reduce_for_each_set_of_groups(two: Runs, four: Runs) -> None:
    def sent(runs: Runs, name: str) -> set[tuple[str, ...]]:
        return {tuple(step) for of_rank in runs for step in of_rank[name][0]["sent"]}

    assert sent(two, "dp, fp32") == sent(two, "tp, bf16") == {("allreduce",)}
    assert sent(two, "pp, tied, bf16") == {()}, "every parameter is whole on its rank"
    assert sent(four, "tp, fp32") == {("allreduce", "allreduce")}, "norms are not cut by tp"
    assert sent(four, "pp, fp32") == {("allreduce",)}


def test_as_near_to_one_process_that_computes_all_as_the_control(
    one: Runs, two: Runs, four: Runs
) -> None:
    check_close(two, one)
    check_close(four, one)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_other_scenario(
    world: int, one: Runs, tmp_path_factory: pytest.TempPathFactory
) -> None:
    known = {2: TWO, 4: FOUR}[world]
    runs = start(tmp_path_factory, world, known, "everything_but")
    for name in runs[0]:
        check(name, runs)
    check_close(runs, one)


class TestAttach:
    def test_what_cannot_work_is_refused_on_all_ranks(self, attached: list[Any]) -> None:
        words = {
            "precision-aware": "use_precision_aware_optimizer=True",
            "offload": "optimizer_cpu_offload=True",
            "Megatron FSDP": "use_megatron_fsdp=True",
            "8-bit parameters": "fp8_param_gather=True",
            "coupled decay": "decoupled_weight_decay=True",
            "SGD with decay": "weight_decay=0",
            "scheduler of torch": "call effx_dist.megatron.attach before it",
            "other chunks": "all the chunks that the optimizer was made with",
            "other chunks on one rank": "all the chunks that the optimizer was made with",
        }
        for of_rank in attached:
            refusals = of_rank["refusals"]
            assert refusals.keys() == words.keys()
            for name, (_, text, is_as_it_was) in refusals.items():
                assert words[name] in text, name
                assert is_as_it_was, name
            kinds = {name: kind for name, (kind, *_) in refusals.items()}
            assert kinds.pop("other chunks") == "LayoutMismatchError"
            assert kinds.pop("other chunks on one rank") in (
                "LayoutMismatchError",
                "RankFailedError",
            )
            assert set(kinds.values()) == {"ConfigError"}

    def test_attaching_twice_changes_nothing_more(self, attached: list[Any]) -> None:
        for of_rank in attached:
            assert of_rank["twice"] == {"num_hook_calls": 1, "is_same": True, "num_parameters": 15}

    def test_a_fused_adam_counts_its_steps_in_groups(self, attached: list[Any]) -> None:
        for found in (of_rank["fused"] for of_rank in attached):
            assert found["keys"] == {"exp_avg", "exp_avg_sq"}
            assert set(found["steps"]) == set(found["loaded steps"]) == {2}
            assert found["after Megatron's own"] == 0
            assert found["after loading"] == 0
            assert found["as AdamW"] == 0
        assert attached[0]["fused"]["AdamW's steps"] == {2.0}


@pytest.fixture(scope="module")
def attached(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return spawn(2, attach_all, tmp_path_factory.mktemp("ranks"), folder)


def attach_all(folder: Path) -> dict[str, Any]:
    return {
        "refusals": call("megatron_attach_runs", "refusals"),
        "twice": call("megatron_attach_runs", "twice"),
        "fused": call("megatron_attach_runs", "fused", folder),
    }
