"""One stored tensor looked at closely: its pieces, its quantiser, and how its values lie."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.checkpoint.format.manifest import (
    ChunkRecord,
    Delta,
    JointWeight,
    Manifest,
    TensorRecord,
)
from effx_dist.checkpoint.format.reader import ChainReader, open_checkpoint
from effx_dist.checkpoint.format.whole_tensors import read_pieces
from effx_dist.checkpoint.storage.steps import MANIFEST
from effx_dist.core.excp import JointQuantiser
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError

NUM_BINS = 16


@dataclass(frozen=True)
class StoredPiece:
    """One box of the tensor, as one rank wrote it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    """Name of the data file; empty where the piece stands in the manifest."""
    num_blocks: int
    stored_bytes: int


@dataclass(frozen=True)
class Histogram:
    """Counts of finite values other than 0 between ``edges[i]`` and ``edges[i + 1]``."""

    of: str
    """What is counted."""
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    num_zeros: int
    num_not_finite: int


@dataclass(frozen=True)
class TensorDetail:
    """What ``effx inspect --tensor`` shows."""

    name: str
    stored_as: str
    """Another name where this one is an alias (a tied weight)."""
    step: int
    dtype: str
    shape: tuple[int, ...]
    coding: str
    parent: str | None
    """The step that its values are a difference to; None where it stands alone."""
    pieces: tuple[StoredPiece, ...]
    raw_bytes: int
    stored_bytes: int
    quantiser: dict[str, Any] | None
    """For a joint's weight: profile, kind, step, numbers of symbols, and the relative rms error that it
    makes; else None."""
    histogram: Histogram


@dataclass(frozen=True)
class TensorSummary:
    """One line of ``effx inspect --step``: a stored tensor, in bytes as decoded and as stored."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    coding: str
    num_pieces: int
    raw_bytes: int
    stored_bytes: int
    error: float | None
    """Relative rms error of a joint's weight; None for the others."""


def list_tensors(chain: ChainReader) -> list[TensorSummary]:
    """Every stored tensor of a checkpoint, by name. Reads the manifest only."""
    manifest = chain.top.manifest
    return [
        TensorSummary(
            name=name,
            dtype=record.dtype,
            shape=tuple(record.shape),
            coding=record.coding.kind,
            num_pieces=len(record.chunks),
            raw_bytes=manifest.tensors[name].raw_bytes,
            stored_bytes=sum(_piece(chunk, manifest).stored_bytes for chunk in record.chunks),
            error=record.coding.error if isinstance(record.coding, JointWeight) else None,
        )
        for name, record in sorted(manifest.tensors.items())
    ]


def describe_tensor(chain: ChainReader, name: str) -> TensorDetail:
    """Look at one tensor or alias; its values are read in pieces, twice.

    Raises CheckpointNotFoundError, which names the nearest names, where there is no such tensor;
    CorruptCheckpointError.
    """
    manifest = chain.top.manifest
    record = chain.record(name)
    if record is None:
        raise CheckpointNotFoundError(_no_such_tensor(chain, name))
    is_difference = isinstance(record.coding, Delta | JointWeight)
    pieces = tuple(_piece(chunk, manifest) for chunk in record.chunks)
    return TensorDetail(
        name=name,
        stored_as=chain.resolve(name),
        step=manifest.step,
        dtype=record.dtype,
        shape=tuple(record.shape),
        coding=record.coding.kind,
        parent=manifest.parent.name if is_difference and manifest.parent else None,
        pieces=pieces,
        raw_bytes=manifest.tensors[chain.resolve(name)].raw_bytes,
        stored_bytes=sum(piece.stored_bytes for piece in pieces),
        quantiser=_quantiser(record, name),
        histogram=_histogram(chain, name, is_difference),
    )


def _no_such_tensor(chain: ChainReader, name: str) -> str:
    names = [*chain.top.manifest.tensors, *chain.top.manifest.aliases]
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    near += sorted(n for n in names if name in n and n not in near)[:5]
    advice = f"nearest: {', '.join(near)}" if near else f"there are {len(names)} others"
    return f"{chain.top.folder}: holds no tensor {name!r}; {advice}"


def _piece(chunk: ChunkRecord, manifest: Manifest) -> StoredPiece:
    inline = chunk.inline is not None
    return StoredPiece(
        offsets=tuple(chunk.offsets),
        sizes=tuple(chunk.sizes),
        file=manifest.files[chunk.file].name if chunk.blocks else "",
        num_blocks=len(chunk.blocks),
        stored_bytes=len(chunk.inline or "")
        if inline
        else sum(block.length for block in chunk.blocks),
    )


def _quantiser(record: TensorRecord, name: str) -> dict[str, Any] | None:
    if not isinstance(record.coding, JointWeight):
        return None
    try:
        quantiser = JointQuantiser.from_json(record.coding.quantiser)
    except ValueError as error:
        raise CorruptCheckpointError(f"{name}: its quantiser cannot be read: {error}") from error
    own = record.coding.quantiser
    weight = own.get("weight", {})
    return {
        "profile": own.get("profile"),
        "kind": weight.get("kind"),
        "step": weight.get("step"),
        "symbols": quantiser.num_w_symbols,
        "exp_avg symbols": quantiser.num_m_symbols,
        "exp_avg_sq symbols": quantiser.num_v_symbols,
        "error": record.coding.error,
    }


def _histogram(chain: ChainReader, name: str, is_difference: bool) -> Histogram:
    parent = chain.top.manifest.parent
    beside = chain.top.folder.parent
    # a parent may have been folded into a base inside the step, and be gone
    if not is_difference or parent is None or not (beside / parent.name).has_file(MANIFEST):
        return _count(lambda: _values(chain, name, None), "values")
    with open_checkpoint(beside / parent.name) as below:
        what = f"differences to {parent.name}"
        return _count(lambda: _values(chain, name, below), what)


def _values(chain: ChainReader, name: str, below: ChainReader | None) -> Iterator[torch.Tensor]:
    for box, piece in read_pieces(chain, name):
        if piece.is_complex():
            piece = torch.view_as_real(piece)
        values = piece.reshape(-1).to(torch.float64)
        if below is not None:
            old = below.read(chain.resolve(name), box)
            old = torch.view_as_real(old) if old.is_complex() else old
            values = values - old.reshape(-1).to(torch.float64)
        yield values


def _count(values: Callable[[], Iterator[torch.Tensor]], what: str) -> Histogram:
    low, high, num_not_finite, num_zeros = math.inf, -math.inf, 0, 0
    for piece in values():
        num_not_finite += int((~piece.isfinite()).sum())
        num_zeros += int((piece == 0).sum())
        counted = _counted(piece)
        if counted.size:
            low, high = min(low, float(counted.min())), max(high, float(counted.max()))
    if low > high:
        return Histogram(what, (), (), num_zeros, num_not_finite)
    edges = np.histogram_bin_edges(np.array([low, high]), NUM_BINS)
    counts = np.zeros(NUM_BINS, dtype=np.int64)
    for piece in values():
        counts += np.histogram(_counted(piece), edges)[0]
    return Histogram(
        what, tuple(map(float, edges)), tuple(map(int, counts)), num_zeros, num_not_finite
    )


def _counted(piece: torch.Tensor) -> npt.NDArray[np.float64]:
    found: npt.NDArray[np.float64] = piece[piece.isfinite() & (piece != 0)].numpy()
    return found
