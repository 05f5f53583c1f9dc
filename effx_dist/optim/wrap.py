"""Any other optimizer made cautious, from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, StateDict

from effx_dist.core.cautious import (
    cautious_decay_,
    cautious_step_,
    count_agreement,
    decay_,
    scale_from_count,
    signs_agree,
)
from effx_dist.core.update_rules import Scalar
from effx_dist.errors import ConfigError
from effx_dist.forwarded import Forwarded
from effx_dist.optim.base import CautiousOptimizer, MaskedOptimizer
from effx_dist.optim.drawn_layouts import DrawnLayouts
from effx_dist.optim.inner_step import InnerStep, Moved
from effx_dist.optim.kernels import working_dtype
from effx_dist.optim.param_layout import FlatPiece, ParamLayout, ShardMapSource, check_dtypes
from effx_dist.optim.step_plan import GradParam, ParamGroup, params_by_group
from effx_dist.optim.whole_counts import count_wholes
from effx_dist.shard import local_of


@dataclass(frozen=True, slots=True)
class Move:
    """One parameter before the inner step, and its gradient."""

    param: GradParam
    local: torch.Tensor
    """The parameter itself on this rank, moved by the inner step."""
    before: torch.Tensor
    decay: Scalar | None
    """Factor of decoupled weight decay."""
    ascends: bool
    decays_cautiously: bool = False

    def update(self, piece: FlatPiece) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What happened to one piece, in the dtype of the arithmetic: the parameter from which the inner step
        began, in a tensor that may be ``before``; what the inner step subtracted from it; and the gradient to
        descend.
        """
        old, new, grad = (piece.of(whole) for whole in (self.before, self.local, self.param.grad))
        if self.decay is not None and not self.decays_cautiously:
            old = old * self.decay  # the operation that decayed the parameter: the same bits
        dtype = working_dtype(new)
        old, grad = old.to(dtype), grad.to(dtype)
        return old, old - new.to(dtype), -grad if self.ascends else grad


def by_bucket(layout: ParamLayout, moves: Sequence[Move]) -> list[list[tuple[Move, FlatPiece]]]:
    """The pieces that have elements."""
    found: list[list[tuple[Move, FlatPiece]]] = [[] for _ in layout.buckets]
    for move in moves:
        for piece in layout.flat_pieces[move.param.place]:
            if piece.of(move.local).numel():
                found[layout.bucket_of[piece.whole_index]].append((move, piece))
    return found


def count(
    layout: ParamLayout, items: Sequence[tuple[Move, FlatPiece]], counts: torch.Tensor
) -> None:
    """Add the elements that agree in sign to the slots of their wholes in ``counts``."""
    for move, piece in items:
        _, update, grad = move.update(piece)
        slot = layout.slots[piece.whole_index]
        counts[slot] += count_agreement(update, grad).to(counts.device)


def mask(move: Move, piece: FlatPiece, scale: torch.Tensor) -> None:
    """Take back what does not agree, scale the rest, and decay where that waits for the update."""
    old, update, grad = move.update(piece)
    if move.decays_cautiously:
        assert move.decay is not None
        cautious_decay_(old, update, move.decay)
    cautious_step_(old, update, signs_agree(update, grad), scale.to(old))
    piece.of(move.local).copy_(old)


_ALWAYS_DECOUPLED = tuple(
    getattr(torch.optim, name) for name in ("Adafactor", "Muon") if hasattr(torch.optim, name)
)
"""Optimizers of torch that decouple the decay without a flag in the group that says so."""


def cautious(
    optimizer: Optimizer,
    *,
    decoupled_weight_decay: bool | None = None,
    cautious_weight_decay: bool = False,
    shard_map: ShardMapSource | None = None,
) -> CautiousWrapper:
    """Make any torch optimizer cautious (arXiv 2411.16085), at the price of a copy of the parameters.

    CautiousAdamW, CautiousLion and CautiousSGD do without the copy and are faster; this is for all
    other update rules::

        optimizer = effx_dist.cautious(torch.optim.NAdam(model.parameters(), lr=1e-3))

    Use the result in place of ``optimizer``; see :class:`CautiousWrapper`.

    Args:
        optimizer: steps by the gradients in ``.grad``. Wrap it before giving it to a learning rate
            scheduler or a GradScaler.
        decoupled_weight_decay: whether ``weight_decay`` is decoupled, and so must not be masked,
            rather than a part of the gradient. None: as the parameter group's
            ``decoupled_weight_decay`` says (torch's Adam, AdamW, NAdam and RAdam have it); as is
            known of torch's Adafactor and Muon, which decouple it; not decoupled otherwise. Say True
            for an optimizer from elsewhere that decouples it, as Lion does.
        cautious_weight_decay: decay only where the update and the parameter do not differ in sign
            (arXiv 2510.12402), as in CautiousAdamW. For decoupled decay alone. The inner optimizer steps
            from the parameter before its decay.
        shard_map: as in CautiousAdamW: where this rank's pieces lie, for engines that hand over flat
            local tensors.

    Raises:
        ConfigError: ``optimizer`` is no torch optimizer, is cautious already, is LBFGS, has a parameter
            that is not of a floating dtype, or decays in its gradient where ``cautious_weight_decay``
            is asked for.
    """
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__}: must be a torch.optim.Optimizer; "
            "wrap the optimizer itself, not what an engine has made of it"
        )
    if isinstance(optimizer, CautiousOptimizer | CautiousWrapper):
        raise ConfigError(
            f"optimizer={type(optimizer).__name__}: is cautious already; use it as it is"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "optimizer=LBFGS: its step evaluates several gradients, so that there is no one "
            "gradient to agree with; must be an optimizer that takes one gradient a step"
        )
    return CautiousWrapper(optimizer, decoupled_weight_decay, shard_map, cautious_weight_decay)


class CautiousWrapper(MaskedOptimizer):
    """An optimizer whose steps are masked from outside; made by :func:`cautious`.

    ``step()`` lets the inner optimizer step, takes the difference as its update u (learning rate
    included), and keeps of it what agrees with the gradient g, over the n elements of a whole
    parameter::

        p     = p * (1 - lr * weight_decay)          if that is decoupled
        u     = p - (p after the inner step)
        mask  = 1[u * g > 0]
        scale = 1 / max(sum(mask) / n, 1e-3)
        p     = p - scale * mask * u

    The inner optimizer's state advances as if it were alone. Decay that is not decoupled is part of
    u, and masked with it. ``step()`` performs one all-reduce of 8 bytes per whole parameter per set
    of groups, as CautiousOptimizer does, so that the mask's mean is that of whole parameters however
    they are cut. Where the inner optimizer works element by element, n ranks do what one process
    does as far as the inner optimizer itself does. torch's fused kernels on the CPU do not to the
    last bit: they round the last elements of a local tensor unlike the others.

    Memory: one copy of this rank's parameters during the step, nothing between steps.

    Rounding: u is a difference of rounded parameters, so that an element that moves by less than half
    an ulp has not moved and does not agree. The arithmetic here is in float32 for 16-bit parameters,
    whose ulps are large: bfloat16 parameters hardly move at usual learning rates, masked or not. Keep
    float32 parameters beside them.

    Optimizers that look at a whole matrix (torch.optim.Muon, Adafactor) may be wrapped where they see
    it: on one device, under DDP, or as DTensors as far as they support them; flat pieces mean nothing
    to them. The mask then follows Muon's orthogonalisation. Masking inside, before it, is pointless:
    Newton-Schulz mixes the elements and undoes the mask.

    ``param_groups``, ``state``, ``defaults`` and ``state_dict()`` are those of the inner optimizer: a
    checkpoint can be loaded into the bare one and back. While it steps, a decoupled ``weight_decay``
    reads 0 in its groups.

    A GradScaler unscales the gradients before the step and skips it on overflow; ranks that share
    parameters must agree on that, as they do with DTensors and with FSDP1's ShardedGradScaler.

    Attributes:
        optimizer: the inner optimizer.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decoupled_weight_decay: bool | None,
        shard_map: ShardMapSource | None,
        cautious_weight_decay: bool = False,
    ) -> None:
        # Not Optimizer.__init__, which would make groups and a state of its own.
        self.__setstate__(
            {
                "optimizer": optimizer,
                "decoupled_weight_decay": decoupled_weight_decay,
                "cautious_weight_decay": cautious_weight_decay,
                "_layouts": DrawnLayouts(shard_map),
            }
        )
        for group in optimizer.param_groups:
            self._check_group(group)

    optimizer: Optimizer
    decoupled_weight_decay: bool | None
    cautious_weight_decay: bool
    _inner: InnerStep

    # Looked up at each use, since load_state_dict replaces them.
    param_groups = Forwarded[list[dict[str, Any]]]("optimizer.param_groups")
    state = Forwarded[Any]("optimizer.state")
    defaults = Forwarded[dict[str, Any]]("optimizer.defaults")

    def _masked_step(self) -> None:
        """Padding of a shard map stays as the inner optimizer leaves it.

        If the inner step or a collective fails, the parameters are put back to what they were; the
        inner optimizer's state may have advanced.

        Raises ConfigError where the inner optimizer changes the gradients, which are read after its
        step; steps from weights of its own, which do not know of the mask; or fails on DTensors.
        """
        for group in self.param_groups:
            self._check_decay(group)
        layout = self._layouts.current(self.param_groups)
        by_group, idle = params_by_group(layout, self.param_groups)
        moves = [move for group, params in by_group for move in self._moves(group, params)]
        try:
            self._inner_step(moves)
            items = by_bucket(layout, moves)
            counts = count_wholes(
                layout, lambda index, counts: count(layout, items[index], counts), idle
            )
        except BaseException:
            for move in moves:
                move.local.copy_(move.before)
            raise
        scales = scale_from_count(counts, layout.numels(counts.device))
        for move, piece in (item for bucket in items for item in bucket):
            mask(move, piece, scales[layout.slots[piece.whole_index]])
        layout.last_counts, layout.idle = counts, idle

    def _moves(self, group: ParamGroup, params: Sequence[GradParam]) -> list[Move]:
        decay, ascends = self._decay_factor(group), bool(group.get("maximize", False))
        locals_ = [local_of(param.param) for param in params]
        cautiously = self.cautious_weight_decay and decay is not None
        return [
            Move(param, local, local.clone(), decay, ascends, cautiously)
            for param, local in zip(params, locals_, strict=True)
        ]

    def _inner_step(self, moves: Sequence[Move]) -> None:
        """Decay, and let the inner optimizer step from there."""
        for move in moves:
            if move.decay is not None and not move.decays_cautiously:
                decay_(move.local, move.decay)
        with _without_decay([g for g in self.param_groups if self._is_decoupled(g)]):
            self._inner.take([Moved(m.param.param, m.local, m.before) for m in moves])

    def _is_decoupled(self, group: Mapping[str, Any]) -> bool:
        if not group.get("weight_decay"):
            return False
        if self.decoupled_weight_decay is not None:
            return self.decoupled_weight_decay
        if isinstance(self.optimizer, _ALWAYS_DECOUPLED):
            return True
        return bool(group.get("decoupled_weight_decay", False))

    def _decay_factor(self, group: ParamGroup) -> Scalar | None:
        if not self._is_decoupled(group):
            return None
        lr = group["lr"]
        if isinstance(lr, torch.Tensor):
            lr = lr.reshape(())  # torch takes any 1-element tensor
        factor: Scalar = 1 - lr * group["weight_decay"]
        return factor

    def _check_group(self, group: ParamGroup) -> None:
        check_dtypes(group)
        self._check_decay(group)

    def _check_decay(self, group: ParamGroup) -> None:
        if (
            self.cautious_weight_decay
            and group.get("weight_decay")
            and not self._is_decoupled(group)
        ):
            raise ConfigError(
                f"cautious_weight_decay=True: {type(self.optimizer).__name__} adds weight_decay="
                f"{group['weight_decay']} to the gradient, where it is a part of the update; set it to 0, or "
                "say decoupled_weight_decay=True if this optimizer decouples it"
            )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch, by the inner optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, and checks dtypes. No communication is performed."""
        self.optimizer.add_param_group(param_group)
        self._admit_last_group()

    def state_dict(self) -> StateDict:
        """The inner optimizer's, hooks of both called. No communication is performed."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.optimizer.state_dict()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of the inner optimizer, bare or wrapped, hooks of both called. No
        communication is performed.
        """
        state_dict = state_dict.copy()  # as in torch: a hook may change it
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self.optimizer.load_state_dict(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        names = ("optimizer", "decoupled_weight_decay", "cautious_weight_decay", "_layouts")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by pickle and deepcopy, and by the constructor."""
        super().__setstate__({"cautious_weight_decay": False, **state})
        self._inner = InnerStep(self.optimizer)
        for group in self.param_groups:
            self._layouts.note_given(group["params"])

    def __repr__(self) -> str:
        return f"cautious({self.optimizer!r})"


@contextmanager
def _without_decay(groups: Sequence[ParamGroup]) -> Iterator[None]:
    """``weight_decay`` is 0 in ``groups``, and as before afterwards."""
    decays = [group["weight_decay"] for group in groups]
    try:
        for group in groups:
            group["weight_decay"] = 0.0
        yield
    finally:
        for group, decay in zip(groups, decays, strict=True):
            group["weight_decay"] = decay
