"""A way to what runs Megatron on the CPU that does not change torch in the process that starts it."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="Megatron-core is not installed"
)


def call(module: str, function: str, *args: Any) -> Any:
    """``tests.module.function(*args)``, imported only now: in a rank's process."""
    return getattr(importlib.import_module(f"tests.{module}"), function)(*args)
