"""The Triton step gives the bits of the eager one: in Triton's interpreter, and on a GPU to the last
ulp. What is compiled for a GPU is looked at without one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.core.update_rules import UpdateRule
from effx_dist.errors import ConfigError
from effx_dist.optim import CautiousAdamW
from tests import triton_checks as checks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
by_rule = pytest.mark.parametrize("rule", checks.RULES, ids=lambda rule: rule.name)


def triton_version() -> tuple[int, ...]:
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))


def test_in_the_interpreter() -> None:
    """Runs triton_checks.py: Triton learns at its import whether it is to interpret."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", checks.__file__],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_on_the_cpu_it_is_refused() -> None:
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    opt = CautiousAdamW([param], implementation="triton")
    with pytest.raises(ConfigError, match=r"'triton' is for CUDA .* but a parameter is on cpu"):
        opt.step()
    assert torch.equal(param, torch.ones(3))


WIDE_LOAD = re.compile(r"ld\.global(?:\.\w+)*?\.v(?:4\.\w32|2\.\w64)")
POINTERS = {
    "pieces": "*i64",
    "blocks": "*i32",
    "rows": "*fp64",
    "counts": "*i64",
    "scales": "*fp64",
    "skip": "*u8",
}


def ptx_of(kernel: Any, **constants: Any) -> str:
    """What a kernel is compiled to for an H100, as TritonKernels has it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from effx_dist.optim.kernels import triton_launch as triton_launch

    constants["BLOCK"] = triton_launch.BLOCK
    signature = {name: POINTERS.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if name in POINTERS
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"enable_fp_fusion": False, "num_warps": triton_launch.NUM_WARPS}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    ptx: str = compiled.asm["ptx"]
    return ptx


class TestCompiled:
    """What the interpreter cannot tell."""

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        if triton_version() < (3, 6):
            pytest.skip("Triton before 3.6 flushes denormal roots and quotients of float32")
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    @staticmethod
    def _both(rule: str, param: torch.dtype, grad: torch.dtype, is_aligned: bool) -> list[str]:
        from effx_dist.optim.kernels import triton_kernels
        from effx_dist.optim.kernels import triton_launch as triton_launch

        state = torch.float64 if param == torch.float64 else torch.float32
        types = {"GRAD": triton_launch.TL_DTYPES[grad], "STATE": triton_launch.TL_DTYPES[state]}
        common = {"RULE": rule, "ALIGNED": is_aligned, **types}
        count = ptx_of(triton_kernels.count_kernel, **common)
        constants = {**common, "PARAM": triton_launch.TL_DTYPES[param], "HAS_SKIP": True}
        return [count, ptx_of(triton_kernels.update_kernel, **constants)]

    @by_rule
    def test_nothing_is_fused_or_flushed(self, rule: UpdateRule) -> None:
        for ptx in self._both(rule.name, torch.float32, torch.float32, True):
            assert not re.search(r"\bfma\.|\bmad\.\w+\.f32|\.ftz|\.approx|div\.full", ptx)

    @pytest.mark.parametrize("dtype", checks.DTYPES, ids=str)
    def test_aligned_elements_are_read_16_bytes_at_a_time(self, dtype: torch.dtype) -> None:
        count, update = self._both("adamw", dtype, dtype, True)
        assert len(WIDE_LOAD.findall(count)) >= 2  # gradient, moment
        assert len(WIDE_LOAD.findall(update)) >= 4  # and the other moment, parameter

    def test_elements_at_any_address_are_not(self) -> None:
        for ptx in self._both("adamw", torch.float32, torch.bfloat16, False):
            assert not WIDE_LOAD.findall(ptx)

    def test_float64_has_the_roots_and_quotients_of_ieee_754(self) -> None:
        _, update = self._both("adamw", torch.float64, torch.float64, True)
        assert "sqrt.rn.f64" in update
        assert "div.rn.f64" in update


@pytest.mark.gpu
@needs_gpu
class TestOnAGPU:
    device = torch.device("cuda:0")

    @by_rule
    @pytest.mark.parametrize("offset", [0, 1])
    def test_every_dtype_and_size_is_as_eager_to_the_last_ulp(
        self, rule: UpdateRule, offset: int
    ) -> None:
        tensors = [
            found
            for param, grad in checks.PAIRS
            for found in (
                *checks.random_tensors(rule, checks.SIZES, param, grad),
                *(checks.special_tensors(rule, param, grad) if triton_version() >= (3, 6) else ()),
            )
        ]
        case = checks.make_case(rule, tensors, self.device, offset)
        checks.assert_same_steps(case, max_ulps=1)

    @pytest.mark.parametrize("flag", [0.0, 1.0])
    def test_a_flag_skips_the_update(self, flag: float) -> None:
        rule = checks.RULES[0]
        tensors = checks.random_tensors(rule, checks.SIZES, torch.float32, torch.float32)
        case = checks.make_case(rule, tensors, self.device)
        checks.assert_same_steps(case, torch.tensor(flag, device=self.device), max_ulps=1)

    @pytest.mark.parametrize("capturable", [False, True])
    def test_a_step_does_not_wait_for_the_device(self, capturable: bool) -> None:
        params = checks.make_params(self.device)
        opt = CautiousAdamW(params, capturable=capturable)
        for step in range(3):
            checks.set_grads(params, step)
            if capturable:
                eight, zero = (torch.tensor(value, device=self.device) for value in (8.0, 0.0))
                checks.scaled(opt, eight, zero)
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            try:
                opt.clip_grad_norm_(1.0)
                opt.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_a_captured_step_is_the_same_step(self) -> None:
        ours, theirs = (
            CautiousAdamW(checks.make_params(self.device), capturable=True) for _ in range(2)
        )
        both = [opt.param_groups[0]["params"] for opt in (ours, theirs)]
        checks.set_grads(both[0], 0)
        checks.set_grads(both[1], 0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            ours.step()
        torch.cuda.current_stream().wait_stream(side)
        theirs.step()
        for param in both[0]:
            param.grad = param.grad.clone()  # at an address that no step has seen
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ours.step()
        for step in range(1, 4):
            checks.set_grads(both[1], step)
            for param, other in zip(*both, strict=True):
                param.grad.copy_(other.grad)
            graph.replay()
            theirs.step()
            checks.assert_same_optimizers(ours, theirs)
