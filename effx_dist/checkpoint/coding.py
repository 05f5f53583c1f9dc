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

from effx_dist.codecs import BytePlanes, pack, pack_inside, unpack, unpack_inside
from effx_dist.core.excp import (
    JointArrays,
    JointQuantiser,
    JointSymbols,
    delta_bits,
    undo_delta_bits,
)

Bits = npt.NDArray[np.unsignedinteger]
U8 = npt.NDArray[np.uint8]
_WORDS: dict[int, type[np.unsignedinteger]] = {
    1: np.uint8,
    2: np.uint16,
    4: np.uint32,
    8: np.uint64,
}
_LENGTH = struct.Struct("<I")


def to_bits(values: torch.Tensor) -> Bits:
    """The bit patterns of contiguous host values, flat: unsigned words of their item size (two per
    complex128)."""
    word = _WORDS[min(values.dtype.itemsize, 8)]
    return values.detach().reshape(-1).view(torch.uint8).numpy().view(word)


def from_bits(bits: Bits, dtype: torch.dtype) -> torch.Tensor:
    """The way back: flat values of ``dtype`` that share memory with ``bits``."""
    return torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8)).view(dtype)


def encode_planes(bits: Bits) -> bytes:
    """Words to byte planes, zstd."""
    return bytes(BytePlanes(itemsize=bits.dtype.itemsize).encode(bits))


def decode_planes(payload: bytes, itemsize: int, numel: int) -> Bits:
    """The way back: words of ``numel`` elements of ``itemsize`` bytes. Raises ValueError for any
    other amount."""
    word_bytes = min(itemsize, 8)
    raw = BytePlanes(itemsize=word_bytes).decode_bounded(payload, numel * itemsize)
    return np.require(raw, requirements="W").view(_WORDS[word_bytes])


def encode_delta(bits: Bits, reference: Bits) -> bytes:
    """Words minus the reference's words, modulo their width, as planes."""
    return encode_planes(delta_bits(bits, reference))


def decode_delta(payload: bytes, itemsize: int, reference: Bits) -> Bits:
    """The way back, given the same reference words."""
    numel = reference.nbytes // itemsize
    return undo_delta_bits(decode_planes(payload, itemsize, numel), reference)


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
    if len(payload) < _LENGTH.size:
        raise ValueError(f"a weight block of {len(payload)} bytes has no length field")
    end = _LENGTH.size + _LENGTH.unpack_from(payload)[0]
    escapes = payload[end:]
    if end > len(payload) or len(escapes) % 4:
        raise ValueError(f"a weight block of {len(payload)} bytes cannot hold what it states")
    symbols = unpack(payload[_LENGTH.size : end], numel, quantiser.num_w_symbols)
    return symbols, np.frombuffer(escapes, dtype="<f4").astype(np.float32)


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
    residual: npt.NDArray[np.float32] = (current.float() - reference.float()).reshape(-1).numpy()
    return residual


def add_residual(reference: torch.Tensor, residual: npt.NDArray[np.float32]) -> torch.Tensor:
    """The way back, in the weight's own dtype: what a reader gets is what the writer keeps as its
    next reference."""
    total = reference.float().reshape(-1) + torch.from_numpy(residual)
    return total.to(reference.dtype)


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
    return encode_joint(symbols), quantiser.decode(symbols).r
