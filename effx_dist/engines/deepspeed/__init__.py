"""DeepSpeed with the three techniques, asked for by an "effx" block in its configuration::

    from effx_dist import deepspeed  # in place of: import deepspeed

    engine, optimizer, loader, scheduler = deepspeed.initialize(args=args, model=model, ...)

Every other name is DeepSpeed's own.
"""

from __future__ import annotations

from typing import Any

import deepspeed as _deepspeed

from effx_dist.engines.deepspeed.handle import Handle
from effx_dist.engines.deepspeed.initialize import init_distributed, initialize

__all__ = ["Handle", "init_distributed", "initialize"]
__version__ = _deepspeed.__version__


def __getattr__(name: str) -> Any:
    """DeepSpeed's own public names, so that a script need change no more than the import (PEP 562)."""
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_deepspeed, name)
