"""Text to token ids: bytes, a byte-level BPE trained on the corpus, or a given `tokenizer.json`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from effx_dist.errors import ConfigError
from launch.llama.files import written_whole

Tokens = npt.NDArray[np.uint32]

BYTE_EOS_ID = 256


class Encoder(Protocol):
    """A tokeniser as far as packing needs it."""

    vocab_size: int
    eos_id: int

    def encode(self, text: str) -> Tokens:
        """Ids of `text`, without an end token, uint32[num_tokens]."""
        ...


class ByteEncoder:
    """UTF-8 bytes as ids 0..255, and 256 as the end of a document."""

    vocab_size = BYTE_EOS_ID + 1
    eos_id = BYTE_EOS_ID

    def encode(self, text: str) -> Tokens:
        """UTF-8 bytes of `text`, uint32[num_bytes]."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Tokens) -> str:
        """Text of ids from `encode`; end tokens are left out."""
        return bytes(ids[ids < BYTE_EOS_ID].astype(np.uint8)).decode("utf-8")


class BpeEncoder:
    """A tokeniser of the `tokenizers` library."""

    def __init__(self, tokenizer: Tokenizer, eos_token: str) -> None:
        eos_id = tokenizer.token_to_id(eos_token)
        if eos_id is None:
            raise ConfigError(f"data.eos_token={eos_token!r}: the tokeniser has no such token")
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self.eos_id: int = eos_id

    @classmethod
    def from_file(cls, path: Path, eos_token: str) -> "BpeEncoder":
        """Read a `tokenizer.json`."""
        if not path.is_file():
            raise ConfigError(
                f'data.tokenizer={str(path)!r}: no such file; use "bytes", "bpe", '
                "or the path of a tokenizer.json"
            )
        return cls(Tokenizer.from_file(str(path)), eos_token)

    def encode(self, text: str) -> Tokens:
        """Ids of `text` without special tokens, uint32[num_tokens]."""
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return np.asarray(ids, dtype=np.uint32)

    def decode(self, ids: Tokens) -> str:
        """Text of ids from `encode`; special tokens are left out."""
        return str(self._tokenizer.decode(ids.tolist()))


def train_bpe(texts: Iterable[str], vocab_size: int, eos_token: str, path: Path) -> BpeEncoder:
    """Train a byte-level BPE on `texts` and keep it in `path`, or read it where it exists."""
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[eos_token],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        with written_whole(path) as temporary:
            tokenizer.save(str(temporary))
    return BpeEncoder.from_file(path, eos_token)
