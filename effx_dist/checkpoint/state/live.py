"""A model and its optimizer as a checkpoint sees them: what an engine with tensors of its own layout
implements to be saved and loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from effx_dist.checkpoint.state.joints import TensorFacts

StateByName = dict[str, dict[str, Any]]
"""An optimizer's state, tensors and other values, by parameter name and key."""


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer as it stands.

    Attributes:
        by_name: its state; empty where it is fresh.
        group_parameters: names of each group's parameters, in its own order.
        group_options: lr, betas and the like of each group, as a scheduler may have left them.
    """

    by_name: StateByName = field(default_factory=dict)
    group_parameters: list[list[str]] = field(default_factory=list)
    group_options: list[dict[str, Any]] = field(default_factory=list)


class LiveState(ABC):
    """A model, with its optimizer where that is saved or loaded too.

    Tensors are given as leaves (:data:`effx_dist.checkpoint.state.tree.Leaf`) that share the live memory:
    a save copies from them, a load fills them in place. Every rank gives the same names, also those of
    tensors that it holds nothing of. No method communicates unless it says so.
    """

    has_optimizer: bool
    has_random_state: bool = True
    """Whether the random states of this process belong to it; not where it stands for another run's state."""

    def fit(self, saved: Mapping[str, TensorFacts]) -> None:  # noqa: B027  most shapes are given
        """Called before a load with what the checkpoint holds of the model, by name. Where shapes depend on
        the layout, or dtypes on how the model is used, what is given from then on may fit it."""

    @property
    def refitted(self) -> frozenset[str]:
        """Names in the model's state whose shapes :meth:`fit` has changed. A later save, in their own
        shapes, cannot be a difference to what was loaded into them."""
        return frozenset()

    @property
    def is_replicated(self) -> bool:
        """Whether every rank holds all of the state, whole and alike, so that each may save a share."""
        return False

    @abstractmethod
    def model_state(self) -> dict[str, Any]:
        """Parameters and buffers by name, and what else the model's state holds. A tied parameter's
        other names may be in it or not."""

    @abstractmethod
    def tied_names(self) -> dict[str, str]:
        """``{other name: first name}`` of parameters that the model holds under several names."""

    @abstractmethod
    def take_model_values(self, values: Mapping[str, Any]) -> None:
        """Hand over the values of the model's state that are not tensors."""

    @abstractmethod
    def optimizer_state(self) -> OptimizerState:
        """The optimizer as it stands."""

    @abstractmethod
    def made_optimizer_state(self) -> tuple[StateByName, bool]:
        """The optimizer's state to be filled, and whether it had to be made first, which is collective
        where the optimizer's step is."""

    @abstractmethod
    def take_optimizer_state(self, state: StateByName) -> None:
        """Hand over the state of :meth:`made_optimizer_state` once it is filled. Parameters that are
        not in it lose theirs."""

    @property
    @abstractmethod
    def num_groups(self) -> int:
        """Number of the optimizer's parameter groups."""

    def fit_groups(
        self, options: list[dict[str, Any]], parameters: list[list[str]] | None
    ) -> list[dict[str, Any]]:
        """The saved options of each of the optimizer's own groups, given those of the saved groups and
        the names of their parameters (None where a checkpoint does not say). By number, unless the
        number of groups depends on the layout."""
        return options

    @abstractmethod
    def take_group_options(self, options: list[dict[str, Any]]) -> None:
        """Hand over the groups' options. Raises LayoutMismatchError for another number of groups."""

    def random_states(self) -> dict[str, torch.Tensor]:
        """States of random generators of this rank that torch, NumPy and Python do not know of. Names
        have no dots."""
        return {}

    def take_random_states(self, states: Mapping[str, torch.Tensor]) -> None:  # noqa: B027
        """The way back; may hold states of others, and lack some."""

    def finish(self) -> None:  # noqa: B027  most hold nothing beside the tensors themselves
        """Called on every rank once all of a checkpoint has been taken. May communicate."""
