"""A small real chain of checkpoints to damage: a base and two links, of tensors of every kind."""

from __future__ import annotations

import contextlib
import functools
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.format.manifest import BLOCK_NUMEL
from effx_dist.checkpoint.storage.steps import MANIFEST, step_name
from effx_dist.config import ExcpConfig
from effx_dist.shard import Group, SoloGroup

BASE, LINK, TOP = 1, 2, 3
CONFIG = ExcpConfig(profile="balanced", base_every=10, async_mode="sync", keep_latest_k=0)
EXTRA_BYTES = 4 * 2**30
"""Address space that a load may add; a hostile size fails there instead of on this machine."""


class Model(torch.nn.Module):
    """Parameters in fp32 and bf16, of one dimension and of none; buffers of integers, one of two
    blocks."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.weight = torch.nn.Parameter(torch.randn(64, 48, generator=generator))
        self.low = torch.nn.Parameter(torch.randn(32, 40, generator=generator).bfloat16())
        self.norm = torch.nn.Parameter(torch.randn(100, generator=generator))
        self.bias = torch.nn.Parameter(torch.randn(8, generator=generator))
        self.scalar = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("ids", torch.arange(10))
        table = torch.arange(BLOCK_NUMEL + 1024) % 7
        self.register_buffer("table", table.to(torch.int16).view(-1, 1024))


def make() -> tuple[Model, torch.optim.Optimizer]:
    """A fresh model and optimizer, the same each time."""
    model = Model()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step with gradients that depend on ``step`` alone."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter.dtype)
    optimizer.step()


def build(folder: Path, group: Group | None = None) -> None:
    """Save steps 1 to 3 into ``folder``. Every rank of ``group`` holds the same."""
    model, optimizer = make()
    with Checkpointer(folder, CONFIG, group=group or SoloGroup()) as checkpointer:
        for step in (BASE, LINK, TOP):
            train(model, optimizer, step)
            extra = {"note": "kept", "mean": torch.arange(300.0), "nan": float("nan")}
            checkpointer.save(step, model, optimizer, extra=extra)


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Let this process's address space grow by EXTRA_BYTES at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + EXTRA_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def load(folder: Path, step: int | None = None) -> tuple[Model, dict[str, Any]]:
    """Load into a fresh model and optimizer, in bounded memory."""
    model, optimizer = make()
    with Checkpointer(folder, CONFIG, group=SoloGroup()) as checkpointer, bounded_memory():
        return model, checkpointer.load(model, optimizer, step=step)


def manifest_path(folder: Path, step: int) -> Path:
    """Path of a step's manifest."""
    return folder / step_name(step) / MANIFEST


def document_of(folder: Path, step: int) -> dict[str, Any]:
    """A step's manifest as a JSON document."""
    found: dict[str, Any] = json.loads(manifest_path(folder, step).read_bytes())
    return found


def sign(text: bytes) -> bytes:
    """Put the checksum that the text has into it, whatever the text says."""
    zeros = b"0" * 32
    head, mark, rest = text.partition(b'"xxh3_128":"')
    zeroed = head + mark + zeros + rest[32:]
    return zeroed.replace(zeros, xxhash.xxh3_128_hexdigest(zeroed).encode(), 1)


def write_signed(folder: Path, step: int, document: dict[str, Any] | bytes) -> None:
    """Write a manifest with a correct checksum, and make the steps above refer to it again."""
    if isinstance(document, dict):
        document = json.dumps(document, separators=(",", ":")).encode()
    content = sign(document)
    manifest_path(folder, step).write_bytes(content)
    above = step + 1
    if above <= TOP and manifest_path(folder, above).exists():
        child = document_of(folder, above)
        child["parent"]["xxh3"] = json_checksum(content)
        write_signed(folder, above, child)


def json_checksum(content: bytes) -> str:
    """The checksum that a manifest's head states."""
    return content.partition(b'"xxh3_128":"')[2][:32].decode()


def edit(folder: Path, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a step's manifest by ``change(document)``, correctly signed."""
    document = document_of(folder, step)
    change(document)
    write_signed(folder, step, document)


def set_at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that sets one value, by its path in the document."""

    def change(document: dict[str, Any]) -> None:
        parent = functools.reduce(lambda node, key: node[key], path[:-1], document)
        parent[path[-1]] = to

    return change
