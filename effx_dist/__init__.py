"""Sample pruning, cautious optimizers and compressed checkpoints, right when training is sharded.

Every public name is imported on first use, so that `import effx_dist` costs next to nothing:
neither torch nor DeepSpeed nor Megatron-core is loaded before a name that needs it is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from effx_dist.version import __version__

if TYPE_CHECKING:
    import effx_dist.engines.fsdp2 as fsdp2
    from effx_dist import checkpoint
    from effx_dist.checkpoint import Checkpointer
    from effx_dist.config import EffxConfig
    from effx_dist.data import InfoBatchSampler, ProgressLR, sequence_losses, with_sample_ids
    from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD, cautious

# The public names that need nothing beyond the plain install; `import *` gives exactly these.
__all__ = [
    "CautiousAdamW",
    "CautiousLion",
    "CautiousSGD",
    "Checkpointer",
    "EffxConfig",
    "InfoBatchSampler",
    "ProgressLR",
    "cautious",
    "checkpoint",
    "fsdp2",
    "sequence_losses",
    "with_sample_ids",
]

_HOMES = {
    "CautiousAdamW": "effx_dist.optim",
    "CautiousLion": "effx_dist.optim",
    "CautiousSGD": "effx_dist.optim",
    "Checkpointer": "effx_dist.checkpoint",
    "EffxConfig": "effx_dist.config",
    "InfoBatchSampler": "effx_dist.data",
    "ProgressLR": "effx_dist.data",
    "cautious": "effx_dist.optim",
    "sequence_losses": "effx_dist.data",
    "with_sample_ids": "effx_dist.data",
}
_SUBMODULES = {"checkpoint": "effx_dist.checkpoint", "fsdp2": "effx_dist.engines.fsdp2"}
# Public too, but not in __all__: the engine may be absent, and `import *` must not fail.
_OPTIONAL_ENGINES = {
    "deepspeed": "effx_dist.engines.deepspeed",
    "megatron": "effx_dist.engines.megatron",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562) and keep it for later uses."""
    if name in _HOMES:
        value: object = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(_SUBMODULES[name])
    elif name in _OPTIONAL_ENGINES:
        value = _import_engine(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; see dir({__name__})")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names; an optional engine is left out, since reading it may raise."""
    return sorted([*__all__, "__version__"])


def _import_engine(engine: str) -> object:
    from effx_dist.errors import MissingEngineError

    module = _OPTIONAL_ENGINES[engine]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            reason = f"effx_dist {__version__} has no adapter for this engine; fsdp2 is there"
        elif error.name is not None and error.name.split(".")[0] == engine:
            reason = f"the engine is not installed; try: pip install 'effx-dist[{engine}]'"
        else:
            raise
        raise MissingEngineError(f"effx_dist.{engine}: {reason}", name=error.name) from error
