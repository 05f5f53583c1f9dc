"""Manifests with a correct checksum and a hostile content: refused by CorruptCheckpointError, in
bounded memory, and nothing outside the folder is touched."""

from __future__ import annotations

import base64
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effx_dist.checkpoint import verify_folder
from effx_dist.checkpoint.format.manifest import VERSION, manifest_from_bytes, manifest_to_bytes
from effx_dist.checkpoint.storage.steps import MANIFEST
from effx_dist.errors import CorruptCheckpointError
from tests import small_chain as chain
from tests.small_chain import BASE, TOP, edit, set_at

Document = dict[str, Any]
Change = Callable[[Document], Any]

CANARY = b"MZ-canary"
WEIGHT = ("tensors", "model.weight")
NORM = ("tensors", "model.norm")  # planes, one block
BIAS = ("tensors", "model.bias")  # inline
TABLE = ("tensors", "model.table")  # planes, two blocks


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the chain, with canaries where a hostile name would lead."""
    shutil.copytree(original, tmp_path / "a" / "run")
    for place in (tmp_path, tmp_path / "a", tmp_path / "a" / "run"):
        for name in ("x", "rank-00000.effx"):
            (place / name).write_bytes(CANARY)
    return tmp_path / "a" / "run"


def state_of(root: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {str(p.relative_to(root)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def expect_refused(folder: Path, word: str = MANIFEST, in_manifest: bool = True) -> str:
    """A load is refused with a short message that names a file of the folder; a check finds it."""
    before = state_of(folder.parent.parent)
    with pytest.raises(CorruptCheckpointError) as caught:
        chain.load(folder)
    message = str(caught.value)
    assert str(folder) in message
    assert word in message, message[:2000]
    assert len(message) < 10_000, "a message that people can read"
    if in_manifest:  # what only decoding can show is not looked for by a check of the bytes
        with chain.bounded_memory():
            findings = verify_folder(folder).findings
        assert any(str(folder) in finding for finding in findings)
        assert all(len(finding) < 10_000 for finding in findings)
    assert state_of(folder.parent.parent) == before
    return message


def test_signing_is_that_of_the_format(folder: Path) -> None:
    path = chain.manifest_path(folder, TOP)
    content = path.read_bytes()
    assert manifest_to_bytes(manifest_from_bytes(content, path)) == content
    edit(folder, BASE, lambda document: None)
    assert path.read_bytes() == content
    assert chain.load(folder)[1]["step"] == TOP


# Fields of the manifest

BLOCK = {"offset": 8, "length": 1, "xxh3": "0" * 32}
HALF = 50


def _norm_chunk(start: int, size: int) -> Document:
    return {"offsets": [start], "sizes": [size], "inline": "00" * 4 * size}


def _chunks(*parts: tuple[int, int]) -> Change:
    """model.norm (100 values) in small inline chunks."""
    return set_at(*NORM, "chunks", to=[_norm_chunk(*part) for part in parts])


def _whole(shape: list[int]) -> Change:
    def change(document: Document) -> None:
        record = document["tensors"]["model.norm"]
        record["shape"] = shape
        record["chunks"][0].update(offsets=[0] * len(shape), sizes=shape)

    return change


def _coding(name: str, **coding: Any) -> Change:
    return set_at("tensors", name, "coding", to=coding)


def _pop(*path: str) -> Change:
    def change(document: Document) -> None:
        node = document
        for key in path[:-1]:
            node = node[key]
        del node[path[-1]]

    return change


CHANGES: dict[str, Change] = {
    "file ../../x": set_at("files", 0, "name", to="../../x"),
    "file absolute": set_at("files", 0, "name", to="/etc/passwd"),
    "file above": set_at("files", 0, "name", to="../rank-00000.effx"),
    "file of a parent": set_at("files", 0, "name", to="../step-1/rank-00000.effx"),
    "file nul": set_at("files", 0, "name", to="rank-00000.effx\0"),
    "file manifest": set_at("files", 0, "name", to=MANIFEST),
    "file twice": lambda d: d["files"].append(d["files"][0]),
    "no files": set_at("files", to=[]),
    "file size negative": set_at("files", 0, "bytes", to=-1),
    "file size bool": set_at("files", 0, "bytes", to=True),
    "file size float": set_at("files", 0, "bytes", to=1e3),
    "file size huge": set_at("files", 0, "bytes", to=2**70),
    "parent ..": set_at("parent", "name", to=".."),
    "parent .": set_at("parent", "name", to="."),
    "parent absolute": set_at("parent", "name", to="/etc"),
    "parent above": set_at("parent", "name", to="../../a/run/step-2"),
    "parent missing": set_at("parent", "name", to="step-77"),
    "parent itself": set_at("parent", "name", to="step-3"),
    "parent another": set_at("parent", "name", to="step-1"),
    "parent none": set_at("parent", to=None),
    "parent no checksum": set_at("parent", to={"name": "step-2"}),
    "parent checksum": set_at("parent", "xxh3", to="0" * 32),
    "parent checksum long": set_at("parent", "xxh3", to="0" * 33),
    "kind unknown": set_at("kind", to="other"),
    "kind base": set_at("kind", to="base"),
    "step negative": set_at("step", to=-3),
    "step bool": set_at("step", to=True),
    "step string": set_at("step", to="3"),
    "unknown key": set_at("run_me", to="os.system"),
    "unknown file key": set_at("files", 0, "mode", to=7),
    "unknown tensor key": set_at(*NORM, "stride", to=[1]),
    "unknown chunk key": set_at(*NORM, "chunks", 0, "pickle", to="gASVBQ=="),
    "unknown block key": set_at(*NORM, "chunks", 0, "blocks", 0, "codec", to="x"),
    "unknown coding": _coding("model.norm", kind="pickle"),
    "no coding": _pop("tensors", "model.norm", "coding"),
    "coding null": set_at(*NORM, "coding", to=None),
    "coding key": _coding("model.norm", kind="planes", level=3),
    "no tensors": _pop("tensors"),
    "tensors a list": set_at("tensors", to=[]),
    "no figures": _pop("figures"),
    "figures nan": set_at("figures", "error", to=math.nan),
    "figures infinite": set_at("figures", "error", to=math.inf),
    "dtype unknown": set_at(*NORM, "dtype", to="float31"),
    "dtype object": set_at(*NORM, "dtype", to="object"),
    "dtype function": set_at(*NORM, "dtype", to="load"),
    "dtype of another size": set_at(*BIAS, "dtype", to="float64"),
    "terabyte": _whole([2**40]),
    "exabytes": _whole([2**61]),
    "more than a count": _whole([2**62]),
    "product overflows": _whole([2**40, 2**40]),
    "negative shape": _whole([-100]),
    "bool shape": _whole([True, 100]),
    "shape of floats": _whole([100.0]),  # type: ignore[list-item]
    "chunks overlap": _chunks((0, HALF), (HALF - 1, HALF), (99, 1)),
    "chunks overlap evenly": _chunks((0, HALF), (0, HALF)),
    "chunks leave a gap": _chunks((0, HALF), (HALF + 1, HALF - 1)),
    "chunks outside": _chunks((0, HALF), (HALF, HALF + 1)),
    "chunk twice": _chunks((0, HALF), (HALF, HALF), (HALF, HALF)),
    "no chunks": set_at(*NORM, "chunks", to=[]),
    "chunk negative": set_at(*NORM, "chunks", 0, "sizes", to=[-100]),
    "chunk offset negative": set_at(*NORM, "chunks", 0, "offsets", to=[-1]),
    "chunk bool": set_at(*NORM, "chunks", 0, "offsets", to=[False]),
    "chunk of other dimensions": set_at(*NORM, "chunks", 0, "sizes", to=[10, 10]),
    "chunk without dimensions": set_at(*NORM, "chunks", 0, "offsets", to=[]),
    "file index": set_at(*NORM, "chunks", 0, "file", to=1),
    "file index negative": set_at(*NORM, "chunks", 0, "file", to=-1),
    "block past the file": set_at(*NORM, "chunks", 0, "blocks", 0, "offset", to=2**40),
    "block longer than the file": set_at(*NORM, "chunks", 0, "blocks", 0, "length", to=2**40),
    "block negative": set_at(*NORM, "chunks", 0, "blocks", 0, "offset", to=-8),
    "block bool": set_at(*NORM, "chunks", 0, "blocks", 0, "length", to=True),
    "block checksum": set_at(*NORM, "chunks", 0, "blocks", 0, "xxh3", to="g" * 32),
    "block checksum newline": set_at(*NORM, "chunks", 0, "blocks", 0, "xxh3", to="0" * 32 + "\n"),
    "no blocks": set_at(*NORM, "chunks", 0, "blocks", to=[]),
    "blocks too many": lambda d: d["tensors"]["model.norm"]["chunks"][0]["blocks"].append(BLOCK),
    "blocks too few": lambda d: d["tensors"]["model.table"]["chunks"][0]["blocks"].pop(),
    "blocks and inline": set_at(*BIAS, "chunks", 0, "blocks", to=[BLOCK]),
    "inline short": set_at(*BIAS, "chunks", 0, "inline", to="00" * 31),
    "inline long": set_at(*BIAS, "chunks", 0, "inline", to="00" * 33),
    "inline odd": set_at(*BIAS, "chunks", 0, "inline", to="0" * 63),
    "inline empty": set_at(*BIAS, "chunks", 0, "inline", to=""),
    "inline in a joint": set_at(*WEIGHT, "chunks", 0, "inline", to="00" * 4 * 64 * 48),
    "inline too large": lambda d: d["tensors"]["model.norm"]["chunks"][0].update(
        inline="00" * 400, blocks=[]
    ),
    "partner missing": _pop("tensors", "optimizer.weight.exp_avg_sq"),
    "partner itself": set_at("tensors", "optimizer.weight.exp_avg", "coding", "weight",
                             to="optimizer.weight.exp_avg"),
    "partner of another kind": set_at("tensors", "optimizer.weight.exp_avg", "coding", "weight",
                                      to="model.norm"),
    "alias of nothing": set_at("aliases", to={"model.tied": "model.gone"}),
    "alias of an alias": set_at("aliases", to={"a": "b", "b": "a"}),
    "alias over a tensor": set_at("aliases", to={"model.norm": "model.bias"}),
    "error nan": set_at(*WEIGHT, "coding", "error", to=math.nan),
    "difference to nothing": lambda d: (d.update(kind="base", parent=None)),
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", CHANGES)
def test_a_hostile_manifest_is_refused(folder: Path, name: str) -> None:
    edit(folder, TOP, CHANGES[name])
    expect_refused(folder, "step-" if name.startswith("parent") else MANIFEST)


QUANTISER_CHANGES: dict[str, Change] = {
    "table nan": set_at("weight", "levels", to=base64.b64encode(struct.pack("<f", math.nan)).decode()),
    "table infinite": set_at("weight", "levels", to=base64.b64encode(struct.pack("<f", math.inf)).decode()),
    "table too long": set_at("weight", "levels", to="AAAAAAAA" * 1000),
    "table not base64": set_at("weight", "levels", to="!!!!"),
    "table not ascii": set_at("weight", "levels", to="\u00e9" * 8),
    "table a list": set_at("weight", "levels", to=[1.0]),
    "table of three bytes": set_at("weight", "levels", to="AAAA"),
    "step nan": set_at("weight", "step", to=math.nan),
    "step huge": set_at("weight", "step", to=1e300),
    "step a huge integer": set_at("weight", "step", to=10**400),
    "step zero": set_at("weight", "step", to=0),
    "step bool": set_at("weight", "step", to=True),
    "levels huge": set_at("weight", "max_level", to=2**40),
    "levels negative": set_at("weight", "max_level", to=-1),
    "kind unknown": set_at("weight", "kind", to="pickle"),
    "kind missing": _pop("weight", "kind"),
    "weight missing": _pop("weight"),
    "weight a list": set_at("weight", to=[]),
    "moments null": set_at("moments", to=None),
    "moments of nothing": set_at("moments", to={}),
    "moments a number": set_at("moments", to=3),
    "profile long": set_at("profile", to="x" * 10**6),
    "error infinite": set_at("squared_error", to=math.inf),
}  # fmt: skip


@pytest.mark.parametrize("change", QUANTISER_CHANGES.values(), ids=QUANTISER_CHANGES.keys())
def test_a_hostile_quantiser_is_refused(folder: Path, change: Change) -> None:
    edit(folder, TOP, lambda d: change(d["tensors"]["model.weight"]["coding"]["quantiser"]))
    expect_refused(folder, "model.weight")


@pytest.mark.parametrize("quantiser", [None, [], 3, "x", {}])
def test_what_is_no_quantiser_is_refused(folder: Path, quantiser: Any) -> None:
    edit(folder, TOP, set_at(*WEIGHT, "coding", "quantiser", to=quantiser))
    expect_refused(folder, "model.weight")


def test_a_quantiser_without_the_moments_that_are_stored_is_refused(folder: Path) -> None:
    edit(folder, TOP, lambda d: d["tensors"]["model.weight"]["coding"]["quantiser"].pop("moments"))
    expect_refused(folder, "weight", in_manifest=False)


def test_a_circle_of_parents_is_refused(folder: Path) -> None:
    def close(document: Document) -> None:
        record = document["tensors"]["model.weight"]
        for name in ("model.weight", "model.low"):
            document["tensors"][name]["coding"] = {"kind": "delta"}
        document.update(kind="link", parent={"name": "step-3", "xxh3": "0" * 32})
        assert record["shape"] == [64, 48]

    edit(folder, BASE, close)
    expect_refused(folder, "circle")


# Versions, and JSON itself


def test_a_newer_version_says_so(folder: Path) -> None:
    edit(folder, TOP, set_at("version", to=VERSION + 1))
    assert "newer" in expect_refused(folder, f"version {VERSION + 1}")


def raw(folder: Path, old: bytes, new: bytes) -> None:
    """Replace a text of the newest manifest that is there once."""
    content = chain.manifest_path(folder, TOP).read_bytes()
    assert content.count(old) == 1
    chain.write_signed(folder, TOP, content.replace(old, new))


def append(folder: Path, member: bytes) -> None:
    content = chain.manifest_path(folder, TOP).read_bytes()
    chain.write_signed(folder, TOP, content[:-1] + b"," + member + b"}")


MEMBERS = {
    "version a string": b'"version":"x"',
    "version null": b'"version":null',
    "version a list": b'"version":[]',
    "deep lists": b'"note":' + b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'"note":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "huge integer": b'"step":' + b"9" * 100_000,
    "not JSON": b'"step":0x10',
    "bad text": b'"writer":"\xff\xfe"',
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS.keys())
def test_hostile_json_is_refused(folder: Path, member: bytes) -> None:
    append(folder, member)
    expect_refused(folder)


def test_what_follows_the_document_is_refused(folder: Path) -> None:
    content = chain.manifest_path(folder, TOP).read_bytes()
    chain.write_signed(folder, TOP, content + b"{}")
    expect_refused(folder)


LONG = "x" * 50_000_000
LONG_PLACES: dict[str, Change] = {
    "dtype": set_at(*NORM, "dtype", to=LONG),
    "kind": set_at("kind", to=LONG),
    "coding": _coding("model.norm", kind=LONG),
    "file": set_at("files", 0, "name", to=LONG),
    "parent": set_at("parent", "name", to=LONG),
    "partner": set_at("tensors", "optimizer.weight.exp_avg", "coding", "weight", to=LONG),
    "tensor": lambda d: d["tensors"].update({LONG: {**d["tensors"]["model.norm"], "dtype": "x"}}),
    "alias": set_at("aliases", to={LONG: "model.gone"}),
    "key": lambda d: d.update({LONG: 1}),
    "inline": set_at(*BIAS, "chunks", 0, "inline", to=LONG),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("change", LONG_PLACES.values(), ids=LONG_PLACES.keys())
def test_fifty_megabytes_of_a_string_are_refused_in_few_words(folder: Path, change: Change) -> None:
    edit(folder, TOP, change)
    expect_refused(folder, "step-3")
