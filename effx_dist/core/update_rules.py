"""The update rules under the cautious mask, as pure functions of tensors.

A rule turns gradient g and moments into an update u, in two walks over the elements. The first,
:meth:`UpdateRule.signs`, only reads: it gives a tensor with the signs of u, for counting agreement.
The second, :meth:`UpdateRule.advance_`, stores the new moments and gives u itself. Compiled kernels
repeat this arithmetic operation by operation, so that they can be compared bit for bit; see
:mod:`effx_dist.core.cautious` on why there are two-operand operations only.

All tensors of a call share a shape and a floating dtype. No communication is performed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

Scalar = float | torch.Tensor
"""A number; as a float64 tensor where it lies on a device and must not be waited for."""


class UpdateRule(ABC):
    """One optimizer's update.

    Attributes:
        name: what kernels call it.
        moment_names: keys of its state, in the order in which the methods take them.
        counts_steps: whether the update depends on the number of steps, kept under "step".
    """

    name: ClassVar[str]
    moment_names: ClassVar[tuple[str, ...]]
    counts_steps: ClassVar[bool] = True

    @abstractmethod
    def coefficients(self, settings: Mapping[str, Any], step: Scalar) -> tuple[Scalar, ...]:
        """What the update needs of a parameter group's settings and the step's number, from 1.

        In float64; an element's arithmetic rounds each of them once to its own dtype.
        """

    @abstractmethod
    def signs(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> torch.Tensor:
        """A tensor with the exact signs of the update to come. Changes nothing."""

    @abstractmethod
    def advance_(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new moments; the update, and the tensor that :meth:`signs` gave before.

        The update may underflow to zero where that tensor has kept its sign.
        """


class _Averaging(UpdateRule):
    """The update has the signs of ``beta1 * m + (1 - beta1) * g``, the first two coefficients."""

    def signs(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> torch.Tensor:
        return (moments[0] * coefficients[0]).add_(grad * coefficients[1])


class AdamW(_Averaging):
    """Adam's update (arXiv 1711.05101), eps where torch.optim adds it::

    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g^2
    u = (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    """

    name = "adamw"
    moment_names = ("exp_avg", "exp_avg_sq")

    def coefficients(self, settings: Mapping[str, Any], step: Scalar) -> tuple[Scalar, ...]:
        beta1, beta2 = settings["betas"]
        inverse_correction = 1 / (1 - beta1**step)
        inverse_root_correction = (1 - beta2**step) ** -0.5
        eps = settings["eps"]
        return (
            beta1,
            1 - beta1,
            beta2,
            1 - beta2,
            inverse_correction,
            inverse_root_correction,
            eps,
        )

    def advance_(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        exp_avg, exp_avg_sq = moments
        beta1, rest1, beta2, rest2, inverse_correction, inverse_root_correction, eps = coefficients
        exp_avg.mul_(beta1).add_(grad * rest1)
        exp_avg_sq.mul_(beta2).add_((grad * grad).mul_(rest2))
        denominator = _rounded_sqrt(exp_avg_sq).mul_(inverse_root_correction).add_(eps)
        return (exp_avg * inverse_correction).div_(denominator), exp_avg


class Lion(_Averaging):
    """Lion's update (arXiv 2302.06675), of the moment before this step::

        u = sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    NaN stays NaN: torch.sign would make it 0 and stop the element for ever without a trace.
    """

    name = "lion"
    moment_names = ("exp_avg",)

    def coefficients(self, settings: Mapping[str, Any], step: Scalar) -> tuple[Scalar, ...]:
        beta1, beta2 = settings["betas"]
        return (beta1, 1 - beta1, beta2, 1 - beta2)

    def advance_(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = self.signs(coefficients, moments, grad)
        moments[0].mul_(coefficients[2]).add_(grad * coefficients[3])
        return torch.where(mixed.isnan(), mixed, mixed.sign()), mixed


class SGD(UpdateRule):
    """Momentum as torch.optim.SGD has it, without dampening::

    b = momentum * b + g
    u = b
    """

    name = "sgd"
    moment_names = ("momentum_buffer",)
    counts_steps = False

    def coefficients(self, settings: Mapping[str, Any], step: Scalar) -> tuple[Scalar, ...]:
        return (settings["momentum"],)

    def signs(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> torch.Tensor:
        return (moments[0] * coefficients[0]).add_(grad)

    def advance_(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = moments[0].mul_(coefficients[0]).add_(grad)
        return buffer, buffer


class NesterovSGD(SGD):
    """:class:`SGD` with Nesterov's look-ahead: ``u = g + momentum * b``."""

    name = "nesterov"

    def signs(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> torch.Tensor:
        return super().signs(coefficients, moments, grad).mul_(coefficients[0]).add_(grad)

    def advance_(
        self, coefficients: Sequence[Scalar], moments: Sequence[torch.Tensor], grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        buffer, _ = super().advance_(coefficients, moments, grad)
        update = (buffer * coefficients[0]).add_(grad)
        return update, update


def _rounded_sqrt(values: torch.Tensor) -> torch.Tensor:
    """The correctly rounded square root, in a new tensor.

    On a CPU torch.sqrt calls a vector maths library that is an ulp off for many values of float32 (a
    fifth of those in [0, 1)) and some of float64, so that no other implementation could reproduce a
    step bit for bit. NumPy takes the processor's, which rounds correctly.
    """
    if values.device.type != "cpu":
        return values.sqrt()
    with np.errstate(invalid="ignore"):  # of a negative number: NaN, as in torch
        return torch.from_numpy(np.asarray(np.sqrt(values.numpy())))
