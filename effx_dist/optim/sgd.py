"""SGD with momentum and the cautious mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from effx_dist.core.update_rules import SGD, NesterovSGD, UpdateRule
from effx_dist.errors import ConfigError
from effx_dist.optim.base import CautiousOptimizer, refuse_options
from effx_dist.optim.kernels import Implementation
from effx_dist.optim.param_layout import ShardMapSource

_PLAIN, _NESTEROV = SGD(), NesterovSGD()


class CautiousSGD(CautiousOptimizer):
    """SGD with momentum (arXiv 2411.16085) that skips elements whose update opposes the gradient.

    With the momentum buffer b, over the n elements of a whole parameter::

        p     = p * (1 - lr * weight_decay)
        b     = momentum * b + g
        u     = b,  with Nesterov's look-ahead  u = g + momentum * b
        mask  = 1[u * g > 0]
        scale = 1 / max(sum(mask) / n, 1e-3)
        p     = p - lr * scale * mask * u

    State: ``momentum_buffer``, as in torch.optim.SGD. Unlike there, weight decay is decoupled, as in
    all optimizers here: it does not enter the buffer, and a state that is carried over from
    torch.optim.SGD goes on with decoupled decay. There is no ``dampening``. Sharding, dtypes,
    communication, the other arguments and the errors are those of
    :class:`~effx_dist.optim.adamw.CautiousAdamW`.

    Args:
        momentum: in (0, 1); without momentum the update is the gradient, and nothing is masked.
        nesterov: look ahead.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        cautious_weight_decay: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        implementation: Implementation = "auto",
        shard_map: ShardMapSource | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        dampening: float = 0,
        differentiable: bool = False,
    ) -> None:
        refuse_options(
            foreach=foreach, fused=fused, dampening=dampening, differentiable=differentiable
        )
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        flags = (cautious_weight_decay, maximize, capturable)
        super().__init__(params, defaults, flags, implementation, shard_map)

    def _rule(self, group: Mapping[str, Any]) -> UpdateRule:
        return _NESTEROV if group["nesterov"] else _PLAIN

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not 0 < group["momentum"] < 1:
            raise ConfigError(
                f"momentum={group['momentum']}: must be in (0, 1); without momentum the update is "
                "the gradient and there is nothing to mask, so use torch.optim.SGD"
            )
