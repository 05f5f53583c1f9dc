"""What a rank holds of a whole tensor, as torch.distributed.checkpoint sees it.

A fragment implements the checkpointable protocol of torch.distributed.checkpoint, so its planners
reshard between any two layouts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint import ChunkStorageMetadata, WriteItem
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItemType
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from effx_dist.checkpoint.format.manifest import DTYPES
from effx_dist.checkpoint.state.joints import TensorFacts
from effx_dist.shard import Box, LocalRows, local_of, pieces_of_tensor, whole_box


class Fragment:
    """This rank's pieces of one whole tensor.

    Args:
        shape: shape of the whole tensor.
        dtype: its data type.
        pieces: the boxes this rank holds, each with a tensor of the box's shape. May be empty.
        is_replica: other ranks hold all of these boxes too, perhaps cut in other ways. A load fills
            them; a save leaves them to those ranks.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        pieces: Sequence[tuple[Box, torch.Tensor]],
        is_replica: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.pieces = list(pieces)
        self.is_replica = is_replica

    @classmethod
    def of(cls, name: str, value: torch.Tensor | LocalRows | Fragment) -> Fragment:
        """Describe a plain tensor, a DTensor or local rows; the pieces share its memory. A fragment
        is its own description."""
        if isinstance(value, Fragment):
            return value
        if isinstance(value, torch.Tensor):
            _refuse_subclass(name, local_of(value))
        checked_dtype(name, value.local.dtype if isinstance(value, LocalRows) else value.dtype)
        if isinstance(value, LocalRows):
            is_held = value.local.numel() or not math.prod(value.global_shape)
            return cls(
                value.global_shape, value.local.dtype, [(value.box, value.local)] if is_held else []
            )
        whole, pieces = pieces_of_tensor(name, value)
        local = local_of(value).detach()
        if not whole.numel:  # nobody holds a piece of it; one rank writes its shape
            return cls(whole.shape, value.dtype, [(whole_box(whole.shape), local)])
        if pieces and not local.is_contiguous():
            # only a whole plain tensor may be strided oddly; its one piece is the tensor itself
            return cls(whole.shape, value.dtype, [(pieces[0].box, local)])
        return cls(whole.shape, value.dtype, [(p.box, p.view(local)) for p in pieces])

    @property
    def parts(self) -> list[tuple[Box, torch.Tensor]]:
        """The former name of ``pieces``."""
        return self.pieces

    @property
    def own_pieces(self) -> list[tuple[Box, torch.Tensor]]:
        """What this rank can save."""
        return [] if self.is_replica else self.pieces

    @property
    def facts(self) -> TensorFacts:
        """dtype and shape of the whole tensor."""
        return TensorFacts(self.dtype, self.shape)

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offsets), index),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=_chunk(box),
                    properties=TensorProperties(dtype=self.dtype),
                    size=torch.Size(self.shape),
                ),
            )
            for index, (box, _) in enumerate(self.own_pieces)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box, _ in self.pieces]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        offsets = tuple(index.offset or ())
        for box, values in self.pieces:
            if box.offsets == offsets:
                return values
        raise KeyError(f"{index.fqn}: no piece at {offsets} on this rank")


def plain_tensors(name: str, value: Any) -> dict[str, Any]:
    """A tensor that is made of others (torchao's quantised ones), as those, by their attributes' names; any
    other leaf as it is. They share its memory: what a load fills of them is in it."""
    if not _is_made_of_others(value):
        return {name: value}
    attributes, _ = value.__tensor_flatten__()
    found: dict[str, Any] = {}
    for attribute in attributes:
        found |= plain_tensors(f"{name}.{attribute}", getattr(value, attribute))
    return found


def _is_made_of_others(value: Any) -> bool:
    return not isinstance(value, DTensor) and is_traceable_wrapper_subclass(value)


def _refuse_subclass(name: str, local: Any) -> None:
    if is_traceable_wrapper_subclass(local):
        raise TypeError(
            f"{name}: is a {type(local).__name__}, which is made of other tensors; as a parameter or buffer of a "
            "model that is whole on each rank it is saved by these, here it is not: hand them over, or "
            "dequantise it"
        )


def checked_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """``dtype`` itself. Raises TypeError, naming the tensor, for one that is not stored."""
    if dtype not in _STORED:
        raise TypeError(
            f"{name}: has dtype {dtype}, whose values are not their bytes (or that this release does "
            "not know); keep it out of the checkpoint, or hand over int_repr() and scales"
        )
    return dtype


_STORED = frozenset(DTYPES.values())


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes))
