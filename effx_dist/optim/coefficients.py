"""Coefficients of a step, computed once per parameter group and number of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from effx_dist.core.update_rules import Scalar, UpdateRule
from effx_dist.optim.kernels import NUM_COLUMNS, Column
from effx_dist.optim.kernels.device import to_device


class Coefficients:
    """Rows of coefficients, collected group by group, then put where the parameters are."""

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._num_rows = 0

    def add(
        self, rule: UpdateRule, settings: Mapping[str, Any], steps: Sequence[float]
    ) -> list[int]:
        """Add the rows of one group's parameters, which are about to take their ``steps[i]``-th step; returns
        the index of each one's row. Equal steps share a row.
        """
        distinct = sorted(set(steps))
        place = {step: self._num_rows + i for i, step in enumerate(distinct)}
        lr = settings["lr"]
        if isinstance(lr, torch.Tensor) and lr.device.type != "cpu":
            on_device = to_device(torch.tensor(distinct, dtype=torch.float64), lr.device)
            self._append(_vectors(rule, settings, lr.double().reshape(()), on_device))
        else:
            host = [_row(rule, settings, float(lr), step) for step in distinct]
            self._append(torch.tensor(host, dtype=torch.float64))
        return [place[step] for step in steps]

    def add_on_device(
        self, rule: UpdateRule, settings: Mapping[str, Any], steps: torch.Tensor
    ) -> list[int]:
        """As :meth:`add`, with the steps (1-D) on a device, which is not waited for."""
        lr = settings["lr"]
        if isinstance(lr, torch.Tensor):
            lr = to_device(lr, steps.device).double().reshape(())
        first = self._num_rows
        self._append(_vectors(rule, settings, lr, steps.double()))
        return list(range(first, self._num_rows))

    def on(self, device: torch.device, grad_factor: torch.Tensor | None) -> torch.Tensor:
        """float64 [num rows, NUM_COLUMNS]; gradients are multiplied by ``grad_factor`` (0-d) too."""
        parts = [to_device(part, device) for part in self._parts]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)
        if grad_factor is not None:
            rows = rows.clone()
            rows[:, Column.GRAD_FACTOR] *= grad_factor.to(device=device, dtype=torch.float64)
        return rows

    def _append(self, part: torch.Tensor) -> None:
        self._parts.append(part)
        self._num_rows += len(part)


def _row(rule: UpdateRule, settings: Mapping[str, Any], lr: Scalar, step: Scalar) -> list[Scalar]:
    """One row, or a column of each for a vector of steps."""
    common = (lr, 1 - lr * settings["weight_decay"], -1.0 if settings["maximize"] else 1.0)
    row: list[Scalar] = [*common, *rule.coefficients(settings, step)]
    return row + [0.0] * (NUM_COLUMNS - len(row))


def _vectors(
    rule: UpdateRule, settings: Mapping[str, Any], lr: Scalar, steps: torch.Tensor
) -> torch.Tensor:
    columns = []
    for value in _row(rule, settings, lr, steps):
        if isinstance(value, torch.Tensor):
            columns.append(value.expand(len(steps)))
        else:
            columns.append(torch.full_like(steps, value))
    return torch.stack(columns, dim=1)
