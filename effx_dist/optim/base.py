"""What the cautious optimisers share: count, one all-reduce of the counts, step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal, overload

import torch
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from effx_dist.core import cautious
from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.optim.layout import Layout, Segment, ShardMapSource, draw_layout
from effx_dist.shard import ShardMap, local_of

Implementation = Literal["auto", "eager"]

_HALF_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALF_DTYPES, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class Options:
    """A parameter group's settings, read once per step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    cautious_weight_decay: bool
    maximize: bool

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> Options:
        """``lr`` may be a 1-element tensor; one on an accelerator is waited for here, as
        torch.optim.AdamW does.
        """
        return cls(
            lr=float(group["lr"]),
            betas=(float(group["betas"][0]), float(group["betas"][1])),
            eps=float(group.get("eps", 0.0)),
            weight_decay=float(group["weight_decay"]),
            cautious_weight_decay=bool(group["cautious_weight_decay"]),
            maximize=bool(group["maximize"]),
        )


@dataclass(frozen=True, slots=True)
class Work:
    """One segment of one local parameter in one step, sharing memory with the optimiser.

    Attributes:
        moments: exp_avg and the like, by state key, in the dtype of the arithmetic.
        step: number of steps of this parameter, this one included.
    """

    whole_index: int
    options: Options
    param: torch.Tensor
    raw_grad: torch.Tensor
    moments: dict[str, torch.Tensor]
    step: float

    def grad(self) -> torch.Tensor:
        """The gradient to descend, in the dtype of the arithmetic; each walk makes its own."""
        grad = self.raw_grad.to(working_dtype(self.param))
        return grad.neg() if self.options.maximize else grad


def working_dtype(param: torch.Tensor) -> torch.dtype:
    """dtype of the state and the arithmetic: the parameter's own, float32 if that has 16 bits."""
    return torch.float32 if param.dtype in _HALF_DTYPES else param.dtype


class CautiousOptimizer(Optimizer):
    """Base of the cautious optimisers: a subclass gives the update, this class the step.

    ``step()`` performs one all-reduce of one int64 vector, 8 bytes per whole parameter, per set of
    groups that parameters are spread over: exactly one under plain FSDP2 or ZeRO, none where every
    parameter is whole on its rank. All parameters take part, also those without a gradient, so that
    every rank sends the same vector.
    """

    _moment_names: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        implementation: Implementation,
        shard_map: ShardMapSource | None,
    ) -> None:
        if implementation not in ("auto", "eager"):
            raise ConfigError(
                f"{implementation=}: must be 'auto' or 'eager', which are all that this version has"
            )
        self.implementation: Implementation = implementation
        self._shard_map = shard_map
        self._layouts: dict[tuple[int, ...], Layout] = {}
        super().__init__(params, defaults)

    @property
    def shard_map(self) -> ShardMapSource | None:
        """Where this rank's pieces lie; None if drawn from the parameters themselves.

        Set it where an engine replaces the parameters by flat local tensors: to a map with one
        entry per parameter, or to a function that draws one from the list of parameters, called
        each time that the list changes.
        """
        return self._shard_map

    @shard_map.setter
    def shard_map(self, source: ShardMapSource | None) -> None:
        self._shard_map = source
        self._layouts = {}

    @property
    def alignment(self) -> dict[str | int, float]:
        """Mean of the mask at the last step by whole parameter: the fraction that agreed in sign.

        The key is the parameter's name where the optimiser knows it and its index otherwise.
        Parameters that have not been stepped are left out. Reading it copies the counts to the
        host; no communication is performed.
        """
        found: dict[str | int, float] = {}
        for layout in self._layouts.values():
            counts = layout.last_counts
            if counts is not None:
                fractions = cautious.fraction_from_count(counts, layout.numels(counts.device))
                labelled = enumerate(zip(layout.labels, fractions.tolist(), strict=True))
                found |= {label: value for i, (label, value) in labelled if i not in layout.idle}
        return found

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, and checks settings and dtypes. No communication is performed."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise
        self._layouts = {}

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. Every rank calls it. Returns the closure's loss, if there is a closure.

        A parameter without a gradient on this rank stays as it is here. Engines give a gradient on
        all ranks that share a parameter or on none (FSDP2 and DDP do).

        Raises:
            LayoutMismatchError: a gradient is sparse or laid out unlike its parameter. On this
                rank nothing was changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layout = self._current_layout()
        work = self._plan(layout)
        counts = torch.zeros(len(layout.shard_map.wholes), dtype=torch.int64, device=layout.device)
        for item in work:
            counts[item.whole_index] += self._count(item)
        layout.shard_map.sum_over_holders(counts)
        scales = cautious.scale_from_count(counts, layout.numels(counts.device))
        for item in work:
            self._apply(item, scales[item.whole_index])
        layout.last_counts = counts
        return loss

    @abstractmethod
    def _count(self, item: Work) -> torch.Tensor:
        """First walk: agreeing elements of this segment, int64 0-d. May advance the moments."""

    @abstractmethod
    def _update(self, item: Work, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Second walk: the update, and a tensor with its exact signs, those that were counted."""

    def _finish(self, item: Work, grad: torch.Tensor) -> None:
        """After the step of this segment: what has to come last."""

    def _apply(self, item: Work, scale: torch.Tensor) -> None:
        options, grad = item.options, item.grad()
        update, signs = self._update(item, grad)
        param = item.param.to(working_dtype(item.param))
        if options.weight_decay and options.cautious_weight_decay:
            cautious.cautious_decay_(param, signs, options.lr, options.weight_decay)
        elif options.weight_decay:
            cautious.decay_(param, options.lr, options.weight_decay)
        step_size = (scale * options.lr).to(param)  # float64 until here: one rounding
        cautious.cautious_step_(param, update, cautious.signs_agree(signs, grad), step_size)
        if param is not item.param:
            item.param.copy_(param)
        self._finish(item, grad)

    def _current_layout(self) -> Layout:
        key = tuple(id(param) for group in self.param_groups for param in group["params"])
        if key not in self._layouts:
            # A layout keeps its parameters alive, so that no id is used again.
            self._layouts[key] = draw_layout(self.param_groups, self._shard_map)
        return self._layouts[key]

    def _plan(self, layout: Layout) -> list[Work]:
        """Every segment that has a gradient. All gradients are checked before anything changes."""
        grads = [layout.local_grad(index) for index in range(len(layout.params))]
        options: dict[torch.Tensor, Options] = {}
        for group in self.param_groups:
            options |= dict.fromkeys(group["params"], Options.of_group(group))
        work: list[Work] = []
        idle: set[int] = set()
        for param, grad, segments in zip(layout.params, grads, layout.segments, strict=True):
            if grad is None:
                idle.update(segment.whole_index for segment in segments)
            else:
                work += self._work_of(param, grad, segments, options[param])
        layout.idle = frozenset(idle)
        return work

    def _work_of(
        self,
        param: torch.Tensor,
        grad: torch.Tensor,
        segments: tuple[Segment, ...],
        options: Options,
    ) -> list[Work]:
        step, moments = self._advance_state(param)
        local = local_of(param)
        return [
            Work(
                whole_index=segment.whole_index,
                options=options,
                param=segment.of(local),
                raw_grad=segment.of(grad),
                moments={name: segment.of(moment) for name, moment in moments.items()},
                step=step,
            )
            for segment in segments
        ]

    def _advance_state(self, param: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
        """Count a step, making the state on first use. Returns its number and the local moments."""
        state = self.state[param]
        if not state:
            # On the host, as in torch.optim.AdamW: reading it must not wait for the device.
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            for name in self._moment_names:
                state[name] = torch.zeros_like(param, dtype=working_dtype(param))
        state["step"] += 1
        return float(state["step"]), {name: local_of(state[name]) for name in self._moment_names}

    def _check_group(self, group: dict[str, Any]) -> None:
        for name in ("lr", "weight_decay", "eps"):
            if name in group and not float(group[name]) >= 0:
                raise ConfigError(f"{name}={group[name]}: must be at least 0")
        betas = tuple(group["betas"])
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"{betas=}: must be two numbers in [0, 1)")
        for index, param in enumerate(group["params"]):
            if param.dtype not in _DTYPES:
                name = (
                    group["param_names"][index] if "param_names" in group else f"parameter {index}"
                )
                raise ConfigError(
                    f"{name}: dtype {param.dtype} must be one of {', '.join(map(str, _DTYPES))}; "
                    "view a complex parameter as real, leave an integer one out"
                )

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in torch, but the moments of 16-bit parameters stay in float32.

        A state of torch.optim.AdamW may be loaded too: settings that it lacks keep their defaults. No
        communication is performed.
        """
        super().load_state_dict(state_dict)
        # torch rounds each moment to its parameter's dtype; take the unrounded ones again.
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for saved_id, param in zip(saved_ids, params, strict=True):
            if param.dtype in _HALF_DTYPES and param in self.state:
                saved = state_dict["state"][saved_id]
                for name in self._moment_names:
                    moment = saved[name].to(device=param.device, dtype=torch.float32)
                    self.state[param][name] = moment

    def __getstate__(self) -> dict[str, Any]:
        own = {
            "implementation": self.implementation,
            "has_shard_map": self._shard_map is not None,
        }
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle, deepcopy and, with the state and the groups alone, load_state_dict."""
        own = dict(state)
        has_shard_map = own.pop("has_shard_map", None)
        super().__setstate__(own)
        if has_shard_map is not None:
            self._shard_map = _lost_shard_map if has_shard_map else None
            self._layouts = {}
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def _lost_shard_map(params: object) -> ShardMap:
    """Stands in for a shard map after a copy.

    Stepping without one would silently scale by the mean of a local piece.
    """
    raise LayoutMismatchError(
        "this optimiser is a copy of one that was given a shard map, which refers to process "
        "groups and is not copied; set opt.shard_map before the first step"
    )
