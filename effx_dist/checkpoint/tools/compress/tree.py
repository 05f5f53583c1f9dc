"""The nested dictionaries that torch files and torch.distributed.checkpoint folders hold: which part is
the model, which the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from effx_dist.checkpoint.state.names import plain_name
from effx_dist.checkpoint.state.optimizer_groups import group_options
from effx_dist.checkpoint.tools.compress.content import (
    ParamNames,
    PlainContent,
    PlainOptimizer,
    ReadOptions,
    SourceTensor,
    keepable,
)
from effx_dist.checkpoint.tools.compress.names import names_of_groups
from effx_dist.checkpoint.tools.convert.torch_file import PARAM_NAMES
from effx_dist.errors import ConfigError

MODEL_KEYS = ("model", "model_state_dict", "state_dict", "module")
DDP_PREFIX = "module."
OPTIMIZER_KEYS = ("optimizer", "optim", "optimizer_state_dict")

Tree = Mapping[Any, Any]


def content_of_tree(
    tree: Tree, tied: Mapping[str, str], where: object, options: ReadOptions
) -> PlainContent:
    """The parts of a checkpoint.

    Args:
        tree: nested dictionaries of SourceTensors and plain values.
        tied: dotted paths of tensors that are another one once more, to that other one's.
        where: the checkpoint, for messages.

    A model's state dict by itself; or one entry of MODEL_KEYS, at most one of OPTIMIZER_KEYS and
    anything else, at the top or below a single key. Raises ConfigError for other trees.
    """
    prefix, top = _descend(tree)
    model_key = _one_of(MODEL_KEYS, top, where)
    if model_key is None:
        if not top or not all(isinstance(v, SourceTensor) for v in top.values()):
            raise ConfigError(
                f"{where}: no model was found: must be a model's state dict, or hold one as one of "
                f"{list(MODEL_KEYS)}; has {sorted(map(str, top))[:12]}"
            )
        return _with_model(top, prefix, tied, where)
    model_path = f"{prefix}{model_key}."
    found = _with_model(top[model_key], model_path, tied, where)
    optimizer_key = _one_of(OPTIMIZER_KEYS, top, where)
    optimizer = None
    if optimizer_key is not None and not options.weights_only:
        names = options.param_names or top.get(PARAM_NAMES)
        optimizer = optimizer_of(top[optimizer_key], found, names, where)
    known = {model_key, optimizer_key, PARAM_NAMES, "step", "stateful", "extra"}
    others = {str(key): value for key, value in top.items() if key not in known}
    stateful = top.get("stateful") or {}
    extra = top.get("extra") or {}
    return PlainContent(
        found.model,
        found.tied,
        found.model_values,
        optimizer,
        {} if options.weights_only else keepable(stateful, where),
        keepable({**others, **extra}, where),
    )


def optimizer_of(
    state_dict: Any, content: PlainContent, names: ParamNames | None, where: object
) -> PlainOptimizer:
    """What an optimizer's state dict says, by the names of the model's parameters. Raises
    ConfigError."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ConfigError(
            f"{where}: the optimizer's state must have 'state' and 'param_groups', as torch's "
            "optimizers give it; compress the weights alone (--weights-only)"
        )
    groups, state = list(state_dict["param_groups"]), state_dict["state"]
    members = names_of_groups(groups, state, content.model, names, where)
    name_of = {
        number: _own_name(name, content.model)
        for group, of_group in zip(groups, members, strict=True)
        for number, name in zip(group["params"], of_group, strict=True)
    }
    lost = [str(number) for number in state if number not in name_of]
    if lost:
        raise ConfigError(
            f"{where}: the optimizer has a state of {lost[:8]}, in none of its groups"
        )
    by_name = {name_of[number]: dict(entries) for number, entries in state.items()}
    plain = [[_own_name(name, content.model) for name in group] for group in members]
    return PlainOptimizer(by_name, plain, group_options(groups))


def _descend(tree: Tree) -> tuple[str, Tree]:
    """Below a single key that holds a model beside other things, such as ``{"app": {...}}``."""
    if len(tree) == 1:
        key, value = next(iter(tree.items()))
        if isinstance(value, Mapping) and any(k in value for k in MODEL_KEYS):
            return f"{key}.", value
    return "", tree


def _one_of(keys: tuple[str, ...], tree: Tree, where: object) -> str | None:
    found = [key for key in keys if isinstance(tree.get(key), Mapping)]
    if len(found) > 1:
        raise ConfigError(f"{where}: holds {found}; which of them is meant cannot be told")
    return found[0] if found else None


def _wrapper_of(names: Iterable[Any]) -> str:
    """What DDP or DataParallel put before every name, where their state dict was saved."""
    return DDP_PREFIX if all(str(name).startswith(DDP_PREFIX) for name in names) else ""


def _own_name(name: str, model: Mapping[str, Any]) -> str:
    """A parameter's name as the model has it, of an optimizer that may have it with DDP's prefix."""
    plain = plain_name(name)
    bare = plain.removeprefix(DDP_PREFIX)
    return bare if plain not in model and bare in model else plain


def _with_model(
    state: Mapping[str, Any], prefix: str, tied: Mapping[str, str], where: object
) -> PlainContent:
    wrapper = _wrapper_of(state)
    named = {plain_name(str(n).removeprefix(wrapper)): value for n, value in state.items()}
    if len(named) < len(state):
        raise ConfigError(
            f"{where}: two tensors of the model have one name without their wrappers'"
        )
    inside = {
        plain_name(other.removeprefix(prefix + wrapper)): plain_name(
            first.removeprefix(prefix + wrapper)
        )
        for other, first in tied.items()
        if other.startswith(prefix) and first.startswith(prefix)
    }
    tensors = {n: v for n, v in named.items() if isinstance(v, SourceTensor) and n not in inside}
    if not tensors:
        raise ConfigError(f"{where}: the model holds no tensor")
    values = {n: v for n, v in named.items() if not isinstance(v, SourceTensor)}
    known = {other: first for other, first in inside.items() if first in tensors}
    return PlainContent(tensors, known, keepable(values, where))
