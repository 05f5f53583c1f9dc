"""Technique 1, InfoBatch: train on fewer samples without bias, the same at every world size. Knows no engine."""

from effx_dist.core.losses import sequence_losses
from effx_dist.data.dataset import with_sample_ids
from effx_dist.data.messages import EffxWarning
from effx_dist.data.sampler import InfoBatchSampler
from effx_dist.data.schedule import ProgressLR

__all__ = ["EffxWarning", "InfoBatchSampler", "ProgressLR", "sequence_losses", "with_sample_ids"]
