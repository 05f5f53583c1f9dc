"""``engine.effx``: what effx_dist adds to a DeepSpeed engine."""

from __future__ import annotations

from typing import Any

from effx_dist.checkpoint import PendingSave
from effx_dist.config import EffxConfig
from effx_dist.engines.deepspeed.checkpoint import EngineCheckpoints
from effx_dist.engines.deepspeed.data import DataFeed
from effx_dist.engines.deepspeed.metrics import MonitorMetrics


class Handle(DataFeed):
    """Found as ``engine.effx`` where the configuration has an "effx" block with something on in it.

    Attributes:
        config: the block.
        sampler: of the loader that was made last; None where InfoBatch is off or there is none yet.
        metrics: what goes to the engine's monitor.
        checkpoints: what ``engine.save_checkpoint`` and ``load_checkpoint`` go to; None where excp is off.
        last_save: the save that ``engine.save_checkpoint`` began last, to wait for or to ask for its figures.
    """

    def __init__(self, engine: Any, config: EffxConfig) -> None:
        super().__init__(engine, config.infobatch)
        self.config = config
        self.metrics = MonitorMetrics(engine, lambda: self.sampler, lambda: self.alignment)
        self.last_save: PendingSave | None = None
        self.checkpoints = (
            EngineCheckpoints(engine, config.excp, lambda: self.sampler, self._saved)
            if config.excp is not None and config.excp.enabled
            else None
        )

    def _saved(self, pending: PendingSave) -> None:
        self.last_save = pending
        self.metrics.saved(pending)

    @property
    def alignment(self) -> dict[str, float]:
        """Mean of the cautious mask at the last step by parameter, named as in
        ``engine.module.named_parameters()``: the fraction of the update that agreed with the gradient.

        The same on every rank. Empty where the step is not cautious or none was taken; 0 for a parameter
        that no rank had a gradient of, since ZeRO steps it with zeros. Copied to the host when it is
        read; no communication is performed.
        """
        return dict(getattr(self._engine.basic_optimizer, "alignment", {}))
