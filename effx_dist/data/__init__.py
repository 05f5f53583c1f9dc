"""Technique 1, InfoBatch: train on fewer samples without bias, the same at every world size. Knows no engine."""

from effx_dist.core.losses import sequence_losses
from effx_dist.data import peers, plan, slots
from effx_dist.data.dataset import with_sample_ids
from effx_dist.data.identity import fingerprint
from effx_dist.data.messages import EffxWarning
from effx_dist.data.sampler import InfoBatchSampler
from effx_dist.data.schedule import ProgressLR
from effx_dist.data.token_batches import TokenBatches
from effx_dist.former_paths import keep_former_paths

keep_former_paths(__name__, detached=peers, layout=slots, planner=plan)

__all__ = [
    "EffxWarning",
    "InfoBatchSampler",
    "ProgressLR",
    "TokenBatches",
    "fingerprint",
    "sequence_losses",
    "with_sample_ids",
]
