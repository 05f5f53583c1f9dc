"""Other people's tests and programs against this library, from checkouts that are given by path (see README.md)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2"],
    "pipeline": ["--pipeline-model-parallel-size", "2"],
    "data": [],
}


def checkout(request: pytest.FixtureRequest, option: str) -> Path:
    path = request.config.getoption(option)
    if path is None:
        pytest.skip(f"no checkout was given: {option} PATH")
    return Path(path).resolve()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pytorchs_own_tests_of_checkpoints(request: pytest.FixtureRequest) -> None:
    path = checkout(request, "--pytorch")
    done = subprocess.run(
        [sys.executable, "-m", "tests.foreign.run_dcp", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line for line in done.stdout.splitlines() if "| passed |" in line]
    assert rows
    assert [row for row in rows if row.split(" | ")[2] != "passed"] == []


def pretrain(path: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    script = ROOT / "tests/foreign/megatron_pretrain.py"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node",
                "2",
            ),
            *(str(script), str(path), str(out), *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_megatron_lms_pretrain_cut_off_and_resumed(
    layout: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path, options = checkout(request, "--megatron-lm"), LAYOUTS[layout]
    whole = pretrain(path, tmp_path / "whole", *options, "--save-interval", "100")
    first = pretrain(
        path, tmp_path / "cut", *options, "--save-interval", "100", "--exit-interval", "11"
    )
    second = pretrain(path, tmp_path / "cut", *options, "--save-interval", "100")
    for one, before, after in zip(whole, first, second, strict=True):
        assert before["iteration"] == 11
        assert before["seen"] + after["seen"] == one["seen"]
        assert before["losses"] + after["losses"] == one["losses"], "bit for bit"
        assert after["iteration"] == one["iteration"] < 24, (
            "fewer steps than all samples would take"
        )
        assert after["epoch"] == one["epoch"] == 2
    assert sum(len(rank["losses"]) for rank in whole) > 0
