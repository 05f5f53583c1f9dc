"""The manifest: everything about one checkpoint but the blocks' bytes, as JSON with a checksum of
itself.

It appears last, by rename: a checkpoint exists when its manifest does. Whatever is read from one is
checked before it is used, because a manifest may be damaged or hostile: names stay inside the
folder, boxes tile their tensor, blocks lie inside their files, and no size asks for more memory
than the files' bytes can account for.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from effx_dist.checkpoint.folder import (
    MANIFEST,
    checked_rank_file_name,
    checked_sibling_name,
    replace_file,
)
from effx_dist.errors import CorruptCheckpointError
from effx_dist.shard import Box, whole_box

FORMAT = "effx-excp"
VERSION = 1
BLOCK_NUMEL = 2**20
"""Elements of a block, the unit of coding, checking and partial reading. A chunk's last block may
be shorter."""
MAX_INLINE_BYTES = 256
"""Chunks up to this many raw bytes stand in the manifest itself."""
MAX_RATIO = 2**17
"""Largest ratio of raw to stored bytes of a lossless block that is believed (zstd reaches 2**15 on
zeros)."""

DTYPES: dict[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
        *(torch.uint16, torch.uint32, torch.uint64),
    )
}

Count = Annotated[int, Field(ge=0, lt=2**62)]
Hex128 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_HEAD = re.compile(rb'\{"format":"effx-excp","version":([0-9]{1,9}),"xxh3_128":"([0-9a-f]{32})",')
_ZEROS = "0" * 32


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileRecord(_Record):
    """One data file: its name inside the step's folder and its size in bytes."""

    name: str
    bytes: Count


class BlockRecord(_Record):
    """One block's payload inside its file: where, how many bytes, and their xxh3-128."""

    offset: Count
    length: Count
    xxh3: Hex128


class ChunkRecord(_Record):
    """One box of a whole tensor, as one rank wrote it: blocks of BLOCK_NUMEL elements in flat
    order, or inline hex."""

    offsets: list[Count]
    sizes: list[Count]
    file: Count = 0
    blocks: list[BlockRecord] = []
    inline: str | None = None

    @property
    def box(self) -> Box:
        """The chunk's box in its whole tensor."""
        return Box(tuple(self.offsets), tuple(self.sizes))


class Planes(_Record):
    """Lossless: byte planes, zstd."""

    kind: Literal["planes"] = "planes"


class Delta(_Record):
    """Lossless: bit patterns minus the parent checkpoint's, byte planes, zstd."""

    kind: Literal["delta"] = "delta"


class JointWeight(_Record):
    """Lossy: the parent checkpoint's value plus a quantised residual. ``error``: relative rms error
    of the weight."""

    kind: Literal["joint_weight"] = "joint_weight"
    quantiser: dict[str, Any]
    error: float = Field(ge=0, allow_inf_nan=False)


class JointMoment(_Record):
    """Lossy: exp_avg, kept where the weight's residual was and where it is large."""

    kind: Literal["joint_exp_avg"] = "joint_exp_avg"
    weight: str
    exp_avg_sq: str | None = None


class JointSecondMoment(_Record):
    """Lossy: exp_avg_sq, kept where exp_avg is; the mean of the others elsewhere."""

    kind: Literal["joint_exp_avg_sq"] = "joint_exp_avg_sq"
    weight: str
    exp_avg: str


Coding = Annotated[
    Planes | Delta | JointWeight | JointMoment | JointSecondMoment, Field(discriminator="kind")
]


class TensorRecord(_Record):
    """One whole tensor: dtype, shape, how its values are coded, and the chunks that tile it."""

    dtype: str
    shape: list[Count]
    coding: Coding
    chunks: list[ChunkRecord]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch data type."""
        return DTYPES[self.dtype]


class ParentRecord(_Record):
    """The checkpoint that links' differences refer to, and the checksum of its manifest."""

    name: str
    xxh3: Hex128


class Figures(_Record):
    """Sizes of this save and of the run so far (bases included), in bytes, headers and manifest
    counted.

    ``error``: largest relative root-mean-square weight error of this save over its tensors; 0 if
    all is exact.
    """

    raw_bytes: Count
    stored_bytes: Count
    run_raw_bytes: Count
    run_stored_bytes: Count
    saves_since_base: Count
    error: float = Field(ge=0, allow_inf_nan=False)

    @property
    def ratio(self) -> float:
        """Raw over stored bytes of this save."""
        return self.raw_bytes / max(self.stored_bytes, 1)

    @property
    def run_ratio(self) -> float:
        """Raw over stored bytes of all saves of the run, this one included."""
        return self.run_raw_bytes / max(self.run_stored_bytes, 1)


class Manifest(_Record):
    """One checkpoint. ``values``: JSON entries of the state dict; ``extra``: what the caller handed
    over."""

    step: Count
    kind: Literal["base", "link"]
    parent: ParentRecord | None
    profile: str
    world_size: Count
    saved_at: str
    writer: str
    files: list[FileRecord]
    figures: Figures
    aliases: dict[str, str] = {}
    tensors: dict[str, TensorRecord]
    values: dict[str, Any] = {}
    extra: Any = None


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """One JSON document whose third member is the xxh3-128 of the document with that member
    zeroed."""
    body = manifest.model_dump(mode="json", exclude_defaults=True)
    # the kinds of coding are defaults, and needed to tell the codings apart
    for name, record in manifest.tensors.items():
        body["tensors"][name]["coding"]["kind"] = record.coding.kind
    head = {"format": FORMAT, "version": VERSION, "xxh3_128": _ZEROS}
    text = json.dumps({**head, **body}, separators=(",", ":"), allow_nan=False).encode()
    checksum = xxhash.xxh3_128_hexdigest(text)
    return text.replace(_ZEROS.encode(), checksum.encode(), 1)


def manifest_from_bytes(content: bytes, path: Path) -> Manifest:
    """The way back. Raises CorruptCheckpointError naming ``path`` and what is wrong; runs no code
    from the file."""
    checksum = manifest_checksum(content, path)
    zeroed = content.replace(checksum.encode(), _ZEROS.encode(), 1)
    if xxhash.xxh3_128_hexdigest(zeroed) != checksum:
        raise CorruptCheckpointError(
            f"{path}: its checksum does not match its content; the file was damaged or edited. "
            "Restore it from a copy, or load an older step"
        )
    try:
        document = json.loads(content)
        version = document["version"]
        if version > VERSION:
            raise CorruptCheckpointError(
                f"{path}: format version {version}; this effx-dist reads up to {VERSION}. Install a newer one"
            )
        for member in ("format", "version", "xxh3_128"):
            del document[member]
        manifest = Manifest.model_validate(document)
    except (ValidationError, ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: not a valid manifest: {error}") from error
    _check(manifest, path)
    return manifest


def manifest_checksum(content: bytes, path: Path) -> str:
    """The checksum that a manifest states of itself."""
    head = _HEAD.match(content)
    if head is None:
        raise CorruptCheckpointError(
            f"{path}: does not begin like an {FORMAT} manifest; the file was damaged or is something else"
        )
    return head[2].decode()


def write_manifest(folder: Path, content: bytes) -> None:
    """Commit: the manifest appears whole, by fsync and rename, after everything it names is
    durable."""
    replace_file(folder / MANIFEST, content)


def _check(manifest: Manifest, path: Path) -> None:
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
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CorruptCheckpointError(f"{where}: alias {alias!r} of {name!r} does not resolve")


def _check_tensor(where: str, record: TensorRecord, manifest: Manifest) -> None:
    if record.dtype not in DTYPES:
        raise CorruptCheckpointError(f"{where}: unknown dtype {record.dtype!r}")
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
    _check_tiling(where, record, boxes)
    for chunk in record.chunks:
        _check_chunk(where, record, chunk, manifest.files)


def _partners(coding: Coding) -> dict[str, str]:
    match coding:
        case JointMoment():
            second = {coding.exp_avg_sq: "joint_exp_avg_sq"} if coding.exp_avg_sq else {}
            return {coding.weight: "joint_weight"} | second
        case JointSecondMoment():
            return {coding.weight: "joint_weight", coding.exp_avg: "joint_exp_avg"}
        case _:
            return {}


def _check_tiling(where: str, record: TensorRecord, boxes: list[Box]) -> None:
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


def _check_chunk(
    where: str, record: TensorRecord, chunk: ChunkRecord, files: list[FileRecord]
) -> None:
    numel, itemsize = chunk.box.numel, record.torch_dtype.itemsize
    if chunk.inline is not None:
        if (
            chunk.blocks
            or record.coding.kind != "planes"
            or numel * itemsize > MAX_INLINE_BYTES
            or len(chunk.inline) != 2 * numel * itemsize
        ):
            raise CorruptCheckpointError(f"{where}: an inline chunk does not hold {numel} elements")
        return
    if len(chunk.blocks) != -(-numel // BLOCK_NUMEL):
        raise CorruptCheckpointError(
            f"{where}: {numel} elements need {-(-numel // BLOCK_NUMEL)} blocks, the manifest has {len(chunk.blocks)}"
        )
    if chunk.blocks and chunk.file >= len(files):
        raise CorruptCheckpointError(f"{where}: names file {chunk.file} of {len(files)}")
    for index, block in enumerate(chunk.blocks):
        if block.offset + block.length > files[chunk.file].bytes:
            raise CorruptCheckpointError(
                f"{where}: block {index} lies outside {files[chunk.file].name}"
            )
        raw_bytes = min(BLOCK_NUMEL, numel - index * BLOCK_NUMEL) * itemsize
        lossless = record.coding.kind in ("planes", "delta")
        if lossless and raw_bytes > block.length * MAX_RATIO:
            raise CorruptCheckpointError(
                f"{where}: block {index} claims {raw_bytes} bytes from {block.length}; "
                f"more than {MAX_RATIO}x is not believed"
            )
