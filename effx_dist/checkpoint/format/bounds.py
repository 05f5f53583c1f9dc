"""How much a checkpoint may ask for where the caller has not said it with tensors of his own.

A load into live tensors takes their memory and one block's, whatever a manifest declares. Tools have
no such tensors: a few bytes may declare a tensor of any size (all of one value), so the total that a
manifest declares is held against a bound before anything is decoded.
"""

from __future__ import annotations

import os

import torch

from effx_dist.checkpoint.format.manifest import TensorRecord, short
from effx_dist.errors import ConfigError, CorruptCheckpointError

DEFAULT_MAX_DECODED_BYTES = 2**46
"""64 TiB: the fp32 weights and moments of four trillion parameters."""
_bound = DEFAULT_MAX_DECODED_BYTES


def set_max_decoded_bytes(num_bytes: int) -> None:
    """Set the bound of this process, in bytes. Raises ConfigError for less than 1."""
    global _bound
    if num_bytes < 1:
        raise ConfigError(f"max_decoded_bytes={num_bytes}: must be >= 1")
    _bound = num_bytes


def check_declared(declared: int, where: object) -> None:
    """Raise CorruptCheckpointError for a checkpoint whose tensors come to more bytes than the bound."""
    if declared > _bound:
        raise CorruptCheckpointError(
            f"{where}: declares tensors of {declared} bytes, at most {_bound} are decoded. If the "
            f"checkpoint is that large: effx --max-decoded-bytes {declared}, or set_max_decoded_bytes()"
        )


def empty_for(name: str, record: TensorRecord) -> torch.Tensor:
    """Host memory for a whole tensor that a manifest describes and nobody has.

    Raises CorruptCheckpointError where that is more than the bound, or than this machine has.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    bound = min(_bound, memory)
    if record.raw_bytes > bound:
        raise CorruptCheckpointError(
            f"{name}: declares {record.raw_bytes} bytes; at most {bound} are taken for a tensor that "
            f"only the checkpoint knows of (this machine's memory, or what set_max_decoded_bytes() says)"
        )
    try:
        return torch.empty(record.shape, dtype=record.torch_dtype)
    except RuntimeError as error:
        raise CorruptCheckpointError(
            f"{name}: no memory for a tensor of shape {record.shape}: {short(str(error))}"
        ) from None
