"""Shared libraries of C++ sources: built once per machine and source, kept in torch's cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

HEADERS = Path(__file__).parent
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


@dataclass(frozen=True)
class Source:
    """C++ files that make one library; they may include the headers of this package."""

    files: tuple[Path, ...]
    """The first one's name begins the library's."""

    @property
    def name(self) -> str:
        """The beginning of its libraries' names."""
        return self.files[0].stem

    def stem(self) -> str:
        """The beginning of the name of a library of this source, these flags and this kind of processor."""
        text = "".join(path.read_text() for path in (*self.files, *sorted(HEADERS.glob("*.h"))))
        described = f"{text}{FLAGS}{_vector_flags()}{platform.machine()}"
        return f"{self.name}_{_digest(described.encode())}_"


def load(source: Source) -> Library:
    """The library, built if need be. Raises BuildError, saying why, where it cannot be had."""
    try:
        return _kept_library(source) or _new_library(source)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(str(error)) from error


def _folder() -> Path:
    return Path(torch.hub.get_dir()).parent / "effx_dist"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _vector_flags() -> tuple[str, ...]:
    return VECTOR_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())


def _kept_library(source: Source) -> Library | None:
    """One built before. Its name ends with a digest of its content: loading a damaged library would
    end the process.
    """
    stem = source.stem()
    for path in _folder().glob(f"{stem}*.so"):
        if path.stem == stem + _digest(path.read_bytes()):
            return ctypes.CDLL(str(path))
        path.unlink(missing_ok=True)
    return None


def _new_library(source: Source) -> Library:
    try:
        _folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            built = _build(source, Path(folder))
            kept = _folder() / f"{source.stem()}{_digest(built.read_bytes())}.so"
            os.replace(built, kept)  # ranks that build at the same time each put a whole file
        return ctypes.CDLL(str(kept))
    except OSError:
        # No cache that can be written, or none to load from: build for this process alone.
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_build(source, Path(folder))))


def _build(source: Source, folder: Path) -> Path:
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"none of {', '.join(COMPILERS)} is on the PATH")
    target = folder / f"{source.name}.so"
    options = [*FLAGS, *_vector_flags(), f"-I{HEADERS}"]
    command = [compiler, *options, *map(str, source.files), "-o", str(target)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=BUILD_TIMEOUT_S
    )
    if done.returncode != 0:
        last_lines = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise BuildError(f"{compiler} failed with status {done.returncode}: {last_lines}")
    return target
