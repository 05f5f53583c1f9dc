"""The sampler of technique 1: what training code holds of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch

from effx_dist.config import InfoBatchConfig
from effx_dist.core.infobatch import HEAVY_WEIGHT, STALENESS_BOUND, weight_table
from effx_dist.data import surroundings
from effx_dist.data.epoch_run import EpochRun, Tally
from effx_dist.data.handed_out import HandedOut
from effx_dist.data.messages import Messages
from effx_dist.data.peers import Peers, data_ranks
from effx_dist.data.plan import EpochPlan, Planner
from effx_dist.data.recorder import as_ids
from effx_dist.data.resume import ByIds
from effx_dist.data.saved_sampler import SavedSampler
from effx_dist.data.scores import ScoreBook
from effx_dist.data.slots import Ranks, Span, whole_number
from effx_dist.data.state import Counters
from effx_dist.data.verdict import of_epoch, of_next, of_strays
from effx_dist.errors import ConfigError
from effx_dist.shard import Group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class InfoBatchSampler(SavedSampler):
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

    **Communication.** `set_epoch`, `check_epoch` and `load_state_dict` are collectives: every rank of the group calls
    them, in the same order. The first of `set_epoch`, `len`, `iter` and `plan` plans epoch 0 and is one too, and so is
    `iter` after the end of an epoch (see `__iter__`). `weigh`, `state_dict` and the properties never communicate.

    **What is planned is what is trained.** The sampler records which samples were weighed. An epoch that ends with
    some left, ids outside the plan and epochs that were never set are errors, on all ranks at once, that name the
    counts and the likely cause. An epoch that ends early on purpose is declared by `end_epoch`.

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
        group: The ranks that see different samples: a Group, a process group, a device mesh, of which the data-parallel
            dimensions are taken (see `data_ranks`), or None for all there are. Tensor-,
            pipeline- and context-parallel peers must not be in it; they get the same samples.
        full_epochs: How the last epochs that use everything are counted: "rounded", or as the "official" code does.
        max_weight: Cap of the weight of kept low-loss samples, at least 1; biased below ``1 / (1 - prune_ratio)``.
            None: no cap.
        strict: Whether it is an error when what was planned was not trained (True), or a warning.
        dataset: Name or fingerprint of the data set that the ids are of. It is kept in the state, and a state with
            another one is refused.
        peers: Those, where not each of them has bit-equal losses, and which one's count. They take part in what is
            collective, each with its own group.

    Raises:
        ConfigError: A value is out of its range, or ``num_samples`` does not fill one global batch with ``drop_last``.

    Warns:
        EffxWarning: Once for each of: no epoch is left for pruning; losses are not finite; scores are stale; a few
            large losses decide the mean; kept samples weigh more than 4; the first evidence that what is trained is
            not what was planned.
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
        group: Group | ProcessGroup | DeviceMesh | None = None,
        peers: Peers | None = None,
        full_epochs: Literal["rounded", "official"] = "rounded",
        max_weight: float | None = None,
        strict: bool = True,
        dataset: str | None = None,
    ) -> None:
        self.config = InfoBatchConfig(
            num_epochs=num_epochs,
            prune_ratio=prune_ratio,
            delta=delta,
            threshold=threshold,
            score=score,
            seed=seed,
            drop_last=drop_last,
            full_epochs=full_epochs,
            max_weight=max_weight,
            strict=strict,
        )
        self.num_samples = whole_number("num_samples", num_samples)
        self.batch_size = whole_number("batch_size", batch_size)
        num_accumulated = whole_number("gradient_accumulation_steps", gradient_accumulation_steps)
        data_group, peers = data_ranks(group, peers)
        ranks = Ranks.of(data_group, self.num_samples, self.batch_size, num_accumulated)
        if drop_last:
            ranks.check_that_a_batch_is_filled()
        self.peers = peers if peers is not None else Peers()
        self._planner = Planner(self.config, ranks)
        self._messages = Messages(is_silent=not self.peers.is_reporter)
        self._book = ScoreBook.unscored(ranks.num_owned)
        self._counters = Counters()
        self._run: EpochRun | None = None
        self._was_epoch_set = False
        self._by_id: ByIds | None = None
        self.dataset_name = dataset
        self.drop_last, self.seed, self.shuffle = (
            drop_last,
            seed,
            True,
        )  # as a DistributedSampler has them
        if prune_ratio > 0 and not self._planner.is_ever_pruning():
            self._messages.nothing_is_pruned(ranks.group, num_epochs, delta)
        weight = float(weight_table(prune_ratio, max_weight).max())
        if weight > HEAVY_WEIGHT:
            self._messages.heavy_weight(ranks.group, prune_ratio, weight)

    @classmethod
    def from_config(
        cls,
        config: InfoBatchConfig,
        num_samples: int,
        batch_size: int,
        gradient_accumulation_steps: int = 1,
        group: Group | ProcessGroup | DeviceMesh | None = None,
        peers: Peers | None = None,
        dataset: str | None = None,
    ) -> Self:
        """A sampler with the settings of an "infobatch" section. No communication is performed."""
        return cls(
            num_samples,
            batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation_steps,
            group=group,
            peers=peers,
            dataset=dataset,
            **config.model_dump(exclude={"enabled"}),
        )

    def set_epoch(self, epoch: int) -> None:
        """Begin ``epoch``: recorded losses go to their samples' owners, become scores, and a plan is made from them.

        Collective: every rank of the group calls it. It does nothing where ``epoch`` is the current one, so a position
        restored by `load_state_dict` survives.

        Raises:
            ConfigError: ``epoch`` is not a whole number, at least 0.
            PlanNotTrainedError: What was planned for the epoch that ends was not trained, beyond what ``drop_last``
                drops; ids were weighed that are not of this rank's plan; or epochs are left out or come again. On all
                ranks. With ``strict=False`` a warning.
        """
        epoch = whole_number("epoch", epoch, at_least=0)
        surroundings.check(surroundings.find(), self.group.size)
        if self._run is None or self._run.plan.epoch != epoch:
            self._go_to(epoch)
        self._was_epoch_set = True

    def end_epoch(self) -> None:
        """Declare that the current epoch ends here on purpose (``max_steps``, ``limit_train_batches``), so that the
        next may begin although samples of this one were not trained. On every rank. No communication is performed."""
        if self._run is not None:
            self._run.has_ended = True

    def check_epoch(self) -> None:
        """Raise what `set_epoch` would raise of the epoch that ends: for the last one, which no other follows.

        Collective: every rank of the group calls it.
        """
        if self._run is not None:
            self._judge(self._run, self.epoch + 1)

    def __iter__(self) -> Iterator[int]:
        """A fresh iterator over what this rank has not weighed of the current epoch; see `HandedOut` for its state.

        Where the epoch was handed out to its end (or all of it was weighed) and `set_epoch` was not called since the
        last `iter`, the next epoch begins first, so loaders that start again by themselves go on through the run; this
        is a collective. After an explicit `set_epoch` of an epoch at whose end a run was resumed there is nothing left.

        A loader may fetch ahead within an epoch; `weigh` every batch of it before the next epoch begins.

        Raises:
            PlanNotTrainedError: As `set_epoch`.
        """
        self.begin_pass()
        return self.hand_out()

    def begin_pass(self) -> None:
        """What `iter` does first: the next epoch begins, if it is its turn. Then a collective."""
        run = self._run
        if run is not None and run.is_through and not run.num_weighed_since and run.num_remaining:
            self._messages.out_of_plan(
                self.group,
                f"epoch {self.epoch} was handed out and none of it was weighed, and is handed out again: "
                "call sampler.weigh(losses, ids) for every batch",
            )
        elif run is not None and not self._was_epoch_set:
            if run.is_through or not run.num_remaining:
                self._go_to(run.plan.epoch + 1)
        elif run is not None and run.is_through and not run.num_remaining:
            self._refuse(
                f"epoch {self.epoch} was trained to its end, and set_epoch({self.epoch}) asks for it again, so a pass "
                f"would train nothing: call set_epoch({self.epoch + 1}) (accelerate: loader.set_epoch(epoch))"
            )
        self._was_epoch_set = False

    def hand_out(self, around: surroundings.Surroundings | None = None) -> HandedOut:
        """An iterator over what this rank has not weighed of the current epoch; no other epoch begins. ``around``: who
        asks, where it is not to be found out."""
        if around is None:
            surroundings.check(around := surroundings.find(), self.group.size)
        _ = self.plan
        run = self._run
        assert run is not None
        if not run.is_resumed:
            run.num_skipped += around.num_skipped
        given = HandedOut(
            run.plan,
            run.places_left(),
            self.batch_size,
            around,
            run.is_resumed,
            skipped=run.recorder.mark,
        )
        return run.hand_out(given)

    def __len__(self) -> int:
        """Ids of one rank in the whole current epoch, right before it is iterated; where a wrapper that asks takes
        every so many-th batch, as many times that.

        A trainer that takes one length for all epochs (transformers.Trainer, Lightning) is told that of one with all
        samples; it ends shorter ones when the sampler does. After a resume within an epoch, still that of the whole
        epoch; `num_remaining` is what `iter` will yield.
        """
        around, total = surroundings.find(), self.plan.num_total
        if around.takes_one_length:
            total = Span.of_epoch(self.num_samples, self.plan.batches, self.drop_last).end
        return total // self.group.size * around.num_shards

    @property
    def plan(self) -> EpochPlan:
        """The current epoch's plan for this rank. Plans the first epoch (a collective) where nothing was planned."""
        if self._run is None:
            self._go_to(self.epoch)
        assert self._run is not None
        return self._run.plan

    def weigh(
        self,
        losses: torch.Tensor,
        sample_ids: torch.Tensor | Sequence[int],
        weights: torch.Tensor | None = None,
        num_items: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Record the losses of a micro-batch, and return the scalar to call ``backward`` on.

        That is ``sum(weight * loss) / batch`` (the paper's equations 5 to 7), in float32 or wider, with its graph.
        Under gradient accumulation the caller, or the engine, divides it by the number of micro-batches, as any other
        loss. The losses are kept on their device until the epoch ends: no communication, and no host sync where they
        are on an accelerator. A loss that is not finite is returned as it is, but never becomes a score.

        What was trained is what was weighed: the position that `state_dict` saves advances here, not where ids are
        fetched, so loaders may fetch ahead. Batches may come in any order and be regrouped; one that is weighed again
        (a closure, a second pass) counts once, and its last losses become scores. Every rank weighs the same number of
        micro-batches between two optimizer steps.

        Args:
            losses: ``[batch]``, one loss a sample, any floating dtype, on any device, without weights of your own: they
                become scores, and a sample that you weigh low is not one that the model knows.
            sample_ids: ``[batch]`` integers, the ids that came with the batch; a tensor or a list.
            weights: ``[batch]``, your own weights; multiplied to those of the plan.
            num_items: What the sum is divided by in the place of ``batch``: for losses that are sums over tokens. For
                the full run's gradient in expectation a constant, such as the mean number of targets of a batch over
                all the data; the number of targets in this batch follows what happens to be kept.

        Raises:
            ConfigError: The shapes differ; the ids are not integers; ids are not of this rank's plan. Where the ids are
                on an accelerator the last is found when the epoch ends or is saved, as looking would cost a host sync.
        """
        ids = as_ids(sample_ids, losses)
        if weights is not None and weights.shape != losses.shape:
            raise ConfigError(
                f"weights of shape {tuple(weights.shape)} for losses of shape {tuple(losses.shape)}: one a loss"
            )
        run = self._run
        if run is None:
            raise ConfigError(
                "weigh: no epoch is planned yet; iterate the sampler, or call set_epoch, first"
            )
        loss = run.recorder.weigh(losses, ids, run.num_given, weights, num_items)
        run.num_weighs += 1
        if ids.device.type == "cpu" and (told := of_strays(self.epoch, run.recorder.strays())):
            self._messages.out_of_plan(self.group, told)
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
        num_samples = whole_number("num_samples", num_samples, at_least=0)
        _ = self.plan
        assert self._run is not None
        self._run.count(num_samples)

    def _refuse(self, text: str) -> None:
        """Raise what is the same on every rank; with ``strict=False``, warn."""
        if (error := self._error_of(text)) is not None:
            raise error

    def _judge(self, run: EpochRun, next_epoch: int) -> list[Tally]:
        """All ranks' tallies of an epoch that ends, if it was trained as planned. One small gather, and one a group of
        peers; no rank raises before all know."""
        error: Exception | None = self._error_of(of_strays(run.plan.epoch, run.recorder.strays()))
        error = error or self._error_of(of_next(run, next_epoch))
        tally = run.tally()
        error = self.peers.agree(error, tally.num_weighed, tally.has_ended)
        tallies = self.group.tell_all(error, tally)
        if (told := of_epoch(run.plan, tallies, self.config.drop_last)) is not None:
            text, is_excused = told
            if is_excused:
                self._messages.out_of_plan(self.group, text)
            else:
                self._refuse(text)
        return tallies

    def _go_to(self, epoch: int) -> None:
        group = self.group
        if (run := self._run) is not None:
            tallies = self._judge(run, epoch)
            self._counters.finished_epochs += all(t.num_weighed >= t.num_planned for t in tallies)
            ids, losses = self.peers.share(*run.recorder.taken())
            self._book.receive(ids, losses, self._planner.ranks)
            self._count_nonfinite()
            stale = self._book.take_scores(
                run.plan.owned_stretches, self.num_samples, self.config.score == "relative", group
            )
            if stale > STALENESS_BOUND and self._planner.is_ever_pruning():
                self._messages.stale_scores(group, run.plan.epoch, stale)
            self._run = run = None  # its memory is needed for the next one
        if epoch >= self.config.num_epochs:
            self._messages.beyond_the_run(group, epoch, self.config.num_epochs)
        plan = self._planner.begin(epoch, self._book, self._messages)
        self._counters.samples_saved += self.num_samples - plan.span.num_kept
        self._run = EpochRun(plan, self.config.strict, self.peers.has_losses)

    def _count_nonfinite(self) -> None:
        """Of the epoch that ends; warn. One small all-reduce."""
        found = torch.tensor([int(np.isinf(self._book.fresh).sum())])
        num_nonfinite = int(self.group.all_reduce(found)[0])
        self._counters.num_nonfinite += num_nonfinite
        if num_nonfinite:
            self._messages.nonfinite_losses(self.group, self._counters.num_nonfinite)
