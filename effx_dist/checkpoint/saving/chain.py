"""What the next save is a difference against: the reconstruction of the last committed one, held in
host memory.

Closed loop: the reference is what a reader of the last checkpoint gets, not what the trainer had,
so errors do not add up along a chain. A save becomes the reference only once it is committed.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

import torch

from effx_dist.checkpoint.format.manifest import Figures, ParentRecord
from effx_dist.shard import Box

Key = tuple[str, tuple[int, ...]]


@dataclass
class Chain:
    """One rank's end of a chain of checkpoints.

    Attributes:
        id: names the checkpoint that the references reconstruct; equal on all ranks that may go on
            with it. None where there is none: the next save is a base.
        parent: that checkpoint's folder and manifest checksum. Known to the coordinator only.
        references: reconstruction of each chained tensor's local boxes, by name and offsets, in
            host memory.
        figures: sizes of the run so far, up to that checkpoint. Used by the coordinator only.

    A chain that is handed to another process time and again (AsyncCheckpointerType.PROCESS pickles
    the writer for each save) goes on where the save before left off.
    """

    id: str | None = None
    parent: ParentRecord | None = None
    references: dict[Key, torch.Tensor] = field(default_factory=dict)
    figures: Figures | None = None
    _pending: tuple[str, dict[Key, torch.Tensor]] | None = None
    _name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __reduce__(self) -> tuple[Any, ...]:
        return _go_on, ((self._name, self.id), self.__dict__)

    @property
    def pending_id(self) -> str | None:
        """Names the save that was written here and whose commit this rank has not been told of."""
        return self._pending[0] if self._pending else None

    def reference(self, name: str, box: Box, dtype: torch.dtype) -> torch.Tensor | None:
        """The reference of one local box, or None if there is no reference of that size and dtype."""
        return _fitting(self.references, name, box, dtype)

    def has_reference(self, name: str, box: Box, dtype: torch.dtype) -> bool:
        """Whether :meth:`reference` will find one, whichever way a pending save turns out to have
        ended."""
        states = [] if self.id is None else [self.references]
        states += [] if self._pending is None else [self._pending[1]]
        found = [_fitting(state, name, box, dtype) for state in states]
        return bool(found) and all(tensor is not None for tensor in found)

    def begin(self, identity: str, reconstruction: dict[Key, torch.Tensor]) -> None:
        """A save has been written here; ``reconstruction`` is what it decodes to."""
        self._pending = (identity, reconstruction)

    def conclude(self, identity: str | None) -> None:
        """Go on from the checkpoint called ``identity``: the pending save if it is that one, else
        the one before."""
        if self._pending is not None and self._pending[0] == identity:
            self.id = identity
            self._take(self._pending[1])
        self._pending = None

    def _take(self, reconstruction: dict[Key, torch.Tensor]) -> None:
        for key in self.references.keys() - reconstruction.keys():
            del self.references[key]
        for key, tensor in reconstruction.items():
            kept = self.references.get(key)
            if kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype:
                kept.copy_(tensor)
            else:
                self.references[key] = tensor.clone()

    def restart(
        self,
        identity: str,
        parent: ParentRecord,
        figures: Figures,
        references: dict[Key, torch.Tensor],
    ) -> None:
        """Go on from a checkpoint that has just been loaded."""
        self.id, self.parent, self.figures = identity, parent, figures
        self.references, self._pending = references, None


_handed_over: dict[tuple[str, str | None], Chain] = {}
"""The chain that last came from another process, by its name and where it stood there."""


def _go_on(origin: tuple[str, str | None], state: dict[str, Any]) -> Chain:
    if origin not in _handed_over:
        chain = Chain()
        chain.__dict__.update(state)
        _handed_over.clear()  # each holds the weights
        _handed_over[origin] = chain
    return _handed_over[origin]


def _fitting(
    references: dict[Key, torch.Tensor], name: str, box: Box, dtype: torch.dtype
) -> torch.Tensor | None:
    found = references.get((name, box.offsets))
    if found is None or tuple(found.shape) != box.sizes or found.dtype != dtype:
        return None
    return found
