"""One file of ``torch.save`` that ``torch.load(weights_only=True)`` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from effx_dist.checkpoint.tools.convert.content import Content

PARAM_NAMES = "param_names"
"""The key, beside the optimizer's state, of the names of each group's parameters: the state itself only
numbers them."""


def write_torch_file(content: Content, path: Path, weights_only: bool) -> None:
    """``{"model", "optimizer", "param_names", "step", "extra", "stateful"}`` as one file; takes memory for
    all of it.

    ``model.load_state_dict(file["model"])``, and ``optimizer.load_state_dict(file["optimizer"])`` for
    an optimizer built over the same parameters in the same order, which ``param_names`` says by group.
    ``weights_only``: "model" and "step" alone. Raises ConfigError, CorruptCheckpointError, OSError.
    """
    stored = set(content.model.values())
    if not weights_only:
        stored |= {n for state in content.optimizer.values() for n in state.values()}
    content.will_read(iter(stored))
    tensors = {name: content.read(name) for name in content.untied.values()}
    model: dict[str, Any] = {name: tensors[stored] for name, stored in content.model.items()}
    model |= content.tree(content.values.model_values, "model_values")
    whole: dict[str, Any] = {"model": model, "step": content.manifest.step}
    if not weights_only:
        groups = content.param_groups()
        whole["optimizer"] = _optimizer(content, groups)
        whole[PARAM_NAMES] = [group["params"] for group in groups]
        whole["stateful"] = content.tree(content.values.stateful, "stateful")
        whole["extra"] = content.tree(content.values.extra, "extra")
    torch.save(whole, path)


def _optimizer(content: Content, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """What the optimizer's own state_dict() gives: parameters are numbers, counted over the groups."""
    number = {name: i for i, name in enumerate(n for group in groups for n in group["params"])}
    state = {
        number[parameter]: {
            **{key: content.read(stored) for key, stored in entries.items()},
            **content.optimizer_values(parameter),
        }
        for parameter, entries in sorted(content.optimizer.items(), key=lambda e: number[e[0]])
    }
    named = [{**group, "params": [number[n] for n in group["params"]]} for group in groups]
    return {"state": state, "param_groups": named}
