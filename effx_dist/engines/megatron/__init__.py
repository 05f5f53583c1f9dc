"""Megatron-core with the three techniques::

import effx_dist as effx

optimizer = get_megatron_optimizer(optimizer_config, model_chunks)
handle = effx.megatron.attach(optimizer, model_chunks, effx.EffxConfig.from_file("run.toml"))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effx_dist.engines.megatron.checks import strategies
from effx_dist.engines.megatron.data import sample_losses
from effx_dist.engines.megatron.handle import Handle, attach
from effx_dist.engines.megatron.pretrain import PretrainHooks, pretrain_hooks
from effx_dist.engines.megatron.pretraining_sampler import InfoBatchPretrainingSampler

if TYPE_CHECKING:
    from effx_dist.engines.megatron.strategies import ExcpLoadStrategy, ExcpSaveStrategy

__all__ = [
    "ExcpLoadStrategy",
    "ExcpSaveStrategy",
    "Handle",
    "InfoBatchPretrainingSampler",
    "PretrainHooks",
    "attach",
    "pretrain_hooks",
    "sample_losses",
]


def __getattr__(name: str) -> Any:
    """The strategies are imported when they are asked for: not every Megatron-core has a place for them
    (PEP 562)."""
    if name in ("ExcpLoadStrategy", "ExcpSaveStrategy"):
        return getattr(strategies(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
