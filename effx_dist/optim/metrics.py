"""What a cautious optimizer tells a run's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def cautious_metrics(alignment: Mapping[Any, float] | None) -> dict[str, float]:
    """The mean over the parameters of an optimizer's ``alignment``, by its name in logs; empty before the first step
    and where the optimizer is not cautious (None)."""
    if not alignment:
        return {}
    return {"effx/cautious/alignment": sum(map(float, alignment.values())) / len(alignment)}
