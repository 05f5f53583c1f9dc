"""The cautious mask, its scale and the weight decays, function by function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.core import cautious
from tests.random_values import random_values

NAN, INF = float("nan"), float("inf")
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-30, -1e-30, 1.0, -2.0, 3e38, -3e38, INF, -INF, NAN]


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


def all_steps(values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every function that writes, once on param, update, grad; all tensors that come out."""
    decayed, cautiously, stepped = (values[0].clone() for _ in range(3))
    update, grad = values[1:]
    cautious.decay_(decayed, 1 - 1e-2 * 0.1)
    cautious.cautious_decay_(cautiously, update, 1 - 1e-2 * 0.1)
    step_size = torch.tensor(0.0123, dtype=stepped.dtype)
    cautious.cautious_step_(stepped, update, cautious.signs_agree(update, grad), step_size)
    return [decayed, cautiously, stepped]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_operation_rounds_once_like_numpy(dtype: torch.dtype) -> None:
    values = [random_values(1000, seed, dtype) for seed in range(3)]
    p, u, g = (value.numpy() for value in values)
    scalar = p.dtype.type
    with np.errstate(under="ignore"):
        agree = np.sign(u) * np.sign(g) > 0
        opposed = np.sign(u) * np.sign(p) < 0
        decayed = p * scalar(1 - 1e-2 * 0.1)
        stepped = p - (u * agree.astype(p.dtype)) * scalar(0.0123)
    expected = [decayed, np.where(opposed, p, decayed), stepped]
    for found, exact in zip(all_steps(values), expected, strict=True):
        assert np.array_equal(found.numpy(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_element_does_not_depend_on_where_its_shard_is_cut(dtype: torch.dtype) -> None:
    whole = [random_values(240, seed, dtype) for seed in range(3)]
    of_whole = all_steps(whole)
    for size in range(1, 201):
        for offset in (0, 1, 2, 3, 5, 7, 8, 15, 16, 31, 33):
            cut = slice(offset, offset + size)
            of_piece = all_steps([value[cut] for value in whole])
            for piece, expected in zip(of_piece, of_whole, strict=True):
                assert torch.equal(piece, expected[cut]), (size, offset)


def test_strided_tensors_give_the_same_bits() -> None:
    whole = [random_values(240, seed) for seed in range(3)]
    of_strided = all_steps([value.view(20, 12).t() for value in whole])
    for strided, expected in zip(of_strided, all_steps(whole), strict=True):
        assert torch.equal(strided.t().reshape(-1), expected)


def test_cautious_decay_is_plain_decay_or_nothing() -> None:
    param, update = random_values(1000, 3), random_values(1000, 4)
    plain, masked = param.clone(), param.clone()
    cautious.decay_(plain, 0.997)
    cautious.cautious_decay_(masked, update, 0.997)
    opposed = torch.tensor(param.double().numpy() * update.double().numpy() < 0)
    assert opposed.any()
    assert not opposed.all()
    assert torch.equal(masked, torch.where(opposed, param, plain))


def test_a_masked_nan_reaches_the_parameter_and_no_other_element() -> None:
    param = torch.ones(4)
    update, grad = torch.tensor([1.0, NAN, INF, -1.0]), torch.tensor([1.0, 1.0, -1.0, 1.0])
    mask = cautious.signs_agree(update, grad)
    assert mask.tolist() == [True, False, False, False]
    cautious.cautious_step_(param, update, mask, torch.tensor(0.5))
    assert param.isnan().tolist() == [False, True, True, False], "infinity times zero is NaN"
    assert param[[0, 3]].tolist() == [0.5, 1]
