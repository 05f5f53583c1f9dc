"""What a sampler tells of its run: where it stands, and what it has saved. Nothing here communicates."""

from __future__ import annotations

from torch.utils.data.distributed import DistributedSampler

from effx_dist.data.epoch_run import EpochRun
from effx_dist.data.plan import Planner
from effx_dist.data.state import Counters
from effx_dist.shard import Group


class SamplerFigures(DistributedSampler[int]):
    """The read-only side of `InfoBatchSampler`.

    It is a DistributedSampler, which is how frameworks know a sampler that gives each rank its own samples already:
    Lightning, Fabric and others then leave it alone, and tell it the epoch.
    """

    num_samples: int
    batch_size: int
    _planner: Planner
    _counters: Counters
    _run: EpochRun | None

    @property
    def group(self) -> Group:
        """The ranks that see different samples."""
        return self._planner.ranks.group

    @property
    def num_replicas(self) -> int:  # type: ignore[override]  # torch's are plain attributes
        """Number of ranks that see different samples."""
        return self.group.size

    @property
    def rank(self) -> int:  # type: ignore[override]
        """This rank's number among them."""
        return self.group.rank

    @property
    def epoch(self) -> int:  # type: ignore[override]
        """The current epoch, from 0."""
        return self._run.plan.epoch if self._run else self._counters.first_epoch

    @property
    def position(self) -> int:
        """Samples of this epoch that all ranks together have weighed, those before a resume included."""
        run = self._run
        return run.plan.num_before + run.num_weighed * self.group.size if run else 0

    @property
    def num_remaining(self) -> int:
        """Ids of this epoch that this rank has not weighed yet; 0 before anything is planned."""
        return self._run.num_remaining if self._run else 0

    @property
    def is_resumed(self) -> bool:
        """Whether the current epoch is one that a loaded state stood in."""
        return bool(self._run and self._run.is_resumed)

    @property
    def progress(self) -> float:
        """Data consumed, in epochs: the epoch plus the weighed fraction of it. For `ProgressLR`.

        A batch that is weighed twice counts once; where ids are on an accelerator, if it is by the same tensor of ids.
        """
        total = self._run.plan.num_total if self._run else 0
        return self.epoch + (self.position / total if total else 0.0)

    @property
    def kept_fraction(self) -> float:
        """Fraction of all samples that the current plan keeps; 1.0 in a full epoch."""
        return self._run.plan.span.num_kept / self.num_samples if self._run else 1.0

    @property
    def threshold_value(self) -> float | None:
        """Score below which samples of this epoch may have been left out; None in an epoch that is not pruned."""
        return self._run.plan.threshold if self._run else None

    @property
    def samples_saved(self) -> int:
        """Samples left out by pruning in the run so far, the whole of the current epoch included."""
        return self._counters.samples_saved

    def metrics(self) -> dict[str, float]:
        """Figures of the current plan and of the run so far, by their names in logs; a threshold only in an epoch
        that is pruned."""
        figures = {
            "kept_fraction": self.kept_fraction,
            "threshold": self.threshold_value,
            "samples_saved": self.samples_saved,
        }
        return {f"effx/infobatch/{name}": float(x) for name, x in figures.items() if x is not None}

    @property
    def num_nonfinite(self) -> int:
        """Losses of all ranks that were NaN or infinite, up to the last `set_epoch`."""
        return self._counters.num_nonfinite

    @property
    def finished_epochs(self) -> int:
        """Epochs of which this rank has weighed every sample."""
        return self._counters.finished_epochs + bool(self._run and not self.num_remaining)
