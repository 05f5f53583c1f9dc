"""What a plain checkpoint holds, under the names that a Checkpointer gives it. Its values are read when
they are asked for."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from effx_dist.checkpoint.format.manifest import short
from effx_dist.checkpoint.format.whole_tensors import row_boxes
from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.checkpoint.state.matching import MODEL, OPTIMIZER
from effx_dist.checkpoint.state.tree import tree_to_json
from effx_dist.errors import ConfigError
from effx_dist.shard import Box, whole_box

logger = logging.getLogger(__name__)

ParamNames = Sequence[Sequence[str]]
"""Names of the parameters of each of an optimizer's groups, in its order."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How plain checkpoints are read.

    Attributes:
        weights_only: leave the optimizer out.
        param_names: for optimizers that number their parameters and name none.
        trust: unpickle files that hold more than tensors and plain values, which runs whatever
            code they name.
    """

    weights_only: bool = False
    param_names: ParamNames | None = None
    trust: bool = False


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a plain checkpoint. ``read`` gives the values of one of its boxes, and performs no
    communication."""

    facts: TensorFacts
    read: Callable[[Box], torch.Tensor]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> SourceTensor:
        """One that lies in memory or in a mapped file."""
        return cls(
            TensorFacts(tensor.dtype, tuple(tensor.shape)), lambda box: tensor[box.slices].detach()
        )

    @property
    def num_bytes(self) -> int:
        """Bytes of all its values."""
        return whole_box(self.facts.shape).numel * self.facts.dtype.itemsize

    def whole(self) -> torch.Tensor:
        """All values, copied into new memory."""
        return self.read(whole_box(self.facts.shape)).clone()


@dataclass(frozen=True)
class PlainOptimizer:
    """An optimizer's state: by parameter and key a SourceTensor or a plain value, and its groups."""

    by_name: dict[str, dict[str, Any]]
    group_parameters: list[list[str]]
    group_options: list[dict[str, Any]]


@dataclass(frozen=True)
class PlainContent:
    """Everything that is kept of a plain checkpoint.

    Attributes:
        model: parameters and buffers by name, in the model's own order where that is known.
        tied: the first name of each tensor that has several, by each other name.
        model_values: what else the model's state holds.
        optimizer: None where there is none.
        stateful: states of schedulers and the like, by name.
        extra: everything else.
    """

    model: dict[str, SourceTensor]
    tied: dict[str, str] = field(default_factory=dict)
    model_values: dict[str, Any] = field(default_factory=dict)
    optimizer: PlainOptimizer | None = None
    stateful: dict[str, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, SourceTensor]:
        """The tensors of the model and the optimizer by the names that a checkpoint gives them."""
        found = {f"{MODEL}.{name}": tensor for name, tensor in self.model.items()}
        for name, entries in (self.optimizer.by_name if self.optimizer else {}).items():
            for key, entry in entries.items():
                if isinstance(entry, SourceTensor):
                    found[f"{OPTIMIZER}.{name}.{key}"] = entry
        return found


def is_same(a: SourceTensor, b: SourceTensor) -> bool:
    """Whether two tensors have the same values; read some rows at a time."""
    boxes = row_boxes(whole_box(a.facts.shape))
    return a.facts == b.facts and all(torch.equal(a.read(box), b.read(box)) for box in boxes)


def check_dense(name: str, tensor: torch.Tensor, where: object) -> torch.Tensor:
    """The tensor, a plain one; raises ConfigError for sparse, quantised and distributed ones."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not is_plain or tensor.layout != torch.strided or tensor.is_quantized:
        raise ConfigError(
            f"{where}: {name}: a {type(tensor).__name__} of layout {tensor.layout} cannot be compressed; "
            "save a dense tensor, such as full_tensor() of a DTensor"
        )
    return tensor.detach()


def keepable(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """The entries that a checkpoint can keep, with their tensors read. The others are named in a
    warning."""
    kept = {}
    for key, value in values.items():
        try:
            found = _with_tensors(value)
            tree_to_json({key: found}, "extra", {})
        except TypeError as error:
            logger.warning("%s: left out: %s", where, short(str(error)))
        else:
            kept[key] = found
    return kept


def _with_tensors(value: Any) -> Any:
    match value:
        case SourceTensor():
            return value.whole()
        case torch.Tensor():
            return value.detach().clone()
        case Mapping():
            return {key: _with_tensors(inner) for key, inner in value.items()}
        case list() | tuple():
            return type(value)([_with_tensors(inner) for inner in value])
    return value
