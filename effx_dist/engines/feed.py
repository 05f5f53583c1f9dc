"""What an engine's handle does with samples: one sampler, and losses that it weighs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import torch

from effx_dist.config import InfoBatchConfig
from effx_dist.errors import ConfigError


class WeighingSampler(Protocol):
    """What is asked of a sampler here."""

    def weigh(self, losses: torch.Tensor, sample_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        """As `InfoBatchSampler.weigh`."""


S = TypeVar("S", bound=WeighingSampler)


class Feed(Generic[S]):
    """Holds the sampler of a run, made by the engine's own ``make_sampler``, and weighs losses with it.

    Attributes:
        sampler: the sampler that was made last; None before, and where InfoBatch is off.

    Args:
        config: the "infobatch" section; None, or one that is not enabled: InfoBatch is off.
    """

    how_to_make_one: str
    """What an error says of how the engine makes a sampler."""

    def __init__(self, config: InfoBatchConfig | None) -> None:
        self._infobatch = config if config is not None and config.enabled else None
        self.sampler: S | None = None

    @property
    def _section(self) -> InfoBatchConfig:
        if self._infobatch is None:
            raise ConfigError(
                "effx.infobatch: is absent or not enabled in the configuration, so there is no sampler to make"
            )
        return self._infobatch

    def _required_sampler(self, caller: str) -> S:
        if self.sampler is None:
            raise ConfigError(f"{caller}: there is no sampler yet; {self.how_to_make_one}")
        return self.sampler

    def _weigh(
        self, losses: torch.Tensor, sample_ids: torch.Tensor | Sequence[int], is_training: bool
    ) -> torch.Tensor:
        """The scalar to call backward on. In an evaluation, and where InfoBatch is off, it is the mean, in
        float32 or wider, and nothing is recorded. No communication is performed."""
        if self._infobatch is None or not is_training:
            return losses.to(torch.promote_types(losses.dtype, torch.float32)).mean()
        return self._required_sampler("weigh").weigh(losses, sample_ids)
