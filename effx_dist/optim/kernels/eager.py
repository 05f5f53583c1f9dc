"""The step in plain torch operations, for any device: the reference that kernels are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from effx_dist.core import cautious
from effx_dist.core.update_rules import Scalar, UpdateRule
from effx_dist.optim.kernels.interface import Column, Item, Kernels, working_dtype


class EagerKernels(Kernels):
    """One item after the other, with temporary tensors of its size."""

    def __init__(self, rule: UpdateRule, items: Sequence[Item], rows: torch.Tensor) -> None:
        self._rule = rule
        self._items = items
        # As plain numbers where that takes no waiting.
        self._rows: list[list[Scalar]] = (
            rows.tolist()
            if rows.device.type == "cpu"
            else [list(row.unbind()) for row in rows.unbind()]
        )

    def count_into(self, counts: torch.Tensor) -> None:
        for item in self._items:
            grad, own = self._grad(item), self._own(item)
            signs = self._rule.signs(own, item.moments, grad)
            counts[item.slot] += cautious.count_agreement(signs, grad)

    def update(self, scales: torch.Tensor, skip: torch.Tensor | None) -> None:
        if skip is not None and bool(skip):
            return
        for item in self._items:
            self._update_item(item, scales[item.slot])

    def _update_item(self, item: Item, scale: torch.Tensor) -> None:
        row, grad = self._rows[item.row], self._grad(item)
        update, signs = self._rule.advance_(self._own(item), item.moments, grad)
        param = item.param.to(grad.dtype)
        if item.decays_cautiously:
            cautious.cautious_decay_(param, signs, row[Column.DECAY])
        else:
            cautious.decay_(param, row[Column.DECAY])
        step_size = (scale * row[Column.LR]).to(param)  # float64 until here: one rounding
        cautious.cautious_step_(param, update, cautious.signs_agree(signs, grad), step_size)
        if param is not item.param:
            item.param.copy_(param)

    def _own(self, item: Item) -> list[Scalar]:
        return self._rows[item.row][Column.FIRST_OWN :]

    def _grad(self, item: Item) -> torch.Tensor:
        """The gradient to descend, in the dtype of the arithmetic; each walk makes its own."""
        grad = item.grad.to(working_dtype(item.param))
        factor = self._rows[item.row][Column.GRAD_FACTOR]
        is_one = not isinstance(factor, torch.Tensor) and factor == 1.0  # would only copy
        return grad if is_one else grad * factor
