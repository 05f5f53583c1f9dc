"""Paths that modules had in earlier releases: in the documentation, and in what users have pickled."""

from __future__ import annotations

import sys
from types import ModuleType


def keep_former_paths(package: str, **modules: ModuleType) -> None:
    """Let ``modules`` be found in ``package`` by these names too, by an import and by an unpickler."""
    for name, module in modules.items():
        sys.modules[f"{package}.{name}"] = module
        setattr(sys.modules[package], name, module)
