"""Per-sequence cross-entropy that neither copies nor keeps the logits in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from effx_dist.errors import LayoutMismatchError

_BLOCK_VALUES = 1 << 24  # logits converted at a time: 64 MiB in float32


def sequence_losses(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100
) -> torch.Tensor:
    """Mean cross-entropy of each sequence over its own targets: ``[batch]``, float32.

    ``labels[b, t]`` is the target of ``logits[b, t]``: they are aligned, and **no shift is done here**. For a causal
    language model pass ``logits[:, :-1]`` and ``tokens[:, 1:]`` (views will do).

    A sequence without any target gives 0 with a zero gradient. Recorded by a sampler, that is a low loss: the sample
    may be left out in later epochs, which costs nothing, as it teaches nothing.

    Computed in float32 (float64 for float64 logits) by blocks of at most 64 MiB: half-precision logits are neither
    copied whole nor kept a second time for the backward pass. The logits must span the whole vocabulary; second
    derivatives are not available. No communication is performed.

    Args:
        logits: ``[batch, sequence, vocabulary]``, or ``[batch, vocabulary]`` with one target a sample.
        labels: ``[batch, sequence]`` or ``[batch]``, int64, each in [0, vocabulary) or ``ignore_index``.
        ignore_index: Label of positions that are not targets.

    Raises:
        LayoutMismatchError: The shapes do not belong together.
    """
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise LayoutMismatchError(
            f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}: must be [batch, sequence, vocabulary] and "
            "[batch, sequence]; shift them before, logits[:, :-1] against tokens[:, 1:]"
        )
    is_target = labels != ignore_index
    targets = labels.masked_fill(~is_target, 0)
    if logits.dim() == 2:
        losses = _token_losses(logits[None], targets[None])[0][:, None]
        is_target = is_target[:, None]
    else:
        losses = _token_losses(logits.flatten(1, -2), targets.flatten(1))
        is_target = is_target.flatten(1)
    num_targets = is_target.sum(dim=1).clamp(min=1)
    return torch.where(is_target, losses, 0).sum(dim=1) / num_targets


def _token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = _TokenLosses.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _TokenLosses(torch.autograd.Function):
    """``logsumexp(logits) - logits[target]`` for each position; keeps the logits as they are and one number each."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        normalisers = logits.new_empty(targets.shape, dtype=dtype)
        losses = torch.empty_like(normalisers)
        for place in _blocks(logits):
            block = logits[place].to(dtype)
            normalisers[place] = block.logsumexp(dim=-1)
            chosen = block.gather(-1, targets[place].unsqueeze(-1)).squeeze(-1)
            losses[place] = normalisers[place] - chosen
        ctx.save_for_backward(logits, targets, normalisers)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for place in _blocks(logits):
            block = (logits[place].to(normalisers.dtype) - normalisers[place].unsqueeze(-1)).exp_()
            factor = upstream[place].unsqueeze(-1)
            block.mul_(factor).scatter_add_(-1, targets[place].unsqueeze(-1), -factor)
            gradient[place] = torch.where(factor == 0, 0, block)  # an ignored position may hold inf
        return gradient, None


def _blocks(logits: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Indices of [rows, vocabulary] blocks; one sequence at a time, so that a shifted view is never copied whole."""
    batch, length, vocabulary = logits.shape
    num_rows = max(1, _BLOCK_VALUES // max(1, vocabulary))
    for sequence in range(batch):
        for start in range(0, length, num_rows):
            yield sequence, slice(start, start + num_rows)
