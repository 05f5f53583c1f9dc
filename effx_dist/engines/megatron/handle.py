"""What :func:`attach` gives: what effx_dist adds to a Megatron job."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from effx_dist.checkpoint import Checkpointer, PendingSave
from effx_dist.checkpoint.training_state import Stateful
from effx_dist.config import EffxConfig
from effx_dist.engines.megatron.cautious import cautious_form, make_cautious
from effx_dist.engines.megatron.checkpoint import MegatronCheckpoints
from effx_dist.engines.megatron.checks import check
from effx_dist.engines.megatron.data import DataFeed
from effx_dist.engines.megatron.fragments import inner_optimizers, unwrapped
from effx_dist.engines.megatron.layout import Layout, survey
from effx_dist.engines.megatron.live import MegatronState
from effx_dist.engines.megatron.strategies import ExcpLoadStrategy, ExcpSaveStrategy
from effx_dist.optim.metrics import cautious_metrics
from effx_dist.shard import as_group


def attach(
    optimizer: Any,
    model_chunks: Any,
    cfg: EffxConfig | None = None,
    *,
    vocab_size: int | None = None,
) -> Handle:
    """Add what ``cfg`` asks for to a Megatron-core job. Call on every rank, once, after
    ``get_megatron_optimizer`` and before the first step; collective over all ranks.

    Args:
        optimizer: what get_megatron_optimizer has made; None where nothing is trained: weights can be
            loaded then.
        model_chunks: the list that it was made with, or its only member; DistributedDataParallel or
            Float16Module around them or not.
        cfg: the sections; "cautious" changes the inner optimizers in place. None: nothing is changed.
        vocab_size: rows of the vocabulary that are no padding; kept in checkpoints, for conversion.

    Raises:
        ConfigError: something in the optimizer or the model cannot work; on every rank, before anything
            is changed.
        LayoutMismatchError: which rank holds what cannot be told.
    """
    chunks = list(model_chunks) if isinstance(model_chunks, Sequence) else [model_chunks]
    optimizers = [] if optimizer is None else inner_optimizers(optimizer)
    group = as_group(None)
    group.everywhere(lambda: check(optimizers, chunks), keep_own_error=True)
    return Handle(survey(optimizer, chunks), cfg if cfg is not None else EffxConfig(), vocab_size)


class Handle(DataFeed):
    """What :func:`attach` gives.

    Attributes:
        config: the sections.
        layout: which rank holds what.
        sampler: what :meth:`make_sampler` made last; None before.
        last_save: the save that began last, to wait for or to read figures of.
    """

    def __init__(self, layout: Layout, config: EffxConfig, vocab_size: int | None) -> None:
        configs = [getattr(unwrapped(chunk), "config", None) for chunk in layout.model_chunks]
        super().__init__(config.infobatch, configs)
        self.config = config
        self.layout = layout
        self.last_save: PendingSave | None = None
        self._checkpoints = MegatronCheckpoints(
            layout, config.excp, lambda: self.sampler, vocab_size
        )
        settings = config.cautious
        if settings is not None and settings.enabled:
            layout.group.everywhere(self._check_forms, keep_own_error=True)
            layout.group.everywhere(self._make_cautious, keep_own_error=True)

    def _check_forms(self) -> None:
        for optimizer in self.layout.optimizers:
            cautious_form(optimizer.optimizer)

    def _make_cautious(self) -> None:
        assert self.config.cautious is not None, "the caller looks"
        for optimizer, params in zip(self.layout.optimizers, self.layout.params, strict=True):
            make_cautious(optimizer, params, self.config.cautious)

    @property
    def alignment(self) -> dict[str, float]:
        """Mean of the cautious mask at the last step by parameter, of this rank's pipeline stage: the
        fraction of the update that agreed with the gradient. The same on all ranks that share a
        parameter. Empty where the step is not cautious or none was taken. Copied to the host when it is
        read; no communication is performed.
        """
        found: dict[str, float] = {}
        for optimizer in self.layout.optimizers:
            found |= getattr(optimizer.optimizer, "alignment", {})
        return found

    def metrics(self) -> dict[str, float]:
        """What "effx/cautious/..." is in logs. No communication is performed."""
        return cautious_metrics(self.alignment)

    def checkpointer(self, folder: str | os.PathLike[str]) -> Checkpointer:
        """What saves to and loads from a folder; made on first use, which is collective."""
        return self._checkpoints.checkpointer(folder)

    def begin(self, save_dir: str | os.PathLike[str]) -> None:
        """With ``seeded_base``: as :meth:`Checkpointer.begin`, for checkpoints in ``save_dir``."""
        self.checkpointer(save_dir).begin(MegatronState(self.layout, with_optimizer=False))

    def save_checkpoint(
        self,
        save_dir: str | os.PathLike[str],
        iteration: int,
        opt_param_scheduler: Stateful | None = None,
        *,
        extra: Mapping[str, Any] | None = None,
        stateful: Mapping[str, Stateful] | None = None,
        tag: str | None = None,
    ) -> PendingSave:
        """Save everything of the run to ``save_dir/step-N``; returns after the copy of the state. Call on
        every rank.

        Each rank writes the boxes that it holds; nothing is gathered. Master weights, moments, the
        numbers of steps, the options of the groups, loss scale, sampler and the states of the random
        generators are saved.

        Args:
            iteration: optimizer steps taken; names the checkpoint.
            opt_param_scheduler: Megatron's learning rate schedule.
            extra: JSON-like values and tensors by name, the same on every rank.
            stateful: other objects with ``state_dict`` and ``load_state_dict``, by name.
            tag: a name to load it by; see :meth:`Checkpointer.async_save`.
        """
        self.last_save = self._checkpoints.save(
            save_dir, iteration, opt_param_scheduler, extra=extra, stateful=stateful, tag=tag
        )
        return self.last_save

    def load_checkpoint(
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
        """Fill the job from the newest checkpoint, or that of ``iteration`` or ``tag``, at any tensor-,
        pipeline- and data-parallel size. Call on every rank.

        Of a vocabulary that is padded differently here, the rows that both have are loaded; others keep
        their weights, and their moments begin at 0.

        Args:
            load_optimizer: False: only the weights and ``extra`` (and ``stateful``, if given).
            strict: see :meth:`Checkpointer.load`.

        Returns the ``extra`` that was saved, with ``extra["step"]``.

        Raises CheckpointNotFoundError, LayoutMismatchError, CorruptCheckpointError; RankFailedError on
        ranks on which all is well.
        """
        return self._checkpoints.load(
            load_dir,
            opt_param_scheduler,
            iteration=iteration,
            tag=tag,
            load_optimizer=load_optimizer,
            strict=strict,
            stateful=stateful,
        )

    def save_strategy(self) -> ExcpSaveStrategy:
        """For ``dist_checkpointing.save(..., sharded_strategy=...)``; see :class:`ExcpSaveStrategy`."""
        return ExcpSaveStrategy(self._checkpoints, self._saved)

    def load_strategy(self) -> ExcpLoadStrategy:
        """For ``dist_checkpointing.load(..., sharded_strategy=...)``."""
        return ExcpLoadStrategy(self._checkpoints)

    def _saved(self, pending: PendingSave) -> None:
        self.last_save = pending

    def close(self) -> None:
        """Finish the saves in flight. Raises what made one fail."""
        self._checkpoints.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
