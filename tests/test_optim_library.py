"""The C++ kernels' library: built once, kept, mended, and done without where it cannot be had."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests import fresh_interpreter

HAS_COMPILER = any(map(shutil.which, ("c++", "g++", "clang++")))
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")

STEP_TWICE = """
import warnings, torch
from effx_dist.optim import CautiousAdamW
from effx_dist.optim.kernels import walks_class
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for implementation in ("auto", "compiled"):
        param = torch.ones(3, requires_grad=True)
        opt = CautiousAdamW([param], lr=0.5, weight_decay=0.0, implementation=implementation)
        for _ in range(2):
            param.grad = torch.ones(3)
            opt.step()
        assert torch.allclose(param, torch.zeros(3), atol=1e-6), param
print(walks_class("auto", torch.device("cpu")).__name__)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


run = partial(fresh_interpreter.run, STEP_TWICE)


def built(cache: Path) -> list[Path]:
    return sorted((cache / "torch" / "effx_dist").rglob("*"))


@needs_compiler
def test_it_is_built_once_and_a_damaged_one_anew(tmp_path: Path) -> None:
    assert run(tmp_path) == ["CompiledWalks"]
    (library,) = built(tmp_path)
    whole = library.read_bytes()
    assert run(tmp_path, path="") == ["CompiledWalks"], "kept: no compiler is needed any more"
    library.write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path) == ["CompiledWalks"]
    assert built(tmp_path) == [library], "and nothing half-built is left"
    assert library.read_bytes() == whole


def test_without_a_compiler_it_is_eager_with_one_warning(tmp_path: Path) -> None:
    name, warning = run(tmp_path, path="")
    assert name == "EagerWalks"
    assert "RuntimeWarning" in warning
    assert "c++, g++, clang++ is on the PATH" in warning
    assert "implementation='eager'" in warning


def test_a_compiler_that_fails_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    compiler = folder / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal: no omp.h here' >&2\nexit 3\n")
    compiler.chmod(0o755)
    name, warning = run(tmp_path, path=f"{folder}:/bin:/usr/bin")
    assert name == "EagerWalks"
    assert "status 3" in warning
    assert "fatal: no omp.h here" in warning


@needs_compiler
def test_a_compiler_that_relaxes_arithmetic_is_found_out(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    real = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))))
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {real} "$@" -mfma -ffp-contract=fast -ffast-math\n')
    compiler.chmod(0o755)
    name, warning = run(tmp_path, path=f"{folder}:{os.environ['PATH']}")
    assert name == "EagerWalks"
    assert "does not give the bits of the eager one" in warning


@needs_compiler
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "effx_dist").write_text("a file where the folder should be")
    assert run(tmp_path) == ["CompiledWalks"]
