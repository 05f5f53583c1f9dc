"""Which rank compresses what: every parameter and buffer, with its optimizer state, is some rank's."""

from __future__ import annotations

import math
from itertools import pairwise

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
            (num_bytes[name] // num_parts, name, box)
            for name, shape in shapes.items()
            for num_parts in [_num_parts(shape, num_bytes[name], even)]
            for box in _rows(shape, num_parts)
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


def _num_parts(shape: Shape, num_bytes: int, even: int) -> int:
    num_rows = shape[0] if shape and 0 not in shape else 1
    return max(min(num_rows, math.ceil(num_bytes / even)), 1)


def _rows(shape: Shape, num_parts: int) -> list[Box]:
    if num_parts == 1:
        return [whole_box(shape)]
    cuts = [shape[0] * part // num_parts for part in range(num_parts + 1)]
    rest = (0,) * (len(shape) - 1)
    return [Box((start, *rest), (stop - start, *shape[1:])) for start, stop in pairwise(cuts)]
