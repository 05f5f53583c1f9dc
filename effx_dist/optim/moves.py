"""What an inner step did to each parameter, and the mask that is laid over it afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from effx_dist.core.cautious import (
    cautious_decay_,
    cautious_step_,
    count_agreement,
    signs_agree,
)
from effx_dist.core.update_rules import Scalar
from effx_dist.optim.kernels import working_dtype
from effx_dist.optim.param_layout import FlatPiece, ParamLayout
from effx_dist.optim.step_plan import GradParam


@dataclass(frozen=True, slots=True)
class Move:
    """One parameter before the inner step, and its gradient."""

    param: GradParam
    local: torch.Tensor
    """The parameter itself on this rank, moved by the inner step."""
    before: torch.Tensor
    decay: Scalar | None
    """Factor of decoupled weight decay."""
    ascends: bool
    decays_cautiously: bool = False

    def update(self, piece: FlatPiece) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a piece, in the dtype of the arithmetic: the parameter from which the inner step began,
        in a tensor that may be ``before``; what that subtracted from it; and the gradient to descend.
        """
        old, new, grad = (piece.of(whole) for whole in (self.before, self.local, self.param.grad))
        if self.decay is not None and not self.decays_cautiously:
            old = old * self.decay  # the operation that decayed the parameter: the same bits
        dtype = working_dtype(new)
        old, grad = old.to(dtype), grad.to(dtype)
        return old, old - new.to(dtype), -grad if self.ascends else grad


def by_bucket(layout: ParamLayout, moves: Sequence[Move]) -> list[list[tuple[Move, FlatPiece]]]:
    """The pieces that have elements."""
    found: list[list[tuple[Move, FlatPiece]]] = [[] for _ in layout.buckets]
    for move in moves:
        for piece in layout.flat_pieces[move.param.place]:
            if piece.of(move.local).numel():
                found[layout.bucket_of[piece.whole_index]].append((move, piece))
    return found


def count(
    layout: ParamLayout, items: Sequence[tuple[Move, FlatPiece]], counts: torch.Tensor
) -> None:
    """Add the elements that agree in sign to the slots of their wholes in ``counts``."""
    for move, piece in items:
        _, update, grad = move.update(piece)
        slot = layout.slots[piece.whole_index]
        counts[slot] += count_agreement(update, grad).to(counts.device)


def mask(move: Move, piece: FlatPiece, scale: torch.Tensor) -> None:
    """Take back what does not agree, scale the rest, and decay where that waits for the update."""
    old, update, grad = move.update(piece)
    if move.decays_cautiously:
        assert move.decay is not None
        cautious_decay_(old, update, move.decay)
    cautious_step_(old, update, signs_agree(update, grad), scale.to(old))
    piece.of(move.local).copy_(old)
