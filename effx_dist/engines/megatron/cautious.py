"""The cautious optimizer in the place of the one inside a Megatron optimizer.

The inner optimizer stays the object that it is and changes its class: its groups, state and hooks, and
whoever holds it, need not know. A new one could not even be made, as Megatron steps views that are no
leaves. The new class is an AdamW of torch, which is what the DistributedOptimizer asks its inner optimizer
to be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from effx_dist.config import CautiousConfig
from effx_dist.engines.megatron.local_tensors import MainParam, shard_map_source
from effx_dist.errors import ConfigError
from effx_dist.optim import CautiousAdamW, CautiousSGD
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.optim.drawn_layouts import DrawnLayouts

FUSED_ADAM = "FusedAdam"
"""The name of this class in Transformer Engine and in Apex."""


class MegatronCautiousAdamW(CautiousAdamW, torch.optim.AdamW):
    """C-AdamW on the fragments of parameters that a Megatron optimizer steps; see CautiousAdamW.

    None is made: an AdamW becomes one.
    """


class MegatronCautiousFusedAdam(CautiousAdamW):
    """C-AdamW in the place of a FusedAdam, which counts its steps once for each group. It does not derive from torch's
    AdamW, which refuses a state without steps."""


class MegatronCautiousSGD(CautiousSGD, torch.optim.SGD):
    """C-SGD in the place of torch's; see CautiousSGD."""


def make_cautious(optimizer: Any, params: Sequence[MainParam], settings: CautiousConfig) -> None:
    """Let the optimizer inside ``optimizer`` be cautious from now on; nothing if it is already.

    No communication is performed. The step inside ``step_with_ready_grads`` then performs one
    all-reduce for the parameters that only the data-parallel ranks share and one for those that are cut
    by tensor parallelism too, 8 bytes for each parameter.

    Raises ConfigError for an inner optimizer that has no cautious form.
    """
    inner = optimizer.optimizer
    if isinstance(inner, CautiousOptimizer):
        return
    form = cautious_form(inner)
    settings_of_form = {
        "cautious_weight_decay": settings.cautious_weight_decay,
        "maximize": False,
        "capturable": False,
    }
    inner.__class__ = form
    inner.defaults = {**inner.defaults, **settings_of_form}
    for group in inner.param_groups:
        group.update(settings_of_form)
    # as unpickling does: with the profiler's hooks, and without a new list of parameters
    inner.__setstate__(
        {
            "implementation": settings.implementation,
            "_layouts": DrawnLayouts(shard_map_source(params)),
        }
    )
    for group in inner.param_groups:
        inner._check_group(group)
    if keeps_steps_in_groups(inner):
        inner.register_step_pre_hook(_spread_steps)
        inner.register_step_post_hook(_collect_steps)


def keeps_steps_in_groups(inner: Optimizer) -> bool:
    """Whether an inner optimizer counts its steps once for each group, under ``group["step"]``."""
    is_fused = any(base.__name__ == FUSED_ADAM for base in type(inner).__mro__)
    return is_fused or isinstance(inner, MegatronCautiousFusedAdam)


def cautious_form(inner: Optimizer) -> type[CautiousOptimizer]:
    """The class of what takes its place. No communication is performed. Raises ConfigError where there
    is none."""
    if isinstance(inner, CautiousOptimizer):
        return type(inner)
    kind, groups = type(inner), inner.param_groups
    if "step" in vars(inner):
        raise ConfigError(
            f"effx.cautious: something, perhaps a scheduler of torch, has replaced step() of the inner "
            f"{kind.__name__}; call effx_dist.megatron.attach before it"
        )
    if keeps_steps_in_groups(inner):
        is_adamw = bool(getattr(inner, "adam_w_mode", True))
        if (is_adamw or _never_decays(groups)) and all(
            g.get("bias_correction", True) for g in groups
        ):
            return MegatronCautiousFusedAdam
    elif kind in (torch.optim.AdamW, torch.optim.Adam):
        is_plain = not any(group.get("amsgrad") for group in groups)
        if is_plain and (kind is torch.optim.AdamW or _never_decays(groups)):
            return MegatronCautiousAdamW
    elif kind is torch.optim.SGD and _never_decays(groups):
        return MegatronCautiousSGD
    raise ConfigError(
        f"effx.cautious: the inner optimizer {kind.__module__}.{kind.__name__} with these settings has no "
        "cautious form; there is one of Adam with decoupled_weight_decay=True and of SGD with "
        "weight_decay=0 (OptimizerConfig). Choose one of these, or set effx.cautious.enabled to false"
    )


def _never_decays(groups: Sequence[Mapping[str, Any]]) -> bool:
    return not any(group.get("weight_decay") for group in groups)


def _spread_steps(inner: Optimizer, *_: Any) -> None:
    """Before a step: to where the step counts them."""
    for group in inner.param_groups:
        for param in group["params"]:
            inner.state[param]["step"] = torch.tensor(float(group.get("step", 0)))


def _collect_steps(inner: Optimizer, *_: Any) -> None:
    """After it: to where Megatron's own checkpoints of a FusedAdam look, which expect nothing but the
    moments in the state of a parameter."""
    for group in inner.param_groups:
        for param in group["params"]:
            inner.state[param].pop("step", None)
        group["step"] = int(group.get("step", 0)) + 1
