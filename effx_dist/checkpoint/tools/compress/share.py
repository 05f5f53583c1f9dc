"""One rank's share of a plain checkpoint, as a Checkpointer saves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.live import LiveState, OptimizerState, StateByName
from effx_dist.checkpoint.tools.compress.content import PlainContent, SourceTensor
from effx_dist.checkpoint.tools.sharing import dealt_out
from effx_dist.shard import Box, whole_box

Shape = tuple[int, ...]


class Division:
    """The ranks' shares, as even as they can be in bytes, and the same wherever they are worked out.

    A tensor larger than an even share is cut by rows. Moments go where their weight's rows go, for
    they are pruned together.

    Args:
        content: a checkpoint of the series; later ones have the same model.
        num_ranks: ranks that share the work.
    """

    def __init__(self, content: PlainContent, num_ranks: int) -> None:
        shapes: dict[str, Shape] = {n: t.facts.shape for n, t in content.model.items()}
        num_bytes = {name: tensor.num_bytes for name, tensor in content.model.items()}
        state = content.optimizer.by_name if content.optimizer is not None else {}
        for name, entries in state.items():
            tensors = [entry for entry in entries.values() if isinstance(entry, SourceTensor)]
            num_bytes[name] = num_bytes.get(name, 0) + sum(t.num_bytes for t in tensors)
            shapes.setdefault(name, ())
        even = max(math.ceil(sum(num_bytes.values()) / num_ranks), 1)
        pieces = [
            (num_bytes[name] // num_pieces, name, box)
            for name, shape in shapes.items()
            for num_pieces in [_num_pieces(shape, num_bytes[name], even)]
            for box in _rows(shape, num_pieces)
        ]
        self._shapes = shapes
        self._places: dict[str, list[tuple[int, Box]]] = {}
        sizes = [size for size, _, _ in pieces]
        for rank, share in enumerate(dealt_out(sizes, num_ranks)):
            for _, name, box in (pieces[index] for index in share):
                self._places.setdefault(name, []).append((rank, box))

    def boxes(self, parameter: str, shape: Shape, rank: int) -> list[Box]:
        """What is ``rank``'s of a tensor of ``parameter``: the parameter's own boxes where the shape
        is the parameter's, else all of it where the parameter's first box is."""
        places = self._places.get(parameter, [(0, whole_box(shape))])
        if shape != self._shapes.get(parameter, shape):
            return [whole_box(shape)] if min(places, key=_offsets)[0] == rank else []
        return [box for owner, box in places if owner == rank]


def _offsets(place: tuple[int, Box]) -> tuple[int, ...]:
    return place[1].offsets


def _num_pieces(shape: Shape, num_bytes: int, even: int) -> int:
    num_rows = shape[0] if shape and 0 not in shape else 1
    return max(min(num_rows, math.ceil(num_bytes / even)), 1)


def _rows(shape: Shape, num_pieces: int) -> list[Box]:
    if num_pieces == 1:
        return [whole_box(shape)]
    cuts = [shape[0] * index // num_pieces for index in range(num_pieces + 1)]
    rest = (0,) * (len(shape) - 1)
    return [Box((start, *rest), (stop - start, *shape[1:])) for start, stop in pairwise(cuts)]


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
        """Does nothing: the source is only read."""

    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        return {}, False

    def take_optimizer_state(self, state: StateByName) -> None:
        """Does nothing: the source is only read."""

    @property
    def num_groups(self) -> int:
        return 0 if self._content.optimizer is None else len(self._content.optimizer.group_options)

    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        """Does nothing: the source is only read."""


class EmptyShare(Share):
    """Room for a rank's share of the weights, to load the end of a chain into."""

    def __init__(self, content: PlainContent, division: Division, rank: int) -> None:
        super().__init__(content, division, rank)
        self.has_optimizer = False

    def _values(self, tensor: SourceTensor, box: Box) -> torch.Tensor:
        return torch.empty(box.sizes, dtype=tensor.facts.dtype)
