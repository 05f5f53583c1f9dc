"""Lion with the cautious mask."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from effx_dist.core.update_rules import Lion
from effx_dist.optim.base import CautiousOptimizer, refuse_options
from effx_dist.optim.kernels import Implementation
from effx_dist.optim.param_layout import ShardMapSource


class CautiousLion(CautiousOptimizer):
    """C-Lion (arXiv 2411.16085): Lion that skips elements whose update opposes the gradient.

    With the moment m of the steps before, over the n elements of a whole parameter::

        p     = p * (1 - lr * weight_decay)
        u     = sign(beta1 * m + (1 - beta1) * g)
        mask  = 1[u * g > 0]
        scale = 1 / max(sum(mask) / n, 1e-3)
        p     = p - lr * scale * mask * u
        m     = beta2 * m + (1 - beta2) * g

    State: ``step`` (float32, 0-d, on the host) and ``exp_avg``. A NaN in the gradient spreads to
    the moment and the parameter. Sharding, dtypes, communication, the arguments and the errors are
    those of :class:`~effx_dist.optim.adamw.CautiousAdamW`; there is no ``eps``.
    """

    _update_rule = Lion()

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-4,
        betas: tuple[float, float] = (0.95, 0.98),
        weight_decay: float = 0.0,
        *,
        cautious_weight_decay: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        implementation: Implementation = "auto",
        shard_map: ShardMapSource | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        refuse_options(foreach=foreach, fused=fused, differentiable=differentiable)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        flags = (cautious_weight_decay, maximize, capturable)
        super().__init__(params, defaults, flags, implementation, shard_map)
