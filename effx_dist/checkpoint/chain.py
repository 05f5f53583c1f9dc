"""What the next save is a difference against: the reconstruction of the last committed one, held in
host memory.

Closed loop: the reference is what a reader of the last checkpoint gets, not what the trainer had,
so errors do not add up along a chain. A save becomes the reference only once it is committed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from effx_dist.checkpoint.manifest import Figures, ParentRecord
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
    """

    id: str | None = None
    parent: ParentRecord | None = None
    references: dict[Key, torch.Tensor] = field(default_factory=dict)
    figures: Figures | None = None
    _pending: tuple[str, dict[Key, torch.Tensor]] | None = None

    @property
    def pending_id(self) -> str | None:
        """Names the save that was written here and whose commit this rank has not been told of."""
        return self._pending[0] if self._pending else None

    def reference(self, name: str, box: Box, dtype: torch.dtype) -> torch.Tensor | None:
        """The reference of one local box, or None where there is none of that size and dtype."""
        key = (name, box.offsets)
        pending = {} if self._pending is None else self._pending[1]
        found = pending.get(key, self.references.get(key))
        if found is None or tuple(found.shape) != box.sizes or found.dtype != dtype:
            return None
        return found

    def begin(self, identity: str, reconstruction: dict[Key, torch.Tensor]) -> None:
        """A save has been written here; ``reconstruction`` is what it decodes to."""
        self._pending = (identity, reconstruction)

    def settle(self, identity: str | None) -> None:
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
