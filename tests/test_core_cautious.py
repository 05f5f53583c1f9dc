"""The arithmetic of the cautious optimisers, function by function."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.core import cautious

NAN, INF = float("nan"), float("inf")
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 1.0, -2.0, 3e38, -3e38, INF, -INF, NAN]
BETAS = (0.9, 0.999)


def random_values(num: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal values over many orders of magnitude, with zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num, generator=generator, dtype=torch.float64)
    values *= torch.pow(10.0, torch.randint(-6, 3, (num,), generator=generator))
    values[torch.rand(num, generator=generator) < 0.05] = 0
    return values.to(dtype)


def test_signs_agree_as_the_exact_product_does() -> None:
    update = torch.tensor(SPECIAL).repeat_interleave(len(SPECIAL))
    grad = torch.tensor(SPECIAL).repeat(len(SPECIAL))
    with np.errstate(invalid="ignore"):
        exact = update.double().numpy() * grad.double().numpy()  # no underflow in float64
    assert np.array_equal(cautious.signs_agree(update, grad).numpy(), exact > 0)
    assert np.array_equal(
        cautious.signs_not_opposed(update, grad).numpy(),
        (exact >= 0) | (np.isnan(exact) & ~update.isnan().numpy() & ~grad.isnan().numpy()),
    ), "zero times infinity is not opposed; NaN is"


def test_an_underflowing_product_still_agrees() -> None:
    tiny = torch.tensor([1e-30])
    assert (tiny * tiny).item() == 0  # what the published code compares
    assert cautious.count_agreement(tiny, tiny).item() == 1


def test_count_of_an_empty_piece_is_zero() -> None:
    count = cautious.count_agreement(torch.empty(0), torch.empty(0))
    assert count.dtype == torch.int64
    assert count.item() == 0


@given(numel=st.integers(1, 2**52), data=st.data())
def test_scale_is_that_of_the_integers(numel: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, numel))
    scale = cautious.scale_from_count(torch.tensor([count]), torch.tensor([numel]))
    assert scale.dtype == torch.float64
    expected = 1 / max(count / numel, 1e-3)
    assert scale.item() == pytest.approx(expected, rel=1e-15)


def test_counts_beyond_int32_and_float32() -> None:
    pieces = torch.tensor([2**31 + 1, 2**31 + 3, 5], dtype=torch.int64)  # three ranks' counts
    numel = torch.tensor(2 * int(pieces.sum()))
    assert cautious.fraction_from_count(pieces.sum(), numel).item() == 0.5
    one_less = cautious.fraction_from_count(pieces.sum() - 1, numel).item()
    assert one_less == (2**32 + 8) / (2**33 + 18)
    assert one_less < 0.5


def test_scale_is_bounded_and_defined_without_elements() -> None:
    scale = cautious.scale_from_count(torch.tensor([0, 0, 1]), torch.tensor([5, 0, 10_000_000]))
    assert scale.tolist() == pytest.approx([1000, 1000, 1000])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_round_like_numpy(dtype: torch.dtype) -> None:
    m, v, g = (random_values(1000, seed, dtype) for seed in range(3))
    scalar = m.numpy().dtype.type
    first = m.numpy() * scalar(0.9) + g.numpy() * scalar(1 - 0.9)
    second = v.numpy() * scalar(0.999) + g.numpy() * g.numpy() * scalar(1 - 0.999)
    cautious.adamw_moments_(m, v, g, BETAS)
    assert np.array_equal(m.numpy(), first)
    assert np.array_equal(v.numpy(), second)
    lion = m.numpy() * scalar(0.98) + g.numpy() * scalar(1 - 0.98)
    cautious.lion_moment_(m, g, 0.98)
    assert np.array_equal(m.numpy(), lion)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_rounds_like_numpy(dtype: torch.dtype) -> None:
    """Every operation is rounded once and none is fused, so NumPy finds the same bits."""
    m, v = random_values(1000, 1, dtype), random_values(1000, 2, dtype).abs()
    update = cautious.adamw_update(m, v, 3.0, BETAS, 1e-8)
    scalar = m.numpy().dtype.type
    correction1, correction2 = 1 / (1 - 0.9**3), 1 / np.sqrt(1 - 0.999**3)
    denominator = np.sqrt(v.numpy()) * scalar(correction2) + scalar(1e-8)
    expected = m.numpy() * scalar(correction1) / denominator
    if dtype == torch.float32:
        assert np.array_equal(update.numpy(), expected)
    else:  # the root itself may be an ulp off
        np.testing.assert_allclose(update.numpy(), expected, rtol=1e-15)


def all_steps(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every function once on param, exp_avg, exp_avg_sq, grad; all tensors that come out of it."""
    p, m, v, g = (value.clone() for value in values)
    v = v.abs()
    cautious.adamw_moments_(m, v, g, BETAS)
    update = cautious.adamw_update(m, v, 2.0, BETAS, 1e-8)
    lion = cautious.lion_update(m, g, 0.95)
    cautious.cautious_decay_(p, update, 1e-2, 0.1)
    cautious.decay_(p, 1e-2, 0.1)
    step_size = torch.tensor(0.0123, dtype=p.dtype)
    cautious.cautious_step_(p, update, cautious.signs_agree(m, g), step_size)
    cautious.cautious_step_(p, lion, cautious.signs_agree(lion, g), step_size)
    cautious.lion_moment_(m, g, 0.98)
    return [p, m, v, update, lion]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_does_not_depend_on_where_its_shard_is_cut(dtype: torch.dtype) -> None:
    whole = [random_values(240, seed, dtype) for seed in range(4)]
    of_whole = all_steps(whole)
    for size in range(1, 201):
        for offset in (0, 1, 2, 3, 5, 7, 8, 15, 16, 31, 33):
            cut = slice(offset, offset + size)
            of_piece = all_steps([value[cut] for value in whole])
            for piece, expected in zip(of_piece, of_whole, strict=True):
                assert torch.equal(piece, expected[cut]), (size, offset)


def test_strided_tensors_give_the_same_bits() -> None:
    whole = [random_values(240, seed) for seed in range(4)]
    of_strided = all_steps([value.view(20, 12).t() for value in whole])
    for strided, expected in zip(of_strided, all_steps(whole), strict=True):
        assert torch.equal(strided.t().reshape(-1), expected)


def test_cautious_decay_is_plain_decay_or_nothing() -> None:
    param, update = random_values(1000, 3), random_values(1000, 4)
    plain, masked = param.clone(), param.clone()
    cautious.decay_(plain, 1e-2, 0.3)
    cautious.cautious_decay_(masked, update, 1e-2, 0.3)
    opposed = torch.tensor(param.double().numpy() * update.double().numpy() < 0)
    assert opposed.any()
    assert not opposed.all()
    assert torch.equal(masked, torch.where(opposed, param, plain))


def adamw_after(grad: torch.Tensor) -> list[torch.Tensor]:
    p, m, v = torch.ones(4), torch.full((4,), 0.5), torch.ones(4)
    cautious.adamw_moments_(m, v, grad, BETAS)
    update = cautious.adamw_update(m, v, 2.0, BETAS, 1e-8)
    cautious.cautious_step_(p, update, cautious.signs_agree(m, grad), torch.tensor(0.1))
    return [p, m, v]


def lion_after(grad: torch.Tensor) -> list[torch.Tensor]:
    p, m = torch.ones(4), torch.full((4,), 0.5)
    update = cautious.lion_update(m, grad, 0.9)
    cautious.cautious_step_(p, update, cautious.signs_agree(update, grad), torch.tensor(0.1))
    cautious.lion_moment_(m, grad, 0.99)
    return [p, m]


@pytest.mark.parametrize("after", [adamw_after, lion_after])
def test_nan_spreads_to_its_own_element_and_no_further(
    after: Callable[[torch.Tensor], list[torch.Tensor]],
) -> None:
    poisoned = after(torch.tensor([1.0, NAN, -1.0, 0.0]))
    clean = after(torch.tensor([1.0, 1.0, -1.0, 0.0]))
    for bad, good in zip(poisoned, clean, strict=True):
        assert bad.isnan().tolist() == [False, True, False, False]
        assert torch.equal(bad[[0, 2, 3]], good[[0, 2, 3]])


def test_lion_update_is_a_sign() -> None:
    grad = torch.tensor([2.0, -3.0, 0.0, INF, -INF])
    update = cautious.lion_update(torch.zeros(5), grad, 0.9)
    assert update.tolist() == [1, -1, 0, 1, -1]
