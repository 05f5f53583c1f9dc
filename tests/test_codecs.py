"""Codecs: exact round trips, golden bytes, bounded decoding of hostile bytes."""

from __future__ import annotations

import importlib.metadata
import json
import zlib

import numcodecs
import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs.abc import Codec

from effx_dist.codecs import BytePlanes, SparseSymbols, pack, pack_inside, unpack, unpack_inside
from effx_dist.codecs.streams import Reader, decode_stream, encode_stream, write_varint
from effx_dist.codecs.zstd import zstd_decode, zstd_encode
from tests.fixtures.codecs.write import FOLDER, arrays, sparse_symbols

CODECS: list[Codec] = [BytePlanes(), BytePlanes(itemsize=2, level=1), SparseSymbols()]


def _bytes(values: np.ndarray) -> bytes:
    return values.tobytes()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("num_bytes", [0, 4, 8, 4000, 300_000])
def test_numcodecs_round_trip(codec: Codec, num_bytes: int) -> None:
    values = np.random.default_rng(0).normal(size=num_bytes // 4).astype(np.float32)
    payload = codec.encode(values)
    assert isinstance(payload, bytes)
    assert _bytes(np.asarray(codec.decode(payload))) == _bytes(values)
    assert _bytes(codec.decode_bounded(payload, num_bytes)) == _bytes(values)
    out = np.full(num_bytes // 4, np.nan, dtype=np.float32)
    codec.decode(bytearray(payload), out=out)
    assert _bytes(out) == _bytes(values)


@pytest.mark.parametrize("codec", CODECS, ids=str)
def test_config_is_json_and_rebuilds_the_codec(codec: Codec) -> None:
    config = json.loads(json.dumps(codec.get_config()))
    assert config["id"] == codec.codec_id
    assert type(codec).from_config({k: v for k, v in config.items() if k != "id"}) == codec


def test_numcodecs_finds_the_codecs_by_entry_point() -> None:
    points = {p.name: p for p in importlib.metadata.entry_points(group="numcodecs.codecs")}
    if "effx_planes" not in points:
        pytest.skip("effx_dist is not installed here, so it has no entry points")
    for codec_class in (BytePlanes, SparseSymbols):
        assert points[codec_class.codec_id].load() is codec_class
        assert isinstance(numcodecs.get_codec({"id": codec_class.codec_id}), codec_class)


SYMBOLS = hnp.arrays(
    np.uint8, st.integers(0, 400), elements=st.sampled_from([0, 0, 0, 0, 1, 2, 15, 16, 17, 255])
)


@given(SYMBOLS)
def test_pack_round_trip(symbols: np.ndarray) -> None:
    assert np.array_equal(unpack(pack(symbols), symbols.size, 256), symbols)


@given(SYMBOLS, st.data())
def test_pack_inside_round_trip(symbols: np.ndarray, data: st.DataObject) -> None:
    extra = data.draw(hnp.arrays(np.bool_, symbols.size))
    support = (symbols != 0) | extra
    payload = pack_inside(symbols, support)
    assert np.array_equal(unpack_inside(payload, support, 256), symbols)


def test_inside_a_tight_support_there_is_no_mask() -> None:
    symbols = sparse_symbols(50_000, 0.1, 14)
    support = symbols != 0
    without_mask = len(pack_inside(symbols, support))
    assert without_mask + 50_000 * 0.4 / 8 < len(pack(symbols))


def test_a_symbol_outside_the_support_is_refused() -> None:
    with pytest.raises(ValueError, match="outside the support"):
        pack_inside(np.array([1, 2], dtype=np.uint8), np.array([True, False]))


def _entropy_bytes(symbols: np.ndarray) -> float:
    share = np.bincount(symbols) / symbols.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum() * symbols.size / 8)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
def test_packed_size_is_close_to_the_entropy(density: float) -> None:
    """Independent symbols as a dead-zone quantiser makes them: within 6 % of the ideal."""
    rng = np.random.default_rng(0)
    level = np.minimum(rng.geometric(0.85, size=200_000), 15)
    symbols = (2 * level - rng.integers(0, 2, size=level.size)) * (rng.random(level.size) < density)
    symbols = symbols.astype(np.uint8)
    assert len(pack(symbols)) < 1.06 * _entropy_bytes(symbols)


@pytest.mark.parametrize(
    "data",
    [
        np.zeros(0, np.uint8),
        np.full(1000, 7, np.uint8),
        np.arange(256, dtype=np.uint8),
        np.tile(np.arange(100, dtype=np.uint8), 100),
        np.random.default_rng(0).integers(0, 3, 5000).astype(np.uint8),
        np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8),
    ],
    ids=["empty", "repeat", "short", "zstd", "huffman", "raw"],
)
def test_stream_round_trip_and_never_much_larger(data: np.ndarray) -> None:
    payload = encode_stream(data, 1)
    assert len(payload) <= data.size + 4
    reader = Reader(payload)
    assert np.array_equal(decode_stream(reader, data.size), data)
    reader.finish()


def test_every_stream_coding_is_used_somewhere() -> None:
    rng = np.random.default_rng(0)
    samples = [
        rng.integers(0, 256, 100).astype(np.uint8),
        np.tile(np.arange(100, dtype=np.uint8), 100),
        np.packbits(rng.random(400_000) < 0.05),
        np.zeros(9, np.uint8),
    ]
    assert [encode_stream(data, 1)[0] for data in samples] == [0, 1, 2, 3]


@given(st.integers(0, 2**62))
def test_varint_round_trip(value: int) -> None:
    reader = Reader(write_varint(value))
    assert reader.varint() == value
    reader.finish()


INDEX = json.loads((FOLDER / "index.json").read_text())


def test_every_golden_payload_is_listed() -> None:
    assert {path.stem for path in FOLDER.glob("*.bin")} == set(INDEX) == set(arrays())


@pytest.mark.parametrize("name", sorted(INDEX))
def test_golden_payloads_are_still_read(name: str) -> None:
    payload, expected = (FOLDER / f"{name}.bin").read_bytes(), arrays()[name]
    entry = INDEX[name]
    if entry["codec"] is None:
        decoded = unpack_inside(payload, arrays()["symbols_sparse"] != 0)
    else:
        config = dict(entry["codec"])
        codec = {"effx_planes": BytePlanes, "effx_symbols": SparseSymbols}[config.pop("id")]
        decoded = codec.from_config(config).decode_bounded(payload, entry["num_bytes"])
    assert np.array_equal(decoded, expected)


def _payloads() -> list[tuple[bytes, int]]:
    return [
        (pack(values), values.size)
        for values in (
            sparse_symbols(500, 0.1, 14),
            sparse_symbols(500, 1.1, 14),
            sparse_symbols(500, 0.3, 200),
            np.full(99, 3, dtype=np.uint8),
        )
    ]


@given(data=st.data())
@settings(max_examples=300)
def test_damaged_symbols_are_refused_or_stay_in_range(data: st.DataObject) -> None:
    payload, num_values = data.draw(st.sampled_from(_payloads()))
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for hostile in (bytes(damaged), bytes(damaged[:cut]), bytes(damaged) + b"\0"):
        try:
            symbols = unpack(hostile, num_values, 20)
        except ValueError:
            continue
        assert symbols.shape == (num_values,)
        assert symbols.max(initial=0) < 20


@given(st.binary(max_size=200), st.integers(0, 1000))
@settings(max_examples=300)
def test_any_bytes_are_refused_or_decode_to_the_expected_size(data: bytes, expected: int) -> None:
    support = np.arange(2 * expected) % 2 == 0
    decoders = (
        lambda: unpack(data, expected, 16),
        lambda: unpack_inside(data, support, 16)[support],
        lambda: SparseSymbols().decode_bounded(data, expected),
        lambda: BytePlanes(1).decode_bounded(data, expected),
    )
    for decode in decoders:
        try:
            out = decode()
        except ValueError:
            continue
        assert out.size == expected


def _zstd_bomb(stated: int) -> bytes:
    """A valid header that states a huge content size."""
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(bytes(1 << 20)))
    header = b"\x28\xb5\x2f\xfd\xe0" + stated.to_bytes(8, "little")
    return header + bytes(frame[-16:])


@pytest.mark.parametrize("stated", [5, 1 << 40, 1 << 62])
def test_a_zstd_frame_of_another_size_is_refused_before_decoding(stated: int) -> None:
    with pytest.raises(ValueError, match=f"holds {stated} bytes, must be 8"):
        BytePlanes().decode_bounded(_zstd_bomb(stated), 8)


def test_a_zstd_frame_that_holds_more_than_it_states_is_refused() -> None:
    frame = bytearray(zstd_encode(bytes(300), 1))
    assert frame[4] >> 6 == 1, "two byte content size"
    frame[5:7] = (8).to_bytes(2, "little")
    with pytest.raises(ValueError, match="zstd"):
        zstd_decode(bytes(frame), 264)


def test_zstd_frames_without_a_size_or_with_a_tail_are_refused() -> None:
    sizeless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10))
    with pytest.raises(ValueError, match="does not state its content size"):
        zstd_decode(sizeless, 10)
    with pytest.raises(ValueError, match="damaged frame"):
        zstd_decode(zstd_encode(bytes(10), 1) + b"tail", 10)
    with pytest.raises(ValueError, match="not a frame"):
        zstd_decode(b"plain text", 10)


def test_a_deflate_bomb_is_refused() -> None:
    coder = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = coder.compress(bytes(1 << 24)) + coder.flush()
    stream = bytes([2]) + write_varint(len(body)) + body
    with pytest.raises(ValueError, match="does not hold 100 bytes"):
        decode_stream(Reader(stream), 100)


@pytest.mark.parametrize(
    ("payload", "num_values", "message"),
    [
        (b"", 3, "ends before"),
        (b"\x07", 3, "layout: 7"),
        (b"\x00\x00", 3, "1 bytes too many"),
        (b"\x01\x09\x01a", 2, "tag 9"),
        (b"\x01\x00" + b"\xff" * 9, 2, "varint"),
        (b"\x01\x00\x02aa", 2, "2 bytes, must be 1"),
        (b"\x02\x00\x01\xff\x00\x01\x11\x00", 3, "beyond num_values"),
        (b"\x01\x00\x01\x11\x00", 1, "half pair"),
        (b"\x01\x00\x01\x0f\x00", 1, "0 large symbols stated, 1 marked"),
        (b"\x01\x00\x01\x0f\x01\x00\x01\x02", 1, "2 among the large"),
        (b"\x01\x00\x01\x05\x00", 1, "symbol 6"),
    ],
)
def test_malformed_payloads_name_what_is_wrong(
    payload: bytes, num_values: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(payload, num_values, 6)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="itemsize"):
        BytePlanes(itemsize=0)
    with pytest.raises(ValueError, match="multiple of"):
        BytePlanes().encode(np.zeros(5, np.uint8))
    with pytest.raises(ValueError, match="multiple of"):
        BytePlanes().decode_bounded(BytePlanes().encode(np.zeros(4, np.uint8)), 5)
    with pytest.raises(ValueError, match="states 9 symbols, must be 8"):
        SparseSymbols().decode_bounded(SparseSymbols().encode(np.zeros(9, np.uint8)), 8)
