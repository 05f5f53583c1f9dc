"""The launch scripts learn their ranks from whatever started them: MPI, another launcher, nobody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from effx_dist.engines import fsdp2
from effx_dist.errors import MissingEngineError
from effx_dist.launchers import MPI_SIZE
from launch.ranks import find_ranks
from tests.mpi_runs import ROOT, by_mpirun, needs_mpi

LAUNCHED = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"]
JOB = """
import json, os, sys
import torch.distributed as dist
from launch.ranks import find_ranks

job, folder = sys.argv[1:]
find_ranks()
dist.init_process_group("gloo")
told = [None] * dist.get_world_size()
dist.all_gather_object(told, (job, dist.get_rank(), int(os.environ["LOCAL_RANK"])))
if dist.get_rank() == 0:
    with open(f"{folder}/{job}.json", "w") as file:
        json.dump(told, file)
dist.barrier()
if dist.get_rank() == 1:
    raise ValueError("on one rank alone")
dist.barrier()
"""


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Without what a launcher may have said, and the same as before in the end."""
    with mock.patch.dict(os.environ):
        for name in (*LAUNCHED, *MPI_SIZE):
            os.environ.pop(name, None)
        yield


@needs_mpi
@pytest.mark.ranks
def test_two_jobs_of_mpirun_at_once_do_not_meet_and_a_failed_rank_ends_its_job(
    tmp_path: Path,
) -> None:
    """A rank that waited in MPI for the others would hold them up for torch's ten minutes."""
    command = [*by_mpirun(2), "-c", JOB]
    jobs = {
        name: subprocess.Popen(
            [*command, name, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for name in ("first", "second")
    }
    for name, job in jobs.items():
        _, errors = job.communicate()
        assert job.returncode != 0
        assert "on one rank alone" in errors
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told == [[name, rank, rank] for rank in range(2)]


def test_alone_it_is_one_rank_also_in_a_shell_of_a_scheduler() -> None:
    os.environ[MPI_SIZE[-1]] = "1"
    find_ranks()
    mesh = fsdp2.init("cpu")
    try:
        assert (mesh.size(), dist.get_rank()) == (1, 0)
    finally:
        dist.destroy_process_group()


def test_what_another_launcher_has_said_stays() -> None:
    told = dict(zip(LAUNCHED, ("3", "8", "1", "node7", "1234"), strict=True))
    os.environ.update(told, **{MPI_SIZE[0]: "2"})  # torchrun on each node, started by mpirun
    find_ranks()
    assert {name: os.environ[name] for name in LAUNCHED} == told


def test_mpirun_without_mpi4py_is_refused_not_run_by_every_rank_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    os.environ[MPI_SIZE[0]] = "2"
    with pytest.raises(MissingEngineError, match="pip install mpi4py"):
        find_ranks()
