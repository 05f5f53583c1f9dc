"""One rank's share of a plain checkpoint, as a Checkpointer saves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.live import LiveState, OptimizerState, StateByName
from effx_dist.checkpoint.tools.compress.content import PlainContent, SourceTensor
from effx_dist.checkpoint.tools.compress.division import Division
from effx_dist.shard import Box


class Share(LiveState):
    """What is ``rank``'s of a checkpoint. Its tensors are read when they are asked for, to be saved.

    No communication is performed.
    """

    has_random_state = False

    def __init__(self, content: PlainContent, division: Division, rank: int) -> None:
        self._content = content
        self._division = division
        self._rank = rank
        self.has_optimizer = content.optimizer is not None

    def model_state(self) -> dict[str, Any]:
        tensors = {n: self._fragment(n, tensor) for n, tensor in self._content.model.items()}
        return tensors | self._content.model_values

    def tied_names(self) -> dict[str, str]:
        return dict(self._content.tied)

    def optimizer_state(self) -> OptimizerState:
        optimizer = self._content.optimizer
        assert optimizer is not None, "has_optimizer"
        by_name: StateByName = {
            name: {
                key: self._fragment(name, entry) if isinstance(entry, SourceTensor) else entry
                for key, entry in entries.items()
            }
            for name, entries in optimizer.by_name.items()
        }
        return OptimizerState(by_name, optimizer.group_parameters, optimizer.group_options)

    def _fragment(self, parameter: str, tensor: SourceTensor) -> Fragment:
        shape, dtype = tensor.facts.shape, tensor.facts.dtype
        boxes = self._division.boxes(parameter, shape, self._rank)
        return Fragment(shape, dtype, [(box, self._values(tensor, box)) for box in boxes])

    def _values(self, tensor: SourceTensor, box: Box) -> torch.Tensor:
        return tensor.read(box)

    def take_model_values(self, values: Mapping[str, Any]) -> None:
        """They are the source's."""

    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        return {}, False

    def take_optimizer_state(self, state: StateByName) -> None:
        """It is the source's."""

    @property
    def num_groups(self) -> int:
        return 0 if self._content.optimizer is None else len(self._content.optimizer.group_options)

    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        """They are the source's."""


class EmptyShare(Share):
    """Room for a rank's share of the weights, to load the end of a chain into."""

    def __init__(self, content: PlainContent, division: Division, rank: int) -> None:
        super().__init__(content, division, rank)
        self.has_optimizer = False

    def _values(self, tensor: SourceTensor, box: Box) -> torch.Tensor:
        return torch.empty(box.sizes, dtype=tensor.facts.dtype)
