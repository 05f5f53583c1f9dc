"""The C++ kernels: built once, and done without where they cannot be had or give other bits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests import fresh_interpreter
from tests.fresh_interpreter import needs_compiler, relaxed_compiler_in

STEP_TWICE = """
import warnings, torch
from effx_dist.optim import CautiousAdamW
from effx_dist.optim.kernels import kernels_class
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for implementation in ("auto", "compiled"):
        param = torch.ones(3, requires_grad=True)
        opt = CautiousAdamW([param], lr=0.5, weight_decay=0.0, implementation=implementation)
        for _ in range(2):
            param.grad = torch.ones(3)
            opt.step()
        assert torch.allclose(param, torch.zeros(3), atol=1e-6), param
print(kernels_class("auto", torch.device("cpu")).__name__)
for warning in caught:
    print(warning.category.__name__, warning.message)
"""


run = partial(fresh_interpreter.run, STEP_TWICE)


@needs_compiler
def test_it_is_built_once(tmp_path: Path) -> None:
    assert run(tmp_path) == ["CompiledKernels"]
    assert run(tmp_path, path="") == ["CompiledKernels"], "kept: no compiler is needed any more"


def test_without_a_compiler_it_is_eager_with_one_warning(tmp_path: Path) -> None:
    name, warning = run(tmp_path, path="")
    assert name == "EagerKernels"
    assert "RuntimeWarning" in warning
    assert "c++, g++, clang++ is on the PATH" in warning
    assert "implementation='eager'" in warning


@needs_compiler
def test_a_compiler_that_relaxes_arithmetic_is_found_out(tmp_path: Path) -> None:
    name, warning = run(tmp_path, path=relaxed_compiler_in(tmp_path / "bin"))
    assert name == "EagerKernels"
    assert "does not give the bits of the eager one" in warning
