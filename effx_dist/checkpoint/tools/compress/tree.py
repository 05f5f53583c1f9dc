"""The nested dictionaries that torch files and torch.distributed.checkpoint folders hold: which part is
the model, which the optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from effx_dist.checkpoint.state.matching import listed
from effx_dist.checkpoint.state.names import plain_name
from effx_dist.checkpoint.state.torch_state import group_options
from effx_dist.checkpoint.tools.compress.content import (
    ParamNames,
    PlainContent,
    PlainOptimizer,
    ReadOptions,
    SourceTensor,
    keepable,
)
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
        tied: from the dotted path of a tensor that is the same as another one to that one's path.
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
    by_group = names_of_groups(groups, state, content.model, names, where)
    name_of = {
        number: _own_name(name, content.model)
        for group, of_group in zip(groups, by_group, strict=True)
        for number, name in zip(group["params"], of_group, strict=True)
    }
    lost = [str(number) for number in state if number not in name_of]
    if lost:
        raise ConfigError(
            f"{where}: the optimizer has a state of {lost[:8]}, in none of its groups"
        )
    by_name = {name_of[number]: dict(entries) for number, entries in state.items()}
    plain = [[_own_name(name, content.model) for name in group] for group in by_group]
    return PlainOptimizer(by_name, plain, group_options(groups))


def _descend(tree: Tree) -> tuple[str, Tree]:
    """Descend below a single key that holds a model beside other things, such as ``{"app": {...}}``."""
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


Shape = tuple[int, ...]
_REMEDY = (
    "Give the names (--param-names FILE: JSON, one list of names for each group, in the optimizer's "
    "order), or compress the weights alone (--weights-only)"
)


def names_of_groups(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    model: Mapping[str, SourceTensor],
    given: ParamNames | None,
    where: object,
) -> list[list[str]]:
    """The names of each group's parameters.

    They are those that ``params`` itself holds; else those given; else ``param_names`` of the groups,
    as torch has it; else the model's own order, where that leaves no choice: as many parameters as
    the model has floating-point tensors, each of its tensor's shape, and no shape in two groups.
    Anything else is a ConfigError, and so is a name or shape that is not the model's.
    """
    numbers = [list(group["params"]) for group in groups]
    if all(isinstance(n, str) for group in numbers for n in group):
        return numbers
    shapes = {n: _shape_of(state.get(n, {})) for group in numbers for n in group}
    if given is not None:
        names = [list(group) for group in given]
    elif all("param_names" in group for group in groups):
        names = [list(group["param_names"]) for group in groups]
    else:
        names = _by_order(numbers, shapes, model, where)
    _check(names, numbers, shapes, model, where)
    return names


def _shape_of(entries: Mapping[str, Any]) -> Shape | None:
    """The shape of the parameter that a state belongs to, if the state has a tensor like it."""
    found = [
        entry.facts.shape
        for key, entry in entries.items()
        if key != "step" and isinstance(entry, SourceTensor)
    ]
    return max(found, key=len, default=None)


def _by_order(
    numbers: Sequence[Sequence[int]],
    shapes: Mapping[int, Shape | None],
    model: Mapping[str, SourceTensor],
    where: object,
) -> list[list[str]]:
    candidates = {n: t.facts.shape for n, t in model.items() if t.facts.dtype.is_floating_point}
    problem = ""
    num_params = sum(len(group) for group in numbers)
    kinds = [{shapes[n] for n in group} for group in numbers]
    if num_params != len(candidates):
        problem = f"it has {num_params}, and the model has {len(candidates)} floating-point tensors"
    elif len(candidates) > 1 and list(model) == sorted(model):
        problem = "the model's tensors are sorted by name, which is not the order of its parameters"
    elif len(kinds) > 1 and (
        any(None in kind for kind in kinds) or len(set().union(*kinds)) < sum(map(len, kinds))
    ):
        problem = "its groups share shapes, so that a name could belong to more than one of them"
    if problem:
        raise ConfigError(
            f"{where}: the optimizer numbers its parameters and does not name them: {problem}. {_REMEDY}"
        )
    if len(kinds) == 1:
        return [list(candidates)]
    return [[name for name, shape in candidates.items() if shape in kind] for kind in kinds]


def _check(
    names: Sequence[Sequence[str]],
    numbers: Sequence[Sequence[int]],
    shapes: Mapping[int, Shape | None],
    model: Mapping[str, SourceTensor],
    where: object,
) -> None:
    counts, given = [len(group) for group in numbers], [len(group) for group in names]
    if counts != given:
        raise ConfigError(
            f"{where}: the optimizer's groups have {counts} parameters, and there are names for {given}. "
            f"{_REMEDY}"
        )
    every = list(chain.from_iterable(names))
    problems = [f"{name} is named twice" for name in set(every) if every.count(name) > 1]
    for name, number in zip(every, chain.from_iterable(numbers), strict=True):
        if name not in model:
            problems.append(f"parameter {number} would be {name}, which the model has not")
        elif shapes[number] not in (None, model[name].facts.shape):
            there = model[name].facts.shape
            problems.append(f"parameter {number} of shape {shapes[number]} would be {name} {there}")
    if problems:
        raise ConfigError(f"{where}: the optimizer: {listed(sorted(problems))}. {_REMEDY}")
