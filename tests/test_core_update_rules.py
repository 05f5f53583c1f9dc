"""The update rules, against the papers' formulas and against their own first walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.core import cautious
from effx_dist.core.update_rules import SGD, AdamW, Lion, NesterovSGD, UpdateRule
from tests import cautious_oracle as oracle
from tests.random_values import random_values

NAN, INF = float("nan"), float("inf")
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-20, 1.0, -2.0, 3e18, -3e38, INF, -INF, NAN]
RULES = [AdamW(), Lion(), SGD(), NesterovSGD()]
SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8, "momentum": 0.9}
EACH = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def random_moments(
    rule: UpdateRule, num: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    first, second = random_values(num, 11, dtype), random_values(num, 12, dtype).abs()
    return [first, second][: len(rule.moment_names)]


def signs(values: torch.Tensor) -> list[float | None]:
    """Per element -1, 0 or 1, None for NaN."""
    return [None if np.isnan(sign) else sign for sign in np.sign(values.double().numpy())]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_walk_gives_the_signs_of_the_second_and_changes_nothing(
    rule: UpdateRule, dtype: torch.dtype
) -> None:
    moments, grad = random_moments(rule, 2000, dtype), random_values(2000, 3, dtype)
    before = [value.clone() for value in (*moments, grad)]
    own = rule.coefficients(SETTINGS, 3.0)
    told = rule.signs(own, moments, grad)
    assert all(map(torch.equal, (*moments, grad), before))
    assert all(told.data_ptr() != value.data_ptr() for value in (*moments, grad))
    update, told_again = rule.advance_(own, moments, grad)
    assert torch.equal(told, told_again), (
        "bit for bit, so that the mask is the one that was counted"
    )
    assert signs(update) == signs(told)
    assert torch.equal(grad, before[-1])
    assert not torch.equal(moments[0], before[0])


@EACH
def test_special_values(rule: UpdateRule) -> None:
    """Both walks agree, and what is not finite stays in its own element."""
    first = torch.tensor(SPECIAL).repeat_interleave(len(SPECIAL))
    grad = torch.tensor(SPECIAL).repeat(len(SPECIAL))
    moments = [first, torch.ones_like(first)][: len(rule.moment_names)]
    is_clean = first.isfinite() & grad.isfinite()
    own = rule.coefficients(SETTINGS, 2.0)
    clean_moments = [torch.where(is_clean, moment, 0.0) for moment in moments]
    clean_update, _ = rule.advance_(own, clean_moments, torch.where(is_clean, grad, 0.0))
    told = rule.signs(own, moments, grad)
    update, told_again = rule.advance_(own, moments, grad)
    same_bits = {"rtol": 0, "atol": 0, "equal_nan": True}  # finite values may overflow to NaN
    torch.testing.assert_close(told, told_again, **same_bits)
    torch.testing.assert_close(update[is_clean], clean_update[is_clean], **same_bits)
    assert update[grad.isnan()].isnan().all(), "a NaN gradient is not hidden"
    assert all(moment[grad.isnan()].isnan().all() for moment in moments)


def test_adamw_keeps_the_sign_of_an_update_that_underflows() -> None:
    rule = AdamW()
    moments = [torch.tensor([-1e-38]), torch.tensor([1e30])]
    own = rule.coefficients(SETTINGS, 1000.0)
    update, told = rule.advance_(own, moments, torch.tensor([-1e-38]))
    assert update.item() == 0
    assert told.item() < 0
    assert cautious.count_agreement(told, torch.tensor([-1e-38])) == 1


def test_lion_is_a_sign() -> None:
    rule = Lion()
    grad = torch.tensor([2.0, -3.0, 0.0, INF, -INF])
    update, _ = rule.advance_(rule.coefficients(SETTINGS, 1.0), [torch.zeros(5)], grad)
    assert update.tolist() == [1, -1, 0, 1, -1]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_does_not_depend_on_where_its_shard_is_cut(
    rule: UpdateRule, dtype: torch.dtype
) -> None:
    own = rule.coefficients(SETTINGS, 3.0)

    def results(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        *moments, grad = (value.clone() for value in values)
        told = rule.signs(own, moments, grad)
        return [told, *rule.advance_(own, moments, grad), *moments]

    whole = [*random_moments(rule, 240, dtype), random_values(240, 3, dtype)]
    of_whole = results(whole)
    for size in (*range(1, 41), 63, 64, 65, 127, 200):
        for offset in (0, 1, 2, 3, 5, 7, 8, 15, 16, 31, 33):
            cut = slice(offset, offset + size)
            for piece, expected in zip(results([v[cut] for v in whole]), of_whole, strict=True):
                assert torch.equal(piece, expected[cut]), (size, offset)
    of_strided = results([value.view(20, 12).t() for value in whole])
    for strided, expected in zip(of_strided, of_whole, strict=True):
        assert torch.equal(strided.t().reshape(-1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_rounds_every_operation_once_like_numpy(dtype: torch.dtype) -> None:
    """What kernels are held to, in this order of operations."""
    rule = AdamW()
    moments, grad = random_moments(rule, 1000, dtype), random_values(1000, 3, dtype)
    m, v, g = moments[0].numpy().copy(), moments[1].numpy().copy(), grad.numpy()
    scalar = g.dtype.type
    beta1, rest1, beta2, rest2, correction, root_correction, eps = (
        scalar(value) for value in rule.coefficients(SETTINGS, 3.0)
    )
    m = m * beta1 + g * rest1
    v = v * beta2 + (g * g) * rest2
    expected = (m * correction) / (np.sqrt(v) * root_correction + eps)
    update, _ = rule.advance_(rule.coefficients(SETTINGS, 3.0), moments, grad)
    assert np.array_equal(moments[0].numpy(), m)
    assert np.array_equal(moments[1].numpy(), v)
    if dtype == torch.float32:
        assert np.array_equal(update.numpy(), expected)
    else:  # the root itself may be an ulp off
        np.testing.assert_allclose(update.numpy(), expected, rtol=1e-15)


@EACH
def test_coefficients_are_those_of_a_step_that_lies_on_a_device(rule: UpdateRule) -> None:
    steps = torch.tensor([1.0, 2.0, 1000.0], dtype=torch.float64)
    by_tensor = rule.coefficients(SETTINGS, steps)
    for i, step in enumerate(steps.tolist()):
        for found, expected in zip(by_tensor, rule.coefficients(SETTINGS, step), strict=True):
            value = found[i].item() if isinstance(found, torch.Tensor) else found
            assert value == pytest.approx(expected, rel=1e-15)


def follow(rule: UpdateRule, chosen: dict[str, Any], grads: Sequence[np.ndarray]) -> list[Any]:
    """Parameter and first moment after cautious steps of ``rule``, as a caller puts them together."""
    param = torch.tensor(np.linspace(-1, 1, len(grads[0])))
    moments = [torch.zeros_like(param) for _ in rule.moment_names]
    for step, whole in enumerate(grads, start=1):
        grad = torch.tensor(-whole if chosen["maximize"] else whole)
        own = rule.coefficients(chosen, float(step))
        count = cautious.count_agreement(rule.signs(own, moments, grad), grad)
        scale = cautious.scale_from_count(count, torch.tensor(grad.numel()))
        update, told = rule.advance_(own, moments, grad)
        factor = 1 - chosen["lr"] * chosen["weight_decay"]
        if chosen["cautious_weight_decay"]:
            cautious.cautious_decay_(param, told, factor)
        else:
            cautious.decay_(param, factor)
        mask = cautious.signs_agree(told, grad)
        cautious.cautious_step_(param, update, mask, scale * chosen["lr"])
    return [param.numpy(), moments[0].numpy()]


Advance = Callable[[oracle.State, Any, oracle.Settings], None]


@settings(max_examples=150)
@given(
    chosen=st.builds(
        oracle.Settings,
        lr=st.floats(0, 1),
        betas=st.tuples(st.floats(0, 0.9999), st.floats(0, 0.9999)),
        eps=st.sampled_from([1e-16, 1e-8, 1e-3, 1.0]),
        weight_decay=st.sampled_from([0.0, 1e-2, 0.5]),
        cautious_weight_decay=st.booleans(),
        maximize=st.booleans(),
    ),
    momentum=st.floats(0.01, 0.9999),
    num_elements=st.integers(0, 9),
    num_steps=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_follows_the_papers_formulas(
    chosen: oracle.Settings, momentum: float, num_elements: int, num_steps: int, seed: int
) -> None:
    grads = list(np.random.default_rng(seed).normal(size=(num_steps, num_elements)))
    advances: dict[str, Advance] = {
        "adamw": oracle.adamw,
        "lion": oracle.lion,
        "sgd": lambda state, grad, chosen: oracle.sgd(state, grad, chosen, momentum),
        "nesterov": lambda state, grad, chosen: oracle.sgd(state, grad, chosen, momentum, True),
    }
    for rule in RULES:
        state = oracle.State(np.linspace(-1, 1, num_elements))
        for grad in grads:
            advances[rule.name](state, grad, chosen)
        param, moment = follow(rule, {**vars(chosen), "momentum": momentum}, grads)
        np.testing.assert_allclose(param, state.p, rtol=1e-11, atol=1e-11, err_msg=rule.name)
        np.testing.assert_allclose(moment, state.m, rtol=1e-13, atol=1e-14, err_msg=rule.name)
