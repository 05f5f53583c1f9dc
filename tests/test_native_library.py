"""Without a compiler, or with one that relaxes arithmetic, the checkpoint's bytes stay the same."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests import fresh_interpreter

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)

ENCODE_TWICE = """
import hashlib, logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from effx_dist.checkpoint import coding
from effx_dist.core.excp import JointArrays
from effx_dist.native.excp import kernels
from tests.excp_pieces import must_build, whole_tensor
for _ in range(2):
    arrays = whole_tensor(0, 5000)
    payloads, residual = coding.quantise(must_build("safe", [arrays]), arrays)
    planes = coding.encode_planes(arrays.m.view("u4"))
content = payloads.weight + payloads.exp_avg + payloads.exp_avg_sq + residual.tobytes() + planes
print("compiled" if kernels() else "numpy", hashlib.sha256(content).hexdigest())
"""


run = partial(fresh_interpreter.run, ENCODE_TWICE)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_all_ways_give_the_same_bytes_and_say_once_which(tmp_path: Path) -> None:
    (compiled,) = run(tmp_path / "a")
    warning, plain = run(tmp_path / "b", path="")
    relaxed = tmp_path / "bin"
    relaxed.mkdir()
    (relaxed / "c++").write_text(
        f'#!/bin/sh\nexec {COMPILER} "$@" -mfma -ffp-contract=fast -ffast-math\n'
    )
    (relaxed / "c++").chmod(0o755)
    found_out, guarded = run(tmp_path / "c", path=f"{relaxed}:{os.environ['PATH']}")
    assert warning.startswith("WARNING")
    assert "c++, g++, clang++ is on the PATH" in warning
    assert "does not round as numpy does" in found_out
    assert compiled.split()[0] == "compiled"
    assert {line.split()[0] for line in (plain, guarded)} == {"numpy"}
    assert len({line.split()[1] for line in (compiled, plain, guarded)}) == 1
