"""`effx compress` as a user types it, alone and under mpirun."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from effx_dist.checkpoint import inspect_folder, verify_folder
from effx_dist.checkpoint.storage.steps import committed_steps
from effx_dist.checkpoint.tools.compress import compress_series
from effx_dist.cli import app
from tests import plain_series as plain
from tests.mpi_runs import effx_by_mpirun, needs_mpi
from tests.plain_series import STEPS, assert_same


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain.write_series(tmp_path_factory.mktemp("series"), plain.write_torch)


def effx(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


class TestAlone:
    def test_prints_one_table(self, series: Path, tmp_path: Path) -> None:
        code, output = effx("compress", series, tmp_path / "out")
        assert code == 0, output
        header, row = output.splitlines()
        assert header.split() == [
            "steps",
            "bytes",
            "in",
            "bytes",
            "out",
            "ratio",
            "greatest",
            "error",
        ]
        steps = inspect_folder(tmp_path / "out")
        assert row.split()[0] == str(len(STEPS))
        error = max(step.error for step in steps if step.error is not None)
        assert float(row.split()[-1]) == pytest.approx(error, rel=0.01)
        for words in (["inspect"], ["verify", "--decode"], ["diff", tmp_path / "out/step-10"]):
            code, output = effx(*words, tmp_path / "out")
            assert code == (1 if "diff" in words else 0), output

    def test_goes_on_where_it_was(self, series: Path, tmp_path: Path) -> None:
        first = series / f"checkpoint-{STEPS[0]}.pt"
        assert effx("compress", first, tmp_path / "out")[0] == 0
        code, output = effx("compress", series, tmp_path / "out")
        assert code == 0
        there, _, row = output.splitlines()
        assert there == "1 step there already"
        assert row.split()[0] == "2"
        assert effx("compress", series, tmp_path / "out") == (0, "3 steps there already\n")

    def test_several_paths_and_options(self, series: Path, tmp_path: Path) -> None:
        paths = [series / f"checkpoint-{step}.pt" for step in STEPS[:2]]
        options = ["--profile", "lossless", "--base-every", 1, "--weights-only", "--threads", 1]
        code, output = effx("compress", *paths, tmp_path / "out", *options)
        assert code == 0, output
        steps = inspect_folder(tmp_path / "out")
        assert [(step.kind, step.profile) for step in steps] == [("base", "lossless")] * 2
        names = plain.values_of(tmp_path / "out", STEPS[0])
        assert not [name for name in names if name.startswith("optimizer.")]

    def test_names_of_parameters_in_a_file(self, tmp_path: Path) -> None:
        model, optimizer = plain.make()
        plain.train(model, optimizer, 1)
        state = optimizer.state_dict()
        names = [group.pop("param_names") for group in state["param_groups"]]
        torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "1.pt")
        code, output = effx("compress", tmp_path / "1.pt", tmp_path / "out")
        assert code == 1
        assert "--param-names" in output
        (tmp_path / "names.json").write_text(json.dumps(names))
        words = ["compress", tmp_path / "1.pt", tmp_path / "out", "--param-names"]
        assert effx(*words, tmp_path / "names.json")[0] == 0
        for content in ("[1]", "{", '["a"]', "[]"):
            (tmp_path / "bad.json").write_text(content)
            code, output = effx(*words, tmp_path / "bad.json")
            assert code == 1
            assert output.startswith("effx: ")
            assert "bad.json" in output

    def test_what_cannot_be_used_is_one_line(self, series: Path, tmp_path: Path) -> None:
        (tmp_path / "7.pt").write_bytes(b"no checkpoint")
        for path, reason in [
            (tmp_path / "absent", "no such"),
            (tmp_path / "7.pt", "cannot be read"),
        ]:
            code, output = effx("compress", path, tmp_path / "out")
            assert code == 1
            assert len(output.splitlines()) == 1
            assert reason in output
        assert effx("compress", series)[0] == 2
        assert effx("compress", series, tmp_path / "out", "--profile", "tiny")[0] == 2
        assert effx("compress", series, tmp_path / "out", "--base-every", 0)[0] == 2


@pytest.mark.ranks
@needs_mpi
class TestMpirun:
    def test_ranks_share_the_work(self, series: Path, tmp_path: Path) -> None:
        compress_series([series], tmp_path / "alone")
        done = effx_by_mpirun(2, "compress", series, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 2
        steps = inspect_folder(tmp_path / "out")
        assert [step.world_size for step in steps] == [2] * len(STEPS)
        assert all((tmp_path / "out/step-10" / f"rank-0000{r}.effx").exists() for r in (0, 1))
        assert verify_folder(tmp_path / "out", decode=True).findings == []
        for step in STEPS:
            found = plain.values_of(tmp_path / "out", step)
            assert_same(found, plain.values_of(tmp_path / "alone", step))

    @pytest.mark.slow
    def test_what_one_rank_finds_all_end_by(self, series: Path, tmp_path: Path) -> None:
        shutil.copytree(series, tmp_path / "series")
        (tmp_path / "series" / f"checkpoint-{STEPS[1]}.pt").write_bytes(b"no checkpoint")
        done = effx_by_mpirun(2, "compress", tmp_path / "series", tmp_path / "out")
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert f"checkpoint-{STEPS[1]}.pt: cannot be read" in done.stderr
        assert committed_steps(tmp_path / "out") == [STEPS[0]]
