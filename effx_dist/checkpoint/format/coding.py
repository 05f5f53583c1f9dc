"""One block's values to its payload and back: lossless planes, lossless differences, quantised
joints.

Every encode stands beside its decode. Payloads carry no lengths that size an allocation: how many
elements come out is known from the manifest, and a payload that disagrees is refused.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from effx_dist.codecs import (
    BytePlanes,
    SymbolStreams,
    pack,
    pack_inside,
    unpack,
    unpack_inside,
    unpack_streams,
)
from effx_dist.core.excp import (
    JointArrays,
    JointQuantiser,
    JointSymbols,
    folded_delta,
    undo_delta_bits,
    undo_folded_delta_,
)
from effx_dist.native import kernels as native

Bits = npt.NDArray[np.unsignedinteger]
U8 = npt.NDArray[np.uint8]
_WORDS: dict[int, type[np.unsignedinteger]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}
_FOLDED = b"\x02"
_LENGTH = struct.Struct("<I")
_COMPILED_TYPES = {
    torch.float32: native.FLOAT32,
    torch.float16: native.FLOAT16,
    torch.bfloat16: native.BFLOAT16,
}
_LOOK = 2**14
"""Elements that are looked at before the next ones, where the answer may be found early."""
_LARGEST_NIBBLE_SYMBOL = 15
_NO_SYMBOLS = SymbolStreams(None, 0, np.empty(0, np.uint8), np.empty(0, np.uint8))


def to_bits(values: torch.Tensor) -> Bits:
    """The bit patterns of contiguous host values, flat: unsigned words of their item size (two per
    complex128)."""
    word = _WORDS[min(values.dtype.itemsize, 8)]
    return values.detach().reshape(-1).view(torch.uint8).numpy().view(word)


def from_bits(bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """The way back: flat values of ``dtype`` that share memory with ``bits``."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8)).view(dtype)


def repeated(bits: Bits, words: int) -> bytes | None:
    """The element, of ``words`` words, that all elements are equal to; None where they differ. Looks at all
    of them only where they are alike."""
    first = bits[:words]
    for start in range(0, bits.size, _LOOK * words):
        stretch = bits[start : start + _LOOK * words].reshape(-1, words)
        if not np.array_equal(stretch, np.broadcast_to(first, stretch.shape)):
            return None
    return first.tobytes()


def repeat(element: bytes, numel: int) -> Bits:
    """The way back: flat words of ``numel`` elements."""
    word = np.frombuffer(element, dtype=_WORDS[min(len(element), 8)])
    return np.tile(word, numel)


def is_same(bits: Bits, reference: Bits) -> bool:
    """Whether all words are the reference's. Stops at the first stretch that differs."""
    return all(
        np.array_equal(bits[start : start + _LOOK], reference[start : start + _LOOK])
        for start in range(0, bits.size, _LOOK)
    )


def encode_planes(bits: Bits) -> bytes:
    """Words to byte planes, zstd. Raises ValueError where a reader would refuse the payload's heads."""
    codec = BytePlanes(itemsize=bits.dtype.itemsize)
    payload = bytes(codec.encode(bits))
    codec.check(payload, bits.nbytes)
    return payload


def decode_planes(payload: bytes, itemsize: int, numel: int) -> Bits:
    """The way back: words of ``numel`` elements of ``itemsize`` bytes. Raises ValueError for any
    other amount."""
    word_bytes = min(itemsize, 8)
    raw = BytePlanes(itemsize=word_bytes).decode_bounded(payload, numel * itemsize)
    return np.require(raw, requirements="W").view(_WORDS[word_bytes])


def encode_delta(bits: Bits, reference: Bits) -> bytes:
    """Words minus the reference's words, modulo their width, folded, as planes after a tag byte."""
    return _FOLDED + encode_planes(folded_delta(bits, reference))


def undo_delta_(values: torch.Tensor, payload: bytes) -> None:
    """The way back: the reference's values, flat and contiguous in host memory, become the current
    ones in place. Raises ValueError for bad payloads, which leave the values as they are."""
    _check_flat(values)
    _undo_delta(payload, values.dtype.itemsize, to_bits(values))


def _check_flat(values: torch.Tensor) -> None:
    """Raises ValueError for values that cannot be changed where they lie."""
    if values.ndim != 1 or not values.is_contiguous() or values.device.type != "cpu":
        raise ValueError(
            f"values: shape {tuple(values.shape)} on {values.device}, must be a flat contiguous "
            "tensor in host memory to be changed in place"
        )


def undo_difference_(values: torch.Tensor, folded: Bits) -> None:
    """As :func:`undo_delta_`, from the folded differences instead of their payload."""
    _check_flat(values)
    undo_folded_delta_(folded, to_bits(values))


def _undo_delta(payload: bytes, itemsize: int, words: Bits) -> None:
    numel = words.nbytes // itemsize
    if payload.startswith(_FOLDED):
        undo_folded_delta_(decode_planes(payload[1:], itemsize, numel), words)
    else:  # as written before differences were folded: planes alone, which begin otherwise
        np.copyto(words, undo_delta_bits(decode_planes(payload, itemsize, numel), words))


@dataclass(frozen=True, slots=True)
class JointPayloads:
    """The payloads of one block of a weight and of its moments; None for a moment that is not
    there."""

    weight: bytes
    exp_avg: bytes | None
    exp_avg_sq: bytes | None


def encode_joint(symbols: JointSymbols) -> JointPayloads:
    """exp_avg's symbols are stored inside the weight's support, exp_avg_sq's inside exp_avg's."""
    packed = pack(symbols.w)
    escapes = symbols.escapes.astype("<f4").tobytes()
    weight = _LENGTH.pack(len(packed)) + packed + escapes
    if symbols.m is None:
        return JointPayloads(weight, None, None)
    exp_avg = pack_inside(symbols.m, symbols.w != 0)
    if symbols.v is None:
        return JointPayloads(weight, exp_avg, None)
    return JointPayloads(weight, exp_avg, pack_inside(symbols.v, symbols.m != 0))


def decode_weight(
    payload: bytes, numel: int, quantiser: JointQuantiser
) -> tuple[U8, npt.NDArray[np.float32]]:
    """The weight's symbols and escapes of one block, and the way back for a block of
    JointPayloads."""
    packed, escapes = _weight_streams(payload)
    return unpack(packed, numel, quantiser.num_w_symbols), escapes


def _weight_streams(payload: bytes) -> tuple[bytes, npt.NDArray[np.float32]]:
    """A weight block's packed symbols and its escapes."""
    if len(payload) < _LENGTH.size:
        raise ValueError(f"a weight block of {len(payload)} bytes has no length field")
    end = _LENGTH.size + _LENGTH.unpack_from(payload)[0]
    escapes = payload[end:]
    if end > len(payload) or len(escapes) % 4:
        raise ValueError(f"a weight block of {len(payload)} bytes cannot hold what it states")
    return payload[_LENGTH.size : end], np.frombuffer(escapes, dtype="<f4").astype(np.float32)


def decode_joint(payloads: JointPayloads, numel: int, quantiser: JointQuantiser) -> JointArrays:
    """The reconstruction of one block of a weight's residual and of its moments. Raises ValueError
    for bad payloads."""
    weight, escapes = decode_weight(payloads.weight, numel, quantiser)
    first = second = None
    if payloads.exp_avg is not None:
        first = unpack_inside(payloads.exp_avg, weight != 0, quantiser.num_m_symbols)
        if payloads.exp_avg_sq is not None:
            second = unpack_inside(payloads.exp_avg_sq, first != 0, quantiser.num_v_symbols)
    return quantiser.decode(JointSymbols(weight, escapes, first, second))


def decode_residual(
    payload: bytes, numel: int, quantiser: JointQuantiser
) -> npt.NDArray[np.float32]:
    """The reconstruction of one block of a weight's residual alone, as links of a chain need it."""
    return quantiser.weight.decode(*decode_weight(payload, numel, quantiser))


def residual_of(current: torch.Tensor, reference: torch.Tensor) -> npt.NDArray[np.float32]:
    """Flat fp32 ``current - reference``."""
    # numpy, because torch would use more threads than the encoder was given
    pair = (x.detach().float().reshape(-1).numpy() for x in (current, reference))
    with np.errstate(invalid="ignore", over="ignore"):  # not finite: then it is stored losslessly
        residual: npt.NDArray[np.float32] = np.subtract(*pair)
    return residual


def add_residual(reference: torch.Tensor, residual: npt.NDArray[np.float32]) -> torch.Tensor:
    """The way back, in the weight's own dtype: what a reader gets is what the writer keeps as its
    next reference."""
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.add(reference.detach().float().reshape(-1).numpy(), residual)
    return torch.from_numpy(total).to(reference.dtype)


def add_residual_(values: torch.Tensor, payload: bytes, quantiser: JointQuantiser) -> None:
    """The reference's flat contiguous host values to the current ones, in place, from a weight
    block's payload: as add_residual does it, at little more than the cost of the non-zero symbols.

    Raises ValueError for bad payloads, which leave the values as they are.
    """
    _check_flat(values)
    kind, compiled = _COMPILED_TYPES.get(values.dtype), native.kernels()
    escape = quantiser.escape_symbol
    first_checked = quantiser.num_w_symbols if escape is None else escape
    if compiled is None or kind is None or first_checked <= _LARGEST_NIBBLE_SYMBOL:
        values.copy_(add_residual(values, decode_residual(payload, values.numel(), quantiser)))
        return
    packed, escapes = _weight_streams(payload)
    streams = unpack_streams(packed, values.numel()) or _NO_SYMBOLS
    # Any nibble is a symbol of the table: only the large ones can be wrong, or escapes.
    if int(streams.large.max(initial=0)) >= quantiser.num_w_symbols:
        raise ValueError(f"symbol {streams.large.max()}: must be < {quantiser.num_w_symbols}")
    num_escapes = 0 if escape is None else int(np.count_nonzero(streams.large == escape))
    if num_escapes != escapes.size:
        raise ValueError(f"escapes: {escapes.size} values for {num_escapes} escape symbols")
    mask = streams.mask
    if mask is None:
        mask = np.full((values.numel() + 7) // 8, 0xFF if streams.num_values else 0, dtype=np.uint8)
    table = np.zeros(256, dtype=np.float32)
    table[: quantiser.num_w_symbols] = quantiser.w_table()
    compiled.add_symbols(
        (values.data_ptr(), kind, values.numel()),
        *(mask, streams.pairs, streams.num_values, streams.large, table),
        *(-1 if escape is None else escape, escapes),
    )


def joint_arrays(
    current: torch.Tensor,
    reference: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor | None,
) -> JointArrays:
    """One block of a weight, its reference and its moments, as the quantisers take it."""
    return JointArrays(
        residual_of(current, reference),
        exp_avg.numpy(),
        None if exp_avg_sq is None else exp_avg_sq.numpy(),
    )


def quantise(
    quantiser: JointQuantiser, arrays: JointArrays
) -> tuple[JointPayloads, npt.NDArray[np.float32]]:
    """The payloads of one block, and the residual that a reader will decode from them."""
    symbols = quantiser.encode(arrays)
    return encode_joint(symbols), quantiser.weight.decode(symbols.w, symbols.escapes)
