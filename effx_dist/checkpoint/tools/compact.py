"""A new base made from the links below it, without the training process.

The base is put beside the link that it stands for, in a folder ``merged`` inside the step's own:
the step, and every later one that is a difference to it, stay as they are and are read from the new
base on. What lies below is then no longer needed, and goes with the next retention.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
import xxhash

from effx_dist.checkpoint.format.block_files import VALUES, BlockReader, RankFiles
from effx_dist.checkpoint.format.chunks import ChunkDecoder, ChunkEncoder, block_ranges
from effx_dist.checkpoint.format.coding import to_bits
from effx_dist.checkpoint.format.manifest import (
    ChunkRecord,
    Delta,
    JointWeight,
    Manifest,
    Planes,
    TensorRecord,
)
from effx_dist.checkpoint.format.manifest_checks import write_manifest
from effx_dist.checkpoint.format.reader import ChainReader
from effx_dist.checkpoint.format.whole_tensors import OnProgress, check_declared
from effx_dist.checkpoint.saving.decision import LOSSLESS
from effx_dist.checkpoint.saving.manifest_building import new_manifest, with_sizes
from effx_dist.checkpoint.storage.places import Folder, Location, location
from effx_dist.checkpoint.storage.steps import MERGED, newest_step, remove_uncommitted, step_folder
from effx_dist.errors import CorruptCheckpointError

Digests = dict[tuple[str, int], int]


@dataclass(frozen=True)
class Compacted:
    """What was merged: ``num_links`` steps below and including ``step``, into ``stored_bytes``."""

    step: int
    num_links: int
    stored_bytes: int


def compact(
    folder: Folder, step: int | None = None, on_progress: OnProgress | None = None
) -> Compacted | None:
    """Make a base of the weights of ``step`` (default: the newest). None where it is one already.

    May run while a job goes on saving to the folder. Takes memory for the largest chunk, and reads
    back what it wrote before it commits. Raises CheckpointNotFoundError, CorruptCheckpointError,
    and OSError: then nothing has changed.
    """
    place = location(folder)
    step = newest_step(place) if step is None else step
    own = step_folder(place, step)
    with ChainReader(own) as chain:
        check_declared(chain.top.declared_bytes, own)
        names = _differences(chain.top.manifest)
        if not names or chain.top.merged is not None:
            return None
        target = own / MERGED
        remove_uncommitted(target)
        target.make()
        try:
            manifest, content = _write(chain, names, target, on_progress)
            write_manifest(target, content)
        except BaseException:
            target.remove()
            raise
        num_links = max(len(chain.steps) - 1, 1)
    return Compacted(step, num_links, manifest.figures.stored_bytes)


def _differences(manifest: Manifest) -> list[str]:
    return [
        name
        for name, record in manifest.tensors.items()
        if isinstance(record.coding, Delta | JointWeight)
    ]


def _write(
    chain: ChainReader, names: list[str], target: Location, on_progress: OnProgress | None
) -> tuple[Manifest, bytes]:
    source = chain.top.manifest
    total = sum(source.tensors[name].raw_bytes for name in names)
    digests: Digests = {}
    tensors: dict[str, TensorRecord] = {}
    done = 0
    with RankFiles(target, 0) as files:
        encoder = ChunkEncoder(files)
        for name in names:
            old = source.tensors[name]
            chunks = list(_chunks(chain, name, encoder, digests))
            tensors[name] = TensorRecord(
                dtype=old.dtype, shape=old.shape, coding=Planes(), chunks=chunks
            )
            done += old.raw_bytes
            if on_progress is not None:
                on_progress(done, total)
    manifest = new_manifest(
        tensors,
        step=source.step,
        kind="base",
        parent=None,
        profile=LOSSLESS,
        world_size=1,
        files=[files.records()[VALUES]],
        merges=chain.top.checksum,
    )
    _check_back(manifest, target, digests)
    return with_sizes(manifest, None)


def _chunks(
    chain: ChainReader, name: str, encoder: ChunkEncoder, digests: Digests
) -> Iterator[ChunkRecord]:
    for index, chunk in enumerate(chain.top.manifest.tensors[name].chunks):
        values = chain.read(name, chunk.box)
        digests[name, index] = _digest([values])
        yield encoder.planes(chunk.box, values)


def _check_back(manifest: Manifest, target: Location, digests: Digests) -> None:
    """What replaces a whole chain must decode to what the chain does."""
    with closing(BlockReader(target, manifest.files[0])) as file:
        decoder = ChunkDecoder([file], manifest.tensors, {})
        for (name, index), digest in digests.items():
            numel = manifest.tensors[name].chunks[index].box.numel
            num_blocks = len(list(block_ranges(numel)))
            blocks = (decoder.block(name, index, block) for block in range(num_blocks))
            if _digest(blocks) != digest:
                raise CorruptCheckpointError(
                    f"{target}: {name} does not read back as it was written; nothing was merged. "
                    "Check the disk"
                )


def _digest(parts: Iterable[torch.Tensor]) -> int:
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(to_bits(part).data)
    return hasher.intdigest()
