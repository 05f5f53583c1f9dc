"""AdamW with the cautious mask."""

from __future__ import annotations

import torch
from torch.optim.optimizer import ParamsT

from effx_dist.core.update_rules import AdamW
from effx_dist.optim.base import CautiousOptimizer, refuse_options
from effx_dist.optim.kernels import Implementation
from effx_dist.optim.param_layout import ShardMapSource


class CautiousAdamW(CautiousOptimizer):
    """C-AdamW (arXiv 2411.16085): AdamW that skips elements whose update opposes the gradient.

    With the new moments m and v of AdamW, over the n elements of a whole parameter::

        p     = p * (1 - lr * weight_decay)
        mask  = 1[m * g > 0]
        scale = 1 / max(sum(mask) / n, 1e-3)
        p     = p - lr * scale * mask * m_hat / (sqrt(v_hat) + eps)

    The gradient is taken as it stands in ``.grad``: averaged, unscaled and clipped by then.
    Parameters that are DTensors (FSDP2, HSDP, tensor parallelism) or whole on every rank (one
    device, DDP) need nothing else, and the result is that of one device. Engines that hand over
    flat local tensors (ZeRO, FSDP1, Megatron) must give a ``shard_map``; without it each rank would
    scale by the mean of its own piece. ``step()`` performs one all-reduce of 8 bytes per whole
    parameter; see :class:`~effx_dist.optim.base.CautiousOptimizer`.

    State, as in torch.optim.AdamW: ``step`` (float32, 0-d, on the host), ``exp_avg``,
    ``exp_avg_sq``; the moments are sharded as the parameter is and kept in float32 for float16 and
    bfloat16 parameters, whose step is computed in float32 and rounded once. A NaN in the gradient
    spreads to both moments and the parameter, as in AdamW.

    Args:
        params: parameters, named parameters, or groups of either.
        lr: learning rate; a float or a 1-element tensor.
        betas: decay rates of the two moments, in [0, 1).
        eps: added to the denominator after the bias correction.
        weight_decay: decoupled; never masked by ``mask``.
        cautious_weight_decay: decay only where the update and the parameter do not differ in sign
            (arXiv 2510.12402).
        maximize: ascend instead.
        capturable: keep the number of steps on the device, so that a step can be captured in a CUDA
            graph and an overflow found by a GradScaler is not waited for.
        implementation: ``"auto"``, ``"triton"``, ``"compiled"`` or ``"eager"``: what computes the
            step. ``"auto"`` is Triton on CUDA and ROCm devices, the compiled kernel on the CPU, plain
            torch operations elsewhere and where Triton or a C++ compiler is missing.
        shard_map: where this rank's pieces lie. None draws it from the parameters at the first
            step, and again when the groups change.
        foreach, fused: accepted as callers of torch.optim.AdamW pass them; they choose nothing here.
        amsgrad, differentiable, decoupled_weight_decay: accepted where they say what is done here.

    Raises:
        ConfigError: a setting is out of its range, or a parameter is not of a floating dtype.
    """

    _update_rule = AdamW()

    def __init__(
        self,
        params: ParamsT,
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        cautious_weight_decay: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        implementation: Implementation = "auto",
        shard_map: ShardMapSource | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        amsgrad: bool = False,
        differentiable: bool = False,
        decoupled_weight_decay: bool = True,
    ) -> None:
        refuse_options(
            foreach=foreach,
            fused=fused,
            amsgrad=amsgrad,
            differentiable=differentiable,
            decoupled_weight_decay=decoupled_weight_decay or not weight_decay,
        )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        flags = (cautious_weight_decay, maximize, capturable)
        super().__init__(params, defaults, flags, implementation, shard_map)
