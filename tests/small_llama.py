"""Settings and texts of pre-training runs that take seconds."""

from __future__ import annotations

import random
from pathlib import Path

_SETTINGS = """
[model]
hidden_size = 32
intermediate_size = 64
num_layers = 2
num_heads = 2
vocab_size = 288

[data]
source = "{source}"
seq_len = 16
heldout_fraction = 0.2
max_samples = {max_samples}
max_heldout_samples = 13
cache_dir = "{cache}"

[train]
num_epochs = {num_epochs}
global_batch_size = 8
micro_batch_size = 2
lr = 3e-3
warmup_epochs = 0.2
seed = 5

[eval]
every_steps = {eval_every_steps}
batch_size = {eval_batch_size}

[log]
every_steps = 2
tensorboard = false

[checkpoint]
every_steps = 6
"""


def write_texts(folder: Path, num_texts: int, num_words: int) -> Path:
    """A folder of texts in which a small model finds something to learn, the same each time."""
    folder.mkdir()
    words = random.Random(3)
    for number in range(num_texts):
        text = " ".join(f"{words.choice('abcdef')}{words.randrange(50)}" for _ in range(num_words))
        (folder / f"{number:02}.txt").write_text(text)
    return folder


def settings(texts: Path, **values: int) -> str:
    """A run's settings file over ``texts``. Values: max_samples, num_epochs, eval_every_steps and
    eval_batch_size."""
    return _SETTINGS.format(source=texts, cache=texts.parent / "cache", **values)
