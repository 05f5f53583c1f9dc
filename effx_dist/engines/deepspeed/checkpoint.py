"""DeepSpeed: ``engine.save_checkpoint`` and ``engine.load_checkpoint`` on this library's checkpoints.

Signatures, tags, ``latest`` and what comes back are DeepSpeed's. Checkpoints that DeepSpeed itself has
written are loaded by its own methods.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import deepspeed

from effx_dist.checkpoint import Checkpointer, PendingSave
from effx_dist.checkpoint.saving.in_flight import settle, settle_saves_in
from effx_dist.checkpoint.state.training_state import Stateful
from effx_dist.checkpoint.state.tree import tree_to_json
from effx_dist.checkpoint.storage.places import Location, folder_key, location
from effx_dist.checkpoint.storage.steps import (
    LATEST,
    TAG,
    StepPrefix,
    committed_steps,
    holds_foreign_files,
    refuse_foreign_files,
    step_folder,
    step_name,
    step_of,
)
from effx_dist.checkpoint.storage.tags import checked_tag, folder_of_tag, is_tag_name, point_to
from effx_dist.checkpoint.tools.compress.deepspeed import SCALER_KEYS
from effx_dist.checkpoint.tools.convert.universal import ENGINE
from effx_dist.config import ExcpConfig
from effx_dist.data import ProgressLR
from effx_dist.engines.deepspeed.live import ZeroState
from effx_dist.engines.run_checkpoints import RunCheckpoints
from effx_dist.errors import CheckpointNotFoundError, ConfigError
from effx_dist.shard import TorchGroup

logger = logging.getLogger(__name__)

_PREFIX: StepPrefix = "global_step"
_MAX_LATEST_BYTES = 4096
_ONCE = ExcpConfig(profile="lossless", base_every=1, async_mode="sync")
"""Settings of a Checkpointer that only loads."""
_users: dict[str, WeakSet[EngineCheckpoints]] = defaultdict(WeakSet)
"""The engines of this process that have saved to or gone on from a folder."""


class EngineCheckpoints(RunCheckpoints):
    """Stands in for an engine's methods that save and load; on the instance, from when it is made.

    Args:
        engine: a DeepSpeedEngine.
        config: the ``excp`` section.
        sampler: gives the sampler whose state travels with the run, if there is one.
        on_save: called with every save that has begun.

    There is one Checkpointer for each folder. Raises ConfigError for an engine whose state cannot be
    told by the names of its model's parameters.
    """

    def __init__(
        self,
        engine: Any,
        config: ExcpConfig,
        sampler: Callable[[], Stateful | None] = lambda: None,
        on_save: Callable[[PendingSave], None] = lambda pending: None,
    ) -> None:
        _check(engine)
        super().__init__(config, sampler, _PREFIX)
        self._engine = engine
        self._config = config
        self._on_save = on_save
        self._group = TorchGroup()
        self._last_steps: dict[str, int] = {}
        self._load_of_engine = engine.load_checkpoint
        self._destroy_of_engine = engine.destroy
        engine.save_checkpoint = self.save_checkpoint
        engine.load_checkpoint = self.load_checkpoint
        engine.destroy = self.destroy

    def _live(self, with_optimizer: bool = True) -> ZeroState:
        return ZeroState(self._engine, with_optimizer)

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        tag: str | None = None,
        client_state: Mapping[str, Any] | None = None,
        save_latest: bool = True,
        exclude_frozen_parameters: bool = False,
    ) -> bool:
        """As ``DeepSpeedEngine.save_checkpoint``; returns after the copy of the state, unless
        ``async_mode`` is "sync". Call on every rank.

        The checkpoint of step N is the folder ``save_dir/global_stepN``. Any other ``tag`` is a name
        for it that may move to a later step, and keeps it from the retention. Where another engine of
        this process saves to ``save_dir`` (an actor and a critic), one with a tag of its own saves to
        ``save_dir/tag/global_stepN``. ``latest`` names it once
        it is committed. A step that this engine has saved or loaded there already is not written again:
        only its names move.

        Args:
            client_state: JSON-like values and tensors by name, the same on every rank.

        Raises ConfigError, TypeError for a client_state that cannot be kept, and RankFailedError on
        the ranks on which all is well. What makes an asynchronous save fail is logged at the next one.
        """
        if not save_dir or not str(save_dir):
            raise ValueError(f"save_dir must be a non-empty string, got {save_dir!r}")
        step = int(self._engine.global_steps)
        name = f"{_PREFIX}{step}" if tag is None else str(tag)
        self._engine._checkpoint_tag_validation(name)
        main = folder_key(save_dir)

        def check() -> tuple[dict[str, Any], str | None, str]:
            own_tag = _own_tag(name, step)
            home = self._home(main, own_tag) if self._group.rank == 0 else main
            if self._group.rank == 0:
                refuse_foreign_files(location(home) / step_name(step, _PREFIX))
            return self._extra(client_state or {}), own_tag, home

        extra, own_tag, home = self._group.everywhere(check)
        key = self._group.broadcast_object(home)
        _users[key].add(self)
        checkpoints = self.checkpointer(key)
        if self._last_steps.get(key) == step and self._stands(checkpoints):
            self._rename(checkpoints.folder, step, own_tag, save_latest)
            return True
        pending = checkpoints.async_save(
            step,
            ZeroState(self._engine, with_frozen=not exclude_frozen_parameters),
            stateful=self._stateful(),
            extra=extra,
            tag=own_tag,
            moves_latest=save_latest,
        )
        if not pending.skipped:
            self._last_steps[key] = step
            self.last_save = pending
            self._on_save(pending)
        if self._config.async_mode == "sync":
            pending.wait()
        return True

    def load_checkpoint(
        self,
        load_dir: str | os.PathLike[str],
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Callable[..., None] | None = None,
    ) -> tuple[str | None, Any]:
        """As ``DeepSpeedEngine.load_checkpoint``, at any world size and ZeRO stage, also of what an FSDP2
        run has saved. Call on every rank.

        Without ``tag``, the checkpoint that ``latest`` names; where there is no such file, a warning and
        ``(None, None)``. What DeepSpeed itself has saved, universal checkpoints included, is loaded by its
        own method. Random states come back with a run that goes on as it was: not with
        ``load_module_only`` or without ``load_module_strict``.

        Returns the checkpoint's folder and the client_state; with ``load_module_only``, the engine's
        counters are added to it and not taken.

        Raises CheckpointNotFoundError (naming the tags there are), LayoutMismatchError,
        CorruptCheckpointError; RankFailedError on ranks on which all is well.
        """
        options: dict[str, Any] = {
            "load_module_strict": load_module_strict,
            "load_optimizer_states": load_optimizer_states,
            "load_lr_scheduler_states": load_lr_scheduler_states,
            "load_module_only": load_module_only,
            "custom_load_fn": custom_load_fn,
        }
        self._last_steps.clear()  # what is live now may be none of what was saved
        if self._engine.load_universal_checkpoint():
            return self._load_plain(load_dir, tag, options)
        folder, name, is_own = self._find(load_dir, tag)
        if name is None:
            logger.warning(
                "%s: has no file %r, so nothing was loaded; give the tag of a checkpoint if there is one",
                load_dir,
                LATEST,
            )
            return None, None
        if not is_own:
            return self._load_plain(load_dir, name, options)
        if custom_load_fn is not None:
            raise ConfigError(
                "custom_load_fn: effx checkpoints are read straight into the partitions, so there is no "
                "state dict to hand it; leave it out, or `effx convert --to torch` and load that"
            )
        loaded = str(location(folder) / name)
        if load_module_only:
            return loaded, self._load_weights(folder, name, load_module_strict)
        return loaded, self._resume(folder, name, options)

    def destroy(self) -> None:
        """Finish the saves in flight, then as ``DeepSpeedEngine.destroy``. Raises what made one fail."""
        for users in _users.values():
            users.discard(self)
        try:
            self.close()
        finally:
            self._destroy_of_engine()

    def _load_weights(self, folder: str, name: str, strict: bool) -> Any:
        live = self._live(with_optimizer=False)
        with Checkpointer(folder, _ONCE) as checkpoints:
            # any mapping, here of each name to itself, says that another run begins, with random states of its own
            checkpoints.load(live, tag=name, strict=strict, mapping=str)
            return _client_state(checkpoints, with_counters=True)

    def _resume(self, folder: str, name: str, options: Mapping[str, Any]) -> Any:
        engine, checkpoints = self._engine, self.checkpointer(folder)
        _users[folder].add(self)
        with_optimizer, strict = options["load_optimizer_states"], options["load_module_strict"]
        with_schedule = options["load_lr_scheduler_states"]
        step = checkpoints.load(
            self._live(with_optimizer),
            stateful=self._stateful(with_optimizer, with_schedule),
            tag=name,
            strict=strict,
        )["step"]
        assert checkpoints.last_load is not None
        counters = checkpoints.last_load.extra.get(ENGINE, {})
        engine.global_steps = step
        engine.global_samples = counters.get("global_samples", step * engine.train_batch_size())
        engine.skipped_steps = counters.get("skipped_steps", 0)
        engine.micro_steps = step * engine.gradient_accumulation_steps()
        if with_optimizer and strict and with_schedule:
            self._last_steps[folder] = step
        return _client_state(checkpoints)

    def _load_plain(
        self, load_dir: str | os.PathLike[str], tag: str | None, options: Mapping[str, Any]
    ) -> tuple[str | None, Any]:
        found: tuple[str | None, Any] = self._load_of_engine(os.fspath(load_dir), tag, **options)
        return found

    def _home(self, main: str, tag: str | None) -> str:
        """The folder whose chain a save goes on with: ``main``, or that of a tag in it. Looks at files."""
        if tag is None or self in _users[main]:
            return main
        own = folder_key(str(location(main) / tag))
        return own if _users[main] or committed_steps(location(own)) else main

    def _find(
        self, load_dir: str | os.PathLike[str], tag: str | None
    ) -> tuple[str, str | None, bool]:
        """The folder of the chain, the name in it to load, and whether it is one of ours. Waits for all
        saves of this process that are in flight there. Rank 0 looks."""
        main = folder_key(load_dir)
        settle_saves_in(main)
        if tag is not None and is_tag_name(str(tag)):
            settle_saves_in(location(main) / str(tag))
        return self._group.from_first(lambda: _look(main, None if tag is None else str(tag)))

    def _stands(self, checkpoints: Checkpointer) -> bool:
        """Whether the last save was committed, as far as any rank knows; waits for it."""
        return all(self._group.all_gather_object(settle(checkpoints)))

    def _rename(self, folder: Location, step: int, tag: str | None, moves_latest: bool) -> None:
        logger.info("step %d: is saved already; nothing is written but its names", step)
        self._group.from_first(lambda: point_to(step_folder(folder, step), tag, moves_latest))

    def _extra(self, client_state: Mapping[str, Any]) -> dict[str, Any]:
        if ENGINE in client_state:
            raise ConfigError(
                f"client_state[{ENGINE!r}]: the engine's counters have this name; take another"
            )
        tree_to_json(client_state, "client_state", {})  # refuses by path what cannot be kept
        engine = self._engine
        names = ("global_steps", "global_samples", "skipped_steps", "micro_steps")
        counters = {
            **{name: int(getattr(engine, name)) for name in names},
            "dp_world_size": int(engine.seq_dp_world_size),
            "mp_world_size": int(engine.mp_world_size),
            "zero_stage": int(engine.zero_optimization_stage()),
            "ds_version": deepspeed.__version__,
        }
        return {**client_state, ENGINE: counters}

    def _stateful(
        self, with_optimizer: bool = True, with_schedule: bool = True
    ) -> dict[str, Stateful]:
        """What travels with the run. A schedule of this library has the name that its FSDP2 runs give
        it, so that either goes on with the other's."""
        schedule = self._engine.lr_scheduler if with_schedule else None
        scaler = scaler_of(self._engine.optimizer) if with_optimizer else None
        return self._with_sampler(
            {
                "schedule" if isinstance(schedule, ProgressLR) else "lr_scheduler": schedule,
                "loss_scaler": None if scaler is None else LossScaler(scaler),
            }
        )


def _check(engine: Any) -> None:
    if getattr(engine.optimizer, "backup_optimizer", None) is not None:
        raise ConfigError(
            "zero_optimization.offload_optimizer.ratio: below 1, part of the optimizer's state lies in a "
            "second optimizer, where effx.excp does not find it; must be 1.0"
        )


def _own_tag(name: str, step: int) -> str | None:
    """The tag to give to a step, or None where the name is that of the step's own folder."""
    named = step_of(name)
    if named is None:
        return checked_tag(name)
    if named != step:
        raise ConfigError(
            f"tag={name!r}: is the name of another step than {step}, which the engine has taken; leave it "
            "out, or take another name"
        )
    return None


def _look(main: str, tag: str | None) -> tuple[str, str | None, bool]:
    """The folder of the chain, the name in it that ``tag`` or else ``latest`` stands for, and whether it is
    one of ours."""
    place = location(main)
    if tag is None:
        if not place.has_file(LATEST):
            return main, None, False
        tag = place.read_file(LATEST, _MAX_LATEST_BYTES).decode("utf-8", "replace").strip()
    try:
        return main, folder_of_tag(place, tag).name, True
    except CheckpointNotFoundError:
        folder = place / tag
        if is_tag_name(tag) and step_of(tag) is None and (steps := committed_steps(folder)):
            return folder_key(str(folder)), step_folder(folder, steps[-1]).name, True
        is_cut_off = step_of(tag) is not None and not holds_foreign_files(folder)
        if is_cut_off or not folder.is_folder(follow_link=True) or folder.has_file(TAG):
            raise
    return main, tag, False  # DeepSpeed's own


def _client_state(checkpoints: Checkpointer, with_counters: bool = False) -> dict[str, Any]:
    assert checkpoints.last_load is not None
    extra = dict(checkpoints.last_load.extra)
    counters = extra.pop(ENGINE, {})
    return {**counters, **extra} if with_counters else extra


class LossScaler:
    """A dynamic loss scale of fp16, as something with a state."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        """Scale and counters, those that this scaler has."""
        return {
            key: getattr(self._scaler, key) for key in SCALER_KEYS if hasattr(self._scaler, key)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        for key in self.state_dict().keys() & state_dict.keys():
            setattr(self._scaler, key, state_dict[key])


def scaler_of(optimizer: Any) -> Any:
    """What holds the dynamic loss scale, with ZeRO or without; None where the scale is not dynamic."""
    for name, is_dynamic in (
        ("loss_scaler", "dynamic"),
        ("loss_scale_config", "dynamic_loss_scale"),
    ):
        scaler = getattr(optimizer, name, None)
        if getattr(scaler, is_dynamic, False):
            return scaler
    return None
