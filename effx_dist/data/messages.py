"""What the sampler warns of."""

from __future__ import annotations

import warnings

from effx_dist.core.infobatch import LOPSIDED_BOUND, STALENESS_BOUND
from effx_dist.shard import Group


class EffxWarning(UserWarning):
    """Something that works but does not do what the user is likely to expect."""


class Messages:
    """Warns of each matter once in a sampler's life, on the group's first rank only, and there if not ``is_silent``."""

    def __init__(self, is_silent: bool = False) -> None:
        self._said: set[str] = set()
        self._is_silent = is_silent

    def _say(self, group: Group, matter: str, text: str) -> None:
        if matter not in self._said:
            self._said.add(matter)
            if group.rank == 0 and not self._is_silent:
                warnings.warn(text, EffxWarning, stacklevel=4)

    def nothing_is_pruned(self, group: Group, num_epochs: int, delta: float) -> None:
        """No epoch of the run is left for pruning."""
        self._say(
            group,
            "nothing_is_pruned",
            f"num_epochs={num_epochs}, delta={delta}: every epoch uses all samples, so InfoBatch will save nothing. "
            "It prunes neither the first epoch nor the last max(1, round((1 - delta) * num_epochs)); train for more "
            "epochs, or leave it out",
        )

    def beyond_the_run(self, group: Group, epoch: int, num_epochs: int) -> None:
        """An epoch was asked for that lies beyond the run."""
        self._say(
            group,
            "beyond_the_run",
            f"epoch {epoch} lies beyond num_epochs={num_epochs}: such epochs use all samples, with weight 1; give the "
            "sampler the true num_epochs",
        )

    def too_few_kept(self, group: Group, epoch: int, num_kept: int, global_batch: int) -> None:
        """A pruned epoch would not fill one global batch."""
        self._say(
            group,
            "too_few_kept",
            f"epoch {epoch} would keep {num_kept} samples, fewer than one global batch of {global_batch} "
            "(drop_last=True): it is not pruned. Use a smaller global batch, or drop_last=False",
        )

    def nonfinite_losses(self, group: Group, num_nonfinite: int) -> None:
        """Some losses were NaN or infinite."""
        self._say(
            group,
            "nonfinite_losses",
            f"{num_nonfinite} per-sample losses were NaN or infinite: they are not scored and their samples are kept. "
            "sampler.num_nonfinite counts them",
        )

    def stale_scores(self, group: Group, epoch: int, share: float) -> None:
        """Scores say when a sample was visited rather than how hard it is."""
        self._say(
            group,
            "stale_scores",
            f"{share:.0%} of the variance of the losses of epoch {epoch} is explained by when in the epoch a sample "
            f"was visited (bound: {STALENESS_BOUND:.0%}), not by how hard it is, so samples would be pruned nearly at "
            'random. Use score="relative", which compares each loss with the mean of the same stretch of training',
        )

    def lopsided_mean(self, group: Group, epoch: int, threshold: float, share_below: float) -> None:
        """A few very large scores decide the mean; nothing is said up to `LOPSIDED_BOUND`."""
        if share_below > LOPSIDED_BOUND:
            self._say(
                group,
                "lopsided_mean",
                f"{share_below:.1%} of the samples have a score below the mean, {threshold:.4g}, that epoch {epoch} "
                f"is pruned by (bound: {LOPSIDED_BOUND:.0%}): a few very large losses decide it, and nearly everything "
                "may be left out. Use a quantile, such as threshold=0.6, which they do not move",
            )

    def heavy_weight(self, group: Group, prune_ratio: float, weight: float) -> None:
        """Kept samples weigh much more than others."""
        self._say(
            group,
            "heavy_weight",
            f"prune_ratio={prune_ratio}: low-loss samples that are kept weigh {weight:.3g}, others 1, so gradients are "
            "noisy: such runs diverged at the learning rate at which training on everything was at its best. Use a "
            f"lower rate, a lower prune_ratio, or max_weight (for instance 2, with which those samples count "
            f"{2 * (1 - prune_ratio):.2g} of what they count in all the data)",
        )

    def out_of_plan(self, group: Group, text: str) -> None:
        """What is trained is not what was planned."""
        self._say(group, "out_of_plan " + text[:24], text)

    def of_state(self, group: Group, text: str) -> None:
        """What is odd about a state that was loaded."""
        self._say(group, "of_state", text)
