"""PyTorch's own tests of torch.distributed.checkpoint, run twice: as they are, and with this library's writer,
reader and planners in the place of the stock ones.

python -m tests.foreign.run_dcp CHECKOUT [FILE ...] > result.md

CHECKOUT is a checkout of PyTorch that fits the installed torch as far as may be; nothing of it is copied.
Prints a table of the tests that the stock run passes: test, stock, ours, and the reason where ours fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path("test/distributed/checkpoint")
USUAL = (
    "test_file_system_checkpoint_cpu.py",
    "test_file_system_checkpoint.py",
    "test_checkpoint.py",
    "test_planner.py",
    "test_dtensor_checkpoint.py",
    "test_dtensor_resharding.py",
    "test_tp_checkpoint.py",
    "test_hsdp_checkpoint.py",
    "test_fsdp_model_state.py",
    "test_fsdp_optim_state.py",
    "test_2d_fsdp_dt_checkpoint.py",
    "test_save_load_api.py",
    "test_list_stored_state_dict.py",
    "e2e/test_e2e_save_and_load.py",
)
TIMEOUT_S = 600
Outcomes = dict[str, tuple[str, str]]
"""By test: passed, failed or skipped, and why."""


def run(checkout: Path, file: str, whose: str) -> Outcomes:
    """One file's outcomes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        path = [str(ROOT), str(ROOT / "tests/foreign/site"), os.environ.get("PYTHONPATH", "")]
        command = [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", os.devnull),
            *(str(checkout / FOLDER / file), "--junit-xml", str(report), "--timeout", "120"),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "EFFX_FOREIGN": whose}
        done = subprocess.run(
            command,
            env=environment,
            cwd=folder,
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if not report.exists():
            return {file: ("failed", done.stdout.decode()[-300:])}
        return dict(_outcome(file, case) for case in ElementTree.parse(report).iter("testcase"))


def _outcome(file: str, case: ElementTree.Element) -> tuple[str, tuple[str, str]]:
    name = f"{file}::{case.get('name')}"
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            text = f"{found.get('message', '')} {found.text or ''}"
            return name, ("skipped" if kind == "skipped" else "failed", _reason(text))
    return name, ("passed", "")


def _reason(text: str) -> str:
    """The last line that names an error."""
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if re.match(r"(E +)?[\w.]*(Error|Exception)\b", line)]
    return (named or lines or [""])[-1].removeprefix("E ").strip()[:160].replace("|", "/")


def main() -> None:
    checkout, *files = sys.argv[1:]
    rows: list[tuple[str, str, str, str]] = []
    for file in files or USUAL:
        if not (Path(checkout) / FOLDER / file).exists():
            continue
        stock, ours = (run(Path(checkout), file, whose) for whose in ("stock", "ours"))
        for name, (outcome, _) in stock.items():
            rows.append((name, outcome, *ours.get(name, ("failed", "did not run"))))
    passed = [row for row in rows if row[1] == "passed"]
    good = sum(row[2] == "passed" for row in passed)
    print(f"torch {torch.__version__}; of {len(rows)} tests the stock run passes {len(passed)};")
    print(f"ours passes {good} of these.", end="\n\n")
    print("| test | stock | ours | reason |\n|---|---|---|---|")
    for row in passed:
        print(f"| {' | '.join(row)} |")
    others = {row[1] for row in rows} - {"passed"}
    for outcome in sorted(others):
        names = ", ".join(row[0] for row in rows if row[1] == outcome)
        print(f"\nStock {outcome}, so nothing to compare: {names}")


if __name__ == "__main__":
    main()
