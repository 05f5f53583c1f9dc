"""A way to what runs Megatron on the CPU that does not change torch in the process that starts it."""

from __future__ import annotations

import importlib
from typing import Any


def call(module: str, function: str, *args: Any) -> Any:
    """``tests.module.function(*args)``, imported only now: in a rank's process."""
    return getattr(importlib.import_module(f"tests.{module}"), function)(*args)
