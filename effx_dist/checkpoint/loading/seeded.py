"""A run's seeded initialisation as its first base: not stored, but known by a hash of each tensor.

Links refer to it as to any parent. To read them, a model must hold the same initialisation, made
from the same seed; a load compares hashes of whole tensors before it changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.checkpoint.format.coding import to_bits
from effx_dist.checkpoint.format.manifest import (
    Manifest,
    ParentRecord,
    Seeded,
    TensorRecord,
    manifest_checksum,
    manifest_to_bytes,
)
from effx_dist.checkpoint.format.manifest_checks import write_manifest
from effx_dist.checkpoint.format.reader import ChainReader
from effx_dist.checkpoint.saving.manifest_building import new_manifest
from effx_dist.checkpoint.saving.saver import Loaded
from effx_dist.checkpoint.state.fragment import Fragment
from effx_dist.checkpoint.state.joints import is_chained
from effx_dist.checkpoint.state.training_state import chained_references
from effx_dist.checkpoint.state.tree import Leaf
from effx_dist.checkpoint.storage.places import Location
from effx_dist.core.fingerprint import Fingerprint, add_fingerprints, fingerprint, fingerprint_hex
from effx_dist.errors import LayoutMismatchError
from effx_dist.shard import Box, Group

PREFIX = "initialisation-"
_PIECE_NUMEL = 2**20
Held = dict[str, dict[Box, Fingerprint]]


def start_chain(folder: Location, leaves: Mapping[str, Leaf], group: Group) -> Loaded:
    """Begin a run's chain with its initialisation: ``leaves`` are the model's, freshly made.

    Rank 0 writes a manifest of hashes. One gather and one broadcast; an error on one rank is raised
    on all.
    """
    fragments = {name: Fragment.of(name, leaf) for name, leaf in leaves.items()}
    chained = {name: f for name, f in fragments.items() if is_chained(name, f.facts)}
    hashes = whole_fingerprints(chained, group)

    checksum, manifest = group.from_first(lambda: _write(folder, chained, hashes))
    return Loaded(
        id=checksum,
        step=manifest.step,
        parent=ParentRecord(name=_name(checksum), xxh3=checksum),
        figures=manifest.figures,
        references=chained_references(leaves, chained),
        is_newest=True,
    )


def _name(checksum: str) -> str:
    return f"{PREFIX}{checksum[:8]}"


def _write(
    folder: Location, chained: Mapping[str, Fragment], hashes: Mapping[str, str]
) -> tuple[str, Manifest]:
    tensors = {
        name: TensorRecord(
            dtype=str(fragment.dtype).removeprefix("torch."),
            shape=list(fragment.shape),
            coding=Seeded(fingerprint=hashes[name]),
            chunks=[],
        )
        for name, fragment in sorted(chained.items())
    }
    manifest = new_manifest(
        tensors, step=0, kind="base", parent=None, profile="seeded", world_size=0, files=[]
    )
    content = manifest_to_bytes(manifest)
    checksum = manifest_checksum(content, folder)
    place = folder / _name(checksum)
    if not place.is_folder():
        place.make()
    write_manifest(place, content)
    return checksum, manifest


def check_seed(chain: ChainReader, leaves: Mapping[str, Leaf], group: Group) -> None:
    """Where a checkpoint builds upon a seeded initialisation, let it be read into ``leaves``, live
    tensors by the names they are stored under, which must hold that initialisation.

    Three small gathers, by which one rank's error is raised on all. Raises LayoutMismatchError where
    a tensor differs.
    """

    def find() -> dict[str, Seeded]:
        return {name: seed for name in leaves if (seed := chain.seed_of(name)) is not None}

    needed = group.everywhere(find)
    live = {name: Fragment.of(name, leaves[name]) for name in needed}
    held = group.all_gather_object(_held(live))
    group.everywhere(lambda: _compare(chain, needed, _merge(live, held)))
    chain.holds_seed = bool(needed)


def _compare(chain: ChainReader, needed: Mapping[str, Seeded], found: Mapping[str, str]) -> None:
    differing = [name for name, seed in needed.items() if found[name] != seed.fingerprint]
    if differing:
        raise LayoutMismatchError(
            f"{chain.top.folder}: builds upon a seeded initialisation that was not stored, and the "
            f"model does not hold it: {len(differing)} of {len(needed)} tensors differ, "
            f"{differing[0]} first. Initialise the model as the run did (seed, device, library "
            "versions) before loading, or load a step after the next stored base"
        )


def whole_fingerprints(fragments: Mapping[str, Fragment], group: Group) -> dict[str, str]:
    """The hash of each whole tensor, from what the ranks hold of it; copies count once. One
    gather. Raises LayoutMismatchError where copies differ, or pieces are missing."""
    return _merge(fragments, group.all_gather_object(_held(fragments)))


def _held(fragments: Mapping[str, Fragment]) -> Held:
    return {
        name: {box: _fingerprint_of(fragment.shape, box, values) for box, values in fragment.pieces}
        for name, fragment in fragments.items()
    }


def _merge(fragments: Mapping[str, Fragment], by_rank: Sequence[Held]) -> dict[str, str]:
    found = {}
    for name, fragment in fragments.items():
        by_box: dict[Box, Fingerprint] = {}
        for rank, held in enumerate(by_rank):
            for box, value in held.get(name, {}).items():
                if by_box.setdefault(box, value) != value:
                    raise LayoutMismatchError(
                        f"{name}: the copy of {box} on rank {rank} differs from another rank's; "
                        "a seeded initialisation must be the same on all"
                    )
        held_numel = sum(box.numel for box in by_box)
        if held_numel != math.prod(fragment.shape):
            raise LayoutMismatchError(
                f"{name}: the ranks hold {held_numel} elements of {math.prod(fragment.shape)}"
            )
        found[name] = fingerprint_hex(add_fingerprints(by_box.values()))
    return found


def _fingerprint_of(shape: tuple[int, ...], box: Box, values: torch.Tensor) -> Fingerprint:
    bits = to_bits(values.detach().cpu().contiguous())
    pieces = _positions(shape, box)
    start, found = 0, []
    for positions in pieces:
        found.append(fingerprint(bits[start : start + positions.size], positions))
        start += positions.size
    return add_fingerprints(found)


def _positions(shape: tuple[int, ...], box: Box) -> Iterator[npt.NDArray[np.int64]]:
    """Flat places in the whole tensor of a box's elements, some rows at a time."""
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    row = np.zeros(1, dtype=np.int64)
    for offset, size, stride in zip(box.offsets[1:], box.sizes[1:], strides[1:], strict=True):
        axis = np.arange(offset, offset + size, dtype=np.int64) * stride
        row = np.add.outer(row, axis).reshape(-1)
    end = box.offsets[0] + box.sizes[0]
    num_rows = max(1, _PIECE_NUMEL // max(row.size, 1))
    for first in range(box.offsets[0], end, num_rows):
        rows = np.arange(first, min(first + num_rows, end), dtype=np.int64) * strides[0]
        yield np.add.outer(rows, row).reshape(-1)
