"""The two walks as Triton kernels. Launched by triton_launch.py.

A program takes one block of one piece. ``blocks`` says which, ``pieces`` where the tensors lie. A
``mask`` may be None: all elements of the block are there.

The arithmetic is that of effx_dist/core/update_rules.py, operation by operation, and every
operation rounds once: products and sums are not fused, square roots and quotients are those of
IEEE 754, coefficients are rounded from float64 once. In Triton's interpreter it gives the bits of
the eager form. On NVIDIA devices Triton before 3.6 takes a float32 below 2^-126 for zero under a
square root and as a quotient.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import triton
import triton.language as tl

from effx_dist.optim.kernels.interface import NUM_COLUMNS, Column


class PieceColumn(IntEnum):
    """The columns of ``pieces``, int64 each."""

    PARAM = 0
    GRAD = 1
    FIRST = 2
    SECOND = 3
    NUMEL = 4
    ROW = 5
    SLOT = 6
    DECAYS_CAUTIOUSLY = 7


# The compiler takes globals as constants of its own.
_PARAM = tl.constexpr(int(PieceColumn.PARAM))
_GRAD = tl.constexpr(int(PieceColumn.GRAD))
_FIRST = tl.constexpr(int(PieceColumn.FIRST))
_SECOND = tl.constexpr(int(PieceColumn.SECOND))
_NUMEL = tl.constexpr(int(PieceColumn.NUMEL))
_ROW = tl.constexpr(int(PieceColumn.ROW))
_SLOT = tl.constexpr(int(PieceColumn.SLOT))
_DECAYS_CAUTIOUSLY = tl.constexpr(int(PieceColumn.DECAYS_CAUTIOUSLY))
_WIDTH = tl.constexpr(len(PieceColumn))
_LR = tl.constexpr(int(Column.LR))
_DECAY = tl.constexpr(int(Column.DECAY))
_GRAD_FACTOR = tl.constexpr(int(Column.GRAD_FACTOR))
_OWN = tl.constexpr(int(Column.FIRST_OWN))
_NUM_COLUMNS = tl.constexpr(NUM_COLUMNS)

_jit: Callable[[Callable[..., Any]], Any] = triton.jit  # which has no types of its own


@_jit
def _pointer(
    piece: tl.tensor, column: int, dtype: tl.constexpr, aligned: tl.constexpr
) -> tl.tensor:
    """A tensor's address in the table."""
    pointer = tl.load(piece + column).to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)  # bytes
    return pointer


@_jit
def _load(pointer: tl.tensor, offsets: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Elements; a 16-bit float comes as a float32 of the same value."""
    values = tl.load(pointer + offsets, mask=mask)
    if values.dtype == tl.uint16:
        values = (values.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif values.dtype == tl.float16:
        values = values.to(tl.float32)
    return values


@_jit
def _store(pointer: tl.tensor, offsets: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    """The way back, rounding to the nearest, ties to even."""
    if pointer.dtype.element_ty == tl.uint16:
        is_nan = values != values
        bits = tl.where(is_nan, 0, values.to(tl.uint32, bitcast=True))
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        values = tl.where(is_nan, 0x7FC0, bits).to(tl.uint16)
    elif pointer.dtype.element_ty == tl.float16:
        values = values.to(tl.float16)
    tl.store(pointer + offsets, values, mask=mask)


@_jit
def _coefficient(row: tl.tensor, column: int, like: tl.tensor) -> tl.tensor:
    return tl.load(row + column).to(like.dtype)


@_jit
def _agree(update: tl.tensor, grad: tl.tensor) -> tl.tensor:
    """Signs are compared, not the product, which underflows; NaN agrees with nothing."""
    return ((update > 0) & (grad > 0)) | ((update < 0) & (grad < 0))


@_jit
def _signs(grad: tl.tensor, first: tl.tensor, row: tl.tensor, RULE: tl.constexpr) -> tl.tensor:
    """As UpdateRule.signs."""
    share = _coefficient(row, _OWN, grad)
    if RULE == "adamw" or RULE == "lion":
        signs = first * share + grad * _coefficient(row, _OWN + 1, grad)
    else:
        signs = first * share + grad
        if RULE == "nesterov":
            signs = signs * share + grad
    return signs


@_jit
def _advance_first(
    grad: tl.tensor, first: tl.tensor, signs: tl.tensor, row: tl.tensor, RULE: tl.constexpr
) -> tl.tensor:
    """The new first moment."""
    advanced = signs
    if RULE == "lion":
        share = _coefficient(row, _OWN + 2, grad)
        advanced = first * share + grad * _coefficient(row, _OWN + 3, grad)
    elif RULE == "nesterov":
        advanced = first * _coefficient(row, _OWN, grad) + grad
    return advanced


@_jit
def _adam_update(exp_avg: tl.tensor, exp_avg_sq: tl.tensor, row: tl.tensor) -> tl.tensor:
    numerator = exp_avg * _coefficient(row, _OWN + 4, exp_avg)
    # What is rounded as IEEE 754 has it is called sqrt_rn and div_rn for float32 alone.
    is_single: tl.constexpr = exp_avg.dtype == tl.float32
    root = tl.sqrt_rn(exp_avg_sq) if is_single else tl.sqrt(exp_avg_sq)
    denominator = root * _coefficient(row, _OWN + 5, root) + _coefficient(row, _OWN + 6, root)
    return tl.div_rn(numerator, denominator) if is_single else numerator / denominator


@_jit
def _sign(values: tl.tensor) -> tl.tensor:
    """NaN stays NaN."""
    return tl.where(values > 0, 1.0, tl.where(values < 0, -1.0, tl.where(values == 0, 0.0, values)))


@_jit
def _step(
    param: tl.tensor,
    update: tl.tensor,
    agrees: tl.tensor,
    not_opposed: tl.tensor,
    row: tl.tensor,
    scale: tl.tensor,
) -> tl.tensor:
    """Weight decay where the signs are not opposed, then the masked step."""
    decayed = tl.where(not_opposed, param * _coefficient(row, _DECAY, param), param)
    step_size = (scale * tl.load(row + _LR)).to(param.dtype)  # float64 until here: one rounding
    # multiplied, not selected: a NaN or an infinity reaches the parameter as it does in AdamW
    return decayed - (update * tl.where(agrees, 1.0, 0.0)) * step_size


@_jit
def _count_block(
    piece: tl.tensor,
    row: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    RULE: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    grad = _load(_pointer(piece, _GRAD, GRAD, ALIGNED), offsets, mask)
    first = _load(_pointer(piece, _FIRST, STATE, ALIGNED), offsets, mask)
    grad = grad * _coefficient(row, _GRAD_FACTOR, first)
    agrees = _agree(_signs(grad, first, row, RULE), grad)
    if mask is not None:  # what was loaded from beyond the end is not defined
        agrees = agrees & mask
    return tl.sum(agrees.to(tl.int32), axis=0)


@_jit
def count_kernel(
    pieces: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    counts: tl.tensor,
    RULE: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    block = blocks + tl.program_id(0) * 2
    piece = pieces + tl.load(block).to(tl.int64) * _WIDTH
    start = tl.load(block + 1).to(tl.int64) * BLOCK
    numel = tl.load(piece + _NUMEL)
    row = rows + tl.load(piece + _ROW) * _NUM_COLUMNS
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:  # no mask, so that loads are of 16 bytes
        count = _count_block(piece, row, offsets, None, RULE, GRAD, STATE, ALIGNED)
    else:
        count = _count_block(piece, row, offsets, offsets < numel, RULE, GRAD, STATE, ALIGNED)
    tl.atomic_add(counts + tl.load(piece + _SLOT), count.to(tl.int64), sem="relaxed")


@_jit
def _update_block(
    piece: tl.tensor,
    row: tl.tensor,
    scale: tl.tensor,
    offsets: tl.tensor,
    mask: tl.tensor,
    RULE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    param_pointer = _pointer(piece, _PARAM, PARAM, ALIGNED)
    first_pointer = _pointer(piece, _FIRST, STATE, ALIGNED)
    grad = _load(_pointer(piece, _GRAD, GRAD, ALIGNED), offsets, mask)
    first = _load(first_pointer, offsets, mask)
    param = _load(param_pointer, offsets, mask)
    grad = grad * _coefficient(row, _GRAD_FACTOR, first)
    signs = _signs(grad, first, row, RULE)
    first = _advance_first(grad, first, signs, row, RULE)
    update = signs
    if RULE == "adamw":
        second_pointer = _pointer(piece, _SECOND, STATE, ALIGNED)
        second = _load(second_pointer, offsets, mask) * _coefficient(row, _OWN + 2, first)
        second = second + (grad * grad) * _coefficient(row, _OWN + 3, first)
        _store(second_pointer, offsets, second, mask)
        update = _adam_update(first, second, row)
    elif RULE == "lion":
        update = _sign(signs)
    _store(first_pointer, offsets, first, mask)
    not_opposed = ((signs >= 0) & (param >= 0)) | ((signs <= 0) & (param <= 0))
    not_opposed = not_opposed | (tl.load(piece + _DECAYS_CAUTIOUSLY) == 0)
    param = _step(param, update, _agree(signs, grad), not_opposed, row, scale)
    _store(param_pointer, offsets, param, mask)


@_jit
def update_kernel(
    pieces: tl.tensor,
    blocks: tl.tensor,
    rows: tl.tensor,
    scales: tl.tensor,
    skip: tl.tensor,
    RULE: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    skips = tl.load(skip) if HAS_SKIP else 0
    if skips != 0:
        return
    block = blocks + tl.program_id(0) * 2
    piece = pieces + tl.load(block).to(tl.int64) * _WIDTH
    start = tl.load(block + 1).to(tl.int64) * BLOCK
    numel = tl.load(piece + _NUMEL)
    row = rows + tl.load(piece + _ROW) * _NUM_COLUMNS
    scale = tl.load(scales + tl.load(piece + _SLOT))
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _update_block(piece, row, scale, offsets, None, RULE, PARAM, GRAD, STATE, ALIGNED)
    else:
        mask = offsets < numel
        _update_block(piece, row, scale, offsets, mask, RULE, PARAM, GRAD, STATE, ALIGNED)
