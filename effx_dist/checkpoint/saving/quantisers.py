"""Quantisers of whole tensors, from ranks that each see only their pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.checkpoint.format.chunks import JointPieces, block_ranges, in_order
from effx_dist.checkpoint.state.joints import Joint
from effx_dist.core.excp import (
    RANGES_LEN,
    SUMS_LEN,
    JointArrays,
    JointQuantiser,
    Profile,
    build_quantiser,
    cells,
    cells_len,
    ranges,
    sums,
)
from effx_dist.shard import Group
from effx_dist.shard.group import ReduceOp

Array = npt.NDArray[Any]
LocalPieces = Mapping[str, Sequence[JointPieces]]
"""This rank's pieces of each joint, by the weight's name; no entry where it holds nothing of it."""


@dataclass(frozen=True, slots=True)
class JointSpec:
    """One joint and the number of elements of its whole weight."""

    joint: Joint
    global_numel: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A whole weight's quantiser, and the relative root-mean-square error of the weight that it
    leaves."""

    quantiser: JointQuantiser
    error: float


def measure(
    specs: Sequence[JointSpec], local: LocalPieces, profile: Profile, group: Group, threads: int = 1
) -> dict[str, Measured]:
    """The quantiser of each weight, the same on every rank; none for one that cannot be quantised
    (not finite, say).

    Four rounds over the local pieces, each with one gather of failures and one all-reduce of a
    vector per joint: maxima, two of integer sums, and the weights' squares for the error. No
    reconstruction depends on how the tensors are cut. Blocks are looked at on up to ``threads``
    threads, which changes nothing.
    """
    if not specs:
        return {}
    rounds = _Rounds(specs, local, group, threads)
    by_max = rounds.run(RANGES_LEN, "max", np.float64, lambda _, block: ranges(block.arrays()))
    by_sum = rounds.run(
        SUMS_LEN,
        "sum",
        np.int64,
        lambda i, block: sums(block.arrays(), by_max[i], specs[i].global_numel),
    )
    by_cell = rounds.run(
        cells_len(profile),
        "sum",
        np.int64,
        lambda i, block: cells(
            block.arrays(), by_max[i], by_sum[i], specs[i].global_numel, profile
        ),
    )
    # reported, and compared with max_error; in no reconstruction
    squares = rounds.run(1, "sum", np.float64, lambda _, block: block.weight_squares())[:, 0]
    found = {}
    for i, spec in enumerate(specs):
        has_v = spec.joint.exp_avg_sq is not None
        quantiser = build_quantiser(
            profile, True, has_v, spec.global_numel, by_max[i], by_sum[i], by_cell[i]
        )
        if quantiser is not None:
            error = math.sqrt(quantiser.squared_error / squares[i]) if squares[i] else 0.0
            found[spec.joint.weight] = Measured(quantiser, error)
    return found


@dataclass(frozen=True, slots=True)
class _Block:
    """One block of the local pieces of a joint."""

    pieces: JointPieces
    cut: slice

    def arrays(self) -> JointArrays:
        """Residual and moments of this block."""
        return self.pieces.arrays(self.cut)

    def weight_squares(self) -> Array:
        """Sum of squares of the weight, float64 [1]."""
        values = self.pieces.weight[self.cut].float().numpy()
        return np.array([np.einsum("i,i->", values, values, dtype=np.float64)])


class _Rounds:
    """Statistics of all joints, a row each, merged over the group."""

    def __init__(
        self, specs: Sequence[JointSpec], local: LocalPieces, group: Group, threads: int
    ) -> None:
        self._specs = specs
        self._local = local
        self._group = group
        self._threads = threads

    def run(
        self, length: int, op: ReduceOp, dtype: type, statistic: Callable[[int, _Block], Array]
    ) -> Array:
        """Rows of ``statistic(joint index, block)``, merged over blocks and ranks by ``op``.

        One rank's failure ends the round on all of them, instead of leaving the others in the
        all-reduce.
        """
        rows: Array = np.zeros((len(self._specs), length), dtype=dtype)
        merge = np.maximum if op == "max" else np.add

        def look(place: tuple[int, _Block]) -> tuple[int, Array]:
            return place[0], statistic(*place)

        def fill() -> None:
            for index, found in in_order(look, self._blocks(), self._threads):
                merge(rows[index], found, out=rows[index])

        self._group.everywhere(fill, keep_own_error=False)
        merged: Array = self._group.all_reduce(torch.from_numpy(rows), op).numpy()
        return merged

    def _blocks(self) -> Iterator[tuple[int, _Block]]:
        """Every local block, by the index of its joint."""
        for index, spec in enumerate(self._specs):
            for pieces in self._local.get(spec.joint.weight, ()):
                for cut in block_ranges(pieces.box.numel):
                    yield index, _Block(pieces, cut)
