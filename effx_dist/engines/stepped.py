"""From the tensors that an engine's optimizer steps to what a checkpoint holds, and back.

Engines step flat tensors that hold pieces of one whole parameter or of several. Their state has entries
with a value for every element, which are cut as the tensor is, and single ones, such as a number of steps,
which every whole parameter has for itself in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from effx_dist.checkpoint import Fragment
from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Piece, WholeTensor, whole_box

STEP = "step"


def fragment_of(whole: WholeTensor, pieces: Sequence[Piece], local: torch.Tensor) -> Fragment:
    """The pieces of ``whole`` in a contiguous local tensor, as views of its memory. No communication is
    performed."""
    local = local.detach()
    held = [(piece.box, piece.view(local)) for piece in pieces]
    if not whole.numel:  # nobody holds a piece of it; one rank writes its shape
        held = [(whole_box(whole.shape), local.new_empty(whole.shape))]
    return Fragment(whole.shape, local.dtype, held)


def is_spread(key: str, value: Any, stepped: torch.Tensor) -> bool:
    """Whether an entry of an optimizer's state has a value for every element of the stepped tensor."""
    is_tensor = isinstance(value, torch.Tensor) and key != STEP
    return is_tensor and value.shape == stepped.shape


def state_leaves(
    state: Mapping[str, Any],
    stepped: torch.Tensor,
    spread: Callable[[torch.Tensor], Fragment],
    single: Callable[[str, Any], Any],
) -> dict[str, Any]:
    """The state of one whole parameter as a checkpoint holds it: ``spread`` cuts an entry with a value for
    every element of the stepped tensor, ``single`` gives any other as that parameter's own."""
    return {
        key: spread(value) if is_spread(key, value, stepped) else single(key, value)
        for key, value in state.items()
    }


def common_value(key: str, found: Mapping[str, float], remedy: str) -> float:
    """The value that parameters (by name) have in common which the engine steps as one; 0 where none has
    one.

    Raises LayoutMismatchError, naming values and parameters, where they differ; ``remedy`` ends it.
    """
    by_value = {value: name for name, value in found.items()}
    if len(by_value) > 1:
        few = ", ".join(f"{value:g} for {name}" for value, name in sorted(by_value.items())[:4])
        raise LayoutMismatchError(f"the optimizer's {key} is {few} in the checkpoint, but {remedy}")
    return next(iter(by_value), 0.0)
