"""The manifest: everything about one checkpoint but the blocks' bytes, as JSON with a checksum of
itself.

It appears last, by rename: a checkpoint exists when its manifest does. Whatever is read from one is
checked before it is used, because a manifest may be damaged or hostile: names stay inside the
folder, boxes tile their tensor, blocks lie inside their files, and no size asks for more memory
than the files' bytes can account for.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from effx_dist.checkpoint.storage.places import Location
from effx_dist.checkpoint.storage.steps import MANIFEST
from effx_dist.errors import CorruptCheckpointError
from effx_dist.shard import Box

FORMAT = "effx-excp"
VERSION = 3
BLOCK_NUMEL = 2**20
"""Elements of a block, the unit of coding, checking and partial reading. A chunk's last block may
be shorter."""
MAX_INLINE_BYTES = 256
"""Chunks up to this many raw bytes stand in the manifest itself."""


_STORABLE = (
    *("float64", "float32", "float16", "bfloat16", "complex128", "complex64", "complex32"),
    *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
    *("float4_e2m1fn_x2", "bool", "int64", "int32", "int16", "int8"),
    *("uint64", "uint32", "uint16", "uint8"),
)
DTYPES: dict[str, torch.dtype] = {
    name: getattr(torch, name) for name in _STORABLE if hasattr(torch, name)
}
"""The dtypes that are stored, by name: all of this torch whose memory holds the whole value. torch's older quantised
dtypes are not among them, because they keep their scales elsewhere."""

MAX_MANIFEST_BYTES = 2**30
"""Larger files are not read as manifests: that of a 100B-parameter model on 1000 ranks is 10^8 bytes."""

Count = Annotated[int, Field(ge=0, lt=2**62)]
Name = Annotated[str, Field(max_length=1024)]
Hex128 = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_HEAD = re.compile(rb'\{"format":"effx-excp","version":([0-9]{1,9}),"xxh3_128":"([0-9a-f]{32})",')
_ZEROS = "0" * 32
_HEAD_BYTES = 128
"""Hold what _HEAD matches."""


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
    order, all of it as inline hex, or one element's bytes as hex (``fill``) where all are alike.

    A fill is what the coding would have put into planes: the value itself, or its difference to the
    parent's, so that a tensor that did not change is ``"00"`` times its item size.
    """

    offsets: list[Count]
    sizes: list[Count]
    file: Count = 0
    blocks: list[BlockRecord] = []
    inline: Annotated[str, Field(pattern=r"^[0-9a-f]*$", max_length=512)] | None = None
    fill: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){1,16}$")] | None = None

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


class Seeded(_Record):
    """Not stored: what a seed initialises the tensor to. ``fingerprint``: the hash of the whole
    tensor by which a load tells that the live one holds just that."""

    kind: Literal["seeded"] = "seeded"
    fingerprint: Hex128


Coding = Annotated[
    Planes | Delta | JointWeight | JointMoment | JointSecondMoment | Seeded,
    Field(discriminator="kind"),
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

    @property
    def raw_bytes(self) -> int:
        """Bytes of the whole tensor when it is decoded."""
        return self.numel * self.torch_dtype.itemsize


class ParentRecord(_Record):
    """The checkpoint that links' differences refer to, and the checksum of its manifest."""

    name: str
    xxh3: Hex128


class Figures(_Record):
    """Sizes of this save and of the run so far (bases included), in bytes, headers and manifest
    counted.

    ``base_bytes`` and ``links_bytes``: stored bytes of the chain's base and of its links, this save
    included. ``error``: largest relative root-mean-square weight error of this save over its tensors; 0 if
    all is exact.
    """

    raw_bytes: Count
    stored_bytes: Count
    run_raw_bytes: Count
    run_stored_bytes: Count
    saves_since_base: Count
    base_bytes: Count = 0
    links_bytes: Count = 0
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
    over; ``paths``: where an entry stood in the nested state dict that it was flattened from, if its name
    does not say it; ``merges``: of a base made from a chain, the checksum of the link that it stands for."""

    step: Count
    kind: Literal["base", "link"]
    parent: ParentRecord | None
    profile: str
    world_size: Count
    saved_at: str
    writer: str
    files: list[FileRecord]
    figures: Figures
    aliases: dict[Name, Name] = {}
    paths: dict[Name, list[str | int]] = {}
    tensors: dict[Name, TensorRecord]
    values: dict[Name, Any] = {}
    extra: Any = None
    merges: Hex128 | None = None


def manifest_to_bytes(manifest: Manifest) -> bytes:
    """One JSON document whose third entry is the xxh3-128 of the document with that entry
    zeroed."""
    body = manifest.model_dump(mode="json", exclude_defaults=True)
    # the kinds of coding are defaults, and needed to tell the codings apart
    for name, record in manifest.tensors.items():
        body["tensors"][name]["coding"]["kind"] = record.coding.kind
    head = {"format": FORMAT, "version": VERSION, "xxh3_128": _ZEROS}
    text = json.dumps({**head, **body}, separators=(",", ":"), allow_nan=False).encode()
    checksum = xxhash.xxh3_128_hexdigest(text)
    return text.replace(_ZEROS.encode(), checksum.encode(), 1)


def manifest_from_bytes(content: bytes, path: object) -> Manifest:
    """The way back. Raises CorruptCheckpointError naming ``path`` and what is wrong; runs no code
    from the file."""
    checksum = manifest_checksum(content, path)
    zeroed = content.replace(checksum.encode(), _ZEROS.encode(), 1)
    if xxhash.xxh3_128_hexdigest(zeroed) != checksum:
        raise CorruptCheckpointError(
            f"{path}: its checksum does not match its content; the file was damaged or edited. "
            "Restore it from a copy, or load an older step"
        )
    version = int(_head(content, path)[1])
    if version > VERSION:
        raise CorruptCheckpointError(
            f"{path}: format version {version}; this effx-dist reads up to {VERSION}. "
            "Install a newer one"
        )
    try:
        document = json.loads(content, object_pairs_hook=_without_duplicates)
        for key in ("format", "version", "xxh3_128"):
            del document[key]
        return Manifest.model_validate(document)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        found = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in problems[:5])
        raise CorruptCheckpointError(f"{path}: not a valid manifest: {short(found)}") from None
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{path}: not a valid manifest: {short(str(error))}") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raises ValueError for one that says something twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has two entries of one name")
    return found


def short(text: str, length: int = 300) -> str:
    """``text`` as an error message may quote it, whatever a file put into it."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


def manifest_checksum(content: bytes, path: object) -> str:
    """The checksum that a manifest states for itself."""
    return _head(content, path)[2].decode()


def stated_checksum(place: Location) -> str:
    """The checksum that the manifest in a checkpoint's folder states; it identifies the checkpoint. Only the
    start of the file is read. Raises CorruptCheckpointError where there is none."""
    return manifest_checksum(place.read_start(MANIFEST, _HEAD_BYTES), place / MANIFEST)


def _head(content: bytes, path: object) -> re.Match[bytes]:
    head = _HEAD.match(content)
    if head is None:
        raise CorruptCheckpointError(
            f"{path}: does not begin like an {FORMAT} manifest; the file was damaged or is "
            "something else"
        )
    return head


def sha256_line(content: bytes) -> bytes:
    """A manifest's SHA-256 as ``sha256sum`` writes it: for signatures, which an xxh3 cannot carry."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()
