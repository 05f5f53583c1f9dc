"""``engine.effx``: what effx_dist adds to a DeepSpeed engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from effx_dist.checkpoint import PendingSave
from effx_dist.config import EffxConfig
from effx_dist.core.cautious import alignment_metrics
from effx_dist.data import InfoBatchSampler
from effx_dist.engines.deepspeed.checkpoint import EngineCheckpoints
from effx_dist.engines.deepspeed.data import DataFeed

EVERY_STEPS = 10
"""Where the configuration has no "steps_per_print"."""


class MonitorMetrics:
    """Writes to ``engine.monitor`` after optimizer steps, beside what DeepSpeed itself writes there, over the
    samples of all ranks (``engine.global_samples``).

    "effx/cautious/alignment" comes every "steps_per_print" steps, "effx/infobatch/..." with the first step of an
    epoch, and "effx/checkpoint/..." once a save has been committed. Where no monitor is enabled the engine is left
    as it is. No communication is performed.

    Args:
        engine: a DeepSpeedEngine; its ``step`` is wrapped, on the instance.
        sampler: gives the sampler of the moment, if there is one.
        alignment: gives what a cautious optimizer calls so; nothing of another.
    """

    def __init__(
        self,
        engine: Any,
        sampler: Callable[[], InfoBatchSampler | None],
        alignment: Callable[[], Mapping[Any, float]],
    ) -> None:
        self._engine = engine
        self._sampler = sampler
        self._alignment = alignment
        self._epoch: int | None = None
        self._saves: list[PendingSave] = []
        self._is_writer = engine.monitor.enabled and engine.global_rank == 0
        if self._is_writer:
            engine.step = self._reporting(engine.step)

    def saved(self, pending: PendingSave) -> None:
        """A save has begun: its figures are written after a step that finds it ended."""
        if self._is_writer:
            self._saves.append(pending)

    def write(self, values: Mapping[str, float]) -> None:
        """Hand ``values`` to the monitor, on the first rank."""
        if self._is_writer and values:
            samples = self._engine.global_samples
            self._engine.monitor.write_events([(name, x, samples) for name, x in values.items()])

    def write_finished_saves(self) -> None:
        """Write the figures of the saves that have ended well, and forget those that have ended."""
        ended = [pending for pending in self._saves if pending.done()]
        self._saves = [pending for pending in self._saves if pending not in ended]
        for pending in ended:
            if not pending.skipped and pending.failure() is None:
                self.write(pending.metrics())

    def _reporting(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def step_and_report(*args: Any, **kwargs: Any) -> Any:
            num_steps = self._engine.global_steps
            result = step(*args, **kwargs)
            if self._engine.global_steps != num_steps:
                self._after_step()
            return result

        return step_and_report

    def _after_step(self) -> None:
        if self._engine.global_steps % (self._engine.steps_per_print() or EVERY_STEPS) == 0:
            self.write(alignment_metrics(self._alignment()))
        sampler = self._sampler()
        if sampler is not None and sampler.epoch != self._epoch:
            self._epoch = sampler.epoch
            self.write(sampler.metrics())
        self.write_finished_saves()


class Handle(DataFeed):
    """Found as ``engine.effx`` where the configuration has an "effx" block with something on in it.

    Attributes:
        config: the block.
        sampler: that of the loader that was made last; None before, and where InfoBatch is off.
        metrics: what goes to the engine's monitor.
        checkpoints: what ``engine.save_checkpoint`` and ``load_checkpoint`` go to; None where excp is off.
    """

    def __init__(self, engine: Any, config: EffxConfig) -> None:
        super().__init__(engine, config.infobatch)
        self.config = config
        self.metrics = MonitorMetrics(engine, lambda: self.sampler, lambda: self.alignment)
        self.checkpoints = (
            EngineCheckpoints(engine, config.on.excp, lambda: self.sampler, self.metrics.saved)
            if config.on.excp is not None
            else None
        )

    @property
    def last_save(self) -> PendingSave | None:
        """The save that ``engine.save_checkpoint`` began last, to wait for or to ask for its figures."""
        return None if self.checkpoints is None else self.checkpoints.last_save

    @property
    def alignment(self) -> dict[str, float]:
        """Mean of the cautious mask at the last step by parameter, named as in
        ``engine.module.named_parameters()``: the fraction of the update that agreed with the gradient.

        The same on every rank. Empty where the step is not cautious or none was taken; 0 for a parameter
        that no rank had a gradient of, since ZeRO steps it with zeros. Copied to the host when it is
        read; no communication is performed.
        """
        return dict(getattr(self._engine.basic_optimizer, "alignment", {}))
