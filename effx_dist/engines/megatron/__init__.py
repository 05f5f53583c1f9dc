"""Megatron-core with the three techniques::

import effx_dist as effx

optimizer = get_megatron_optimizer(optimizer_config, model_chunks)
handle = effx.megatron.attach(optimizer, model_chunks, effx.EffxConfig.from_file("run.toml"))
"""

from __future__ import annotations

from effx_dist.engines.megatron.data import sample_losses
from effx_dist.engines.megatron.handle import Handle, attach
from effx_dist.engines.megatron.pretraining_sampler import InfoBatchPretrainingSampler
from effx_dist.engines.megatron.strategies import ExcpLoadStrategy, ExcpSaveStrategy

__all__ = [
    "ExcpLoadStrategy",
    "ExcpSaveStrategy",
    "Handle",
    "InfoBatchPretrainingSampler",
    "attach",
    "sample_losses",
]
