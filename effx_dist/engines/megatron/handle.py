"""What :func:`attach` gives: what effx_dist adds to a Megatron job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from effx_dist.config import EffxConfig
from effx_dist.engines.megatron.cautious import cautious_form, make_cautious
from effx_dist.engines.megatron.checkpoint import JobCheckpoints
from effx_dist.engines.megatron.checks import check, has_strategies, strategies
from effx_dist.engines.megatron.data import DataFeed
from effx_dist.engines.megatron.job_layout import JobLayout, survey
from effx_dist.engines.megatron.local_tensors import inner_optimizers, unwrapped
from effx_dist.shard import as_group

if TYPE_CHECKING:
    from effx_dist.engines.megatron.strategies import ExcpLoadStrategy, ExcpSaveStrategy


def attach(
    optimizer: Any,
    model_chunks: Any,
    cfg: EffxConfig | None = None,
    *,
    vocab_size: int | None = None,
) -> Handle:
    """Add what ``cfg`` asks for to a Megatron-core job. Call on every rank, once, after
    ``get_megatron_optimizer`` and before the first step; collective over all ranks.

    ``dist_checkpointing.load`` without a strategy then reads what the save strategy wrote, by the handle
    that was attached last.

    Args:
        optimizer: what get_megatron_optimizer has made; None where nothing is trained: weights can be
            loaded then.
        model_chunks: the list that it was made with, or the only one in it; DistributedDataParallel or
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
    group.everywhere(lambda: check(optimizer, optimizers, chunks))
    handle = Handle(survey(optimizer, chunks), cfg if cfg is not None else EffxConfig(), vocab_size)
    if has_strategies():
        strategies().register(handle, optimizer)
    return handle


class Handle(DataFeed, JobCheckpoints):
    """What :func:`attach` gives.

    Attributes:
        config: the sections.
        layout: which rank holds what.
        sampler: what :meth:`make_sampler` made last; None before.
        last_save: the save that began last, to wait for or to read figures of.
    """

    def __init__(self, layout: JobLayout, config: EffxConfig, vocab_size: int | None) -> None:
        configs = [getattr(unwrapped(chunk), "config", None) for chunk in layout.model_chunks]
        DataFeed.__init__(self, config.infobatch, configs)
        JobCheckpoints.__init__(self, layout, config.excp, lambda: self.sampler, vocab_size)
        self.config = config
        if config.on.cautious is not None:
            layout.group.everywhere(self._check_forms)
            layout.group.everywhere(self._make_cautious)

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

    def save_strategy(self) -> ExcpSaveStrategy:
        """For ``dist_checkpointing.save(..., sharded_strategy=...)``; see :class:`ExcpSaveStrategy`. Raises
        MissingEngineError where Megatron-core has no place for one."""
        made: ExcpSaveStrategy = strategies().ExcpSaveStrategy(self)
        return made

    def load_strategy(self) -> ExcpLoadStrategy:
        """For ``dist_checkpointing.load(..., sharded_strategy=...)``; where none is given, it is used for
        checkpoints that the save strategy wrote. Raises MissingEngineError as :meth:`save_strategy`."""
        made: ExcpLoadStrategy = strategies().ExcpLoadStrategy(self)
        return made

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
