"""What every implementation of the step offers: two walks over a list of items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch

from effx_dist.core.cautious import scale_from_count
from effx_dist.core.update_rules import UpdateRule

NUM_COLUMNS = 10
"""Width of a row of coefficients: those of :class:`Column`, then the rule's own."""


class Column(IntEnum):
    """The coefficients that every rule has, in a row."""

    LR = 0
    DECAY = 1
    """``1 - lr * weight_decay``."""
    GRAD_FACTOR = 2
    """What gradients are multiplied by: -1 to ascend, 1 / the loss scale, the clipping."""
    FIRST_OWN = 3


@dataclass(slots=True)  # not frozen: that makes making one four times slower
class Item:
    """One piece of one local parameter in one step, sharing memory with the optimizer.

    Attributes:
        param: of any strides; float16, bfloat16, float32 or float64.
        grad: like it in shape; its dtype may be another of these.
        moments: in the rule's order, like ``param`` in shape, in the dtype of the arithmetic.
        row: index of its coefficients.
        slot: index of its whole parameter's count and scale.
        decays_cautiously: whether weight decay is masked by sign.
    """

    param: torch.Tensor
    grad: torch.Tensor
    moments: tuple[torch.Tensor, ...]
    row: int
    slot: int
    decays_cautiously: bool

    @property
    def lies_flat(self) -> bool:
        """Whether all its tensors fill their memory in the same order, as kernels take them."""
        first, second = self.moments[0], self.moments[-1]
        moments_are = first.is_contiguous() and second.is_contiguous()
        if moments_are and self.param.is_contiguous() and self.grad.is_contiguous():
            return True
        strides = self.param.stride()
        same = all(part.stride() == strides for part in (self.grad, *self.moments))
        return same and _is_dense(self.param)


class Kernels(ABC):
    """The two walks over items of one device and one rule, in one step.

    Args:
        rule: their update rule.
        items: at least one, all on one device.
        rows: float64 [num rows, NUM_COLUMNS] on that device.

    No communication is performed, and a device is not waited for.
    """

    @abstractmethod
    def __init__(self, rule: UpdateRule, items: Sequence[Item], rows: torch.Tensor) -> None: ...

    @abstractmethod
    def count_into(self, counts: torch.Tensor) -> None:
        """First walk: add each item's agreeing elements to its slot of ``counts`` (int64, on the
        items' device). Nothing else is written.
        """

    @abstractmethod
    def update(self, scales: torch.Tensor, skip: torch.Tensor | None) -> None:
        """Second walk: moments and parameters advance, by the slots' ``scales`` (float64, on the
        items' device); nothing does where ``skip`` (0-d) is given and not zero.
        """

    def step_wholes(self, counts: torch.Tensor, numels: torch.Tensor) -> None:
        """Both walks, for items that are whole parameters, each the only one in its slot: no other rank
        has to be asked in between.

        ``counts`` is 0 in their slots; ``numels`` (int64) has the elements of each slot.
        """
        self.count_into(counts)
        self.update(scale_from_count(counts, numels), None)


def working_dtype(param: torch.Tensor) -> torch.dtype:
    """dtype of the state and the arithmetic: the parameter's own, float32 if that has 16 bits."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def readable_grad(item: Item) -> torch.Tensor:
    """The gradient in a dtype that kernels take: float64 with a float64 parameter and only then."""
    working = working_dtype(item.param)
    is_readable = (item.grad.dtype == torch.float64) == (working == torch.float64)
    return item.grad if is_readable else item.grad.to(working)


def described(item: Item, grad: torch.Tensor) -> list[int]:
    """The beginning of an item's row in the tables that kernels read: four addresses, number of elements, row, slot."""
    first, second = item.moments[0], item.moments[-1]
    return [
        item.param.data_ptr(),
        grad.data_ptr(),
        first.data_ptr(),
        second.data_ptr(),
        item.param.numel(),
        item.row,
        item.slot,
    ]


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a range of memory, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True
