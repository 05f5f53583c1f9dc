"""Golden chains of every format version stay readable, value for value."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from effx_dist.checkpoint import verify_folder
from tests.fixtures.checkpoints.write import FOLDER, STEPS, Model, make, read

GOLDEN = sorted(FOLDER.glob("version-*"))


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
class TestGoldenChains:
    """Chains that earlier versions wrote."""

    @pytest.mark.parametrize("step", STEPS)
    def test_reads_what_was_written(self, golden: Path, step: int) -> None:
        expected = json.loads((golden / "expected.json").read_text())
        assert read(golden / "checkpoints", step) == expected[str(step)]

    def test_verifies(self, golden: Path) -> None:
        report = verify_folder(golden / "checkpoints")
        assert report.num_steps == len(STEPS)
        assert report.findings == []

    def test_a_run_goes_on_from_it(self, golden: Path, tmp_path: Path) -> None:
        from effx_dist.checkpoint import Checkpointer
        from effx_dist.config import ExcpConfig

        shutil.copytree(golden / "checkpoints", tmp_path / "run")
        model, optimizer = make()
        config = ExcpConfig(async_mode="sync", keep_latest_k=0)
        with Checkpointer(tmp_path / "run", config) as checkpointer:
            checkpointer.load(model, optimizer)
            checkpointer.save(4, model, optimizer, extra={})
        assert verify_folder(tmp_path / "run").findings == []
        loaded = Model()
        with Checkpointer(tmp_path / "run", config) as checkpointer:
            assert checkpointer.load(loaded)["step"] == 4
