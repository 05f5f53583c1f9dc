"""Megatron-core: a job's checkpoints, written by every rank from the boxes that it holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import megatron.core

from effx_dist.checkpoint import Checkpointer, PendingSave
from effx_dist.checkpoint.convert.megatron_llama import MEGATRON
from effx_dist.checkpoint.training_state import Stateful
from effx_dist.config import ExcpConfig
from effx_dist.data import InfoBatchSampler
from effx_dist.engines.megatron.description import description_of
from effx_dist.engines.megatron.layout import Layout
from effx_dist.engines.megatron.live import MegatronState
from effx_dist.errors import ConfigError

_SCALER = "grad_scaler"
_SCHEDULER = "opt_param_scheduler"
_SAMPLER = "sampler"


class MegatronCheckpoints:
    """Saves and loads a job, at any tensor-, pipeline- and data-parallel size.

    Args:
        layout: of the job.
        config: the ``excp`` section; None or ``enabled = false`` writes exact, whole checkpoints.
        sampler: gives the sampler whose state travels with the run, if there is one.
        vocabulary: rows of the vocabulary that are no padding, if that is known.

    There is one Checkpointer for each folder, made on first use, which is collective.
    """

    def __init__(
        self, layout: Layout, config: ExcpConfig | None, sampler: Any, vocabulary: int | None
    ) -> None:
        self.layout = layout
        self._config = config
        self._sampler = sampler
        self._vocabulary = vocabulary
        self._by_folder: dict[str, Checkpointer] = {}

    def checkpointer(self, folder: str | os.PathLike[str]) -> Checkpointer:
        """What saves to and loads from a folder."""
        text = os.fspath(folder)
        key = text if "://" in text else str(Path(text).absolute())
        if key not in self._by_folder:
            self._by_folder[key] = Checkpointer(key, self._config)
        return self._by_folder[key]

    def save(
        self,
        save_dir: str | os.PathLike[str],
        iteration: int,
        opt_param_scheduler: Stateful | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        tag: str | None = None,
    ) -> PendingSave:
        """See :meth:`Handle.save_checkpoint`."""
        if MEGATRON in (extra or {}):
            raise ConfigError(
                f"extra[{MEGATRON!r}]: the model is described there; take another name"
            )
        told = {
            "version": megatron.core.__version__,
            "transformer": description_of(self.layout.model_chunks, self._vocabulary),
        }
        return self.checkpointer(save_dir).async_save(
            iteration,
            MegatronState(self.layout),
            stateful=self._stateful(opt_param_scheduler, stateful),
            extra={**(extra or {}), MEGATRON: told},
            tag=tag,
        )

    def load(
        self,
        load_dir: str | os.PathLike[str],
        opt_param_scheduler: Stateful | None = None,
        *,
        iteration: int | None = None,
        tag: str | None = None,
        load_optimizer: bool = True,
        strict: bool = True,
        stateful: Mapping[str, Stateful] | None = None,
    ) -> dict[str, Any]:
        """See :meth:`Handle.load_checkpoint`."""
        found = self.checkpointer(load_dir).load(
            MegatronState(self.layout, with_optimizer=load_optimizer),
            stateful=self._stateful(opt_param_scheduler, stateful) if load_optimizer else stateful,
            step=iteration,
            tag=tag,
            strict=strict,
        )
        found.pop(MEGATRON, None)
        return found

    def close(self) -> None:
        """Finish the saves in flight. Raises what made one fail."""
        while self._by_folder:
            self._by_folder.popitem()[1].close()

    def _stateful(
        self, opt_param_scheduler: Stateful | None, others: Mapping[str, Stateful] | None
    ) -> dict[str, Stateful]:
        found: dict[str, Stateful] = dict(others or {})
        sampler: InfoBatchSampler | None = self._sampler()
        if sampler is not None:
            found[_SAMPLER] = sampler
        if opt_param_scheduler is not None:
            found[_SCHEDULER] = _Schedule(opt_param_scheduler)
        scalers = [getattr(optimizer, "grad_scaler", None) for optimizer in self.layout.optimizers]
        for scaler in scalers[:1]:  # the optimizers' are alike
            if scaler is not None:
                found[_SCALER] = scaler
        return found


class _Schedule:
    """Megatron's schedule, which takes as many steps as were saved, from wherever it is: a job that goes
    back to an earlier checkpoint would be too far on."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = self._scheduler.state_dict()
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheduler.num_steps = 0
        self._scheduler.load_state_dict(state_dict)
