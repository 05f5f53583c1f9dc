"""The sampler of technique 1: what training code holds of it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from torch.utils.data import Sampler

from effx_dist.config import InfoBatchConfig
from effx_dist.core.infobatch import STALENESS_BOUND
from effx_dist.data.messages import Messages
from effx_dist.data.peers import Peers, detached
from effx_dist.data.plan import EpochPlan, Planner
from effx_dist.data.recorder import LossRecorder, as_ids
from effx_dist.data.scores import Flushed, ScoreBook, tell_all
from effx_dist.data.slots import Ranks, whole_number
from effx_dist.data.state import Counters, SamplerState
from effx_dist.errors import ConfigError, EffxError
from effx_dist.shard import Group, as_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class InfoBatchSampler(Sampler[int]):
    """Sample ids for one rank, epoch by epoch, without the samples that InfoBatch (ICLR 2024) leaves out.

    ::

        sampler = InfoBatchSampler(len(dataset), batch_size=8, num_epochs=4)
        loader = DataLoader(with_sample_ids(dataset), batch_size=8, sampler=sampler)
        for epoch in range(4):
            sampler.set_epoch(epoch)
            for batch in loader:
                losses = sequence_losses(model(batch), ...)          # [batch]
                sampler.weigh(losses, batch["sample_id"]).backward()

    In a pruning epoch, a sample whose score lies below the threshold is left out with probability ``prune_ratio``,
    and weighs ``1 / (1 - prune_ratio)`` where it is kept. The first epoch and the last
    ``max(1, round((1 - delta) * num_epochs))`` use everything. The kept samples, their weights and the global batches
    are the same at every world size, given the same scores and the same global batch
    (``batch_size * gradient_accumulation_steps * group.size``). Every rank gets the same number of whole micro-batches.

    **Communication.** `set_epoch`, `state_dict` and `load_state_dict` are collectives: every rank of the group calls
    them, in the same order. The first of `set_epoch`, `len`, `iter` and `plan` plans epoch 0 and is one too, and so is
    `iter` after the end of an epoch (see `__iter__`). `weigh` and the other properties never communicate.

    Args:
        num_samples: Samples of the data set, over all ranks.
        batch_size: Samples of one micro-batch of one rank.
        num_epochs: Passes over the data in the whole run.
        prune_ratio: Fraction of the low-score samples that is left out, in [0, 1); not the fraction saved, which is
            about 0.3 to 0.37 at 0.5.
        delta: Fraction of the epochs after which pruning ends, in (0, 1].
        seed: Seed of what is left out and of the order, the same on every rank. No global random state is touched.
        threshold: "mean" of the scores, or a number in (0, 1) for that quantile.
        score: "loss", a sample's last loss, or "relative", that minus the mean loss of the same stretch of training.
        drop_last: What does not fill a global batch is dropped, chosen uniformly at random (True), or padded with
            repeated samples of weight 0, spread over the epoch (False).
        gradient_accumulation_steps: Micro-batches of one optimizer step.
        group: The ranks that see different samples: a Group, a process group, or None for all there are. Tensor-,
            pipeline- and context-parallel peers must not be in it; they get the same samples.
        peers: Those, where not each of them has bit-equal losses, and which one's count. They take part in what is
            collective, each with its own group.

    Raises:
        ConfigError: A value is out of its range, or ``num_samples`` does not fill one global batch with ``drop_last``.

    Warns:
        EffxWarning: Once for each of: no epoch is left for pruning; losses are not finite; scores are stale.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int = 8,
        num_epochs: int = 4,
        prune_ratio: float = 0.5,
        delta: float = 0.875,
        seed: int = 0,
        threshold: Literal["mean"] | float = "mean",
        score: Literal["loss", "relative"] = "loss",
        drop_last: bool = True,
        gradient_accumulation_steps: int = 1,
        group: Group | ProcessGroup | None = None,
        peers: Peers | None = None,
    ) -> None:
        self.config = InfoBatchConfig(
            num_epochs=num_epochs,
            prune_ratio=prune_ratio,
            delta=delta,
            threshold=threshold,
            score=score,
            seed=seed,
            drop_last=drop_last,
        )
        self.num_samples = whole_number("num_samples", num_samples)
        self.batch_size = whole_number("batch_size", batch_size)
        num_accumulated = whole_number("gradient_accumulation_steps", gradient_accumulation_steps)
        ranks = Ranks.of(as_group(group), self.num_samples, self.batch_size, num_accumulated)
        if drop_last:
            ranks.check_that_a_batch_is_filled()
        self.peers = peers if peers is not None else Peers()
        self._planner = Planner(self.config, ranks)
        self._messages = Messages(is_silent=not self.peers.is_reporter)
        self._book = ScoreBook.unscored(ranks.num_owned)
        self._counters = Counters()
        self._plan: EpochPlan | None = None
        self._recorder: LossRecorder | None = None
        self._num_consumed = 0  # of this rank's plan, by weigh
        self._was_epoch_set = False
        if prune_ratio > 0 and not self._planner.is_ever_pruning():
            self._messages.nothing_is_pruned(ranks.group, num_epochs, delta)

    @classmethod
    def from_config(
        cls,
        config: InfoBatchConfig,
        num_samples: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        group: Group | ProcessGroup | None = None,
        peers: Peers | None = None,
    ) -> Self:
        """A sampler with the settings of an "infobatch" section. No communication is performed."""
        return cls(
            num_samples,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            group=group,
            peers=peers,
            **config.model_dump(exclude={"enabled"}),
        )

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``: recorded losses go to their samples' owners, become scores, and a plan is made from them.

        Collective: every rank of the group calls it. It does nothing where ``epoch`` is the current one, so a position
        restored by `load_state_dict` survives.

        Raises:
            ConfigError: ``epoch`` is not a whole number, at least 0; or ids were weighed that are not of this rank's
                plan (then RankFailedError on the other ranks).
        """
        epoch = whole_number("epoch", epoch, at_least=0)
        if self._plan is None or self._plan.epoch != epoch:
            self._go_to(epoch)
        self._was_epoch_set = True

    def __iter__(self) -> Iterator[int]:
        """A fresh iterator over what this rank has not weighed of the current epoch.

        Where everything was weighed and `set_epoch` was not called since the last `iter`, the next epoch begins first,
        so loaders that start again by themselves go on through the run; this is a collective. After an explicit
        `set_epoch` of a finished epoch (a run resumed at its end) there is nothing left to yield.

        A loader may fetch ahead within an epoch; `weigh` every batch of it before the next epoch begins.
        """
        if self._plan is not None and not self._was_epoch_set and not self.num_remaining:
            self._go_to(self._plan.epoch + 1)
        self._was_epoch_set = False
        return self.plan.ids_from(self._num_consumed)

    def __len__(self) -> int:
        """Ids of one rank in the whole current epoch, right before it is iterated.

        After a resume within an epoch, still that of the whole epoch; `num_remaining` is what `iter` will yield.
        """
        return self.plan.span.end // self.group.size

    @property
    def plan(self) -> EpochPlan:
        """The current epoch's plan for this rank. Plans epoch 0 (a collective) where nothing was planned yet."""
        if self._plan is None:
            self._go_to(0)
        assert self._plan is not None
        return self._plan

    def weigh(self, losses: torch.Tensor, sample_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """Record the losses of a micro-batch, and return the scalar to call ``backward`` on.

        That is ``sum(weight * loss) / batch`` (the paper's equations 5 to 7), in float32 or wider, with its graph.
        Under gradient accumulation the caller, or the engine, divides it by the number of micro-batches, as any other
        loss. The losses are kept on their device until the epoch ends: no communication, and no host sync where they
        are on an accelerator. A loss that is not finite is returned as it is, but never becomes a score.

        The position that `state_dict` saves advances here, not where ids are fetched, so loaders may fetch ahead. Weigh
        whole micro-batches, on every rank the same number of them, in the order in which the sampler gave them.

        Args:
            losses: ``[batch]``, one loss a sample, any floating dtype, on any device.
            sample_ids: ``[batch]`` integers, the ids that came with the batch; a tensor or a list.

        Raises:
            ConfigError: The shapes differ; the ids are not integers; ids are not of this rank's plan. Where the ids are
                on an accelerator the last is found when the epoch ends or is saved, as looking would cost a host sync.
        """
        ids = as_ids(sample_ids, losses)
        if self._recorder is None:
            raise ConfigError(
                "weigh: no epoch is planned yet; iterate the sampler, or call set_epoch, first"
            )
        loss = self._recorder.weigh(losses, ids, self._num_consumed)
        self._count(len(ids))
        return loss

    def advance(self, num_samples: int) -> None:
        """Count samples of this rank that a peer weighs, where there are no losses (`Peers.has_losses`).

        Called for whole optimizer steps, after them: the position is then the same on all peers. No communication is
        performed.

        Raises:
            ConfigError: This rank weighs its losses itself; ``num_samples`` is not a whole number, at least 0.
        """
        if self.peers.has_losses:
            raise ConfigError(
                "advance: this rank has losses to weigh; only ranks without any call it"
            )
        self._count(whole_number("num_samples", num_samples, at_least=0))

    def _count(self, num_samples: int) -> None:
        self._num_consumed = min(self._num_consumed + num_samples, len(self.plan.local_ids))

    def _go_to(self, epoch: int) -> None:
        group = self.group
        if self._plan is not None:
            flushed = self._flush()
            self._counters.finished_epochs += flushed.min_consumed >= len(self._plan.local_ids)
            stale = self._book.take_scores(
                self._plan.owned_stretches, self.num_samples, self.config.score == "relative", group
            )
            if stale > STALENESS_BOUND and self._planner.is_ever_pruning():
                self._messages.stale_scores(group, self._plan.epoch, stale)
            self._plan = self._recorder = None  # their memory is needed for the next ones
        if epoch >= self.config.num_epochs:
            self._messages.beyond_the_run(group, epoch, self.config.num_epochs)
        plan = self._planner.begin(epoch, self._book, self._messages)
        self._counters.samples_saved += self.num_samples - plan.span.num_kept
        self._take_up(plan)

    def _take_up(self, plan: EpochPlan) -> None:
        self._plan = plan
        self._recorder = LossRecorder(plan.local_ids, plan.local_weights)
        self._num_consumed = 0

    def _flush(self) -> Flushed:
        """Send the recorded losses to the owners of their samples. One small gather and two all-to-alls."""
        assert self._recorder is not None
        error: Exception | None = None
        ids, losses = np.empty(0, np.int64), np.empty(0, np.float32)
        try:
            ids, losses = self._recorder.take()
        except ConfigError as caught:
            error = caught
        error = self.peers.agree(error, self._num_consumed)
        if error is None:
            ids, losses = self.peers.share(ids, losses)
        flushed = tell_all(error, self._num_consumed, losses, self.group)
        self._book.receive(ids, losses, self._planner.ranks)
        self._counters.num_nonfinite += flushed.num_nonfinite
        if flushed.num_nonfinite:
            self._messages.nonfinite_losses(self.group, self._counters.num_nonfinite)
        return flushed

    @property
    def group(self) -> Group:
        """The ranks that see different samples."""
        return self._planner.ranks.group

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self._plan.epoch if self._plan else 0

    @property
    def position(self) -> int:
        """Samples of this epoch that all ranks together have weighed, those before a resume included."""
        return self._plan.span.first + self._num_consumed * self.group.size if self._plan else 0

    @property
    def num_remaining(self) -> int:
        """Ids of this epoch that this rank has not weighed yet; 0 before anything is planned."""
        return len(self._plan.local_ids) - self._num_consumed if self._plan else 0

    @property
    def progress(self) -> float:
        """Data consumed, in epochs: the epoch plus the weighed fraction of it. For `ProgressLR`."""
        end = self._plan.span.end if self._plan else 0
        return self.epoch + (self.position / end if end else 0.0)

    @property
    def kept_fraction(self) -> float:
        """Fraction of all samples that the current plan keeps; 1.0 in a full epoch."""
        return self._plan.span.num_kept / self.num_samples if self._plan else 1.0

    @property
    def threshold_value(self) -> float | None:
        """Score below which samples of this epoch may have been left out; None in an epoch that is not pruned."""
        return self._plan.threshold if self._plan else None

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
        """Losses of all ranks that were NaN or infinite, up to the last `set_epoch` or `state_dict`."""
        return self._counters.num_nonfinite

    @property
    def finished_epochs(self) -> int:
        """Epochs of which this rank has weighed every sample."""
        return self._counters.finished_epochs + bool(self._plan and not self.num_remaining)

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands: JSON values, and the scores that this rank owns as two `LocalRows`.

        **Collective: every rank of the group calls it**, not only the one that writes a file: losses recorded so far
        are sent to the owners of their samples first. Training may go on afterwards; the state is a copy.

        Call it between optimizer steps. The position is that of the rank that has weighed least, in whole
        micro-batches.
        """
        position, span, pruned = 0, None, False
        if self._plan is not None:
            flushed = self._flush()
            span, pruned = self._plan.span, self._plan.pruned
            num_steps = flushed.min_consumed // self.batch_size
            position = span.first + num_steps * self._planner.ranks.batches.micro_step
        settings = self.config.model_dump(exclude={"enabled"})
        counters = dataclasses.replace(self._counters)
        state = SamplerState(settings, counters, self.epoch, position, pruned, span, self._book)
        return state.to_dict(self._planner.ranks)

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where a run stood when it was saved, at the same or another number of ranks. Collective.

        With the same global batch, this and all later epochs are those of the uninterrupted run, bit for bit, given the
        same losses. With another one, no sample of the epoch is repeated or skipped, but for what ``drop_last`` drops.

        Args:
            state: At the same number of ranks, this rank's own. At another number, the list of every old rank's state,
                or one whose `LocalRows` hold the rows that this rank owns (see `state_dict` of a new sampler).

        Raises:
            ConfigError: The state is of a run with other settings (named), or is malformed.
            LayoutMismatchError: It is of another number of samples, or rows are missing.
            RankFailedError: Another rank refused its state.
        """
        states = [state] if isinstance(state, Mapping) else list(state)
        settings = self.config.model_dump(exclude={"enabled"})
        error: Exception | None = None
        try:
            loaded = SamplerState.from_dicts(states, self._planner.ranks, settings)
        except EffxError as caught:
            error = caught
        self.group.tell_all(self.peers.agree(error), None)
        self._book, self._counters = loaded.book, loaded.counters
        self._plan = self._recorder = None
        self._num_consumed, self._was_epoch_set = 0, False
        if loaded.span is not None:
            self._take_up(
                self._planner.resume(
                    loaded.epoch, loaded.pruned, loaded.span, loaded.position, self._book
                )
            )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: a group of several ranks cannot travel, so the copy can finish its epoch but cannot
        plan the next."""
        ranks = dataclasses.replace(self._planner.ranks, group=detached(self.group))
        peers = dataclasses.replace(self.peers, groups=tuple(map(detached, self.peers.groups)))
        return {**self.__dict__, "_planner": Planner(self.config, ranks), "peers": peers}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy of everything but the group, which both then use."""
        memo[id(self.group)] = self.group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin
