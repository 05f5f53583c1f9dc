"""What ``dcp.async_save`` of older torch needs of a writer: a copy of what is saved.

Until torch had a ``DefaultStager``, ``async_save`` handed host tensors to the background as they are, so
that later steps of training were what was saved; unless the writer stages by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint import staging
from torch.utils import _pytree as pytree

from effx_dist.checkpoint.state.fragment import Fragment


class CopyingStager:
    """torch's ``AsyncStager`` protocol, by a blocking copy to new host memory. No communication is
    performed."""

    _synchronize_after_execute = False

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether the copy still has to be waited for: it never has."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """The same nested state with copies of its tensors, DTensors and fragments."""
        copied: dict[str, Any] = pytree.tree_map(_copied, state_dict)
        return copied

    def synchronize_staging(self) -> None:
        """The copy is complete when :meth:`stage` returns."""

    def close(self) -> None:
        """Does nothing: no resources are held."""


def _copied(value: Any) -> Any:
    if isinstance(value, Fragment):
        pieces = [(box, values.detach().to("cpu", copy=True)) for box, values in value.pieces]
        return Fragment(value.shape, value.dtype, pieces, value.is_replica)
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone() if value.device.type == "cpu" else value.detach().cpu()


COPIES_BY_ITSELF = hasattr(staging, "DefaultStager")
"""Whether this torch's ``async_save`` copies the state by itself where the writer does not."""

if TYPE_CHECKING or COPIES_BY_ITSELF:

    class SafeStaging:
        """Adds nothing: this torch stages safely by itself."""

else:
    SafeStaging = CopyingStager
