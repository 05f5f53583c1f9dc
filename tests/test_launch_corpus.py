"""Readers of text: every kind of file gives the same documents, and every fault names its file."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.errors import ConfigError
from launch.llama.corpus import is_held_out, open_corpus

TEXTS = [
    "First text.\n",
    "Second: \u00fcml\u00e4ut \u4e2d\u6587 \U0001f600\n",
    "Third\nhas lines\n",
]


def documents(source: object, **options: str) -> list[str]:
    return list(open_corpus(str(source), **options).documents())


def jsonl(field: str = "text") -> bytes:
    return "".join(json.dumps({"id": 1, field: text}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_plain_and_compressed_files_give_the_same_documents(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    (tmp_path / f"lines.jsonl{suffix}").write_bytes(pack(jsonl()))
    assert documents(tmp_path / f"lines.jsonl{suffix}") == TEXTS
    for number, text in enumerate(TEXTS):
        (tmp_path / f"{number}.txt{suffix}").write_bytes(pack(text.encode()))
    assert documents(tmp_path / f"*.txt{suffix}") == TEXTS


def test_folder_is_read_deeply_in_name_order_and_other_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "c.txt").write_text(" \n ")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    assert documents(tmp_path) == ["one", "two"]


def test_text_field_is_chosen(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(field="body"))
    assert documents(tmp_path, text_field="body") == TEXTS
    with pytest.raises(ConfigError, match=r"a\.jsonl, line 1: no text in field 'text'.*body"):
        documents(tmp_path)


def test_paragraphs_become_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nmore\n\n\n  \ntwo\n\nthree")
    assert documents(tmp_path, document="paragraph") == ["one\nmore\n", "two\n", "three"]


def test_package_is_read_without_being_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "pack_of_texts"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    (package / "data" / "b.txt").write_text("two")
    (package / "data" / "a.txt").write_text("one")
    monkeypatch.syspath_prepend(tmp_path)
    assert documents("package:pack_of_texts") == ["one", "two"]


def test_missing_package_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match="pip install --no-deps no_such_package_of_texts"):
        documents("package:no_such_package_of_texts")


@pytest.mark.parametrize("source", ["nothing.txt", "no/*.jsonl", "."])
def test_nothing_found_names_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.source="):
        documents(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 in Latin-1", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', "no text in field"),
        ("a.jsonl", b'{"text": 3}\n', "no text in field"),
        ("a.txt.gz", b"not gzip at all", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"long text " * 99)[:-20], "cannot be read"),
        ("a.txt.zst", b"not zstandard", "cannot be read"),
    ],
)
def test_faulty_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        documents(tmp_path)
    assert name in str(caught.value)


@given(st.text(), st.floats(0, 1))
def test_held_out_part_grows_with_the_fraction(text: str, fraction: float) -> None:
    assert not is_held_out(text, 0.0)
    assert is_held_out(text, 1.0)
    if is_held_out(text, fraction):
        assert is_held_out(text, min(1.0, fraction * 1.5))


def test_held_out_part_has_about_its_share() -> None:
    # Binomial with n = 20000, p = 0.1: five standard deviations are 212.
    held_out = sum(is_held_out(f"document {number}", 0.1) for number in range(20000))
    assert abs(held_out - 2000) < 212
