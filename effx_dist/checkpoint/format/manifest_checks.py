"""Whether a manifest holds together, before anything that it says is used.

A manifest may be damaged or hostile: names stay inside the folder, boxes tile their tensor, and blocks
lie apart in their files. How much memory a load takes is not for a manifest to say: values are decoded
block by block into tensors that the caller has; what is made because a manifest names it is bounded
(``whole_tensors.py``).

A writer runs the same checks on what it is about to publish: whatever is committed is accepted by a reader.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

from effx_dist.checkpoint.format.manifest import (
    BLOCK_NUMEL,
    DTYPES,
    MAX_INLINE_BYTES,
    MAX_MANIFEST_BYTES,
    ChunkRecord,
    Coding,
    FileRecord,
    JointMoment,
    JointSecondMoment,
    Manifest,
    Seeded,
    TensorRecord,
    manifest_from_bytes,
    short,
)
from effx_dist.checkpoint.storage.places import Location
from effx_dist.checkpoint.storage.steps import (
    MANIFEST,
    checked_rank_file_name,
    checked_sibling_name,
)
from effx_dist.errors import ConfigError, CorruptCheckpointError, UnreadableSaveError
from effx_dist.shard import Box, whole_box

SHORTEST_BLOCK_BYTES = {"planes": 5, "delta": 6}
"""The fewest bytes of a lossless block, by kind, however many values it stands for: a tag, the number of their bytes
(varint), and one stream of a repeated byte; a difference has one more tag before them."""
MAX_DIMS = 64


def check_manifest(manifest: Manifest, path: object) -> None:
    """Raise CorruptCheckpointError, naming ``path`` and the tensor, for a manifest that does not
    hold together."""
    try:
        _check(manifest, path)
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(short(str(error), 1500)) from None


def _check(manifest: Manifest, path: object) -> None:
    where = str(path)
    if (manifest.kind == "link") != (manifest.parent is not None):
        raise CorruptCheckpointError(f"{where}: a link needs a parent and a base has none")
    if manifest.parent is not None:
        checked_sibling_name(manifest.parent.name, where)
    for file in manifest.files:
        checked_rank_file_name(file.name, where)
    if len({file.name for file in manifest.files}) != len(manifest.files):
        raise CorruptCheckpointError(f"{where}: names a data file twice")
    for name, record in manifest.tensors.items():
        _check_tensor(f"{where}: tensor {name!r}", record, manifest)
    _check_blocks_apart(where, manifest)
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CorruptCheckpointError(f"{where}: alias {alias!r} of {name!r} does not resolve")


def _check_tensor(where: str, record: TensorRecord, manifest: Manifest) -> None:
    if record.dtype not in DTYPES:
        raise CorruptCheckpointError(
            f"{where}: unknown dtype {record.dtype!r}; no torch has it, or a newer one than this"
        )
    needs_parent = record.coding.kind in ("delta", "joint_weight")
    if needs_parent and manifest.parent is None:
        raise CorruptCheckpointError(f"{where}: is stored as a difference, but there is no parent")
    for partner, kind in _partners(record.coding).items():
        other = manifest.tensors.get(partner)
        if other is None or other.coding.kind != kind or other.shape != record.shape:
            raise CorruptCheckpointError(
                f"{where}: its partner {partner!r} is not a {kind} of its shape"
            )
        if [c.box for c in other.chunks] != [c.box for c in record.chunks]:
            raise CorruptCheckpointError(f"{where}: cut differently from its partner {partner!r}")
    boxes = [chunk.box for chunk in record.chunks if len(chunk.offsets) == len(chunk.sizes)]
    if len(boxes) != len(record.chunks):
        raise CorruptCheckpointError(f"{where}: a chunk has offsets and sizes of different lengths")
    if isinstance(record.coding, Seeded):
        if record.chunks or manifest.kind != "base":
            raise CorruptCheckpointError(f"{where}: is seeded, so a base states it without chunks")
        return
    _check_tiling(where, record, boxes)
    for chunk in record.chunks:
        if chunk.file >= len(manifest.files):
            raise CorruptCheckpointError(
                f"{where}: names file {chunk.file} of {len(manifest.files)}"
            )
        check_chunk(where, record.dtype, record.coding, chunk, manifest.files[chunk.file])


def _partners(coding: Coding) -> dict[str, str]:
    match coding:
        case JointMoment():
            second = {coding.exp_avg_sq: "joint_exp_avg_sq"} if coding.exp_avg_sq else {}
            return {coding.weight: "joint_weight"} | second
        case JointSecondMoment():
            return {coding.weight: "joint_weight", coding.exp_avg: "joint_exp_avg"}
        case _:
            return {}


def _check_blocks_apart(where: str, manifest: Manifest) -> None:
    """Blocks that share bytes would let a small file claim any amount of memory."""
    ends = [0] * len(manifest.files)
    blocks = sorted(
        (chunk.file, block.offset, block.length)
        for record in manifest.tensors.values()
        for chunk in record.chunks
        for block in chunk.blocks
    )
    for file, offset, length in blocks:
        if offset < ends[file]:
            raise CorruptCheckpointError(
                f"{where}: two blocks of {manifest.files[file].name} overlap at byte {offset}"
            )
        ends[file] = offset + length


def _check_tiling(where: str, record: TensorRecord, boxes: list[Box]) -> None:
    if len(record.shape) > MAX_DIMS or math.prod(max(size, 1) for size in record.shape) >= 2**62:
        raise CorruptCheckpointError(f"{where}: no tensor has the shape {record.shape[:MAX_DIMS]}")
    whole = whole_box(record.shape)
    if any(not box.is_inside(whole) for box in boxes):
        raise CorruptCheckpointError(f"{where}: a chunk lies outside its shape {record.shape}")
    stored = sum(box.numel for box in boxes)
    ordered = sorted(boxes, key=lambda box: box.offsets)
    overlap = any(
        a.intersect(b) for index, a in enumerate(ordered) for b in _until_past(ordered, index, a)
    )
    if overlap or stored != record.numel:
        raise CorruptCheckpointError(
            f"{where}: its chunks hold {stored} elements of {record.numel} and "
            f"{'overlap' if overlap else 'do not overlap'}; they must tile it exactly"
        )


def _until_past(ordered: list[Box], index: int, box: Box) -> list[Box]:
    """The boxes after ``index`` that start before ``box`` ends along the first dimension."""
    if not box.offsets:
        return ordered[index + 1 :]
    end = box.offsets[0] + box.sizes[0]
    stop = index + 1
    while stop < len(ordered) and ordered[stop].offsets[0] < end:
        stop += 1
    return ordered[index + 1 : stop]


def check_chunk(
    where: str, dtype: str, coding: Coding, chunk: ChunkRecord, file: FileRecord
) -> None:
    """Raise CorruptCheckpointError for a chunk that does not hold its box's elements, or does not lie
    in its file."""
    numel, itemsize, kind = chunk.box.numel, DTYPES[dtype].itemsize, coding.kind
    if chunk.fill is not None:
        if (
            chunk.blocks
            or chunk.inline is not None
            or kind not in ("planes", "delta")
            or not numel
            or len(chunk.fill) != 2 * itemsize
        ):
            raise CorruptCheckpointError(f"{where}: a fill is not one element of {dtype}")
        return
    if chunk.inline is not None:
        if (
            chunk.blocks
            or kind != "planes"
            or numel * itemsize > MAX_INLINE_BYTES
            or len(chunk.inline) != 2 * numel * itemsize
        ):
            raise CorruptCheckpointError(f"{where}: an inline chunk does not hold {numel} elements")
        return
    if len(chunk.blocks) != -(-numel // BLOCK_NUMEL):
        raise CorruptCheckpointError(
            f"{where}: {numel} elements need {-(-numel // BLOCK_NUMEL)} blocks, the manifest has {len(chunk.blocks)}"
        )
    shortest = SHORTEST_BLOCK_BYTES.get(kind, 1)
    for index, block in enumerate(chunk.blocks):
        if block.offset + block.length > file.bytes:
            raise CorruptCheckpointError(f"{where}: block {index} lies outside {file.name}")
        if block.length < shortest:
            raise CorruptCheckpointError(
                f"{where}: block {index} has {block.length} bytes; no {kind} block has fewer than {shortest}"
            )


def write_manifest(folder: Location, content: bytes, manifest: Manifest | None = None) -> None:
    """Commit: the manifest appears whole, by fsync and rename, after everything it names is
    durable. Where that cannot be made sure of, it does not stay.

    ``manifest``: what ``content`` was made of, whose fields were checked as it was made; None: read back
    from ``content``.

    Raises UnreadableSaveError, before anything is written, for a manifest that no load would accept.
    """
    path = folder / MANIFEST
    if len(content) > MAX_MANIFEST_BYTES:
        raise ConfigError(
            f"{path}: would have {len(content)} bytes, at most {MAX_MANIFEST_BYTES} are "
            "read back; save fewer or larger tensors, or less in `extra`"
        )
    with refused_by_readers(path):
        check_manifest(manifest or manifest_from_bytes(content, path), path)
    try:
        folder.replace_file(MANIFEST, content)
    except BaseException:
        with contextlib.suppress(OSError):
            folder.remove_file(MANIFEST)
        raise


@contextlib.contextmanager
def refused_by_readers(place: object) -> Iterator[None]:
    """Within it a reader's checks are run by the writer: what they refuse is an UnreadableSaveError."""
    try:
        yield
    except CorruptCheckpointError as error:
        raise UnreadableSaveError(
            f"{place}: this save is not published, because every load would refuse it: {error}"
        ) from error
