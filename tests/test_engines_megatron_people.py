"""What people do with Megatron-core: its own load calls in every mode, weights alone at another layout, experts
elsewhere, bare models, folders that Megatron wrote itself."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import verify_folder
from effx_dist.checkpoint.format.reader import open_checkpoint
from tests.megatron_processes import call, needs_megatron
from tests.ranks import spawn


def _has_strategies() -> bool:
    """By its version: looking for the module would import Megatron here, without the shim."""
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return False
    return tuple(map(int, version.split(".")[:2])) < (0, 17)


has_strategies = _has_strategies()
pytestmark = [pytest.mark.ranks, pytest.mark.megatron, needs_megatron]
needs_strategies = pytest.mark.skipif(
    not has_strategies, reason="this Megatron-core takes no strategies of others"
)
MODULE = "megatron_people_runs"
UNEXPECTED = ("log_unexpected", "raise_unexpected", "return_unexpected")
ALL = ("log_all", "raise_all", "return_all")


def run_all(folder: Path) -> dict[str, Any]:
    names = ["weights_alone", "experts_elsewhere", "unwrapped_chunks"]
    if has_strategies:
        names += ["strict_modes", "torch_dist"]
    found = {name: call(MODULE, name, folder / name) for name in names}
    return found | {"messages": call(MODULE, "messages")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def ran(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(2, run_all, tmp_path_factory.mktemp("ranks"), folder)


@needs_strategies
@pytest.mark.parametrize("mode", ["assume_ok_unexpected", *UNEXPECTED, *ALL, "ignore_all"])
class TestStrictHandling:
    def found(self, ran: list[dict[str, Any]], mode: str, kind: str) -> list[dict[str, Any]]:
        return [of_rank["strict_modes"][mode, kind] for of_rank in ran]

    @pytest.mark.parametrize("kind", ["fits", "other format"])
    def test_what_fits(self, ran: list[dict[str, Any]], mode: str, kind: str) -> None:
        for found in self.found(ran, mode, kind):
            assert found["error"] == ""
            assert found["is_same"], "the default strategy has filled everything"
            assert found["logged"] == []
            assert found["keys"] in (None, [[], []])

    def test_what_nobody_asks_for(self, ran: list[dict[str, Any]], mode: str) -> None:
        """ "Missing", in Megatron's words: in its own keys, where it looks at them."""
        for found in self.found(ran, mode, "fewer"):
            key = found["lacked"]
            if mode == "raise_all":
                assert "CheckpointingException" in found["error"]
                assert key in found["error"]
            else:
                assert found["error"] == ""
            if mode == "return_all":
                assert found["keys"] == [[key], []]

    def test_what_the_checkpoint_lacks(self, ran: list[dict[str, Any]], mode: str) -> None:
        for found in self.found(ran, mode, "stranger"):
            if mode.startswith("raise"):
                assert "stranger" in found["error"]
            elif mode != "assume_ok_unexpected":
                assert found["error"] == ""
            if mode.startswith("return"):
                assert found["keys"] == [[], ["stranger"]]


def test_weights_alone_at_any_layout(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        assert set(of_rank["weights_alone"].values()) == {True}
        assert len(of_rank["weights_alone"]) == 5


def test_groups_are_found_by_their_parameters(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        found = of_rank["experts_elsewhere"]
        (same_one, rates_one), (same_two, rates_two) = found["loaded", 1], found["loaded", 2]
        assert same_one
        assert same_two
        common = rates_one.keys() & rates_two.keys()
        assert len(common) > 4
        assert {n: rates_one[n] for n in common} == {n: rates_two[n] for n in common}
        assert len(set(rates_two.values())) == 2


def test_bare_models_are_accepted_throughout(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        assert of_rank["unwrapped_chunks"] == {"is_same": True, "is_rounded": True}


def test_refusals_say_what_is_refused_and_why(ran: list[dict[str, Any]]) -> None:
    for of_rank in ran:
        said = of_rank["messages"]
        assert "TensorParallelMuon orthogonalises whole matrices" in said["muon"]
        assert "tp_group" not in said["muon"]
        assert "gives each data-parallel rank parameters of its own" in said["layer-wise"]
        assert "has no tp_group, which the adapter needs" in said["unknown make"]
        assert "use that version" not in said["unknown make"]


@needs_strategies
@pytest.mark.parametrize("form", ["dp_reshardable", "fully_reshardable"])
def test_megatrons_own_folders_are_compressed(
    ran: list[dict[str, Any]], folder: Path, form: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "effx_dist.cli", "compress", "--weights-only"]
    done = subprocess.run(
        [*command, str(folder / "torch_dist" / form), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert verify_folder(tmp_path / "out", decode=True).num_steps == 2
    with open_checkpoint(tmp_path / "out") as opened:
        names = {name.removeprefix("model.") for name in opened.top.manifest.tensors}
        assert "embedding.word_embeddings.weight" in names
        assert not any("optimizer" in name for name in names)
        key = "model.embedding.word_embeddings.weight"
        values = opened.read(key, opened.top.boxes(key)[0])
    expected = ran[0]["torch_dist"]["weights"]["embedding.word_embeddings.weight"]
    assert torch.allclose(values.float(), expected.float(), atol=0.02)


def test_newer_versions_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    source = """
import importlib.util, warnings
warnings.simplefilter("ignore")
own = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.endswith("strategies.base") else own(name, *a)
import effx_dist.megatron as megatron
try:
    megatron.ExcpSaveStrategy
except ImportError as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("MissingEngineError megatron-core"), done.stderr
    assert "takes no strategies of others" in done.stdout
    assert "handle.save_checkpoint" in done.stdout
