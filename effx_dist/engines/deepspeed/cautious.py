"""The cautious optimizer in the place of the one that DeepSpeed's configuration or its user asks for."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch.optim.optimizer import Optimizer

from effx_dist.config import CautiousConfig
from effx_dist.engines.deepspeed.block import Block
from effx_dist.engines.deepspeed.partitions import shard_map_source
from effx_dist.errors import ConfigError
from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD, CautiousWrapper, cautious
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.shard import ShardMap

logger = logging.getLogger(__name__)

OptimizerMaker = Callable[[Any], Optimizer]
"""A function that DeepSpeed takes in an optimizer's place: it makes one from parameters, or groups of them."""

_TORCH_ADAMS = (torch.optim.Adam, torch.optim.AdamW)
_DEEPSPEED_ADAMS = (FusedAdam, DeepSpeedCPUAdam)
_LIONS = (FusedLion, DeepSpeedCPULion)
_WRAPPED = tuple(
    getattr(torch.optim, name)
    for name in ("Adam", "AdamW", "SGD", "NAdam", "RAdam", "RMSprop", "Adamax", "Adadelta")
)
"""Optimizers of torch that go element by element and make their state as they step: they can be
masked from outside where they are given flat partitions."""

_KNOWN = "AdamW, Adam, Lion, SGD, NAdam, RAdam, RMSprop, Adamax and Adadelta"


def prepare(
    optimizer: Optimizer | OptimizerMaker | None, block: Block
) -> Optimizer | OptimizerMaker | None:
    """What to give to deepspeed.initialize as ``optimizer``. No communication is performed.

    Where the "cautious" section is on, the cautious form of the user's ``optimizer`` or, without one, of
    the configuration's. One that is cautious already is used as it is, whatever the section says.

    Raises:
        ConfigError: there is no optimizer, its type or a setting has no cautious form, or a setting is
            none of its type's.
    """
    settings = block.on.cautious
    if isinstance(optimizer, Optimizer):
        return _ready_for_partitions(optimizer, settings)
    if optimizer is not None:
        make = optimizer
    elif settings is not None and block.config.get("optimizer") is None:
        logger.warning(
            "effx.cautious: this engine has no optimizer (a reference or reward model), so there is nothing to "
            "make cautious"
        )
        return None
    elif settings is not None:
        make = _configured(block.config.get("optimizer"), settings)
    else:
        return None
    return lambda params: _ready_for_partitions(make(params), settings)


def attach(engine: Any) -> None:
    """Tell the engine's cautious optimizer, if it has one, which parameters its partitions hold. No
    communication is performed.
    """
    optimizer = engine.basic_optimizer
    if not isinstance(optimizer, CautiousOptimizer | CautiousWrapper):
        return
    if optimizer.shard_map is _whole_tensors:
        optimizer.shard_map = shard_map_source(engine)
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        _undo_first_step(engine.optimizer, optimizer)


def _whole_tensors(params: Sequence[torch.Tensor]) -> ShardMap:
    """What holds until the engine is there: of what steps while it is made (see _undo_first_step)."""
    return ShardMap.of_tensors([(f"parameter {i}", param) for i, param in enumerate(params)])


def _undo_first_step(holder: Any, optimizer: Optimizer) -> None:
    """Without ZeRO, DeepSpeed has an optimizer of 16-bit parameters step once with zero gradients, to make
    its state. That decays the weights and counts as a step.
    """
    optimizer.state.clear()
    for masters, params in zip(holder.fp32_groups, holder.fp16_groups, strict=True):
        for master, param in zip(masters, params, strict=True):
            master.data.copy_(param.data)


def _ready_for_partitions(optimizer: Optimizer, settings: CautiousConfig | None) -> Optimizer:
    """The optimizer, made cautious if ``settings`` say so, and ready to be given partitions."""
    made = optimizer if settings is None else _cautious_form(optimizer, settings)
    if isinstance(made, CautiousOptimizer | CautiousWrapper) and made.shard_map is None:
        made.shard_map = _whole_tensors
    return made


def _cautious_form(optimizer: Optimizer, settings: CautiousConfig) -> Optimizer:
    if isinstance(optimizer, CautiousOptimizer | CautiousWrapper):
        return optimizer
    form = _fast_form(optimizer)
    if form is not None:
        return _replaced(optimizer, form, settings)
    if type(optimizer) not in (*_WRAPPED, *_DEEPSPEED_ADAMS):
        raise _no_form(f"optimizer={type(optimizer).__name__}")
    decoupled = getattr(optimizer, "adam_w_mode", None)
    try:
        return cautious(
            optimizer,
            decoupled_weight_decay=decoupled,
            cautious_weight_decay=settings.cautious_weight_decay,
        )
    except ConfigError as error:
        raise ConfigError(f"effx.cautious: {error}") from error


def _fast_form(optimizer: Optimizer) -> type[CautiousOptimizer] | None:
    """The cautious optimizer that does the same and needs no copy of the parameters, if there is one."""
    kind, groups = type(optimizer), optimizer.param_groups
    if kind in (*_TORCH_ADAMS, *_DEEPSPEED_ADAMS):
        is_adamw = kind is torch.optim.AdamW or getattr(optimizer, "adam_w_mode", False)
        return CautiousAdamW if all(_is_plain_adamw(group, is_adamw) for group in groups) else None
    if kind in _LIONS:
        return CautiousLion
    if kind is torch.optim.SGD:
        is_plain = not any(group["weight_decay"] or group["dampening"] for group in groups)
        return CautiousSGD if is_plain else None
    return None


def _is_plain_adamw(group: Mapping[str, Any], is_adamw: bool) -> bool:
    is_decoupled = is_adamw or group.get("decoupled_weight_decay") or not group["weight_decay"]
    return bool(is_decoupled and not group.get("amsgrad") and group.get("bias_correction", True))


def _replaced(
    optimizer: Optimizer, form: Callable[..., CautiousOptimizer], settings: CautiousConfig
) -> CautiousOptimizer:
    """``form`` over the groups of ``optimizer``, which is left with the same groups, state and hooks: a
    learning rate scheduler that the user made over it goes on setting the learning rate.
    """
    made = form(optimizer.param_groups, **settings.model_dump(exclude={"enabled"}))
    made._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
    made._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks

    def follow(*_: Any) -> None:
        optimizer.param_groups, optimizer.state = made.param_groups, made.state

    follow()
    made.register_load_state_dict_post_hook(follow)  # which makes new ones
    # Else a scheduler warns that the optimizer it was made with has not stepped.
    made.register_step_post_hook(lambda *_: setattr(optimizer, "_opt_called", True))
    return made


def _configured(section: Any, settings: CautiousConfig) -> OptimizerMaker:
    """The optimizer that DeepSpeed's "optimizer" section means, as it understands it."""
    name = section.get("type") if isinstance(section, Mapping) else None
    if name is None:
        raise ConfigError(
            'effx.cautious is on, but there is no optimizer: give the configuration an "optimizer" with '
            "a type, or pass one to initialize; or set effx.cautious.enabled to false"
        )
    options = dict(section.get("params") or {})
    if name.lower() == "lion":
        return _configured_lion(name, options, settings)
    if name.lower() in ("adam", "adamw"):
        kind = _configured_adam(name, options)
    elif getattr(torch.optim, name, None) in _WRAPPED:
        kind = getattr(torch.optim, name)
    else:
        raise _no_form(f"optimizer.type = {name!r}")
    _check_options(name, options, kind)
    return lambda params: kind(params, **options)


def _configured_lion(
    name: str, options: Mapping[str, Any], settings: CautiousConfig
) -> OptimizerMaker:
    _check_options(name, options, DeepSpeedCPULion)
    ours: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), **options}  # DeepSpeed's defaults
    ours.pop("fp32_optimizer_states", None)  # as the moments here are
    ours |= settings.model_dump(exclude={"enabled"})
    return lambda params: CautiousLion(params, **ours)


def _configured_adam(name: str, options: dict[str, Any]) -> Callable[..., Optimizer]:
    """Rewrites ``options`` to those of the returned optimizer of torch, which does the same."""
    is_torch = options.pop("torch_adam", False)
    is_adamw = options.pop("adam_w_mode", True) or name.lower() == "adamw"
    options.pop("fp32_optimizer_states", None)  # as the moments here are
    if not is_torch:
        for option, allowed in (("bias_correction", True), ("amsgrad", False)):
            if options.pop(option, allowed) != allowed:
                raise ConfigError(
                    f"optimizer.params.{option} = {not allowed}: has no cautious form; must be {allowed}"
                )
        options.pop("set_grad_none", None)
        options.setdefault("weight_decay", 0.0)  # torch's AdamW has another default
    return torch.optim.AdamW if is_adamw else torch.optim.Adam


def _check_options(name: str, options: Iterable[str], kind: Callable[..., Optimizer]) -> None:
    _, *known = inspect.signature(kind).parameters  # the first takes the parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        hint = "; to clip, set gradient_clipping" if "max_grad_norm" in unknown else ""
        raise ConfigError(
            f"optimizer.params: {name} has no {', '.join(unknown)}; must be of {', '.join(known)}{hint}"
        )


def _no_form(what: str) -> ConfigError:
    return ConfigError(
        f"{what}: has no cautious form; there is one of {_KNOWN}. Choose one of these, pass "
        "optimizer=effx_dist.cautious(...) if yours goes element by element, or set "
        "effx.cautious.enabled to false"
    )
