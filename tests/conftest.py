"""What every test shares: one compute thread, and property tests that are not timed."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import tests.bytecode  # noqa: F401  before torch is imported

# Also for every process that a test starts: ranks that each take all the cores would crowd each
# other out.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# DeepSpeed compiles its operators here at their first use.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix, "torch_extensions")))
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# By one and the same ninja: where another of the machine's had its turn, each compiles all anew.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import ranks

LONGEST_BUILD_S = 900
torch.set_num_threads(1)

settings.register_profile("effx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("effx")


def pytest_sessionstart() -> None:
    """Whoever finds a lock where operators are compiled waits for it without end, also for one that
    a killed run left behind."""
    for lock in Path(os.environ["TORCH_EXTENSIONS_DIR"]).glob("*/lock"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > LONGEST_BUILD_S:
                lock.unlink()


def pytest_collection_finish(session: pytest.Session) -> None:
    """DeepSpeed takes seconds to import: once for all ranks, and only where one of them needs it."""
    if any(item.get_closest_marker("deepspeed") for item in session.items):
        # ZeRO asks whether an optimizer is its Muon, which imports torch's compiler.
        ranks.PRELOADED.extend(["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"])


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small chain of checkpoints, a base and two links; not to be changed."""
    from tests import small_chain

    folder = tmp_path_factory.mktemp("chain")
    small_chain.build(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the small chain, to be damaged."""
    shutil.copytree(original, tmp_path / "run")
    return tmp_path / "run"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Checkouts of others, for tests/foreign."""
    parser.addoption("--pytorch", help="a checkout of PyTorch, whose tests of checkpoints are run")
    parser.addoption("--megatron-lm", help="a checkout of Megatron-LM, whose pretrain() is run")
