"""A fresh interpreter with a build cache of its own, for what is decided once per process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(program: str, cache: Path, path: str | None = None) -> list[str]:
    """Lines that a fresh interpreter prints, with torch's cache in a folder of its own."""
    env = {**os.environ, "TORCH_HOME": str(cache / "torch"), "OMP_NUM_THREADS": "1"}
    if path is not None:
        env["PATH"] = path
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
