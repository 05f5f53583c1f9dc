"""Which moments belong to which weight, told from the names in a state dict.

The optimizer keeps ``exp_avg`` (m) and ``exp_avg_sq`` (v) beside each parameter. Their names end in
the parameter's own: ``optimizer.layers.0.w.exp_avg`` and ``optim.state.layers.0.w.exp_avg`` both
belong to ``model.layers.0.w``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

EXP_AVG = ".exp_avg"
EXP_AVG_SQ = ".exp_avg_sq"


_QUANTISED = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.float8_e4m3fn, torch.float8_e5m2}
)
"""dtypes of weights whose residuals are quantised; of others torch does no arithmetic everywhere."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What the rule looks at: dtype and shape of a whole tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Joint:
    """One weight and its moments, which are pruned and quantised together."""

    weight: str
    exp_avg: str
    exp_avg_sq: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the joint, the weight first."""
        return tuple(n for n in (self.weight, self.exp_avg, self.exp_avg_sq) if n is not None)


def is_moment(name: str) -> bool:
    """Whether the name is that of an Adam-like moment."""
    return name.endswith((EXP_AVG, EXP_AVG_SQ))


def is_chained(name: str, facts: TensorFacts) -> bool:
    """Whether links of a chain store this tensor as a difference: floating point, two or more
    dimensions, no moment.

    Norms, biases and everything else of fewer dimensions are a few bytes and stay whole in every
    save.
    """
    return facts.dtype.is_floating_point and len(facts.shape) >= 2 and not is_moment(name)


def is_spread(facts: TensorFacts) -> bool:
    """Whether tensors like this one, where several ranks hold it, are shared out among them: large ones
    are. Buffers and what else has few dimensions is the first rank's, all of it from one moment."""
    return facts.dtype.is_floating_point and len(facts.shape) >= 2


def find_joints(tensors: Mapping[str, TensorFacts]) -> tuple[Joint, ...]:
    """All weights with a first moment of their own shape, in the order of their names.

    A moment whose weight cannot be told (none, or several names fit equally well) is in no joint
    and so is stored losslessly.
    """
    weights: dict[str, list[str]] = {}
    for name, facts in tensors.items():
        if is_chained(name, facts):
            for suffix in (name, name.partition(".")[2]):
                if suffix:
                    weights.setdefault(suffix, []).append(name)
    found: dict[str, tuple[int, str]] = {}
    for name, facts in sorted(tensors.items()):
        if not name.endswith(EXP_AVG) or facts.dtype != torch.float32:
            continue
        weight, num_matched = _weight_of(name.removesuffix(EXP_AVG), weights)
        fits = weight is not None and _fits(tensors[weight], facts)
        # of two moments that claim a weight the one that names more of it has it, then the first
        if weight is not None and fits and num_matched > found.get(weight, (0, ""))[0]:
            found[weight] = (num_matched, name)
    return tuple(
        Joint(weight, found[weight][1], _second_moment(found[weight][1], tensors))
        for weight in sorted(found)
    )


def _fits(weight: TensorFacts, moment: TensorFacts) -> bool:
    return weight.shape == moment.shape and weight.dtype in _QUANTISED


def _weight_of(stem: str, weights: Mapping[str, list[str]]) -> tuple[str | None, int]:
    """The weight whose name, with or without its first component, is the longest dotted end of
    ``stem``, and how many characters of it that end is."""
    suffix = stem
    while suffix:
        candidates = weights.get(suffix, [])
        if candidates:
            return (candidates[0] if len(candidates) == 1 else None), len(suffix)
        suffix = suffix.partition(".")[2]
    return None, 0


def _second_moment(exp_avg: str, tensors: Mapping[str, TensorFacts]) -> str | None:
    name = exp_avg.removesuffix(EXP_AVG) + EXP_AVG_SQ
    return name if tensors.get(name) == tensors[exp_avg] else None
