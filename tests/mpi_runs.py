"""Ranks that mpirun has started."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from effx_dist.shard import MpiGroup

ROOT = Path(__file__).parents[1]
MPIRUN = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun")


def has_mpi() -> bool:
    return MPIRUN is not None and importlib.util.find_spec("mpi4py") is not None


needs_mpi = pytest.mark.skipif(not has_mpi(), reason="no mpirun; pip install mpich mpi4py does it")


@cache
def mpirun(num_ranks: int) -> tuple[str, ...]:
    """The command that starts another in so many ranks, also in a container."""
    assert MPIRUN is not None
    version = subprocess.run([MPIRUN, "--version"], capture_output=True, text=True, check=True)
    # no other MPI knows the options that Open MPI needs
    options = ["--allow-run-as-root", "--oversubscribe"] if "Open MPI" in version.stdout else []
    return (MPIRUN, *options, "-n", str(num_ranks))


def by_mpirun(num_ranks: int) -> list[str]:
    """What starts a script in so many ranks."""
    return [*mpirun(num_ranks), sys.executable]


def effx_by_mpirun(num_ranks: int, *words: object) -> subprocess.CompletedProcess[str]:
    """The command line of effx in so many ranks."""
    command = [*by_mpirun(num_ranks), "-m", "effx_dist.cli", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False
    )


def start_mpi(
    num_ranks: int, body: Callable[..., None], *arguments: object
) -> subprocess.CompletedProcess[str]:
    """Run ``body(MpiGroup(), *arguments)``, a function of a module of tests/, in so many ranks; it
    gets the arguments as text. The first rank that raises ends all of them."""
    place = [f"tests.{body.__module__.removeprefix('tests.')}", body.__qualname__]
    command = [*by_mpirun(num_ranks), "-m", "mpi4py", "-m", "tests.mpi_runs", *place]
    command += map(str, arguments)
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


if __name__ == "__main__":
    module, name, *given = sys.argv[1:]
    getattr(importlib.import_module(module), name)(MpiGroup(), *given)
