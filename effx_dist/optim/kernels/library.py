"""The C++ kernels' shared library: built once per machine and source, kept in torch's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("cautious.cpp")
COMPILERS = ("c++", "g++", "clang++")
BUILD_TIMEOUT_S = 300

# Each operation rounds once (no contraction to fused multiply-adds); sqrt sets no errno and
# comparisons do not trap, without which gcc does not vectorise the loops.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-fopenmp"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# By what torch finds the processor to have, not by -march=native: one cache may serve many machines.
VECTOR_FLAGS = {
    "AVX2": ("-mavx2",),
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}

Library = ctypes.CDLL


class BuildError(Exception):
    """The library cannot be had; the message says why."""


@functools.cache
def library() -> Library | None:
    """The loaded library, built if need be. None, with one warning, where it cannot be had."""
    try:
        return _load_or_build(_cached_path())
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"the compiled cautious step is not available ({error}); the eager one is used: the same "
            f"values, about ten times slower. Install a C++ compiler with OpenMP ({SOURCE.name} is "
            "compiled once, within seconds), or choose implementation='eager' to say so.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _cached_path() -> Path:
    """Where the library of this source, these flags and this kind of processor lies."""
    described = f"{SOURCE.read_text()}{FLAGS}{_vector_flags()}"
    key = hashlib.sha256(described.encode()).hexdigest()[:16]
    return Path(torch.hub.get_dir()).parent / "effx_dist" / f"cautious_{key}.so"


def _vector_flags() -> tuple[str, ...]:
    return VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())


def _load_or_build(path: Path) -> Library:
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            path.unlink(missing_ok=True)  # of another architecture, or damaged
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            built = _build(Path(folder))
            os.replace(built, path)  # ranks that build at the same time each put a whole file
        return ctypes.CDLL(str(path))
    except (PermissionError, OSError):
        # No cache that can be written: build for this process alone.
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_build(Path(folder))))


def _build(folder: Path) -> Path:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"none of {', '.join(COMPILERS)} is on the PATH")
    target = folder / "cautious.so"
    command = [compiler, *FLAGS, *_vector_flags(), str(SOURCE), "-o", str(target)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S
    )
    if done.returncode != 0:
        last_lines = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise BuildError(f"{compiler} failed with status {done.returncode}: {last_lines}")
    return target
