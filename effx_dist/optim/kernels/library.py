"""The C++ kernels' shared library: built once per machine and source, kept in torch's cache."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
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
        return _kept_library() or _new_library()
    except (BuildError, OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"the compiled cautious step is not available ({error}); the eager one is used: the same "
            f"values, many times slower. Install a C++ compiler with OpenMP ({SOURCE.name} is "
            "compiled once, within seconds), or choose implementation='eager' to say so.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _folder() -> Path:
    return Path(torch.hub.get_dir()).parent / "effx_dist"


def _stem() -> str:
    """Begins the name of a library of this source, these flags and this kind of processor."""
    described = f"{SOURCE.read_text()}{FLAGS}{_vector_flags()}{platform.machine()}"
    return f"cautious_{_digest(described.encode())}_"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _vector_flags() -> tuple[str, ...]:
    return VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())


def _kept_library() -> Library | None:
    """One built before. Its name ends with a digest of its content: loading a damaged library would
    end the process.
    """
    stem = _stem()
    for path in _folder().glob(f"{stem}*.so"):
        if path.stem == stem + _digest(path.read_bytes()):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    return None


def _new_library() -> Library:
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            built = _build(Path(folder))
            kept = _folder() / f"{_stem()}{_digest(built.read_bytes())}.so"
            os.replace(built, kept)  # ranks that build at the same time each put a whole file
        return ctypes.CDLL(str(kept))
    except OSError:
        # No cache that can be written, or none to load from: build for this process alone.
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
