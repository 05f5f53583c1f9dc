"""What every cautious optimizer is to its caller, whoever computes the update that is masked."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch.optim.optimizer import Optimizer

from effx_dist.errors import ConfigError
from effx_dist.optim.drawn_layouts import DrawnLayouts
from effx_dist.optim.param_layout import ShardMapSource


def untraced(step: Callable[..., Any]) -> Callable[..., Any]:
    """torch's hook around ``step``, which torch.compile leaves as it is: the step consists of kernels
    already, and a graph of it would break at every one."""
    hooked: Callable[..., Any] = torch.compiler.disable(Optimizer.profile_hook_step(step))
    return hooked


class MaskedOptimizer(Optimizer):
    """An optimizer whose update is masked by its agreement with the gradient; a subclass says how."""

    _layouts: DrawnLayouts

    profile_hook_step = staticmethod(untraced)  # type: ignore[assignment]

    @property
    def shard_map(self) -> ShardMapSource | None:
        """Where this rank's pieces lie; None if drawn from the parameters themselves.

        Set it where an engine replaces the parameters by flat local tensors: to a map with one
        entry per parameter, or to a function that draws one from the list of parameters, called
        each time that the list changes.
        """
        return self._layouts.source

    @shard_map.setter
    def shard_map(self, source: ShardMapSource | None) -> None:
        self._layouts.source = source

    @property
    def alignment(self) -> dict[str | int, float]:
        """Mean of the mask at the last step by whole parameter: the fraction that agreed in sign.

        The key is the parameter's name where the optimizer knows it and its index otherwise.
        Parameters that have not been stepped are left out, but read 0 on a rank whose flat tensors hold
        nothing of them, which cannot tell. Reading it copies the counts, which the step has left where
        they were, to the host; no communication is performed.
        """
        return self._layouts.alignment()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. Every rank calls it. Returns the closure's loss, if there is a closure, which
        runs once, before anything else.

        A parameter without a gradient on this rank is not masked here. Engines give a gradient on
        all ranks that share a parameter or on none (FSDP2 and DDP do). One all-reduce of 8 bytes per
        whole parameter, as the class describes.

        Raises:
            ConfigError: ``implementation`` is not for the device of a parameter; or a wrapped optimizer
                does in its own step what a mask from outside cannot follow.
            LayoutMismatchError: a gradient is sparse, complex or laid out unlike its parameter, or
                how a parameter is cut cannot be told, as where an engine has put flat partitions in the
                place of those given here; on all ranks, where a DTensor has a gradient on some of its
                ranks only. On this rank nothing was changed then (on an accelerator, where a step does
                not wait for the counts, the last is found out two steps later).
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._masked_step()
        return loss

    @abstractmethod
    def _masked_step(self) -> None:
        """The step itself, without gradients being recorded."""

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ConfigError for a parameter group that cannot be stepped."""

    def _admit_last_group(self) -> None:
        """Check the group that was added last, and take it out again if it is refused."""
        try:
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise
        self._layouts.forget()
        self._layouts.note_given(self.param_groups[-1]["params"])
