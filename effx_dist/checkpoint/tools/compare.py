"""What differs between two checkpoints: which tensors, by how much, and which other values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from effx_dist.checkpoint.format.manifest import Manifest, TensorRecord
from effx_dist.checkpoint.format.reader import ChainReader
from effx_dist.checkpoint.format.whole_tensors import OnProgress, read_pieces

Kind = Literal["same", "values", "shape", "dtype", "only in A", "only in B"]


@dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """One tensor of two checkpoints A and B."""

    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    relative: float | None = None
    """``||B - A|| / ||A||`` in double precision, infinite where A is zero; None where the two
    cannot be subtracted."""
    largest: float | None = None
    """Largest ``|B - A|``; not a number where only one side is."""
    num_changed: int = 0
    """Elements whose bits differ."""
    other: str = ""
    """B's shape or dtype, where that differs."""

    @property
    def order(self) -> tuple[float, float, str]:
        """Sorts what cannot be compared first, then by falling relative change, then by name."""
        size = math.inf if self.relative is None or math.isnan(self.relative) else self.relative
        return (-float(self.relative is None and self.kind != "same"), -size, self.name)


@dataclass(frozen=True)
class CheckpointDifference:
    """Two checkpoints side by side."""

    tensors: tuple[TensorDifference, ...]
    """All tensors of both checkpoints, the largest change first."""
    values: tuple[str, ...]
    """Paths of what is no tensor (parameter groups, a scheduler's state, the caller's extra), and is
    not the same."""

    @property
    def changed(self) -> list[TensorDifference]:
        """The tensors that are not the same, bit for bit."""
        return [tensor for tensor in self.tensors if tensor.kind != "same"]

    @property
    def identical(self) -> bool:
        """Whether a load gives the same, bit for bit, from either."""
        return not self.changed and not self.values


def compare_checkpoints(
    a: ChainReader, b: ChainReader, on_progress: OnProgress | None = None
) -> CheckpointDifference:
    """Read both, a bounded piece at a time. Names, shapes and dtypes need not be the same.

    No communication is performed. Raises CorruptCheckpointError.
    """
    ours, theirs = a.top.manifest, b.top.manifest
    names = sorted(_names(ours) | _names(theirs))
    total = sum(ours.tensors[a.resolve(name)].raw_bytes for name in names if name in _names(ours))
    done, found = 0, []
    for name in names:
        found.append(_compare_tensor(name, a, b))
        if name in _names(ours):
            done += ours.tensors[a.resolve(name)].raw_bytes
        if on_progress is not None:
            on_progress(done, total)
    values = tuple(_differing_paths(_values_of(ours), _values_of(theirs), ""))
    return CheckpointDifference(tuple(sorted(found, key=lambda t: t.order)), values)


def _names(manifest: Manifest) -> set[str]:
    return {*manifest.tensors, *manifest.aliases}


def _compare_tensor(name: str, a: ChainReader, b: ChainReader) -> TensorDifference:
    ours, theirs = a.record(name), b.record(name)
    record = ours or theirs
    assert record is not None
    shape = tuple(record.shape)
    if ours is None or theirs is None:
        kind: Kind = "only in A" if theirs is None else "only in B"
        return TensorDifference(name=name, kind=kind, dtype=record.dtype, shape=shape)
    if ours.shape != theirs.shape:
        other = str(tuple(theirs.shape))
        return TensorDifference(name=name, kind="shape", dtype=ours.dtype, shape=shape, other=other)
    return _compare_values(name, a, b, ours, theirs)


def _compare_values(
    name: str, a: ChainReader, b: ChainReader, ours: TensorRecord, theirs: TensorRecord
) -> TensorDifference:
    squared = squared_change = largest = 0.0
    num_changed = 0
    for box, old in read_pieces(a, name):
        new = b.read(name, box)
        if old.dtype == new.dtype and torch.equal(_bits(old), _bits(new)):
            squared += float(_doubles(old).square().sum())
            continue
        before, after = _doubles(old), _doubles(new)
        change = torch.where(before == after, 0.0, after - before)
        squared += float(before.square().sum())
        squared_change += float(change.square().sum())
        largest = max(largest, float(change.abs().max()), key=_nan_last)
        num_changed += _count_changed(old, new)
    kind: Kind = "dtype" if ours.dtype != theirs.dtype else "values" if num_changed else "same"
    return TensorDifference(
        name=name,
        kind=kind,
        dtype=ours.dtype,
        shape=tuple(ours.shape),
        relative=_ratio(math.sqrt(squared_change), math.sqrt(squared)),
        largest=largest,
        num_changed=num_changed,
        other=theirs.dtype if kind == "dtype" else "",
    )


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def _count_changed(old: torch.Tensor, new: torch.Tensor) -> int:
    if old.dtype != new.dtype:
        return old.numel()
    itemsize = old.dtype.itemsize
    differs = (_bits(old) != _bits(new)).view(-1, itemsize)
    return int(differs.any(dim=1).sum())


def _doubles(values: torch.Tensor) -> torch.Tensor:
    if values.is_complex():
        values = torch.view_as_real(values)
    return values.to(torch.float64)


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _ratio(change: float, norm: float) -> float:
    if not change:
        return 0.0
    return change / norm if norm else math.inf


def _values_of(manifest: Manifest) -> dict[str, Any]:
    own = manifest.extra if isinstance(manifest.extra, dict) else {"extra": manifest.extra}
    return {**manifest.values, **own}


def _differing_paths(a: Any, b: Any, path: str) -> Iterator[str]:
    """Dotted paths below which two JSON values are not the same."""
    inside = f"{path}." if path else ""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted({*a, *b}):
            if key not in a or key not in b:
                yield f"{inside}{key}"
            else:
                yield from _differing_paths(a[key], b[key], f"{inside}{key}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differing_paths(x, y, f"{inside}{index}")
    elif type(a) is not type(b) or a != b:
        yield path
