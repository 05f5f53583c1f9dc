"""Checkpointer: a run's checkpoints, saved while training goes on and loaded at any world size."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec

import torch

from effx_dist.checkpoint.loading.dcp_reader import ExcpReader
from effx_dist.checkpoint.loading.restore import Wanted, restore
from effx_dist.checkpoint.loading.seeded import start_chain
from effx_dist.checkpoint.saving.executor import make_executor
from effx_dist.checkpoint.saving.in_flight import closed, opened, settle, settle_saves_in
from effx_dist.checkpoint.saving.manifest_building import SaveFacts
from effx_dist.checkpoint.saving.pending import PendingSave
from effx_dist.checkpoint.saving.saver import SaveJob
from effx_dist.checkpoint.saving.sigterm import SigtermMemory
from effx_dist.checkpoint.saving.staging import Staging
from effx_dist.checkpoint.state.live import LiveState
from effx_dist.checkpoint.state.matching import LoadReport, NameMap, warn_of_left_alone
from effx_dist.checkpoint.state.torch_state import live_state
from effx_dist.checkpoint.state.training_state import Stateful, TrainingState, collect, shared_out
from effx_dist.checkpoint.storage.places import folder_key, location
from effx_dist.checkpoint.storage.steps import (
    StepPrefix,
    committed_steps,
    newest_step,
    step_folder,
    step_name,
)
from effx_dist.checkpoint.storage.tags import checked_tag, folder_of_tag
from effx_dist.config import ExcpConfig
from effx_dist.errors import ConfigError
from effx_dist.shard import Group, SoloGroup, meet, separate_group

logger = logging.getLogger(__name__)
P = ParamSpec("P")

PLAIN = ExcpConfig(profile="lossless", base_every=1)
"""What a Checkpointer without a config writes: exact, whole checkpoints."""


def _and_wait(start: Callable[P, PendingSave]) -> Callable[P, PendingSave]:
    """What ``start`` does, to its end."""

    @wraps(start)
    def save(*args: P.args, **kwargs: P.kwargs) -> PendingSave:
        return start(*args, **kwargs).wait()

    save.__doc__ = "As :meth:`async_save`, and waits for the commit; raises what made it fail."
    return save


class Checkpointer:
    """Saves and loads model, optimizer and everything else of a run in ``folder/step-N``.

    Args:
        folder: the run's checkpoint folder, shared by all ranks: a local path or an fsspec URL.
        config: the ``excp`` section; None or ``enabled = false`` writes exact, whole checkpoints.
        group: the ranks that save, for async_mode "sync" only. None: all ranks of
            torch.distributed, or this process alone. What the training thread says goes over a gloo
            group made here that nothing else uses, saves talk through a store that rank 0's process
            serves (collective: make the Checkpointer on every rank).
        timeout: how long a rank waits for another in a save before the save fails.
        step_prefix: begins the names of new checkpoints' folders: "step-", or "global_step" as under
            DeepSpeed. Either is found, and a run may go on with the other.

    A failed save is logged, commits nothing and leaves the previous checkpoint as it was; training
    may go on. A rank that does not come, dies, or loses touch is named on all ranks, within
    ``timeout`` at the latest; the next save works again if all ranks are there.

    How it ends: leaving the ``with`` block, ``close()`` and a normal exit of the interpreter finish
    the save in flight. Ctrl-C (KeyboardInterrupt) in the training loop or in ``wait()`` leaves the
    save running; ``close()`` then finishes it, and a second Ctrl-C, which interrupts that,
    abandons it: nothing is committed, and the next run removes what was written. SIGTERM ends the
    process at once, as always in Python, and the save with it, unless ``save_on_sigterm`` is set; see
    ``should_stop``. A saving process ignores all these signals and ends with the process it
    belongs to.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: ExcpConfig | None = None,
        *,
        group: Group | None = None,
        timeout: timedelta = timedelta(minutes=10),
        step_prefix: StepPrefix = "step-",
    ) -> None:
        step_name(0, step_prefix)  # refuses another one
        self.folder = location(folder)
        self._step_prefix: StepPrefix = step_prefix
        self.config = config if config is not None and config.enabled else PLAIN
        self.num_skipped = 0
        self.last_load: LoadReport | None = None
        if group is not None and group.size > 1 and self.config.async_mode != "sync":
            raise ConfigError(
                f"effx.excp.async_mode = {self.config.async_mode!r} with a group of {group.size} ranks "
                'given: saves would talk over it beside this thread; use "sync", or leave group out'
            )
        # saves run beside training: what they say to each other must never mix with what this thread says
        self._control = group if group is not None else separate_group(timeout)
        self._store, rendezvous = meet(self._control if group is None else SoloGroup(), timeout)
        self._executor = make_executor(self.folder, self.config, rendezvous, group)
        self._is_group_given = group is not None
        self._num_saves = 0
        self._staging = Staging(shared=self.config.async_mode == "process")
        self._pending: PendingSave | None = None
        self._closed = False
        self._sigterm = SigtermMemory() if self.config.save_on_sigterm else None
        opened(self)

    def begin(self, model: torch.nn.Module | LiveState) -> None:
        """With ``seeded_base``: take the weights of ``model``, as they were just initialised, as
        the base of the run's chain; only their hashes are stored. Without it, nothing is done.

        Call on every rank before the first step of a run that does not resume. To load then takes a
        model initialised in the same way, until the next stored base. A few small gathers. Raises
        ConfigError where the folder holds checkpoints already.
        """
        if not self.config.seeded_base:
            return
        if self.newest() is not None:
            raise ConfigError(
                f"{self.folder}: holds checkpoints already; load one, or begin in another folder"
            )
        state = self._control.everywhere(
            lambda: collect(live_state(model), {}, {}, self._control.rank)
        )
        self._executor.restart(start_chain(self.folder, state.leaves, self._control))

    def async_save(
        self,
        step: int,
        model: torch.nn.Module | LiveState,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        stateful: Mapping[str, Stateful] | None = None,
        extra: Mapping[str, Any] | None = None,
        tag: str | None = None,
        moves_latest: bool = True,
    ) -> PendingSave:
        """Copy the state to host memory and save it in the background. Call on every rank, at the
        same step.

        Args:
            step: optimizer steps taken; names the checkpoint. A step committed already is refused.
            model: plain, DDP or FSDP2, or an engine's LiveState, optimizer included. Buffers are
                saved too.
            optimizer: any torch optimizer; exp_avg and exp_avg_sq beside a weight are compressed
                with it.
            stateful: samplers, schedulers and the like, by name. Their ``state_dict()`` is called
                here and may communicate.
            extra: JSON-like values and tensors by name, equal on all ranks (rank 0's are kept).
            tag: a name to load it by, such as "best", which moves here from another step once this
                one is committed. Steps that have one are kept.
            moves_latest: let ``latest`` name this checkpoint then, by its tag if it has one.

        Returns after the copy. An earlier save still in flight is waited for, or (policy "skip")
        this one is left out; that choice is made by all ranks together, in one small gather. Nothing
        else is said before it returns: a rank that cannot save raises here, and the save fails on the
        others by its name. The global random states of this process are saved as well.
        """
        if self._closed:
            raise ConfigError("this Checkpointer is closed; make a new one to save again")
        name = step_name(step, self._step_prefix)  # refused before anything is copied
        if tag is not None:
            checked_tag(tag)
        live = live_state(model, optimizer)
        started = time.perf_counter()
        if self._must_skip():
            self.num_skipped += 1
            logger.warning("step %d: not saved, the save before it is still in flight", step)
            return PendingSave(step, None, time.perf_counter() - started)
        self._settle_pending()
        self._num_saves += 1  # on every rank, however this call ends: saves find each other by it
        try:
            state = self._collect(live, stateful or {}, extra or {})
            leaves = state.leaves
            if live.is_replicated:
                leaves = shared_out(leaves, self._control.rank, self._control.size)
            staged = self._staging.copy(leaves)
        except BaseException as error:  # no memory, or Ctrl-C: the other ranks are saving already
            self._executor.give_up(self._num_saves, error)
            raise
        facts = SaveFacts(step, state.values, state.aliases, tag, moves_latest)
        job = SaveJob(staged, facts, name)
        future = self._executor.submit(job, self._num_saves)
        self._pending = PendingSave(step, future, time.perf_counter() - started)
        return self._pending

    def _collect(
        self, live: LiveState, stateful: Mapping[str, Stateful], extra: Mapping[str, Any]
    ) -> TrainingState:
        """What there is to save. The ranks wait for each other here only where a group was given,
        which has no other way to tell that one of them does not come."""
        ranks = self._control if self._is_group_given else SoloGroup()
        return ranks.everywhere(lambda: collect(live, stateful, extra, self._control.rank))

    save = _and_wait(async_save)

    def load(
        self,
        model: torch.nn.Module | LiveState,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        stateful: Mapping[str, Stateful] | None = None,
        step: int | None = None,
        tag: str | None = None,
        strict: bool = True,
        mapping: NameMap | None = None,
    ) -> dict[str, Any]:
        """Fill live objects in place from the newest committed checkpoint, or that of ``step`` or
        ``tag``. Call on every rank.

        The world size and the layout may differ from those that saved. Every block read is
        verified. Later saves are differences to what was loaded under its own name; newer
        checkpoints than an explicit older ``step`` are then set aside (renamed), not overwritten.

        Args:
            model, optimizer, stateful: as in :meth:`async_save`. What is not handed over is not
                read: without an optimizer, only the weights and ``extra`` are.
            step, tag: which checkpoint; neither: the newest.
            strict: refuse tensors that only the checkpoint or only the live objects have. False:
                live ones keep their values, the checkpoint's are left out, and so are the options
                of parameter groups if their number differs; a warning names the tensors and
                ``last_load`` holds their names. Another shape or dtype is always refused.
            mapping: from the name of a live parameter or buffer to its name in the checkpoint; the
                optimizer's state follows. A dictionary (names that it lacks are left as they are)
                or a function of every name. None for a name: not loaded, and not missed.

        The global random states come back on ranks that saved some, but only if the run goes on as
        it was: not with ``strict=False`` or a mapping.

        Returns:
            The ``extra`` that was saved (an empty dictionary if none), with ``extra["step"]``.

        Raises:
            CheckpointNotFoundError: there is none. LayoutMismatchError: it does not fit.
                CorruptCheckpointError: it is damaged. A rank on which all is well raises
                RankFailedError if another could not load.
        """
        self._settle_pending()
        settle_saves_in(self.folder)
        live = live_state(model, optimizer)
        reader = ExcpReader(self.folder / self._choose(step, tag))
        try:
            self._control.everywhere(lambda: reader.chain)
            keeps_references = self.config.base_every > 1
            wanted = Wanted(live, stateful or {}, strict, mapping, keeps_references)
            extra, loaded, self.last_load = restore(reader, wanted, self._control)
        finally:
            reader.close()
        if self._control.rank == 0:
            warn_of_left_alone(self.last_load)
        self._executor.restart(replace(loaded, is_newest=step is None and tag is None))
        return {**extra, "step": loaded.step}

    def newest(self) -> int | None:
        """Step of the newest committed checkpoint as rank 0 sees it, or None. One small gather."""
        return self._control.from_first(lambda: max(committed_steps(self.folder), default=None))

    def wait(self) -> None:
        """Wait for a save in flight; raises what made it fail."""
        if self._pending is not None:
            self._pending.wait()

    @property
    def should_stop(self) -> bool:
        """Whether any rank has got SIGTERM (``save_on_sigterm``): save once more and leave the
        loop. Read it on every rank at the same step; one small gather, none if ``save_on_sigterm``
        is off.

        The first SIGTERM is only remembered; a second one acts as if there were no Checkpointer.
        """
        if self._sigterm is None:
            return False
        return any(self._control.all_gather_object(self._sigterm.received))

    def close(self) -> None:
        """Finish a save in flight and let go of all threads, processes and buffers. Raises what
        made that save fail, unless somebody has waited for it already. Ctrl-C abandons the save."""
        if self._closed:
            return
        self._closed = True
        closed(self)
        try:
            if self._pending is not None and not self._pending.reported:
                self._pending.wait()
        except Exception:
            self._let_go()
            raise
        except BaseException:
            self._executor.abandon()
            raise
        else:
            self._let_go()
        finally:
            self._staging.clear()
            if self._sigterm is not None:
                self._sigterm.restore()

    def _let_go(self) -> None:
        try:
            self._executor.close()
        except KeyboardInterrupt:
            self._executor.abandon()
            raise

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _must_skip(self) -> bool:
        """Policy "skip": whether a save is in flight on any rank. One small gather; none under
        policy "wait"."""
        if self.config.policy != "skip" or self._pending is None:
            return False
        return any(self._control.all_gather_object(not self._pending.done()))

    def _settle_pending(self) -> None:
        """Wait for the save in flight; one that failed and that nobody waited for is logged here."""
        if self._pending is None:
            return
        step, was_reported = self._pending.step, self._pending.reported
        try:
            self._pending.wait()
        except Exception:
            if not was_reported:
                told = "the save of step %d failed; nothing was committed for it, training goes on"
                logger.exception(told, step)
        self._pending = None  # after Ctrl-C it is still there, for close()

    def _choose(self, step: int | None, tag: str | None) -> str:
        """Name of the checkpoint's folder, as rank 0 sees it: all choose, or raise, the same."""
        if step is not None and tag is not None:
            raise ConfigError(
                f"{step=}, {tag=}: two names for one checkpoint; leave one of them out"
            )

        def look() -> str:
            if tag is not None:
                return folder_of_tag(self.folder, tag).name
            newest = newest_step(self.folder)
            return step_folder(self.folder, newest if step is None else step).name

        return self._control.from_first(look)


MAX_OPEN = 2
"""A run's checkpoints and its best ones, say. Each holds a copy of the state, references and a thread."""


class CheckpointersByFolder:
    """One Checkpointer for each of the folders used last, with the same settings.

    Where every save has a folder of its own, memory stays what two of them take: the others are closed,
    their saves finished first, and would begin with a base if they came back.
    """

    def __init__(self, config: ExcpConfig | None, step_prefix: StepPrefix = "step-") -> None:
        self._config = config
        self._step_prefix: StepPrefix = step_prefix
        self._made: OrderedDict[str, Checkpointer] = OrderedDict()

    def __getitem__(self, folder: str | os.PathLike[str]) -> Checkpointer:
        """The Checkpointer of a folder; it is made on first use, which is collective."""
        key = folder_key(folder)
        if key not in self._made:
            self._make_room()
            self._made[key] = Checkpointer(key, self._config, step_prefix=self._step_prefix)
        self._made.move_to_end(key)
        return self._made[key]

    def get(self, folder: str | os.PathLike[str]) -> Checkpointer | None:
        """The Checkpointer of a folder, if there is one. No communication is performed."""
        return self._made.get(folder_key(folder))

    def close(self) -> None:
        """Finish the saves in flight. Raises what made one fail; the others may be closed then."""
        while self._made:
            self._made.popitem()[1].close()

    def _make_room(self) -> None:
        while len(self._made) >= MAX_OPEN:
            _, oldest = self._made.popitem(last=False)
            settle(oldest)  # logs a failure, which is not an error of the save that is made now
            oldest.close()
