"""What the cautious optimizers share: count, one all-reduce of the counts, step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, overload

import torch
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from effx_dist.core import cautious
from effx_dist.core.update_rules import UpdateRule
from effx_dist.errors import ConfigError
from effx_dist.optim.clip import check_max_norm, clipping_factor, total_norm
from effx_dist.optim.drawn_layouts import DrawnLayouts
from effx_dist.optim.kernels import IMPLEMENTATIONS, Implementation
from effx_dist.optim.param_layout import ParamLayout, ShardMapSource, check_dtypes
from effx_dist.optim.step_plan import StepPlan, mend_loaded_state, params_by_group, plan_step
from effx_dist.optim.whole_counts import count_wholes


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


def refuse_options(**options: Any) -> None:
    """Options of torch.optim that change nothing here are taken; ConfigError names one that would.

    ``foreach`` and ``fused`` choose among torch's kernels for the same step, and have no meaning here.
    """
    for name in ("foreach", "fused"):
        value = options.pop(name, None)
        if value not in (None, True, False):
            raise ConfigError(f"{name}={value!r}: must be True, False or None; it is not used here")
    for name, value in options.items():
        if value != NEEDED_OPTIONS[name]:
            raise ConfigError(
                f"{name}={value!r}: must be {NEEDED_OPTIONS[name]}; there is no cautious form of the other, and "
                "going on without it would be another optimizer"
            )


NEEDED_OPTIONS = {
    "amsgrad": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
    "dampening": 0,
}
"""Options of torch's optimizers of the same names, and the one value of each that is done here."""


FLAGS = ("cautious_weight_decay", "maximize", "capturable")
"""Settings of every group of every cautious optimizer, beside those of its update rule."""


class CautiousOptimizer(MaskedOptimizer):
    """Base of the cautious optimizers: a subclass gives the update rule, this class the step.

    ``step()`` walks twice over the parameters: it counts the elements that agree in sign, sums the
    counts over the ranks, and steps. It performs one all-reduce of one int64 vector, 8 bytes per
    whole parameter, per set of groups that parameters are spread over: exactly one under plain FSDP2
    or ZeRO, none where every parameter is whole on its rank. Several are under way together, each
    while the next set is counted. All parameters take part, also those without a gradient, so that
    every rank sends the same vector. If a collective fails nothing has been changed.

    torch.amp.GradScaler may leave unscaling to ``step()``: an overflow that one rank found makes all
    that share a parameter with it skip the step, and every rank must use the scaler then. Gradients
    are left as they are, scaled and unclipped.
    """

    _update_rule: UpdateRule
    _step_supports_amp_scaling = True  # see torch.amp.GradScaler.step

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        flags: tuple[bool, bool, bool],
        implementation: Implementation,
        shard_map: ShardMapSource | None,
    ) -> None:
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                f"{implementation=}: must be one of {', '.join(map(repr, IMPLEMENTATIONS))}"
            )
        self.implementation: Implementation = implementation
        self._layouts = DrawnLayouts(shard_map)
        self._clipping: tuple[torch.Tensor, float] | None = None
        super().__init__(params, defaults | dict(zip(FLAGS, flags, strict=True)))

    def _rule(self, group: Mapping[str, Any]) -> UpdateRule:
        """The update rule of a parameter group: that of the class, unless a subclass chooses by group."""
        return self._update_rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, and checks settings and dtypes. No communication is performed."""
        super().add_param_group(param_group)
        self._admit_last_group()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; a clipping that no step has used goes with the gradients it was for."""
        self._clipping = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Clip the gradients to a total 2-norm of ``max_norm`` within the next ``step()``.

        In place of torch.nn.utils.clip_grad_norm_, and cheaper: both walks of the step multiply as
        they read, so that clipping writes nothing, and masking moves no more bytes than clipping by
        hand would. The gradients themselves stay unclipped. The norm is over all whole parameters of
        this optimizer; a sum of floating-point numbers, it is the same on all ranks but depends on
        their number in its last bits. Where a GradScaler leaves unscaling to the step, it is the
        unscaled gradients that are clipped to ``max_norm``.

        Returns the norm of the gradients as they are: float64, 0-d, on the parameters' device, which
        is not waited for. One all-reduce of 8 bytes per set of groups. Every rank calls it.

        Raises:
            ConfigError: ``max_norm`` is not above 0.
            LayoutMismatchError: as in ``step()``.
        """
        check_max_norm(max_norm)
        layout = self._layouts.current(self.param_groups)
        norm = total_norm(layout, params_by_group(layout, self.param_groups)[0])
        self._clipping = (norm, max_norm)
        return norm

    def _masked_step(self) -> None:
        layout = self._layouts.current(self.param_groups)
        factor = self._take_grad_factor()
        found_inf: torch.Tensor | None = getattr(self, "found_inf", None)
        plan = plan_step(
            layout,
            self.param_groups,
            self.state,
            self._rule,
            self.implementation,
            factor,
            may_skip=found_inf is not None,
        )
        counts, skip = _count(layout, plan, found_inf)
        if any(plan.kernels):
            scales = cautious.scale_from_count(counts, layout.numels(counts.device))
            for device, kernels in chain.from_iterable(plan.kernels):
                kernels.update(scales.to(device), skip)
        for device, kernels in plan.whole_kernels:
            with _slots_on(device, counts) as here:
                kernels.step_wholes(here, layout.numels(device))
        plan.advance_steps(skip)
        layout.last_counts, layout.idle = counts, plan.idle

    def _take_grad_factor(self) -> torch.Tensor | None:
        """What a scaler and the clipping want gradients multiplied by, once; None for 1."""
        clipping, self._clipping = self._clipping, None
        grad_scale: torch.Tensor | None = getattr(self, "grad_scale", None)
        unscaling = None if grad_scale is None else grad_scale.double().reciprocal()
        if clipping is None:
            return unscaling
        norm, max_norm = clipping
        if unscaling is None:
            return clipping_factor(norm, max_norm)
        return unscaling * clipping_factor(norm.to(unscaling) * unscaling, max_norm)

    def _check_group(self, group: dict[str, Any]) -> None:
        options = {name: group[name] for name in NEEDED_OPTIONS if name in group}
        if not group["weight_decay"]:  # then it is neither
            options.pop("decoupled_weight_decay", None)
        refuse_options(**options)
        for name in ("lr", "weight_decay", "eps"):
            if name in group and not float(group[name]) >= 0:
                raise ConfigError(f"{name}={group[name]}: must be at least 0")
        betas = tuple(group.get("betas", ()))
        if "betas" in group and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(f"{betas=}: must be two numbers in [0, 1)")
        check_dtypes(group)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As in torch, but the moments of 16-bit parameters stay in float32.

        A state of the torch.optim optimizer of the same name may be loaded too: settings that it
        lacks keep their defaults. No communication is performed.

        Raises:
            ConfigError: the state is of a variant (amsgrad, dampening) that is not to be had here.
        """
        for group in state_dict["param_groups"]:
            self._check_loaded_group(group)
        super().load_state_dict(state_dict)
        saved_ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        ours = ((param, group) for group in self.param_groups for param in group["params"])
        for saved_id, (param, group) in zip(saved_ids, ours, strict=True):
            if param in self.state:
                saved = state_dict["state"][saved_id]
                rule = self._rule(group)
                mend_loaded_state(self.state[param], saved, rule, param, group["capturable"])

    def _check_loaded_group(self, group: Mapping[str, Any]) -> None:
        for name in ("amsgrad", "dampening"):
            if group.get(name):
                raise ConfigError(
                    f"{name}={group[name]} in the state to load: {type(self).__name__} has no {name}; "
                    "going on without it would be another optimizer"
                )

    def __getstate__(self) -> dict[str, Any]:
        own = {"implementation": self.implementation, "_layouts": self._layouts}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle, deepcopy and, with the state and the groups alone, load_state_dict."""
        super().__setstate__({"_clipping": None, **state})
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
            if "_layouts" in state:  # a copy, with parameters of its own
                self._layouts.note_given(group["params"])


def _count(
    layout: ParamLayout, plan: StepPlan, found_inf: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The first walks and their all-reduces: the whole counts by slot, and whether to skip."""

    def count_into(index: int, counts: torch.Tensor) -> None:
        bucket = layout.buckets[index]
        for device, kernels in plan.kernels[index]:
            # slots of other buckets may be under way to other ranks
            with _slots_on(device, counts, slice(bucket.start, bucket.stop)) as here:
                kernels.count_into(here)
        if found_inf is not None:
            counts[layout.buckets[index].stop] = found_inf != 0

    counts = count_wholes(layout, count_into, plan.idle, with_flags=found_inf is not None)
    if found_inf is None or not layout.buckets:
        return counts, found_inf
    return counts, torch.stack([counts[bucket.stop] for bucket in layout.buckets]).any()


@contextmanager
def _slots_on(
    device: torch.device, counts: torch.Tensor, own: slice = slice(None)
) -> Iterator[torch.Tensor]:
    """``counts`` itself, or on another device zeros whose ``own`` slots are added to it afterwards."""
    here = counts if device == counts.device else torch.zeros_like(counts, device=device)
    yield here
    if here is not counts:
        counts[own] += here[own].to(counts.device)
