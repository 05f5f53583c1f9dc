"""`effx`: exit codes, plain text in a pipe, one line for what went wrong, and no torch for `--help`."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import effx_dist
from effx_dist.checkpoint import StepSummary
from effx_dist.cli import app
from effx_dist.cli.inspect import steps_line, steps_table
from effx_dist.cli.places import checkpoint_folder
from effx_dist.cli.show import show_table
from effx_dist.report import RunLog, doctor
from effx_dist.report.text import ABSENT

ROOT = Path(__file__).parents[1]


def summary(**changes: Any) -> StepSummary:
    """One row of a table, for tests of the formatting."""
    fields: dict[str, Any] = {
        "step": 100,
        "kind": "base",
        "profile": "balanced",
        "world_size": 2,
        "raw_bytes": 7_000_000,
        "stored_bytes": 1_000_000,
        "ratio": 7.0,
        "run_ratio": 7.0,
        "saved_at": "2026-01-02T03:04:05Z",
        "writer": "effx-dist 0.1.0",
        "num_tensors": 12,
        "committed": True,
    }
    return StepSummary(**fields | changes)


STEPS = [
    summary(),
    summary(
        step=1200, kind="link", parent="step-100", stored_bytes=100_000, ratio=70.0, error=0.0213
    ),
    summary(step=1300, kind="", profile="", saved_at="", committed=False),
]


def effx(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "effx_dist.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def run_effx(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_help_imports_neither_torch_nor_an_engine() -> None:
    program = (
        "import sys\n"
        "from effx_dist.cli import app\n"
        "try: app(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "loaded = {'torch', 'numpy', 'numcodecs', 'deepspeed', 'megatron'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "inspect" in done.stdout


def test_version() -> None:
    code, out, _ = run_effx("--version")
    assert (code, out) == (0, f"effx_dist {effx_dist.__version__}\n")


def test_exit_codes_of_the_process(tmp_path: Path) -> None:
    RunLog(tmp_path / "run", tensorboard=False).close()
    assert effx("report", tmp_path / "run").returncode == 0
    finding = effx("report", tmp_path / "absent")
    assert finding.returncode == 1
    assert finding.stdout == ""
    assert len(finding.stderr.splitlines()) == 1
    assert "absent" in finding.stderr
    assert effx("reprot").returncode == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["verify", ".", "--step", "x"],
        ["verify", ".", "--step", "-1"],
        ["report", "--wrong"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert run_effx(*arguments)[0] == 2


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_folder_that_is_not_there_is_a_finding(command: str, tmp_path: Path) -> None:
    code, out, error = run_effx(command, tmp_path / "absent")
    assert (code, out) == (1, "")
    assert re.fullmatch(r"effx: .*absent: no such folder\n", error)


def test_report_writes_the_page_and_says_where(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run", tensorboard=False) as log:
        log.log(1, {"train/loss": 1.0})
    code, out, _ = run_effx("report", tmp_path / "run")
    assert (code, out) == (0, f"{tmp_path / 'run' / 'report.html'}\n")
    code, out, _ = run_effx(
        "report", tmp_path / "run", "-o", tmp_path / "o.html", "--baseline", tmp_path / "run"
    )
    assert (code, out) == (0, f"{tmp_path / 'o.html'}\n")
    assert "<html" in (tmp_path / "o.html").read_text()


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    RunLog(tmp_path / "run", tensorboard=False).close()
    (tmp_path / "file").touch()
    code, _, error = run_effx("report", tmp_path / "run", "-o", tmp_path / "file" / "o.html")
    assert code == 1
    assert len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with three checkpoints: a base and two links."""
    torch = pytest.importorskip("torch")
    from effx_dist import Checkpointer
    from effx_dist.config import ExcpConfig

    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = torch.nn.Linear(32, 32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = ExcpConfig(profile="balanced", async_mode="sync", keep_latest_k=0)
    with Checkpointer(folder / "checkpoints", config) as checkpointer:
        for step in (1, 2, 3):
            model(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
            checkpointer.save(step, model, optimizer)
    return folder


def test_inspect_lists_what_the_run_saved(saved: Path) -> None:
    code, out, _ = run_effx("inspect", saved)
    assert code == 0
    rows = [line.split() for line in out.splitlines()[1:4]]
    assert [row[:3] for row in rows] == [
        ["1", "base", ABSENT],
        ["2", "link", "step-1"],
        ["3", "link", "step-2"],
    ]
    assert out.splitlines()[4].startswith("3 checkpoints (1 base): ")


def test_inspect_json_states_the_bytes_that_lie_on_disk(saved: Path) -> None:
    code, out, _ = run_effx("inspect", saved, "--json")
    content = json.loads(out)
    assert code == 0
    assert content["folder"] == str(saved / "checkpoints")
    for step in content["steps"]:
        files = (saved / "checkpoints" / f"step-{step['step']}").iterdir()
        assert step["stored_bytes"] == sum(file.stat().st_size for file in files)
        assert step["ratio"] == step["raw_bytes"] / step["stored_bytes"]


def test_verify_finds_nothing_in_a_good_folder(saved: Path) -> None:
    code, out, _ = run_effx("verify", saved)
    assert (code, out.splitlines()[-1].split(", ")[0]) == (0, "3 steps")
    assert out.endswith("good\n")
    code, out, _ = run_effx("verify", saved / "checkpoints", "--step", 2)
    assert (code, out.split(", ")[0]) == (0, "2 steps")


def test_verify_names_the_damaged_file(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved / "checkpoints", copy)
    file = next((copy / "step-2").glob("rank-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    code, out, _ = run_effx("verify", copy)
    assert code == 1
    assert str(file) in out
    assert run_effx("verify", copy, "--step", 1)[0] == 0
    assert run_effx("verify", copy, "--step", 3)[0] == 1  # it builds on step 2


def test_a_damaged_manifest_is_one_line(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "copy")
    (tmp_path / "copy" / "step-3" / "manifest.json").write_text("{}")
    code, _, error = run_effx("inspect", tmp_path / "copy")
    assert (code, len(error.splitlines())) == (1, 1)
    assert "manifest.json" in error


def test_a_cut_off_save_is_shown(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved / "checkpoints", tmp_path / "copy")
    (tmp_path / "copy" / "step-3" / "manifest.json").unlink()
    code, out, _ = run_effx("inspect", tmp_path / "copy")
    assert code == 0
    assert "cut off" in out
    assert out.splitlines()[-1].startswith("2 checkpoints (1 base)")


@pytest.mark.parametrize("arguments", [["inspect"], ["verify"]])
def test_a_folder_without_checkpoints_is_a_finding(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    code, out, error = run_effx(*arguments, tmp_path)
    assert (code, out, len(error.splitlines())) == (1, "", 1)


def test_a_step_that_is_not_there_is_a_finding(saved: Path) -> None:
    code, _, error = run_effx("verify", saved, "--step", 9)
    assert (code, len(error.splitlines())) == (1, 1)
    assert "9" in error


def test_the_checkpoints_subfolder_is_taken_where_there_is_one(tmp_path: Path) -> None:
    assert checkpoint_folder(str(tmp_path)) == str(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert checkpoint_folder(str(tmp_path)) == str(tmp_path / "checkpoints")
    assert checkpoint_folder("memory://a/b") == "memory://a/b"


def test_a_table_in_a_pipe_is_aligned_text(capsys: pytest.CaptureFixture[str]) -> None:
    columns, rows = steps_table(STEPS)
    show_table(columns, rows)
    lines = capsys.readouterr().out.splitlines()
    assert [re.split(r" {2,}", line.strip()) for line in lines] == [columns, *rows]
    cells = [list(re.finditer(r"\S+(?: \S+)*", line)) for line in lines]
    for column in zip(
        *cells, strict=True
    ):  # text stands at the left of its column, numbers at the right
        assert (
            len({cell.start() for cell in column}) == 1 or len({cell.end() for cell in column}) == 1
        )


def test_a_table_on_a_terminal_takes_names_literally(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    show_table(["name"], [["[red]x[/red]"], ["\x1b[2Jy"]])
    out = capsys.readouterr().out
    assert "[red]x[/red]" in out
    assert "?[2Jy" in out


def test_names_cannot_send_escape_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(*steps_table([replace(STEPS[0], profile="\x1b]0;owned\x07\nx")]))
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert len(out.splitlines()) == 2


def test_a_save_that_was_cut_off_says_so() -> None:
    _, rows = steps_table(STEPS)
    assert [row[1] for row in rows] == ["base", "link", "cut off"]
    assert set(rows[2][2:]) == {ABSENT}


def test_a_narrow_terminal_squeezes_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    columns, rows = steps_table(STEPS)
    show_table(columns, rows)
    out = capsys.readouterr().out
    assert all(cell in out for row in [columns, *rows] for cell in row)


def test_the_summary_line_counts_committed_steps_only() -> None:
    assert steps_line(STEPS) == "2 checkpoints (1 base): 14.0 MB stored as 1.10 MB, 12.7x"
    assert steps_line(STEPS[2:]) == "0 checkpoints (0 bases): 0 B stored as 0 B"


def test_doctor_says_what_is_here() -> None:
    pytest.importorskip("torch")
    code, out, _ = run_effx("doctor")
    assert code == 0
    assert re.search(rf"^torch +{re.escape(metadata.version('torch'))}$", out, re.MULTILINE)
    assert re.search(r"^compressed checkpoints \(ExCP\) +yes", out, re.MULTILINE)
    assert re.search(r"^cautious optimisers +yes +\w+: (compiled|eager|triton)$", out, re.MULTILINE)


def test_doctor_names_the_lock_of_a_build_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    monkeypatch.setattr(cpp_extension, "get_default_build_root", lambda: str(tmp_path))
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()

    def note() -> str:
        return {part.name: part.note for part in doctor.examine().features}["DeepSpeed"]

    assert str(lock) not in note(), "someone may be compiling"
    an_hour_ago = time.time() - 3600
    os.utime(lock, (an_hour_ago, an_hour_ago))
    if importlib.util.find_spec("deepspeed"):
        assert f"{lock} blocks its start: remove it" in note()


def test_doctor_knows_every_required_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split(r"[<>=!~; \[]", requirement)[0] for requirement in project["dependencies"]]
    assert sorted(doctor.REQUIRED) == sorted(names)


@pytest.mark.parametrize("fault", [ImportError("no torch"), OSError("libcudart.so.99: not found")])
def test_doctor_survives_a_torch_that_does_not_import(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> None:
        raise fault

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    found = doctor.examine()
    assert found.missing == ("torch",)
    assert str(fault) in " ".join(part.note for part in found.packages)
    features = {part.name: part.found for part in found.features}
    assert features["cautious optimisers"] == features["several ranks"] == "no"


def test_doctor_without_any_package_lists_all_as_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    code, out, error = run_effx("doctor")
    assert code == 1
    assert all(name in error for name in doctor.REQUIRED)
    assert "pip install numcodecs" in out
