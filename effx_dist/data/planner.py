"""From scores to a plan: which samples an epoch keeps, and the plan of it, whole or from where a run was resumed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from effx_dist.config import InfoBatchConfig
from effx_dist.core.counter_random import stream_key
from effx_dist.core.infobatch import PLAIN, is_full_epoch, roles
from effx_dist.data.messages import Messages
from effx_dist.data.plan import EpochPlan, exchange, exclusive_scan
from effx_dist.data.scores import ScoreBook
from effx_dist.data.slots import Ranks, Span
from effx_dist.errors import LayoutMismatchError

_KEEP, _ORDER = 1, 2  # purposes of random numbers, so that they are not those of one another


class Planner:
    """Plans epochs for one rank. Every method is a collective of the ranks; scores are read, not changed."""

    def __init__(self, config: InfoBatchConfig, ranks: Ranks) -> None:
        self.config = config
        self.ranks = ranks

    def is_ever_pruning(self) -> bool:
        """Whether any epoch of the run prunes. No communication is performed."""
        config = self.config
        return config.prune_ratio > 0 and not all(
            is_full_epoch(epoch, config.num_epochs, config.delta)
            for epoch in range(config.num_epochs)
        )

    def begin(self, epoch: int, book: ScoreBook, messages: Messages) -> EpochPlan:
        """Plan all of ``epoch``. At most four small all-reduces and one all-to-all."""
        config, ranks = self.config, self.ranks
        full = is_full_epoch(epoch, config.num_epochs, config.delta)
        pruned = config.prune_ratio > 0 and not full
        threshold, role = self._roles(epoch, pruned, book)
        before, kept = exclusive_scan(int(np.count_nonzero(role)), ranks.group)
        global_batch = ranks.batches.global_batch
        if config.drop_last and kept < global_batch:
            messages.too_few_kept(ranks.group, epoch, kept, global_batch)
            pruned, (threshold, role) = False, self._roles(epoch, False, book)
            before, kept = ranks.owned_start, ranks.owners.num_samples
        span = Span.of_epoch(kept, ranks.batches, config.drop_last)
        return self._build(epoch, pruned, threshold, role, before, span)

    def resume(
        self, epoch: int, pruned: bool, span: Span, position: int, book: ScoreBook
    ) -> EpochPlan:
        """Plan what is left of an epoch that was planned as ``span`` from the same scores, in any layout of ranks.

        Raises:
            LayoutMismatchError: The scores are not those that the epoch was planned from.
        """
        threshold, role = self._roles(epoch, pruned, book)
        before, kept = exclusive_scan(int(np.count_nonzero(role)), self.ranks.group)
        if kept != span.num_kept:
            raise LayoutMismatchError(
                f"the scores keep {kept} samples in epoch {epoch}, the state says {span.num_kept}: they do not belong "
                "together; load the scores and the rest of the state from one checkpoint"
            )
        span = span.resumed_at(position, self.ranks.batches, self.config.drop_last)
        return self._build(epoch, pruned, threshold, role, before, span)

    def _roles(
        self, epoch: int, pruned: bool, book: ScoreBook
    ) -> tuple[float | None, npt.NDArray[np.uint8]]:
        config, ranks = self.config, self.ranks
        threshold = None
        if pruned:
            threshold = book.threshold(config.threshold, ranks.owners.num_samples, ranks.group)
        if threshold is None:
            return None, np.full(ranks.num_owned, PLAIN, dtype=np.uint8)
        key = stream_key(config.seed, epoch, _KEEP)
        role = roles(book.scores, ranks.owned_start, threshold, config.prune_ratio, key)
        return threshold, role

    def _build(
        self,
        epoch: int,
        pruned: bool,
        threshold: float | None,
        role: npt.NDArray[np.uint8],
        before: int,
        span: Span,
    ) -> EpochPlan:
        key = stream_key(self.config.seed, epoch, _ORDER)
        ids, weights, stretches = exchange(
            role, before, span, key, self.config.prune_ratio, self.ranks
        )
        return EpochPlan(
            epoch=epoch,
            pruned=pruned,
            threshold=threshold,
            span=span,
            batches=self.ranks.batches,
            local_ids=ids,
            local_weights=weights,
            owned_stretches=stretches,
        )
