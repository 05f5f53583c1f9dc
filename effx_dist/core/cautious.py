"""The cautious mask (arXiv 2411.16085) as pure functions of tensors, for any update rule.

For gradient g and update u, with n elements in the *whole* parameter::

    mask  = 1[u * g > 0]                        one where the update agrees with the gradient
    scale = 1 / max(sum(mask) / n, 1e-3)
    p     = p - lr * scale * mask * u

A sharded parameter is right only if ``sum(mask)`` and ``n`` are those of the whole parameter, so
the work is split in two: count (:func:`count_agreement`, summed over ranks by the caller), then
step (:func:`cautious_step_`).

Every element is computed by two-operand operations alone. torch's fused forms (``lerp_``,
``addcmul_``, ``addcdiv_``, ``add_`` with ``alpha``) may contract to a fused multiply-add in the
vectorised body of a loop and not in its tail, so that a result would depend on where a shard is
cut. Names ending in ``_`` change their first arguments in place. All tensors of one call share a
shape and a floating dtype. No communication is performed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effx_dist.core.update_rules import Scalar

MIN_FRACTION = 1e-3
"""Lower bound of the fraction of agreeing elements, as published: the scale never exceeds 1000."""


def signs_agree(update: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``update * grad > 0`` elementwise, as bool. Zero or NaN on either side does not agree.

    The signs are compared rather than the product, which underflows to zero for values that are
    both tiny.
    """
    return ((update > 0) & (grad > 0)) | ((update < 0) & (grad < 0))


def signs_not_opposed(update: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """``update * param >= 0`` elementwise, as bool, by sign. Zero counts, NaN does not."""
    return ((update >= 0) & (param >= 0)) | ((update <= 0) & (param <= 0))


def count_agreement(update: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Number of elements of this piece whose signs agree: int64, 0-d; 0 if the piece is empty."""
    return signs_agree(update, grad).sum(dtype=torch.int64)


def fraction_from_count(count: torch.Tensor, numel: torch.Tensor) -> torch.Tensor:
    """Mean of the mask, ``count / numel``, in float64. Both are int64 and of the whole parameter.

    A parameter without elements has fraction 0.
    """
    return count.double() / numel.clamp(min=1).double()


def scale_from_count(count: torch.Tensor, numel: torch.Tensor) -> torch.Tensor:
    """``1 / max(count / numel, 1e-3)`` in float64, of int64 ``count`` and ``numel`` of the whole
    parameter.

    Counts are exact as integers and in float64 up to 2^53; a mean taken in float32 is not from 2^24
    on.
    """
    return fraction_from_count(count, numel).clamp(min=MIN_FRACTION).reciprocal()


def decay_(param: torch.Tensor, factor: Scalar) -> None:
    """Decoupled weight decay (arXiv 1711.05101), never masked: ``p *= factor``, where ``factor`` is
    ``1 - lr * weight_decay``.
    """
    param.mul_(factor)


def cautious_decay_(param: torch.Tensor, update: torch.Tensor, factor: Scalar) -> None:
    """Cautious weight decay (arXiv 2510.12402): ``p = p - lr * weight_decay * 1[u * p >= 0] * p``.

    ``update`` is the step's direction before masking; only its sign is used. Where the indicator is
    1 the result is that of :func:`decay_`, bit for bit.
    """
    param.copy_(torch.where(signs_not_opposed(update, param), param * factor, param))


def cautious_step_(
    param: torch.Tensor, update: torch.Tensor, mask: torch.Tensor, step_size: torch.Tensor
) -> None:
    """``p = p - step_size * mask * u``, where ``step_size = lr * scale`` is 0-d and like ``param``.

    The bool ``mask`` multiplies rather than selects, so that a NaN in u reaches the parameter as it
    does in AdamW.
    """
    param.sub_((update * mask).mul_(step_size))


def alignment_metrics(alignment: Mapping[Any, float]) -> dict[str, float]:
    """The mean of a cautious optimizer's ``alignment`` over its parameters, by its name in logs; empty
    before the first step. No communication is performed."""
    if not alignment:
        return {}
    return {"effx/cautious/alignment": sum(map(float, alignment.values())) / len(alignment)}
