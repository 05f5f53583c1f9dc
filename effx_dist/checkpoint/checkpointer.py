"""Checkpointer: a run's checkpoints, saved while training goes on and loaded at any world size."""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from effx_dist.checkpoint.executor import make_executor
from effx_dist.checkpoint.folder import (
    committed_steps,
    local_folder,
    newest_step,
    require_committed,
    step_name,
)
from effx_dist.checkpoint.reader import ExcpReader
from effx_dist.checkpoint.restore import restore
from effx_dist.checkpoint.saver import SaveJob, SaveResult
from effx_dist.checkpoint.staging import Staging
from effx_dist.checkpoint.training_state import Stateful, collect
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError, ConfigError
from effx_dist.shard import Group, separate_group

logger = logging.getLogger(__name__)

PLAIN = ExcpConfig(profile="lossless", base_every=1)
"""What a Checkpointer without a config writes: exact, whole checkpoints."""


class PendingSave:
    """A save under way.

    Attributes:
        step: the optimizer step it is of.
        blocked_s: seconds that ``async_save`` kept the training loop, waiting for an earlier save
            included.
        skipped: True where policy "skip" left it out because another save was in flight.
        reported: whether somebody has waited for it, and so knows how it ended.
    """

    def __init__(self, step: int, future: Future[SaveResult] | None, blocked_s: float) -> None:
        self.step = step
        self.blocked_s = blocked_s
        self.skipped = future is None
        self._future = future
        self.reported = False

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future is None or self._future.done()

    def wait(self) -> PendingSave:
        """Wait for the end; re-raises, with its traceback, what made it fail on this or another
        rank."""
        if self._future is not None:
            self.reported = True
            self._future.result()
        return self

    def failure(self) -> BaseException | None:
        """What made an ended save fail, or None."""
        if self._future is None or not self._future.done():
            return None
        return self._future.exception()

    @property
    def result(self) -> SaveResult:
        """What the committed save came to; waits for it."""
        if self._future is None:
            raise ValueError(f"the save of step {self.step} was skipped; it has no result")
        return self.wait()._future.result()  # type: ignore[union-attr]

    @property
    def raw_bytes(self) -> int:
        """Bytes of all saved tensors, uncompressed, all ranks together. Waits for the save."""
        return self.result.figures.raw_bytes

    @property
    def stored_bytes(self) -> int:
        """Bytes of all files written, manifest included. Waits for the save."""
        return self.result.figures.stored_bytes

    @property
    def ratio(self) -> float:
        """raw_bytes / stored_bytes. Waits for the save."""
        return self.result.figures.ratio

    @property
    def run_ratio(self) -> float:
        """The same over all saves of the run so far, bases included. Waits for the save."""
        return self.result.figures.run_ratio

    @property
    def error(self) -> float:
        """Largest relative root-mean-square weight error over the tensors; 0 if exact. Waits for
        the save."""
        return self.result.figures.error

    @property
    def write_s(self) -> float:
        """Seconds from the start of encoding to the commit, on this rank. Waits for the save."""
        return self.result.write_s


class Checkpointer:
    """Saves and loads model, optimizer and everything else of a run in ``folder/step-N``.

    Args:
        folder: the run's checkpoint folder, shared by all ranks. Local path.
        config: the ``excp`` section; None or ``enabled = false`` writes exact, whole checkpoints.
        group: the ranks that save, for async_mode "sync" only. None: all ranks of
            torch.distributed, over two gloo groups made here that nothing else uses (collective),
            or this process alone.
        timeout: how long a rank waits for another in a save before the save fails.

    A failed save is logged, commits nothing and leaves the previous checkpoint as it was; training
    may go on.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        config: ExcpConfig | None = None,
        *,
        group: Group | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        self.folder = local_folder(folder)
        self.config = config if config is not None and config.enabled else PLAIN
        self.num_skipped = 0
        if group is not None and group.size > 1 and self.config.async_mode != "sync":
            raise ConfigError(
                f"effx.excp.async_mode = {self.config.async_mode!r} with a group of {group.size} ranks "
                'given: saves would talk over it beside this thread; use "sync", or leave group out'
            )
        # saves run beside training: what they say to each other must never mix with what this thread says
        self._control = group if group is not None else separate_group(timeout)
        saving = group if group is not None else separate_group(timeout)
        self._executor = make_executor(self.folder, self.config, saving, timeout)
        self._staging = Staging(shared=self.config.async_mode == "process")
        self._pending: PendingSave | None = None
        self._closed = False
        atexit.register(self._close_at_exit)

    def async_save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        stateful: Mapping[str, Stateful] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> PendingSave:
        """Copy the state to host memory and save it in the background. Call on every rank, at the
        same step.

        Args:
            step: optimizer steps taken; names the checkpoint. An existing committed step is
                refused.
            model: plain, DDP or FSDP2. Buffers are saved too.
            optimizer: any torch optimizer; exp_avg and exp_avg_sq beside a weight are compressed
                with it.
            stateful: samplers, schedulers and the like, by name. Their ``state_dict()`` is called
                here and may communicate.
            extra: JSON-like values and tensors by name, equal on all ranks (rank 0's are kept).

        Returns after the copy. An earlier save still in flight is waited for, or (policy "skip")
        this one is left out; that choice is made by all ranks together. The global random states of
        this process are saved as well.
        """
        if self._closed:
            raise ConfigError("this Checkpointer is closed; make a new one to save again")
        step_name(step)  # refuses a negative step before anything is copied
        started = time.perf_counter()
        if self._must_skip():
            self.num_skipped += 1
            logger.warning("step %d: not saved, the save before it is still in flight", step)
            return PendingSave(step, None, time.perf_counter() - started)
        self._settle_pending()
        state = self._control.everywhere(
            lambda: collect(model, optimizer, stateful or {}, extra or {}, self._control.rank),
            keep_own_error=True,
        )
        job = SaveJob(step, self._staging.copy(state.leaves), state.values, state.aliases)
        future = self._executor.submit(job)
        self._pending = PendingSave(step, future, time.perf_counter() - started)
        return self._pending

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        stateful: Mapping[str, Stateful] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> PendingSave:
        """:meth:`async_save`, then wait for the commit."""
        return self.async_save(step, model, optimizer, stateful=stateful, extra=extra).wait()

    def load(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        stateful: Mapping[str, Stateful] | None = None,
        step: int | None = None,
    ) -> dict[str, Any]:
        """Fill live objects in place from the newest committed checkpoint, or that of ``step``.
        Call on every rank.

        The world size and the layout may differ from those that saved. Every block read is
        verified. Ranks that saved random states get theirs back. Later saves are differences to
        what was loaded; newer checkpoints than an explicit older ``step`` are then set aside
        (renamed), not overwritten.

        Returns:
            The ``extra`` that was saved (an empty dictionary if none), with ``extra["step"]``.

        Raises:
            CheckpointNotFoundError: there is none. LayoutMismatchError: it does not fit.
                CorruptCheckpointError: it is damaged. A rank on which all is well raises
                RankFailedError if another could not load.
        """
        self._settle_pending()
        chosen = self._choose(step)
        reader = ExcpReader(self.folder / step_name(chosen))
        try:
            self._control.everywhere(lambda: reader.chain, keep_own_error=True)
            extra, loaded = restore(reader, model, optimizer, stateful or {}, self._control)
        finally:
            reader.close()
        self._executor.restart(replace(loaded, is_newest=step is None))
        return {**extra, "step": chosen}

    def newest(self) -> int | None:
        """Step of the newest committed checkpoint as rank 0 sees it, or None. One small gather."""
        steps = committed_steps(self.folder) if self._control.rank == 0 else []
        return self._control.broadcast_object(steps[-1] if steps else None)

    def wait(self) -> None:
        """Wait for a save in flight; raises what made it fail."""
        if self._pending is not None:
            self._pending.wait()

    def close(self) -> None:
        """Finish a save in flight and let go of all threads, processes and buffers. Raises what
        made that save fail, unless somebody has waited for it already."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._close_at_exit)
        try:
            if self._pending is not None and not self._pending.reported:
                self._pending.wait()
        finally:
            self._executor.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _close_at_exit(self) -> None:
        try:
            self.close()
        except Exception:
            logger.exception("the last save failed")

    def _must_skip(self) -> bool:
        """Policy "skip": whether a save is in flight on any rank. One small gather; none under
        policy "wait"."""
        if self.config.policy != "skip" or self._pending is None:
            return False
        busy = self._control.all_gather_object(not self._pending.done())
        return any(busy)

    def _settle_pending(self) -> None:
        """Wait for the save in flight; one that failed and that nobody waited for is logged
        here."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        was_reported = pending.reported
        try:
            pending.wait()
        except Exception:
            if not was_reported:
                logger.exception(
                    "the save of step %d failed; nothing was committed for it, training goes on",
                    pending.step,
                )

    def _choose(self, step: int | None) -> int:
        """Rank 0 looks, so that all ranks choose the same or raise the same."""
        found: int | str | None = None
        if self._control.rank == 0:
            try:
                found = newest_step(self.folder)
                if step is not None:
                    found = require_committed(self.folder, step)
            except CheckpointNotFoundError as error:
                found = str(error)
        found = self._control.broadcast_object(found)
        if not isinstance(found, int):
            raise CheckpointNotFoundError(found)
        return found
