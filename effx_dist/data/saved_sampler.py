"""The sampler's state: what goes into a checkpoint, how it is taken up again, and what a copy has."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from effx_dist.config import InfoBatchConfig
from effx_dist.data import kinds, surroundings
from effx_dist.data.epoch_run import EpochRun
from effx_dist.data.figures import SamplerFigures
from effx_dist.data.messages import Messages
from effx_dist.data.peers import Peers, detached
from effx_dist.data.plan import Planner
from effx_dist.data.resume import ByIds, load
from effx_dist.data.scores import ScoreBook
from effx_dist.data.state import state_of
from effx_dist.data.verdict import of_strays
from effx_dist.errors import PlanNotTrainedError


class SavedSampler(SamplerFigures):
    """The side of `InfoBatchSampler` that checkpoints, loaders and pickle see."""

    config: InfoBatchConfig
    peers: Peers
    dataset_name: str | None
    _messages: Messages
    _book: ScoreBook
    _by_id: ByIds | None
    _was_epoch_set: bool

    def _error_of(self, told: str | None) -> PlanNotTrainedError | None:
        """What is wrong on this rank, as an error; with ``strict=False`` it is warned of."""
        if told is None:
            return None
        if self.config.strict:
            return PlanNotTrainedError(told)
        self._messages.out_of_plan(self.group, told)
        return None

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, which is what was *weighed*: JSON values, equal on all ranks, and this rank's rows.

        **No communication is performed**: one rank may call it alone, though a checkpoint needs the states of all.
        Training may go on afterwards; the state is a copy. Call it between optimizer steps.

        A loader that takes snapshots when it fetches (torchdata's StatefulDataLoader) gets a small mark in its place:
        what was *handed out* is in the state of the iterator.

        Raises:
            PlanNotTrainedError: This rank has weighed ids that are not of its plan; a Checkpointer tells the others.
        """
        if surroundings.is_asked_by_loader():
            return {"kind": kinds.IN_A_LOADER, "epoch": self.epoch}
        if (run := self._run) is not None:
            error = self._error_of(of_strays(run.plan.epoch, run.recorder.strays()))
            if error is not None:
                raise error
        return state_of(
            self._settings(),
            self.dataset_name,
            self._counters,
            self._run,
            self._book,
            self._planner.ranks,
            self.peers.is_reporter,
        )

    def load_state_dict(self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
        """Go on where a run stood when it was saved, at the same or another number of ranks. Collective.

        With the same global batch, and batches weighed as they were handed out, this and all later epochs are those of
        the uninterrupted run, bit for bit, given the same losses. Else no sample of the epoch is repeated or skipped,
        but for what ``drop_last`` drops.

        Args:
            state: At the same number of ranks, this rank's own. At another number, every old rank's, by rank, of which
                only those are looked at that hold what this rank asks for (so a sequence may read them from files); or
                one whose `LocalRows` hold the rows that this rank asks for, as a Checkpointer fills them.

        Raises:
            ConfigError: The state is of a run with other settings or another data set (named), is malformed, or is
                that of an iterator.
            LayoutMismatchError: It is of another number of samples, or rows are missing.
            RankFailedError: Another rank refused its state.
        """
        states = [state] if isinstance(state, Mapping) else state
        if isinstance(state, Mapping) and surroundings.is_asked_by_loader():
            return  # the mark; the iterator's own state follows, or this sampler's was loaded
        loaded = load(
            states, self._planner, self.peers, self._settings(), self.dataset_name, self._by_id
        )
        self._by_id = None
        self._book, self._counters, self._run = loaded.book, loaded.counters, None
        self._was_epoch_set = False
        if loaded.message:
            self._messages.of_state(self.group, loaded.message)
        if loaded.plan is not None:
            has_losses = self.peers.has_losses
            self._run = EpochRun(loaded.plan, self.config.strict, has_losses, is_resumed=True)
            self._run.has_ended = loaded.has_ended

    def keep_scores_by_id(self, old_ids: npt.NDArray[np.int64] | None = None) -> None:
        """Let the next `load_state_dict` take the scores of another data set: one that has grown, or was reordered.

        The epoch that was underway begins anew, with the scores that it was planned from. No communication is
        performed.

        Args:
            old_ids: int64 ``[num_samples]``: the id that each sample had, -1 for a new one; a rank reads those of the
                samples that it owns. None: ids are what they were, and those beyond are new.
        """
        self._by_id = ByIds(old_ids)

    def _settings(self) -> dict[str, Any]:
        return self.config.model_dump(exclude={"enabled", "strict"})

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_plan" in state:
            state = _of_former_release(state)
        self.__dict__.update(state)

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


def _of_former_release(state: dict[str, Any]) -> dict[str, Any]:
    """What a sampler holds now, from what one of effx_dist 0.1 held when it was pickled."""
    plan, former = state.pop("_plan"), state.pop("_recorder")
    num_consumed, config = state.pop("_num_consumed"), InfoBatchConfig(**vars(state["config"]))
    run = None
    if plan is not None:
        run = EpochRun(plan, config.strict, state["peers"].has_losses)
        run.count(num_consumed)
        run.recorder.take_over(former._losses, num_consumed)
    counters = dataclasses.replace(state["_counters"], first_epoch=0)
    planner = Planner(config, state["_planner"].ranks)
    missing: dict[str, Any] = {"_by_id": None, "dataset_name": None, "drop_last": config.drop_last}
    missing |= {"seed": config.seed, "shuffle": True, "_run": run, "_counters": counters}
    return {**state, **missing, "config": config, "_planner": planner}
