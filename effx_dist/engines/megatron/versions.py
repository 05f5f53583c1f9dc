"""What the adapter was tested with, and what a Megatron-core has of it."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

import megatron.core

from effx_dist.errors import MissingEngineError

TESTED_VERSIONS = ("0.16.1", "0.19.2")
"""The first and the last; the strategies with the first alone."""
_BASE = "megatron.core.dist_checkpointing.strategies.base"


def has_strategies() -> bool:
    """Whether this Megatron-core lets a library add strategies to dist_checkpointing."""
    return importlib.util.find_spec(_BASE) is not None


def strategies() -> ModuleType:
    """The module of the strategies. Raises MissingEngineError where this Megatron-core has no place for
    them."""
    if not has_strategies():
        raise MissingEngineError(
            f"megatron-core {megatron.core.__version__}: its dist_checkpointing takes no strategies of others (it "
            f"did in {TESTED_VERSIONS[0]}); use handle.save_checkpoint and handle.load_checkpoint, which write and "
            "read the same checkpoints"
        )
    return importlib.import_module("effx_dist.engines.megatron.strategies")
