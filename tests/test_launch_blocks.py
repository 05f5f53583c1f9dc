"""Packing: every token stands in exactly one block, in order, whatever the documents' lengths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.errors import ConfigError
from launch.llama import blocks
from launch.llama.blocks import BlockDataset, pack, prepare, write_blocks
from launch.llama.corpus import is_held_out
from launch.llama.settings import DataSettings
from launch.llama.tokens import BYTE_EOS_ID, BpeEncoder, ByteEncoder, train_bpe


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=30), st.integers(2, 17), st.integers(1, 3))
def test_every_token_stands_in_one_block_in_order(
    lengths: list[int], width: int, blocks_per_write: int
) -> None:
    ids = iter(range(10_000))
    documents = [np.array([next(ids) for _ in range(n)], dtype=np.uint32) for n in lengths]
    eos = 77_777
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCKS_PER_WRITE", blocks_per_write)
        packed = np.concatenate(list(pack(documents, eos, width)))
    stream = [token for document in documents for token in (*document.tolist(), eos)]
    assert packed.shape[1] == width
    assert packed.ravel().tolist() == stream[: len(stream) // width * width]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_file_holds_the_blocks(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    parts = [np.arange(12, dtype=np.uint32).reshape(3, 4) + 65500, np.zeros((1, 4), np.uint32)]
    assert write_blocks(tmp_path / "a.npy", parts, 4, vocab_size) == 4
    stored = np.load(tmp_path / "a.npy", mmap_mode="r")
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, np.concatenate(parts))
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_sample_gives_inputs_and_the_targets_after_them(tmp_path: Path) -> None:
    write_blocks(tmp_path / "a.npy", [np.arange(10, dtype=np.uint32).reshape(2, 5)], 5, 300)
    sample = BlockDataset(tmp_path / "a.npy")[1]
    assert sample["input_ids"].tolist() == [5, 6, 7, 8]
    assert sample["labels"].tolist() == [6, 7, 8, 9]


@given(st.integers(1, 200), st.integers(0, 250))
@settings(max_examples=40, deadline=None)
def test_max_samples_are_spread_over_all_blocks(num_blocks: int, max_samples: int) -> None:
    rows = np.arange(num_blocks, dtype=np.uint32).repeat(2).reshape(num_blocks, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks.np, "load", lambda *_, **__: rows)
        dataset = BlockDataset(Path("unused"), max_samples)
    taken = [int(dataset[index]["input_ids"][0]) for index in range(len(dataset))]
    assert len(taken) == min(num_blocks, max_samples or num_blocks)
    gaps = np.diff([*taken, num_blocks])
    assert taken[0] == 0
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def corpus_folder(folder: Path, num_documents: int = 40) -> Path:
    folder.mkdir()
    for number in range(num_documents):
        text = f"Document {number}: " + " ".join(str(number * k) for k in range(30))
        (folder / f"{number:03}.txt").write_text(text)
    return folder


def data_settings(source: Path, **changes: object) -> DataSettings:
    return DataSettings.model_validate(
        {"source": str(source), "seq_len": 16, "heldout_fraction": 0.3, **changes}
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_prepared_parts_decode_to_their_documents(tmp_path: Path, tokenizer: str) -> None:
    source = corpus_folder(tmp_path / "texts")
    data = prepare(data_settings(source, tokenizer=tokenizer), 320, tmp_path / "cache")
    bpe = next((tmp_path / "cache").glob("bpe-*.json"), None)
    encoder = BpeEncoder.from_file(bpe, "</s>") if bpe else ByteEncoder()
    texts = [path.read_text() for path in sorted(source.iterdir())]
    for part, held_out in ((data.train, False), (data.held_out, True)):
        wanted = "".join(text for text in texts if is_held_out(text, 0.3) == held_out)
        rows = np.array([part[index]["input_ids"].tolist() for index in range(len(part))])
        last = np.array([part[index]["labels"].tolist()[-1] for index in range(len(part))])
        stream = np.concatenate([rows, last[:, None]], axis=1).ravel()
        read = encoder.decode(stream[stream != encoder.eos_id])
        assert len(read) > len(wanted) - 200
        assert wanted.startswith(read)


def test_cache_is_used_again_until_the_corpus_changes(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "texts")
    cache = tmp_path / "cache"
    prepare(data_settings(source, tokenizer="bpe"), 320, cache)
    first = {path.name: path.stat().st_mtime_ns for path in cache.iterdir()}
    prepare(data_settings(source, tokenizer="bpe"), 320, cache)
    assert {path.name: path.stat().st_mtime_ns for path in cache.iterdir()} == first
    (source / "extra.txt").write_text("One more document.")
    prepare(data_settings(source, tokenizer="bpe"), 320, cache)
    assert len(list(cache.iterdir())) == 2 * len(first)


def test_seq_len_alone_does_not_train_the_tokeniser_again(tmp_path: Path) -> None:
    source = corpus_folder(tmp_path / "texts")
    for seq_len in (16, 8):
        prepare(data_settings(source, tokenizer="bpe", seq_len=seq_len), 320, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("bpe-*.json"))) == 1


@pytest.mark.parametrize(
    ("changes", "vocab_size", "message"),
    [
        ({}, 256, r"model\.vocab_size=256"),
        ({"seq_len": 10**6}, 320, "do not fill one block"),
        ({"heldout_fraction": 1e-9}, 320, "held_out documents do not fill"),
        ({"tokenizer": "no/tokenizer.json"}, 320, "no such file"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, changes: dict[str, object], vocab_size: int, message: str
) -> None:
    source = corpus_folder(tmp_path / "texts")
    with pytest.raises(ConfigError, match=message):
        prepare(data_settings(source, **changes), vocab_size, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("held_out-*"))


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_come_back(text: str) -> None:
    encoder = ByteEncoder()
    ids = encoder.encode(text)
    assert encoder.decode(ids) == text
    assert not (ids >= BYTE_EOS_ID).any()


def test_bpe_comes_back_and_needs_its_end_token(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", "the dog sat on the log"] * 5
    path = tmp_path / "bpe.json"
    encoder = train_bpe(texts, 300, "<end>", path)
    assert encoder.vocab_size <= 300
    unseen = "a c\u00e4t \u4e2d <end> \n\t"
    assert "c\u00e4t \u4e2d" in encoder.decode(encoder.encode(unseen))
    assert len(encoder.encode("the cat")) < len("the cat")
    with pytest.raises(ConfigError, match="no such token"):
        BpeEncoder.from_file(path, "<other>")
