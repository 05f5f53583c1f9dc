"""What a cautious optimizer keeps of the layouts that it has drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch.distributed.tensor import DTensor

from effx_dist.errors import LayoutMismatchError
from effx_dist.optim.param_layout import ParamLayout, ShardMapSource, draw_layout
from effx_dist.shard import ShardMap


class DrawnLayouts:
    """The layouts of one optimizer, one for each list of parameters that it was stepped with.

    A copy, by pickle or deepcopy, starts without any. It refuses to draw one if the original had a
    shard map: that refers to process groups, and is not copied.
    """

    def __init__(self, source: ShardMapSource | None) -> None:
        self._source = source
        self._drawn: dict[tuple[int, ...], ParamLayout] = {}
        self._given: dict[int, ReferenceType[torch.Tensor]] | None = None

    def note_given(self, params: Iterable[torch.Tensor]) -> None:
        """Parameters that the caller gave to the optimizer. Once there are some, a plain tensor that is
        none of them is refused: an engine has put it in their place.
        """
        self._given = self._given or {}
        self._given |= {id(param): ref(param) for param in params}

    @property
    def source(self) -> ShardMapSource | None:
        """Where this rank's pieces lie; None if drawn from the parameters. Setting it forgets."""
        return self._source

    @source.setter
    def source(self, source: ShardMapSource | None) -> None:
        self._source = source
        self.forget()

    def forget(self) -> None:
        """Called where parameters were added."""
        self._drawn = {}

    def current(self, groups: Sequence[dict[str, Any]]) -> ParamLayout:
        """The layout of the parameters in ``groups``, as draw_layout draws it, kept. No
        communication is performed.
        """
        key = tuple(id(param) for group in groups for param in group["params"])
        if key not in self._drawn:
            if self._source is None and self._given is not None:
                _refuse_strangers(groups, self._given)
            # A layout keeps its parameters alive, so that no id is used again.
            self._drawn[key] = draw_layout(groups, self._source)
        return self._drawn[key]

    def alignment(self) -> dict[str | int, float]:
        """The alignment of all layouts together; see :meth:`ParamLayout.alignment`."""
        found: dict[str | int, float] = {}
        for layout in self._drawn.values():
            found |= layout.alignment()
        return found

    def __getstate__(self) -> dict[str, bool]:
        return {"has_source": self._source is not None}

    def __setstate__(self, state: Mapping[str, bool]) -> None:
        self.__init__(_lost_shard_map if state["has_source"] else None)  # type: ignore[misc]


Layouts = DrawnLayouts
"""The name in the pickles of earlier releases."""


def _refuse_strangers(
    groups: Iterable[Mapping[str, Any]], given: Mapping[int, ReferenceType[torch.Tensor]]
) -> None:
    """ZeRO and others put flat partitions in the parameters' place, which look like whole tensors."""
    for number, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            known = given.get(id(param))
            if not isinstance(param, DTensor) and (known is None or known() is not param):
                raise LayoutMismatchError(
                    f"parameter {index} of group {number}, of shape {tuple(param.shape)}, is none that "
                    "this optimizer was given: an engine has put it in their place, and which elements of "
                    "which parameters it holds cannot be told; under DeepSpeed use "
                    "effx_dist.deepspeed.initialize, elsewhere set opt.shard_map (for whole tensors to a "
                    "function that returns ShardMap.of_tensors of them)"
                )


def _lost_shard_map(params: object) -> ShardMap:
    """Stands in for a shard map after a copy.

    Stepping without one would silently scale by the mean of a local piece.
    """
    raise LayoutMismatchError(
        "this optimizer is a copy of one that was given a shard map, which refers to process "
        "groups and is not copied; set opt.shard_map before the first step"
    )
