"""Commands whose work is shared by ranks: found out without a flag, said once, and never a hang."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from effx_dist.checkpoint import verify_folder
from effx_dist.cli import app
from effx_dist.cli.ranks import tool_ranks
from effx_dist.errors import ConfigError, RankFailedError
from effx_dist.launchers import MPI_SIZE
from effx_dist.shard import Group, SoloGroup
from tests.mpi_runs import ROOT, mpirun, needs_mpi, start_mpi

NUM_RANKS = 2
SCRIPT = str(Path(sys.executable).with_name("effx"))
Said = tuple[int, str, str]
"""Exit code, stdout and stderr of one rank."""


@pytest.fixture
def damaged(folder: Path) -> Path:
    """A small chain in which one bit of a file of each step is another."""
    for path in folder.glob("step-*/rank-00000.effx"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    return folder


def started(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def said_of(folder: Path) -> str:
    report = verify_folder(folder)
    return f"{report.num_steps} steps, {report.num_blocks} blocks"


@pytest.mark.ranks
def test_torchrun_splits_the_work(original: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(NUM_RANKS), "-m", "effx_dist.cli"]
    done = started(*launcher, "verify", "--torchrun", str(original))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said_of(original))
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.ranks
@needs_mpi
def test_mpirun_splits_the_work_without_a_flag(damaged: Path) -> None:
    done = started(*mpirun(NUM_RANKS), SCRIPT, "verify", str(damaged))
    assert done.returncode == 1
    *findings, summary = done.stdout.splitlines()
    assert sorted(findings) == sorted(verify_folder(damaged).findings)
    assert summary.startswith(said_of(damaged))


def _on_ranks(world: Group, good: str, absent: str, out: str) -> None:
    """What each rank says; written by the first. Then one rank fails alone."""
    commands = {
        "good": ["verify", good],
        "flag": ["verify", "--mpi", good],
        "absent": ["verify", absent],
        "usage": ["verify", "--no-such-option"],
        "missing": ["verify"],
    }
    said = {}
    for name, arguments in commands.items():
        done = CliRunner().invoke(app, arguments)
        said[name] = world.all_gather_object((done.exit_code, done.stdout, done.stderr))
    with pytest.raises(ConfigError, match=f"has started 8 ranks, and mpi4py sees {NUM_RANKS}"):
        tool_ranks(8, False).__enter__()
    with pytest.raises(RankFailedError if world.rank == 0 else typer.Exit) as caught:
        _fail_unlike()
    if isinstance(caught.value, RankFailedError):
        assert caught.value.failures == {
            rank: f"OSError: disk {rank}" for rank in range(world.size)
        }
    with pytest.raises(OSError if world.rank == 0 else typer.Exit):  # once, by whomever it was told
        _fail_alike()
    if world.rank == 0:
        Path(out).write_text(json.dumps(said))
    world.barrier()  # it is written before the job ends
    # No error gets out of here: only what tool_ranks does itself can release the other rank.
    with suppress(typer.Exit), tool_ranks(NUM_RANKS, False) as ranks:
        if ranks.rank == 1:
            raise OSError("the disk is full")
        ranks.barrier()


def _fail_unlike() -> None:
    with tool_ranks(NUM_RANKS, False) as ranks:

        def fail() -> None:
            raise OSError(f"disk {ranks.rank}")

        ranks.everywhere(fail, keep_own_error=False)


def _fail_alike() -> None:
    with tool_ranks(NUM_RANKS, False) as ranks:

        def fail() -> None:
            raise OSError("no such disk")

        ranks.everywhere(lambda: ranks.everywhere(fail, keep_own_error=False), keep_own_error=False)


@pytest.fixture(scope="module")
def job(
    original: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], dict[str, list[Said]]]:
    """One start by mpirun: how it ended, and what the ranks have said in it by case."""
    out = tmp_path_factory.mktemp("mpi") / "said.json"
    done = start_mpi(NUM_RANKS, _on_ranks, original, original / "absent", out)
    assert out.exists(), done.stdout + done.stderr
    said = json.loads(out.read_text())
    return done, {name: [tuple(rank) for rank in ranks] for name, ranks in said.items()}


@pytest.fixture
def said(
    job: tuple[subprocess.CompletedProcess[str], dict[str, list[Said]]],
) -> dict[str, list[Said]]:
    return job[1]


@pytest.mark.ranks
@needs_mpi
class TestMpirun:
    @pytest.mark.parametrize("name", ["good", "flag"])
    def test_the_first_rank_speaks_for_all(
        self, name: str, said: dict[str, list[Said]], original: Path
    ) -> None:
        (code, out, error), *others = said[name]
        assert (code, error) == (0, "")
        assert out.startswith(said_of(original))
        assert others == [(0, "", "")] * (NUM_RANKS - 1)

    def test_what_is_wrong_everywhere_is_said_once(self, said: dict[str, list[Said]]) -> None:
        (code, out, error), *others = said["absent"]
        assert (code, out) == (1, "")
        assert re.fullmatch(r"effx: .*absent: no such folder\n", error)
        assert others == [(1, "", "")] * (NUM_RANKS - 1)

    @pytest.mark.parametrize(
        ("name", "reason"), [("usage", "no-such-option"), ("missing", "Missing argument")]
    )
    def test_wrong_usage_is_said_once(
        self, name: str, reason: str, said: dict[str, list[Said]]
    ) -> None:
        (code, _, error), *others = said[name]
        assert code == 2
        assert reason in error
        assert others == [(2, "", "")] * (NUM_RANKS - 1)

    def test_what_one_rank_raises_alone_ends_the_job(
        self, job: tuple[subprocess.CompletedProcess[str], dict[str, list[Said]]]
    ) -> None:
        done, _ = job
        assert done.returncode != 0
        assert "effx: the disk is full" in done.stderr


@pytest.mark.parametrize("variable", MPI_SIZE)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_without_mpi4py_a_shell_of_a_scheduler_works_and_mpirun_is_refused(
    variable: str, num_ranks: int, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler may say to a shell that it is one rank; ranks that could not tell who they are
    would each do the whole work."""
    monkeypatch.setenv(variable, str(num_ranks))
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as if it were not installed
    done = CliRunner().invoke(app, ["verify", str(original)])
    assert done.exit_code == (0 if num_ranks == 1 else 1), done.output
    assert ("pip install mpi4py" in done.output) == (num_ranks > 1)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--torchrun"], "effx: --torchrun: was not started by torchrun"),
        (["--torchrun", "--mpi"], "effx: --mpi, --torchrun: are two ways to start"),
    ],
)
def test_a_wrong_flag_is_refused(
    flags: Sequence[str], reason: str, original: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = CliRunner().invoke(app, ["verify", str(original), *flags])
    assert done.exit_code == 1
    assert done.output.startswith(reason)
    assert len(done.output.splitlines()) == 1


class TestAlone:
    def test_it_is_a_group_of_one(self) -> None:
        with tool_ranks(0, False) as ranks:
            assert ranks == SoloGroup()

    def test_what_fails_everywhere_is_raised_as_it_is(self) -> None:
        def fail() -> None:
            raise ConfigError("of its own")

        def enter() -> Group:
            with tool_ranks(0, False) as ranks:
                ranks.everywhere(fail)
                return ranks

        with pytest.raises(ConfigError, match=r"^of its own$"):
            enter()
