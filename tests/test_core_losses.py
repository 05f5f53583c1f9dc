"""Per-sequence losses against a float64 oracle, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from effx_dist.core import losses as module
from effx_dist.core.losses import sequence_losses
from effx_dist.errors import LayoutMismatchError

IGNORED = -100


def _batch(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(4, 9, 17, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, 17, (4, 9), generator=generator)
    labels[0, 3:] = IGNORED
    labels[2] = IGNORED
    return logits, labels


def _oracle(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, target in zip(logits.double(), labels, strict=True):
        used = target != IGNORED
        rows.append(
            functional.cross_entropy(row[used], target[used]) if used.any() else row.sum() * 0
        )
    return torch.stack(rows)


@pytest.mark.parametrize("block_values", [1, 40, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_values_and_gradients(
    dtype: torch.dtype, block_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_VALUES", block_values)
    logits, labels = _batch(dtype)
    upstream = torch.tensor([1.0, -2.0, 3.0, 0.5])
    mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses = sequence_losses(mine, labels)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    losses.backward(upstream.to(losses.dtype))
    _oracle(exact, labels).backward(upstream.double())
    torch.testing.assert_close(losses.double(), _oracle(logits, labels), rtol=1e-5, atol=1e-5)
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-5)
    assert mine.grad is not None
    assert mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad.double(), exact.grad, rtol=tolerance, atol=1e-5)


def test_half_precision_losses_are_not_rounded_to_half_precision() -> None:
    logits, labels = _batch(torch.bfloat16)
    exact = _oracle(logits, labels)
    rounded = functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
    )
    assert rounded.dtype == torch.bfloat16
    assert (sequence_losses(logits, labels).double() - exact).abs().max() < 1e-5


def test_no_target_gives_zero_and_a_zero_gradient_even_beside_infinities() -> None:
    logits, labels = _batch()
    logits[2, 0, 0] = float("inf")
    logits.requires_grad_()
    losses = sequence_losses(logits, labels)
    losses.sum().backward()
    assert losses[2] == 0
    assert logits.grad is not None
    assert (logits.grad[2] == 0).all()


def test_gradient_check_in_double() -> None:
    logits, labels = _batch(torch.float64)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sequence_losses(x, labels), (logits,))


def test_shifted_views_and_single_targets() -> None:
    logits, labels = _batch()
    shifted = sequence_losses(logits[:, :-1], labels[:, 1:])
    torch.testing.assert_close(shifted.double(), _oracle(logits[:, :-1], labels[:, 1:]))
    single = sequence_losses(logits[:, 0], labels[:, 0])
    exact = functional.cross_entropy(logits[:, 0], labels[:, 0], reduction="none")
    torch.testing.assert_close(single, exact)


def test_other_ignore_index() -> None:
    logits, labels = _batch()
    masked = labels.masked_fill(labels == IGNORED, 0)
    masked[1, 0] = 0
    expected = _oracle(logits, masked.masked_fill(masked == 0, IGNORED))
    torch.testing.assert_close(sequence_losses(logits, masked, ignore_index=0).double(), expected)


def test_only_the_logits_themselves_are_kept_for_backward() -> None:
    logits, labels = _batch(torch.bfloat16)
    logits.requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sequence_losses(logits, labels)
    big = [t for t in kept if t.numel() >= logits.numel()]
    assert [t.data_ptr() for t in big] == [logits.data_ptr()]


@pytest.mark.parametrize("shape", [(4, 8), (4,), (9, 4)])
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutMismatchError, match="shift them before"):
        sequence_losses(_batch()[0], torch.zeros(shape, dtype=torch.int64))
