"""Any optimizer made cautious from outside, on one device: its arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import Optimizer

import effx_dist
from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD, CautiousWrapper, cautious
from tests.inner_optimizers import NormalisedMomentum, PlainLion

NAN, INF = float("nan"), float("inf")
NUM_STEPS = 60
SHAPES: list[tuple[int, ...]] = [(40, 7), (5,), (), (0, 3), (1,)]


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def new_params(dtype: torch.dtype = torch.float64, shapes: Any = SHAPES) -> list[torch.Tensor]:
    return [normal(seed, shape, dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def set_grads(opt: Optimizer, step: int) -> None:
    params = [param for group in opt.param_groups for param in group["params"]]
    for index, param in enumerate(params):
        param.grad = normal(1000 + 10 * step + index, tuple(param.shape), param.dtype)


def params_of(opt: Optimizer) -> list[torch.Tensor]:
    return [param.detach().clone() for group in opt.param_groups for param in group["params"]]


def rounding_of(num_steps: int, params: list[torch.Tensor]) -> float:
    """Bound of what rounding a parameter, and its difference, costs in float64 in so many steps.

    Each step rounds the parameter at most three times, and the scale multiplies two of these errors. It
    is at most 5 on the vector of five, and below that on the matrix, whose signs are random.
    """
    largest = max(float(param.abs().max()) for param in params if param.numel())
    return num_steps * 11 * 2**-53 * (largest + 1)


# What to wrap, and whether its weight decay is decoupled.
CASES: list[tuple[Callable[..., Optimizer], dict[str, Any], bool]] = [
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2}, True),
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2, "foreach": True}, True),
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2, "fused": True}, True),
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.2, "maximize": True}, True),
    (
        torch.optim.AdamW,
        {"lr": torch.tensor([0.05], dtype=torch.float64), "weight_decay": 0.2},
        True,
    ),
    (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.2}, False),
    (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.2, "maximize": True}, False),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}, False),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, False),
    (torch.optim.RMSprop, {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}, False),
    (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.2}, False),
    (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.2, "decoupled_weight_decay": True}, True),
    (torch.optim.RAdam, {"lr": 0.02, "weight_decay": 0.2, "decoupled_weight_decay": True}, True),
    (torch.optim.Adagrad, {"lr": 0.1, "weight_decay": 0.2}, False),
    (torch.optim.Adamax, {"lr": 0.02}, False),
    (torch.optim.Adadelta, {"lr": 0.5, "weight_decay": 0.5}, False),
    (torch.optim.ASGD, {"lr": 0.1, "weight_decay": 0.5}, False),
    (torch.optim.Rprop, {"lr": 0.01}, False),
    (torch.optim.Adafactor, {"lr": 0.05, "weight_decay": 0.2}, True),
    (NormalisedMomentum, {"lr": 0.05, "weight_decay": 0.2}, False),
]


@pytest.mark.parametrize(
    ("make", "options", "is_decoupled"),
    CASES,
    ids=[f"{make.__name__}-{i}" for i, (make, _, _) in enumerate(CASES)],  # type: ignore[attr-defined]
)
def test_follows_the_formula_for_any_rule(
    make: Callable[..., Optimizer], options: dict[str, Any], is_decoupled: bool
) -> None:
    """Beside it the bare optimizer steps from the same parameters, and NumPy masks what it did."""
    shapes = [(40, 7), (5, 1), (1, 3), (2, 2)]
    if make is not torch.optim.Adafactor:  # it has no moments of an empty or 0-d parameter
        shapes = [*SHAPES, *shapes]  # type: ignore[list-item]
    wrapped = cautious(make(new_params(shapes=shapes), **options))
    bare = make(new_params(shapes=shapes), **options)
    if is_decoupled:
        bare.param_groups[0]["weight_decay"] = 0.0
    sign = -1 if options.get("maximize") else 1
    keep = 1 - float(options["lr"]) * options["weight_decay"] if is_decoupled else 1.0
    for step in range(8):
        before = [param.numpy() * keep for param in params_of(wrapped)]
        for twin, old in zip(bare.param_groups[0]["params"], before, strict=True):
            twin.data.copy_(torch.as_tensor(old))
        for opt in (wrapped, bare):
            set_grads(opt, step)
            opt.step()
        found = params_of(wrapped)
        for index, (old, twin) in enumerate(zip(before, params_of(bare), strict=True)):
            update = old - twin.numpy()
            grad = sign * bare.param_groups[0]["params"][index].grad.numpy()
            mask = (update * grad > 0).astype(np.float64)
            fraction = float(mask.mean()) if mask.size else 0.0
            expected = old - mask * update / max(fraction, 1e-3)
            np.testing.assert_allclose(found[index].numpy(), expected, rtol=1e-13, atol=1e-13)
            assert wrapped.alignment[index] == pytest.approx(fraction)
    has_momentum_or_decay = make is not torch.optim.Adafactor
    assert any(0 < value < 1 for value in wrapped.alignment.values()) == has_momentum_or_decay


# A wrapped optimizer beside the one that is cautious itself.
PAIRS: dict[str, tuple[Callable[..., Optimizer], Callable[..., Any]]] = {
    "adamw": (
        lambda params: CautiousAdamW(params, lr=0.05, weight_decay=0.2),
        lambda params: cautious(torch.optim.AdamW(params, lr=0.05, weight_decay=0.2)),
    ),
    "adamw, fused": (
        lambda params: CautiousAdamW(params, lr=0.05, weight_decay=0.2),
        lambda params: cautious(torch.optim.AdamW(params, lr=0.05, weight_decay=0.2, fused=True)),
    ),
    "adamw, maximize": (
        lambda params: CautiousAdamW(params, lr=0.05, maximize=True),
        lambda params: cautious(torch.optim.AdamW(params, lr=0.05, maximize=True)),
    ),
    "sgd": (
        lambda params: CautiousSGD(params, lr=0.05),
        lambda params: cautious(torch.optim.SGD(params, lr=0.05, momentum=0.9)),
    ),
    "nesterov": (
        lambda params: CautiousSGD(params, lr=0.05, nesterov=True),
        lambda params: cautious(torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)),
    ),
    "lion": (
        lambda params: CautiousLion(params, lr=0.02, betas=(0.95, 0.98), weight_decay=0.2),
        lambda params: cautious(
            PlainLion(params, lr=0.02, weight_decay=0.2), decoupled_weight_decay=True
        ),
    ),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_is_the_optimizer_that_is_cautious_itself(pair: str) -> None:
    make_own, make_wrapped = PAIRS[pair]
    own, wrapped = make_own(new_params()), make_wrapped(new_params())
    for step in range(NUM_STEPS):
        for opt in (own, wrapped):
            set_grads(opt, step)
            opt.step()
        assert wrapped.alignment == own.alignment  # type: ignore[attr-defined]
        atol = rounding_of(step + 1, params_of(own))
        for found, expected in zip(params_of(wrapped), params_of(own), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_without_disagreement_it_is_the_bare_optimizer_with_its_decay() -> None:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.3}
    wrapped = cautious(torch.optim.AdamW(new_params(), **options))
    bare = torch.optim.AdamW(new_params(), **options)
    for _ in range(5):
        for opt in (wrapped, bare):
            set_grads(opt, 0)  # the same gradient again: no moment opposes it
            opt.step()
    assert {value for value in wrapped.alignment.values() if value} == {1.0}
    atol = rounding_of(5, params_of(bare))
    for found, expected in zip(params_of(wrapped), params_of(bare), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("make", "argument", "is_masked"),
    [
        (torch.optim.AdamW, None, False),
        (torch.optim.AdamW, True, False),
        (torch.optim.AdamW, False, True),
        (PlainLion, None, True),
        (PlainLion, True, False),
        (torch.optim.Muon, None, False),
        (torch.optim.Muon, False, True),
        (torch.optim.Adafactor, None, False),
    ],
)
def test_decoupled_decay_is_never_masked(
    make: Callable[..., Optimizer], argument: bool | None, is_masked: bool
) -> None:
    """Without a gradient in sight decay still shrinks; as a part of the update it does not."""
    param = normal(1, (4, 3)).requires_grad_()
    before = param.detach().clone()
    opt = cautious(make([param], lr=0.1, weight_decay=0.5), decoupled_weight_decay=argument)
    param.grad = torch.zeros_like(param)
    opt.step()
    assert torch.equal(param, before if is_masked else before * (1 - 0.1 * 0.5))
    assert opt.param_groups[0]["weight_decay"] == 0.5


def test_what_moves_by_less_than_an_ulp_does_not_agree() -> None:
    param = torch.tensor([1.0, 1e-6], requires_grad=True)
    opt = cautious(torch.optim.SGD([param], lr=1e-9))
    param.grad = torch.ones(2)
    opt.step()
    assert opt.alignment == {0: 0.5}
    assert param[0] == 1
    assert param[1].item() == pytest.approx(1e-6 - 2e-9, rel=1e-4), "all of the scale is its own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_are_scaled_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    wrapped = cautious(torch.optim.Adam(new_params(dtype), lr=0.3, eps=1e-3))
    bare = torch.optim.Adam(new_params(dtype), lr=0.3, eps=1e-3)
    for step in range(3):
        before = params_of(wrapped)
        for twin, old in zip(bare.param_groups[0]["params"], before, strict=True):
            twin.data.copy_(old)
        for opt in (wrapped, bare):
            set_grads(opt, step)
            opt.step()
        for index, (old, new) in enumerate(zip(before, params_of(bare), strict=True)):
            update = old.float() - new.float()
            mask = update * bare.param_groups[0]["params"][index].grad.float() > 0
            scale = torch.tensor(1 / max(wrapped.alignment[index], 1e-3))
            expected = (old.float() - update * mask * scale).to(dtype)
            assert torch.equal(params_of(wrapped)[index], expected)


def test_nan_and_infinity_reach_the_parameter_as_in_the_bare_optimizer() -> None:
    grad = torch.tensor([1.0, NAN, -1.0, INF])
    for make in (torch.optim.Adam, torch.optim.SGD):
        wrapped, bare = (torch.ones(4, requires_grad=True) for _ in range(2))
        for opt, param in ((cautious(make([wrapped])), wrapped), (make([bare]), bare)):
            param.grad = grad.clone()
            opt.step()
        assert wrapped.isfinite().tolist() == bare.isfinite().tolist()


def test_whole_matrices_after_the_orthogonalisation() -> None:
    """Muon: the update that is masked is the orthogonal one, not the momentum."""
    wrapped, bare = (normal(3, (6, 4), torch.float32).requires_grad_() for _ in range(2))
    opt = cautious(torch.optim.Muon([wrapped], lr=0.1, weight_decay=0.0))
    reference = torch.optim.Muon([bare], lr=0.1, weight_decay=0.0)
    old = bare.detach().clone()
    wrapped.grad = normal(4, (6, 4), torch.float32)
    bare.grad = wrapped.grad.clone()
    opt.step()
    reference.step()
    update = old - bare.detach()
    mask = update * bare.grad > 0
    assert opt.alignment == {0: mask.double().mean().item()}
    assert 0 < opt.alignment[0] < 1, "momentum alone would agree everywhere at the first step"
    torch.testing.assert_close(wrapped.detach(), old - mask * update / mask.float().mean())


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: torch.optim.LBFGS([p]), "LBFGS: .*several gradients"),
        (lambda p: CautiousAdamW([p]), "CautiousAdamW: is cautious already"),
        (lambda p: cautious(torch.optim.SGD([p])), "CautiousWrapper: is cautious already"),
        (lambda p: [p], "list: must be a torch.optim.Optimizer"),
        (
            lambda p: torch.optim.SGD([("w", p.detach().to(torch.complex64))]),
            r"w: dtype torch\.complex64 must be",
        ),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make: Callable[[Any], Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        cautious(make(torch.ones(2, requires_grad=True)))


@pytest.mark.parametrize("make", [torch.optim.SparseAdam, torch.optim.SGD])
def test_a_sparse_gradient_is_refused_before_anything_changes(make: Any) -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    opt = cautious(make([("table.weight", table.weight)]))
    before = table.weight.detach().clone()
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(LayoutMismatchError, match=r"table\.weight: .*torch\.sparse_coo"):
        opt.step()
    assert torch.equal(table.weight, before)
    assert not opt.state


def test_public_names() -> None:
    assert effx_dist.cautious is cautious
    assert effx_dist.CautiousSGD is CautiousSGD
    assert isinstance(cautious(PlainLion([torch.ones(1)])), CautiousWrapper)
    assert issubclass(CautiousWrapper, Optimizer)
