"""The optimizers on one device: the papers' formulas, dtypes, NaN, and what the host reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from effx_dist.optim import CautiousAdamW, CautiousLion
from effx_dist.optim.base import CautiousOptimizer
from tests import cautious_oracle as oracle

NAN = float("nan")
BOTH = pytest.mark.parametrize("optimizer", [CautiousAdamW, CautiousLion])


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def oracle_settings(draw: st.DrawFn) -> oracle.Settings:
    beta = st.floats(0, 0.9999)
    return oracle.Settings(
        lr=draw(st.floats(0, 1)),
        betas=(draw(beta), draw(beta)),
        eps=draw(st.sampled_from([1e-16, 1e-8, 1e-3, 1.0])),
        weight_decay=draw(st.sampled_from([0.0, 1e-2, 0.5])),
        cautious_weight_decay=draw(st.booleans()),
        maximize=draw(st.booleans()),
    )


@settings(max_examples=150)
@given(
    chosen=oracle_settings(),
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    num_steps=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    is_lion=st.booleans(),
)
def test_follows_the_papers_formulas(
    chosen: oracle.Settings, shape: tuple[int, ...], num_steps: int, seed: int, is_lion: bool
) -> None:
    param = normal(seed, shape, torch.float64).requires_grad_()
    state = oracle.State(param.detach().numpy().copy())
    options = dict(vars(chosen))
    if is_lion:
        del options["eps"]
    opt = (CautiousLion if is_lion else CautiousAdamW)([param], **options)
    advance = oracle.lion if is_lion else oracle.adamw
    for step in range(num_steps):
        param.grad = normal(seed + step + 1, shape, torch.float64)
        opt.step()
        advance(state, param.grad.numpy(), chosen)
        assert opt.alignment == {0: pytest.approx(state.mask_mean)}
        np.testing.assert_allclose(param.detach().numpy(), state.p, rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(opt.state[param]["exp_avg"].numpy(), state.m, atol=1e-14)
    if not is_lion:
        np.testing.assert_allclose(opt.state[param]["exp_avg_sq"].numpy(), state.v, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_with_every_sign_in_agreement_it_is_adamw(dtype: torch.dtype, tolerance: float) -> None:
    ours, theirs = (normal(1, (7, 5), dtype).requires_grad_() for _ in range(2))
    signs = normal(2, (7, 5), dtype).sign()  # always the same: the moment never disagrees
    options: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.2}
    opt = CautiousAdamW([ours], **options)
    reference = torch.optim.AdamW([theirs], **options)
    for step in range(6):
        ours.grad = normal(10 + step, (7, 5), dtype).abs() * signs
        theirs.grad = ours.grad.clone()
        opt.step()
        reference.step()
    assert opt.alignment == {0: 1.0}
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for key in ("exp_avg", "exp_avg_sq", "step"):
        found, expected = opt.state[ours][key], reference.state[theirs][key]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@BOTH
def test_nan_propagates_to_state_and_parameter(optimizer: type[CautiousOptimizer]) -> None:
    param = torch.ones(3, requires_grad=True)
    opt = optimizer([param])  # type: ignore[call-arg]
    param.grad = torch.tensor([1.0, NAN, -1.0])
    opt.step()
    expected = [False, True, False]
    assert param.isnan().tolist() == expected
    for key, value in opt.state[param].items():
        assert key == "step" or value.isnan().tolist() == expected, key
    assert opt.alignment == {0: pytest.approx(2 / 3)}


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_rounded_once(
    optimizer: Callable[..., CautiousOptimizer], dtype: torch.dtype
) -> None:
    half = normal(1, (50,), dtype).requires_grad_()
    opt = optimizer([half], lr=0.1, weight_decay=0.1)
    for step in range(3):
        full = half.detach().float().requires_grad_()
        twin = optimizer([full], lr=0.1, weight_decay=0.1)
        if step:
            state = opt.state[half]
            twin.state[full] = {key: value.clone() for key, value in state.items()}
        half.grad = normal(10 + step, (50,), dtype)
        full.grad = half.grad.float()
        opt.step()
        twin.step()
        assert torch.equal(half, full.to(dtype))
        for key, value in twin.state[full].items():
            assert opt.state[half][key].dtype == torch.float32
            assert torch.equal(opt.state[half][key], value), key


class HostReads(TorchDispatchMode):
    """Keeps every tensor whose value the host reads: on an accelerator each such read waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.data_dependent_output in func.tags:
            self.read.append(args[0])
        return func(*args, **(kwargs or {}))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_reads_nothing_but_the_step_numbers(
    optimizer: Callable[..., CautiousOptimizer], dtype: torch.dtype
) -> None:
    params = [torch.ones(3, dtype=dtype).requires_grad_() for _ in range(2)]
    opt = optimizer(params, weight_decay=0.1, cautious_weight_decay=True)
    for _ in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        with HostReads() as host:
            opt.step()
        steps = {id(opt.state[param]["step"]) for param in params}
        assert {id(tensor) for tensor in host.read} == steps
    assert opt.alignment == {0: 1.0, 1: 1.0}
