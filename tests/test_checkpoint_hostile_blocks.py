"""Manifests that pass every check of their own, and lead to blocks, trees and sizes that do not
decode."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash
import zstandard

from effx_dist.checkpoint import inspect_folder, verify_folder
from effx_dist.checkpoint.format.manifest import BLOCK_NUMEL
from effx_dist.errors import CorruptCheckpointError, EffxError
from tests import small_chain as chain
from tests.small_chain import BASE, TOP, edit, set_at

Document = dict[str, Any]

WEIGHT, FIRST, SECOND = "model.weight", "optimizer.weight.exp_avg", "optimizer.weight.exp_avg_sq"


def refused(folder: Path, kind: type[EffxError] = CorruptCheckpointError) -> str:
    """The message of a load that is refused; a check says what it says, and never raises."""
    with pytest.raises(kind) as caught:
        chain.load(folder)
    with chain.bounded_memory():
        verify_folder(folder)
        with contextlib.suppress(EffxError):
            inspect_folder(folder)
    assert len(str(caught.value)) < 10_000
    return str(caught.value)


def put_block(folder: Path, payload: bytes) -> Document:
    """Append a payload to the newest data file and its manifest; the block's record."""
    path = folder / "step-3" / "rank-00000.effx"
    record = {
        "offset": path.stat().st_size,
        "length": len(payload),
        "xxh3": xxhash.xxh3_128_hexdigest(payload),
    }
    path.write_bytes(path.read_bytes() + payload)
    edit(folder, TOP, set_at("files", 0, "bytes", to=path.stat().st_size))
    return record


def replace_block(folder: Path, name: str, payload: bytes) -> None:
    record = put_block(folder, payload)
    edit(folder, TOP, set_at("tensors", name, "chunks", 0, "blocks", 0, to=record))


def payload_of(folder: Path, name: str) -> bytes:
    block = chain.document_of(folder, TOP)["tensors"][name]["chunks"][0]["blocks"][0]
    content = (folder / "step-3" / "rank-00000.effx").read_bytes()
    return content[block["offset"] : block["offset"] + block["length"]]


def zstd(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def bomb() -> bytes:
    """A frame that says it holds 400 bytes, and goes on for a gigabyte of zeros."""
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(2**28))
    # magic, descriptor, then the content size: 4 bytes for sizes from 65792 on
    assert frame[4] >> 6 == 2
    return frame[:5] + (400).to_bytes(4, "little") + frame[9:]


def huge_frame() -> bytes:
    """A frame that says it holds a terabyte."""
    return b"\x28\xb5\x2f\xfd\xe0" + (2**40).to_bytes(8, "little") + b"\x01\x00\x00"


PAYLOADS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda old: b"",
    "zeros": lambda old: bytes(len(old)),
    "noise": lambda old: bytes(range(256)) * 4,
    "cut": lambda old: old[:-1],
    "longer": lambda old: old + b"\0",
    "twice": lambda old: old + old,
    "of fewer values": lambda old: zstd(bytes(396)),
    "of more values": lambda old: zstd(bytes(2**20)),
    "bomb": lambda old: bomb(),
    "terabyte": lambda old: huge_frame(),
    "no size": lambda old: zstandard.ZstdCompressor(write_content_size=False).compress(bytes(400)),
    "a pickle": lambda old: b"cos\nsystem\n(S'touch /tmp/effx-ran'\ntR.",
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["model.norm", "model.low", WEIGHT, FIRST, SECOND])
@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_signed_block_that_does_not_decode_is_named(folder: Path, name: str, kind: str) -> None:
    replace_block(folder, name, PAYLOADS[kind](payload_of(folder, name)))
    message = refused(folder)
    assert str(folder) in message
    assert "block 0" in message


def test_a_weight_block_whose_length_field_lies_is_refused(folder: Path) -> None:
    old = payload_of(folder, WEIGHT)
    for length in (0, 1, len(old), 2**32 - 1):
        replace_block(folder, WEIGHT, length.to_bytes(4, "little") + old[4:])
        assert WEIGHT in refused(folder)


def test_escapes_without_symbols_are_refused(folder: Path) -> None:
    replace_block(folder, WEIGHT, payload_of(folder, WEIGHT) + bytes(8))
    assert WEIGHT in refused(folder)


@pytest.mark.parametrize("table", ["m", "v"])
def test_symbols_beyond_their_table_are_refused(folder: Path, table: str) -> None:
    moments = ("tensors", WEIGHT, "coding", "quantiser", "moments")
    edit(folder, TOP, lambda d: d["tensors"][WEIGHT]["coding"]["quantiser"]["moments"].pop(table))
    assert "weight" in refused(folder)
    edit(folder, TOP, set_at(*moments, table, to="AACAPw=="))  # 1.0 alone
    assert "exp_avg" in refused(folder)


INLINES = [
    "zz" * 32,
    "00" * 31 + "0x",
    "0 " * 32,
    "00 " * 21 + "0",
    " " * 64,
    "0000803f" + " " * 56,  # one value for eight
    "00" * 16 + " " * 32,  # four values for eight
    "\u0660" * 64,
    "-0" * 32,
]


@pytest.mark.parametrize("text", INLINES, ids=range(len(INLINES)))
@pytest.mark.parametrize("file_index", [0, 7])
def test_inline_text_that_is_no_hex_is_refused(folder: Path, text: str, file_index: int) -> None:
    assert len(text) == 64
    chunk = {"offsets": [0], "sizes": [8], "inline": text, "file": file_index}
    edit(folder, TOP, set_at("tensors", "model.bias", "chunks", to=[chunk]))
    assert "bias" in refused(folder)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(WEIGHT, "int32"), (WEIGHT, "uint32"), (WEIGHT, "float64"), ("model.low", "float16")],
)
def test_a_parent_of_another_dtype_is_refused(folder: Path, name: str, dtype: str) -> None:
    """The links' tensor is a difference to bits of another meaning."""
    edit(folder, BASE, set_at("tensors", name, "dtype", to=dtype))
    assert name in refused(folder)


def test_a_parent_of_another_shape_is_refused(folder: Path) -> None:
    def reshape(document: Document) -> None:
        record = document["tensors"][WEIGHT]
        record["shape"] = [48, 64]
        record["chunks"][0]["sizes"] = [48, 64]

    edit(folder, BASE, reshape)
    assert WEIGHT in refused(folder)


def test_a_parent_without_the_tensor_is_refused(folder: Path) -> None:
    edit(folder, BASE, lambda d: d["tensors"].pop("model.low"))
    assert "model.low" in refused(folder)


# Sizes


def _record(dtype: str, shape: list[int], blocks: list[Document]) -> Document:
    chunk = {"offsets": [0] * len(shape), "sizes": shape, "blocks": blocks}
    return {"dtype": dtype, "shape": shape, "coding": {"kind": "planes"}, "chunks": [chunk]}


def test_one_block_named_a_quarter_of_a_million_times_is_no_terabyte(folder: Path) -> None:
    """Every block is valid and inside its file; together they hold far more than the file can."""
    block = put_block(folder, zstd(bytes(4 * BLOCK_NUMEL)))
    shape = [2**18 * BLOCK_NUMEL]
    edit(
        folder, TOP, set_at("tensors", "extra.mean", to=_record("float32", shape, [block] * 2**18))
    )
    assert str(folder) in refused(folder)


@pytest.mark.parametrize("shape", [[2**61, 2**61, 0], [0, 2**61], [1] * 100, [1] * 5000 + [0]])
def test_odd_shapes_of_few_elements_are_loaded_or_refused(folder: Path, shape: list[int]) -> None:
    record: Document = {
        "dtype": "float32",
        "shape": shape,
        "coding": {"kind": "planes"},
        "chunks": [],
    }
    if 0 not in shape:
        chunk = {"offsets": [0] * len(shape), "sizes": shape, "inline": "00" * 4}
        record["chunks"] = [chunk]
    edit(folder, TOP, set_at("tensors", "extra.mean", to=record))
    try:
        _, extra = chain.load(folder)
    except CorruptCheckpointError:
        return
    assert list(extra["mean"].shape) == shape


def test_a_manifest_of_a_terabyte_of_nothing_is_refused(folder: Path) -> None:
    with chain.manifest_path(folder, TOP).open("r+b") as file:
        file.truncate(2**40)
    assert "manifest.json" in refused(folder)


# Trees


def nested(depth: int) -> Any:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    return tree


TREES: dict[str, Any] = {
    "tensor that is not there": {"$tensor": "extra.gone"},
    "tensor of no name": {"$tensor": None},
    "tensor of a list": {"$tensor": ["extra.mean"]},
    "rows of a number": {"$rows": 3},
    "float of words": {"$float": "one"},
    "float of a list": {"$float": [1]},
    "tuple of a number": {"$tuple": 5},
    "items of a number": {"$items": 5},
    "items that are no pairs": {"$items": [[1, 2, 3]]},
    "items with a list for a key": {"$items": [[[1], 2]]},
    "deep": nested(900),
    "a list": [1],
    "a number": 3,
    "null": None,
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
@pytest.mark.parametrize("member", ["extra", "stateful", "param_groups", "model_values"])
def test_a_hostile_tree_is_refused_or_harmless(folder: Path, member: str, tree: Any) -> None:
    edit(folder, TOP, set_at("extra", member, to=tree))
    with contextlib.suppress(EffxError):
        chain.load(folder)
    verify_folder(folder)
    inspect_folder(folder)


@pytest.mark.parametrize("extra", [None, 3, [], "x", {}, {"extra": {}}, {"optimizer_values": [1]}])
def test_a_manifest_without_a_run_is_refused_or_harmless(folder: Path, extra: Any) -> None:
    edit(folder, TOP, set_at("extra", to=extra))
    with contextlib.suppress(EffxError):
        chain.load(folder)


@pytest.mark.parametrize("generator", ["torch", "python", "numpy", "numpy_gauss"])
@pytest.mark.parametrize("dtype", ["uint8", "int64"])
def test_a_random_state_that_is_none_is_refused(folder: Path, generator: str, dtype: str) -> None:
    record = {
        "dtype": dtype,
        "shape": [2],
        "coding": {"kind": "planes"},
        "chunks": [
            {"offsets": [0], "sizes": [2], "inline": "ff" * (2 if dtype == "uint8" else 16)}
        ],
    }
    edit(folder, TOP, set_at("tensors", f"rng.0.{generator}", to=record))
    assert "rng.0" in refused(folder)
