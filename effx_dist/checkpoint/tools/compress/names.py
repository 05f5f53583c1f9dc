"""Which parameters the numbers of a torch optimizer's state stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from effx_dist.checkpoint.state.matching import listed
from effx_dist.checkpoint.tools.compress.content import ParamNames, SourceTensor
from effx_dist.errors import ConfigError

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
    Anything else is a ConfigError, and so is a name or shape that the model has not.
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
