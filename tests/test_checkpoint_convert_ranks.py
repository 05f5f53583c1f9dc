"""`convert` by several ranks: the same output as by one, and nothing of it where any of them fails."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from effx_dist.checkpoint.format import whole_tensors as pieces
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.checkpoint.tools.convert import ConvertOptions, convert_checkpoint
from effx_dist.checkpoint.tools.sharing import dealt_out
from effx_dist.errors import ConfigError, RankFailedError
from effx_dist.shard import Group
from tests import small_chain
from tests.mpi_runs import effx_by_mpirun, needs_mpi
from tests.thread_ranks import run_ranks

OPTIONS = ConvertOptions(config={"model_type": "llama"}, max_shard_size="6kB")
"""Several shards of the small chain's model."""


def convert(chain: Path, target: Any, output: Path, num_ranks: int) -> None:
    def body(group: Group) -> int:
        return convert_checkpoint(chain, target, output, options=OPTIONS, group=group)

    assert run_ranks(num_ranks, body) == [small_chain.TOP] * num_ranks


def files_of(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.parametrize("target", ["safetensors", "universal"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_same_bytes(original: Path, target: Any, num_ranks: int, tmp_path: Path) -> None:
    convert_checkpoint(original, target, tmp_path / "one", options=OPTIONS)
    convert(original, target, tmp_path / "many", num_ranks)
    assert len(files_of(tmp_path / "one")) > num_ranks
    assert files_of(tmp_path / "many") == files_of(tmp_path / "one")


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_torch_file(original: Path, num_ranks: int, tmp_path: Path) -> None:
    convert(original, "torch", tmp_path / "out.pt", num_ranks)
    file = torch.load(tmp_path / "out.pt", weights_only=True)
    expected = small_chain.load(original, small_chain.TOP)[0].state_dict()
    assert file["model"].keys() == expected.keys()
    assert all(torch.equal(file["model"][name], expected[name]) for name in expected)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_a_dcp_folder_has_a_file_of_each_rank(
    original: Path, num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "PIECE_NUMEL", 500)  # so that tensors are cut, too
    convert(original, "dcp", tmp_path / "out", num_ranks)
    names = {f"__{rank}_0.distcp" for rank in range(num_ranks)} | {".metadata"}
    assert files_of(tmp_path / "out").keys() == names
    expected = small_chain.load(original, small_chain.TOP)[0].state_dict()
    state = {"model": {n: torch.zeros_like(t) for n, t in expected.items()}, "step": 0}
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    assert all(torch.equal(state["model"][name], expected[name]) for name in expected)  # type: ignore[index]
    assert state["step"] == small_chain.TOP


def damage(chain: Path, tensor: str) -> None:
    """The first byte of a stored tensor, where the newest step has it."""
    document = small_chain.document_of(chain, small_chain.TOP)
    chunk = document["tensors"][tensor]["chunks"][0]
    name = document["files"][chunk.get("file", 0)]["name"]
    path = chain / step_name(small_chain.TOP) / name
    content = bytearray(path.read_bytes())
    content[chunk["blocks"][0]["offset"]] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("target", ["safetensors", "universal", "dcp"])
def test_whichever_rank_fails_nothing_stays(original: Path, target: Any, tmp_path: Path) -> None:
    """A tensor is damaged that one of the ranks reads; all are told which rank it was."""
    failed = set()
    for tensor in ("weight", "low", "norm"):
        folder = tmp_path / tensor
        shutil.copytree(original, folder / "chain")
        damage(folder / "chain", f"model.{tensor}")

        def body(group: Group, folder: Path = folder, tensor: str = tensor) -> list[int]:
            with pytest.raises(RankFailedError, match=f"model.{tensor}") as caught:
                convert_checkpoint(
                    folder / "chain", target, folder / "out", options=OPTIONS, group=group
                )
            return list(caught.value.failures)

        first, *others = run_ranks(3, body)
        assert all(failures == first for failures in others)
        assert [path.name for path in folder.iterdir()] == ["chain"]
        failed.update(first)
    assert len(failed) > 1


@pytest.mark.parametrize("target", ["torch", "dcp"])
def test_what_the_first_rank_refuses_all_refuse(
    original: Path, target: Any, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("mine")

    def body(group: Group) -> dict[int, str]:
        with pytest.raises(RankFailedError) as caught:
            convert_checkpoint(original, target, tmp_path / "out", group=group)
        return dict(caught.value.failures)

    assert all("is there already" in failures[0] for failures in run_ranks(2, body))
    assert (tmp_path / "out").read_text() == "mine"


def test_one_rank_raises_its_own_error(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        convert_checkpoint(original, "dcp", tmp_path / "out")


@pytest.mark.parametrize("num_ranks", [1, 2, 5])
@pytest.mark.parametrize("sizes", [[], [7], [0, 0, 0], [5, 1, 9, 9, 2, 30, 4]])
def test_parts_are_dealt_out_evenly(sizes: list[int], num_ranks: int) -> None:
    shares = dealt_out(sizes, num_ranks)
    assert sorted(itertools.chain(*shares)) == list(range(len(sizes)))
    loads = [sum(sizes[index] for index in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


@pytest.mark.ranks
@needs_mpi
class TestMpirun:
    def test_shares_the_work(self, original: Path, tmp_path: Path) -> None:
        done = effx_by_mpirun(2, "convert", original, tmp_path / "out", "--to", "dcp")
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"step {small_chain.TOP} as dcp: {tmp_path / 'out'}\n"
        assert {".metadata", "__0_0.distcp", "__1_0.distcp"} == files_of(tmp_path / "out").keys()

    @pytest.mark.slow
    def test_a_rank_that_fails_ends_all(self, original: Path, tmp_path: Path) -> None:
        shutil.copytree(original, tmp_path / "chain")
        damage(tmp_path / "chain", "model.low")
        done = effx_by_mpirun(
            2, "convert", tmp_path / "chain", tmp_path / "out", "--to", "universal"
        )
        assert done.returncode == 1
        assert "model.low" in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["chain"]
