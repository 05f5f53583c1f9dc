"""JSON values of a state dict, as planners hand them over."""

from __future__ import annotations

import json
from typing import Any


def parse_value(name: str, payload: bytes) -> Any:
    """The JSON value in ``payload``. Raises TypeError for anything else, such as what
    ``torch.save`` writes."""
    try:
        return json.loads(payload)
    except ValueError as error:
        raise TypeError(
            f"{name}: the planner handed over bytes that are not JSON (the stock planner pickles non-tensors); "
            "pass planner=effx_dist.checkpoint.ExcpSavePlanner(), or take the entry out of the state dict"
        ) from error
