"""What every test shares: one compute thread, and property tests that are not timed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

# Before torch is imported, and for every process that a test starts: ranks that each take all the
# cores would crowd each other out.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile("effx", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("effx")


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
