"""What InfoBatch tells a run's log."""

from __future__ import annotations

from effx_dist.data.sampler import InfoBatchSampler


def infobatch_metrics(sampler: InfoBatchSampler) -> dict[str, float]:
    """Figures of the current epoch's plan and of the run so far, by their names in logs; a threshold only in an epoch
    that is pruned. No communication is performed."""
    values = {
        "effx/infobatch/kept_fraction": sampler.kept_fraction,
        "effx/infobatch/threshold": sampler.threshold_value,
        "effx/infobatch/samples_saved": sampler.samples_saved,
    }
    return {name: float(value) for name, value in values.items() if value is not None}
