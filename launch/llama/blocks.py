"""Documents packed into blocks of one length: block i is sample i.

Documents follow one another, each closed by the end token, and the stream is cut every
`seq_len + 1` tokens: every token stands in exactly one block, and only the tail that does not
fill a block is left out. A block gives `seq_len` inputs and the `seq_len` targets after them.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
import xxhash
from torch.utils.data import Dataset

from effx_dist.errors import ConfigError
from launch.llama.corpus import Corpus, is_held_out, open_corpus
from launch.llama.files import made_by_rank_zero, written_whole
from launch.llama.settings import DataSettings
from launch.llama.tokens import BpeEncoder, ByteEncoder, Encoder, Tokens, train_bpe

BLOCKS_PER_WRITE = 4096


class BlockDataset(Dataset[dict[str, torch.Tensor]]):
    """Samples `{"input_ids", "labels"}`, both int64[seq_len]; labels are already the targets.

    `max_samples` > 0 takes that many samples, evenly spread over the whole file.
    """

    def __init__(self, path: Path, max_samples: int = 0) -> None:
        self._path = path
        self._blocks: npt.NDArray[np.unsignedinteger] = np.load(path, mmap_mode="r")
        self._num_samples = min(len(self._blocks), max_samples or len(self._blocks))

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self._num_samples:
            raise IndexError(f"sample {index} of {self._num_samples}")
        row = index * len(self._blocks) // self._num_samples
        block = torch.from_numpy(self._blocks[row].astype(np.int64))
        return {"input_ids": block[:-1], "labels": block[1:]}


@dataclass(frozen=True)
class PreparedData:
    """What training needs of the corpus."""

    train: BlockDataset
    held_out: BlockDataset


def prepare(data: DataSettings, vocab_size: int, cache_dir: Path) -> PreparedData:
    """Tokenise and pack the corpus on rank 0, once, and open the result on every rank.

    Performs one small broadcast. What is found in `cache_dir` under the same content, settings
    and vocabulary size is used again.
    """
    names = made_by_rank_zero(
        cache_dir / "prepared.json", lambda: _write_blocks(data, vocab_size, cache_dir)
    )
    return PreparedData(
        BlockDataset(cache_dir / names["train"], data.max_samples),
        BlockDataset(cache_dir / names["held_out"], data.max_heldout_samples),
    )


def pack(documents: Iterable[Tokens], eos_id: int, width: int) -> Iterator[Tokens]:
    """Join documents by `eos_id` and cut: yields uint32[num_blocks, width], a few at a time."""
    waiting: list[Tokens] = []
    num_waiting = 0
    eos = np.array([eos_id], dtype=np.uint32)
    for document in documents:
        waiting += [document, eos]
        num_waiting += len(document) + 1
        if num_waiting >= width * BLOCKS_PER_WRITE:
            stream = np.concatenate(waiting)
            whole = len(stream) - len(stream) % width
            yield stream[:whole].reshape(-1, width)
            waiting, num_waiting = [stream[whole:]], len(stream) - whole
    stream = np.concatenate([*waiting, eos[:0]])
    yield stream[: len(stream) - len(stream) % width].reshape(-1, width)


def write_blocks(path: Path, blocks: Iterable[Tokens], width: int, vocab_size: int) -> int:
    """Write blocks to a `.npy` of the smallest unsigned type that holds the vocabulary.

    Returns the number of blocks. The file appears by rename when it is whole.
    """
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    num_blocks = 0
    with written_whole(path) as temporary, temporary.open("wb") as file:
        _write_header(file, (0, width), dtype)
        start = file.tell()
        for part in blocks:
            file.write(part.astype(dtype).tobytes())
            num_blocks += len(part)
        file.seek(0)
        _write_header(file, (num_blocks, width), dtype)
        # numpy pads the header so that the first axis may grow; rely on it, but not blindly.
        assert file.tell() == start
    return num_blocks


def _write_header(file: BinaryIO, shape: tuple[int, int], dtype: np.dtype[Any]) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _write_blocks(data: DataSettings, vocab_size: int, cache_dir: Path) -> dict[str, str]:
    corpus = open_corpus(data.source, data.text_field, data.document)
    tokenizer_file = Path(data.tokenizer)
    tokens = _key(
        _content_hash(corpus),
        data.heldout_fraction,
        data.tokenizer,
        data.eos_token,
        vocab_size,
        xxhash.xxh3_64(tokenizer_file.read_bytes()).hexdigest()
        if tokenizer_file.is_file()
        else None,
    )
    key = f"{tokens}-{data.seq_len}"
    names = {"train": f"train-{key}.npy", "held_out": f"held_out-{key}.npy"}
    if all((cache_dir / name).exists() for name in names.values()):
        return names
    encoder = _make_encoder(corpus, data, vocab_size, cache_dir / f"bpe-{tokens}.json")
    for part, name in names.items():
        texts = _documents(corpus, data, held_out=part == "held_out")
        blocks = pack(map(encoder.encode, texts), encoder.eos_id, data.seq_len + 1)
        num_blocks = write_blocks(cache_dir / name, blocks, data.seq_len + 1, vocab_size)
        if not num_blocks:
            (cache_dir / name).unlink()
            raise ConfigError(
                f"data.source={data.source!r}: the {part} documents do not fill one block of "
                f"data.seq_len={data.seq_len}; there is too little text, or "
                f"data.heldout_fraction={data.heldout_fraction} leaves that part empty "
                '(the split is by document; data.document="paragraph" makes more of them)'
            )
    return names


def _documents(corpus: Corpus, data: DataSettings, held_out: bool) -> Iterator[str]:
    for text in corpus.documents():
        if is_held_out(text, data.heldout_fraction) == held_out:
            yield text


def _make_encoder(corpus: Corpus, data: DataSettings, vocab_size: int, cached: Path) -> Encoder:
    encoder: Encoder
    if data.tokenizer == "bytes":
        encoder = ByteEncoder()
    elif data.tokenizer == "bpe":
        texts = _documents(corpus, data, held_out=False)
        encoder = train_bpe(texts, vocab_size, data.eos_token, cached)
    else:
        encoder = BpeEncoder.from_file(Path(data.tokenizer), data.eos_token)
    if encoder.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the tokeniser {data.tokenizer!r} "
            f"has {encoder.vocab_size} ids; raise it to that at least"
        )
    return encoder


def _content_hash(corpus: Corpus) -> str:
    digest = xxhash.xxh3_128()
    for text in corpus.documents():
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


def _key(*parts: object) -> str:
    return xxhash.xxh3_64(repr(parts).encode()).hexdigest()
