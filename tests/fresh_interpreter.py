"""A fresh interpreter with a build cache and compilers of its own, for what is decided once per
process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from effx_dist.native.library import COMPILERS

COMPILER = next(filter(None, map(shutil.which, COMPILERS)), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
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


def compiler_in(folder: Path, script: str) -> str:
    """Makes a folder whose C++ compiler is this script; what to put on the PATH."""
    folder.mkdir()
    compiler = folder / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def relaxed_compiler_in(folder: Path) -> str:
    """As `compiler_in`: the real one, told to round as it likes."""
    return compiler_in(folder, f'exec {COMPILER} "$@" -mfma -ffp-contract=fast -ffast-math')
