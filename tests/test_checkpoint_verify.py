"""Verification: beside each other in threads, processes and ranks; the same findings each way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from effx_dist.checkpoint import VerifyReport, verify_folder
from effx_dist.checkpoint.storage.steps import MANIFEST, step_name
from effx_dist.checkpoint.tools import verify as verify_module
from effx_dist.errors import CheckpointNotFoundError, RankFailedError
from effx_dist.shard import Group
from tests import small_chain
from tests.thread_ranks import run_ranks


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain")
    small_chain.build(folder)
    return folder


@pytest.fixture
def damaged(chain: Path, tmp_path: Path) -> Path:
    """A copy in which one bit of each data file of every step is another."""
    shutil.copytree(chain, tmp_path / "damaged")
    for path in (tmp_path / "damaged").glob("step-*/rank-*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    return tmp_path / "damaged"


def blocks_of(folder: Path) -> list[dict[str, Any]]:
    """Every block that the manifests name."""
    return [
        block
        for step in (small_chain.BASE, small_chain.LINK, small_chain.TOP)
        for record in small_chain.document_of(folder, step)["tensors"].values()
        for chunk in record["chunks"]
        for block in chunk.get("blocks", [])
    ]


class TestEachWay:
    @pytest.mark.parametrize("jobs", [1, 3])
    @pytest.mark.parametrize("decode", [False, True])
    def test_every_block_is_read(self, chain: Path, jobs: int, decode: bool) -> None:
        report = verify_folder(chain, jobs=jobs, decode=decode)
        blocks = blocks_of(chain)
        assert report.findings == []
        assert (report.num_steps, report.num_blocks) == (3, len(blocks))
        assert report.num_bytes == sum(block["length"] for block in blocks)

    def test_ranks_share_the_work_and_say_the_same(self, chain: Path, damaged: Path) -> None:
        for folder in (chain, damaged):
            alone = verify_folder(folder)

            def body(group: Group, folder: Path = folder) -> VerifyReport:
                return verify_folder(folder, ranks=group)

            alone.findings.sort()
            for report in run_ranks(3, body):
                report.findings.sort()  # they come rank by rank
                assert report == alone

    def test_each_rank_reads_a_part(self, chain: Path) -> None:
        def body(group: Group) -> int:
            done = [0]
            verify_folder(chain, ranks=group, on_progress=lambda num, _: done.append(num))
            return done[-1]

        parts = run_ranks(3, body)
        total = sum(block["length"] for block in blocks_of(chain))
        assert sum(parts) == total
        assert all(0 < part < total for part in parts)

    def test_runs_of_blocks_may_be_short(
        self, chain: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = verify_folder(chain)
        monkeypatch.setattr(verify_module, "RUN_BYTES", 1)
        assert verify_folder(chain, jobs=2) == whole

    def test_findings_do_not_depend_on_the_threads(self, damaged: Path) -> None:
        alone = verify_folder(damaged)
        assert len(alone.findings) == len(list(damaged.glob("step-*/rank-*")))
        assert verify_folder(damaged, jobs=4).findings == alone.findings


class TestFindings:
    def test_name_file_tensor_and_block(self, chain: Path, tmp_path: Path) -> None:
        folder = tmp_path / "copy"
        shutil.copytree(chain, folder)
        document = small_chain.document_of(folder, small_chain.LINK)
        chunk = document["tensors"]["model.table"]["chunks"][0]
        block = chunk["blocks"][1]
        path = (
            folder / step_name(small_chain.LINK) / document["files"][chunk.get("file", 0)]["name"]
        )
        content = bytearray(path.read_bytes())
        content[block["offset"]] ^= 1
        path.write_bytes(content)
        (finding,) = verify_folder(folder, jobs=2).findings
        assert str(path) in finding
        assert "block 1 of model.table" in finding

    def test_a_missing_file_is_one_finding(self, chain: Path, tmp_path: Path) -> None:
        shutil.copytree(chain, tmp_path / "copy")
        path = next((tmp_path / "copy" / step_name(small_chain.TOP)).glob("rank-*"))
        path.unlink()
        (finding,) = verify_folder(tmp_path / "copy").findings
        assert str(path) in finding

    def test_decoding_finds_what_checksums_cannot(self, chain: Path, tmp_path: Path) -> None:
        """A signed manifest that gives a weight another dtype than its reference has."""
        shutil.copytree(chain, tmp_path / "copy")

        def widen(document: dict[str, Any]) -> None:
            document["tensors"]["model.weight"]["dtype"] = "float64"

        small_chain.edit(tmp_path / "copy", small_chain.TOP, widen)
        assert verify_folder(tmp_path / "copy").findings == []
        findings = verify_folder(tmp_path / "copy", decode=True).findings
        assert findings
        assert all("model.weight" in finding for finding in findings)

    def test_a_rank_that_cannot_look_is_named_on_all(self, chain: Path) -> None:
        def body(group: Group) -> str:
            folder = chain if group.rank != 1 else chain / "absent"
            with pytest.raises(RankFailedError) as caught:
                verify_folder(folder, ranks=group)
            assert list(caught.value.failures) == [1]
            return str(caught.value)

        assert all("absent" in message for message in run_ranks(2, body))

    def test_nothing_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="no committed checkpoint"):
            verify_folder(tmp_path)


def test_a_manifest_alone_is_not_enough(chain: Path, tmp_path: Path) -> None:
    """A step whose data files are all gone is found, whatever its manifest says."""
    place = tmp_path / step_name(small_chain.BASE)
    place.mkdir()
    shutil.copy(chain / step_name(small_chain.BASE) / MANIFEST, place)
    assert verify_folder(tmp_path).findings
