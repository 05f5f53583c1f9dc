"""The step in Triton for CUDA and ROCm devices: one launch per walk over a list of items.

A launch reads what it needs to know of its items from a table of pieces in device memory, as
torch's multi-tensor kernels do, so that hundreds of small tensors cost no more than one large one.
Of a float32 parameter under AdamW the first walk reads 8 bytes per element, the second reads 16 and
writes 12.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from effx_dist.core.update_rules import UpdateRule
from effx_dist.optim.kernels.device import is_capturing, to_device
from effx_dist.optim.kernels.interface import Item, Kernels, described, readable_grad
from effx_dist.optim.kernels.triton_kernels import PieceColumn, count_kernel, update_kernel

BLOCK = 4096
"""Elements of one program. With longer blocks fewer programs wait for the tables and add to one
count; with shorter ones less of the device idles over tensors of a few elements."""

NUM_WARPS = 8
"""16 elements per thread: four loads of 16 bytes of each float32 tensor."""

# bfloat16 is taken as its bits: Triton's interpreter cuts it off instead of rounding it.
TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.uint16,
}


@dataclass(frozen=True, slots=True)
class _Launch:
    """Items that one launch takes: of equal dtypes, all or none aligned to 16 bytes.

    Attributes:
        pieces: their part of the table, int64 [num pieces, len(PieceColumn)].
        blocks: for each program its piece and which of the piece's blocks, int32 [num programs, 2].
        dtypes: the constexpr arguments PARAM, GRAD and STATE.
    """

    pieces: torch.Tensor
    blocks: torch.Tensor
    dtypes: dict[str, Any]
    aligned: bool


class TritonKernels(Kernels):
    """Steps all items of equal dtypes and alignment in one launch per walk. No walk waits for the device.

    A step may be captured in a CUDA graph, which then holds the items' addresses.
    """

    def __init__(self, rule: UpdateRule, items: Sequence[Item], rows: torch.Tensor) -> None:
        assert rule.name in ("adamw", "lion", "sgd", "nesterov"), "a kernel's last branch takes all"
        self._rule = rule.name
        self._rows = rows.contiguous()
        self._items = items
        self._grads = [readable_grad(item) for item in items]  # kept alive with their addresses
        self._device = rows.device
        with _on(self._device):
            self._launches = _plan_launches(items, self._grads, self._device)

    def count_into(self, counts: torch.Tensor) -> None:
        with _on(self._device):
            for launch in self._launches:
                dtypes = {name: launch.dtypes[name] for name in ("GRAD", "STATE")}
                count_kernel[(len(launch.blocks),)](
                    launch.pieces,
                    launch.blocks,
                    self._rows,
                    counts,
                    **self._constants(launch),
                    **dtypes,
                )

    def update(self, scales: torch.Tensor, skip: torch.Tensor | None) -> None:
        scales = scales.contiguous()
        flag = scales  # any pointer
        if skip is not None:
            flag = skip.to(self._device, non_blocking=True).to(torch.bool).view(torch.uint8)
        with _on(self._device):
            for launch in self._launches:
                update_kernel[(len(launch.blocks),)](
                    launch.pieces,
                    launch.blocks,
                    self._rows,
                    scales,
                    flag,
                    HAS_SKIP=skip is not None,
                    **self._constants(launch),
                    **launch.dtypes,
                )
        written = [part for item in self._items for part in (item.param, *item.moments)]
        torch.autograd.graph.increment_version(written)  # autograd does not see the kernel write

    def _constants(self, launch: _Launch) -> dict[str, Any]:
        return {
            "RULE": self._rule,
            "ALIGNED": launch.aligned,
            "BLOCK": BLOCK,
            "num_warps": NUM_WARPS,
            "enable_fp_fusion": False,
        }


def runs_on(device: torch.device) -> bool:
    """Whether the kernels take tensors on ``device``: CUDA and ROCm devices (which torch calls "cuda"
    both) or, in Triton's interpreter, the CPU.
    """
    is_compiled = isinstance(count_kernel, triton.JITFunction)
    return device.type == ("cuda" if is_compiled else "cpu")


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, whatever device its arguments are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _plan_launches(
    items: Sequence[Item], grads: Sequence[torch.Tensor], device: torch.device
) -> list[_Launch]:
    by_kind: dict[tuple[torch.dtype, torch.dtype, bool], list[list[int]]] = {}
    for item, grad in zip(items, grads, strict=True):
        if not item.param.numel():
            continue  # no program would take it, and a launch has at least one
        row = _describe(item, grad)
        is_aligned = all(address % 16 == 0 for address in row[: PieceColumn.NUMEL])
        by_kind.setdefault((item.param.dtype, grad.dtype, is_aligned), []).append(row)
    described = [row for rows in by_kind.values() for row in rows]
    if not described:
        return []
    table = to_device(torch.tensor(described, dtype=torch.int64), device)
    parts = table.split([len(rows) for rows in by_kind.values()])
    launches = []
    for pieces, ((param, grad_dtype, is_aligned), rows) in zip(parts, by_kind.items(), strict=True):
        state = torch.float64 if param == torch.float64 else torch.float32
        dtypes = {"PARAM": param, "GRAD": grad_dtype, "STATE": state}
        launch = _Launch(
            pieces=pieces,
            blocks=_blocks(tuple(row[PieceColumn.NUMEL] for row in rows), device),
            dtypes={name: TL_DTYPES[dtype] for name, dtype in dtypes.items()},
            aligned=is_aligned,
        )
        launches.append(launch)
    return launches


def _describe(item: Item, grad: torch.Tensor) -> list[int]:
    """A row of the table."""
    return [*described(item, grad), int(item.decays_cautiously)]


def _blocks(numels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """For each program of a launch, which item and which of its blocks it takes: int32 [num programs, 2].

    Kept from step to step, since it holds no addresses; for each stream, because another one does
    not know when it is filled. While a graph is captured nothing is filled.
    """
    if is_capturing(device):
        return _make_blocks(numels, device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _kept_blocks(numels, device, stream)


@functools.lru_cache(maxsize=64)
def _kept_blocks(numels: tuple[int, ...], device: torch.device, stream: int) -> torch.Tensor:
    return _make_blocks(numels, device)


def _make_blocks(numels: tuple[int, ...], device: torch.device) -> torch.Tensor:
    per_piece = [-(-numel // BLOCK) for numel in numels]
    repeats = to_device(torch.tensor(per_piece, dtype=torch.int64), device)
    pieces = torch.repeat_interleave(repeats, output_size=sum(per_piece))
    starts = repeats.cumsum(0) - repeats
    which = torch.arange(len(pieces), device=device) - starts[pieces]
    return torch.stack([pieces, which], dim=1).to(torch.int32)
