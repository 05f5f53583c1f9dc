"""Blocks of a chain in place: compiled as by numpy and torch, for good payloads and damaged ones; and
what several encoder threads write."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.checkpoint.format import chunks, coding
from effx_dist.checkpoint.format.chunks import ChunkEncoder, JointPieces, in_order
from effx_dist.checkpoint.saving.quantisers import JointSpec, measure
from effx_dist.checkpoint.state.joints import Joint
from effx_dist.core.excp import PROFILES, JointQuantiser
from effx_dist.shard import Box, SoloGroup
from tests.excp_pieces import must_build, whole_tensor
from tests.native_forms import FINITE, LENGTHS, by_both, hostile_values, needs_compiled

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
lengths = st.sampled_from(LENGTHS)
seeds = st.integers(0, 10**6)


def one_payload(name: str, seed: int, length: int) -> tuple[JointQuantiser, bytes]:
    """A weight block whose residuals are mostly, rarely or never 0."""
    arrays = whole_tensor(seed, length)
    scale = [0.0, 1.0, 1e4][seed % 3]
    arrays.r[seed % 7 :: 3] *= np.float32(scale)
    quantiser = must_build(name, [arrays])
    return quantiser, coding.quantise(quantiser, arrays)[0].weight


def bits(values: torch.Tensor) -> bytes:
    return coding.to_bits(values).tobytes() if values.numel() else b""


@needs_compiled
@pytest.mark.parametrize("name", sorted(PROFILES))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seeds, lengths)
@settings(max_examples=25, deadline=None)
def test_a_residual_in_place_is_the_dense_one(
    name: str, dtype: torch.dtype, seed: int, length: int
) -> None:
    quantiser, payload = one_payload(name, seed, length)
    # Only finite values are ever quantised; a half has fewer of them.
    drawn = torch.from_numpy(hostile_values(seed, length, FINITE)).clamp(-1e4, 1e4)
    reference = drawn.to(dtype)

    def in_place() -> bytes:
        values = reference.clone()
        coding.add_residual_(values, payload, quantiser)
        return bits(values)

    compiled, plain = by_both(in_place)
    residual = coding.decode_residual(payload, length, quantiser)
    assert compiled == plain == bits(coding.add_residual(reference, residual))


@needs_compiled
@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_damaged_residual_is_refused_by_both_or_by_none(data: st.DataObject) -> None:
    length = data.draw(st.sampled_from([1, 9, 200, 1000]))
    quantiser, payload = one_payload("safe", data.draw(st.integers(0, 20)), length)
    damaged = bytearray(payload)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    hostile = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    left: list[bytes] = []

    def in_place() -> bytes:
        values = torch.ones(length)
        try:
            coding.add_residual_(values, hostile, quantiser)
        except ValueError:
            left.append(bits(values))
            raise
        return bits(values)

    compiled, plain = by_both(in_place)
    assert compiled == plain
    assert set(left) <= {bits(torch.ones(length))}, "what is refused changes nothing"


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.complex128], ids=str
)
def test_a_lossless_difference_is_undone_in_place(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    current, reference = torch.randint(-100, 100, (2, 5000), generator=generator).to(dtype)
    payload = coding.encode_delta(coding.to_bits(current), coding.to_bits(reference))
    values = reference.clone()
    with pytest.raises(ValueError, match="holds"):
        coding.undo_delta_(values[:4999], payload)
    assert torch.equal(values, reference)
    coding.undo_delta_(values, payload)
    assert torch.equal(values, current)


def test_a_difference_written_before_they_were_folded_is_read() -> None:
    current, reference = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([1.5, -1.0, 1e9])
    words = coding.to_bits(current) - coding.to_bits(reference)
    coding.undo_delta_(reference, coding.encode_planes(words))
    assert torch.equal(reference, current)


def test_values_that_do_not_lie_flat_are_refused() -> None:
    quantiser, payload = one_payload("safe", 1, 10)
    for values in (torch.zeros(20)[::2], torch.zeros(2, 5)):
        with pytest.raises(ValueError, match="flat contiguous"):
            coding.add_residual_(values, payload, quantiser)
        with pytest.raises(ValueError, match="flat contiguous"):
            coding.undo_delta_(values, payload)


class Memory:
    """Data files that remember what was written."""

    def __init__(self) -> None:
        self.payloads: list[tuple[int, bytes]] = []

    def append(self, payload: bytes, file: int) -> dict[str, object]:
        self.payloads.append((file, payload))
        return {"offset": len(self.payloads), "length": len(payload), "xxh3": "0" * 32}


def everything(threads: int, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """All kinds of chunks in blocks of 700 elements, the records and the reconstruction."""
    monkeypatch.setattr(chunks, "BLOCK_NUMEL", 700)
    numel, box = 5000, Box((0,), (5000,))
    arrays = whole_tensor(4, numel)
    reference = torch.from_numpy(hostile_values(1, numel, [0.5]))
    weight = reference + torch.from_numpy(arrays.r)
    first, second = torch.from_numpy(arrays.m), torch.from_numpy(arrays.v)
    parts = JointPieces(box, weight, reference, first, second)
    spec = JointSpec(Joint("w", "m", "v"), numel)
    found = measure([spec], {"w": [parts]}, PROFILES["safe"], SoloGroup(), threads)["w"]
    files = Memory()
    encoder = ChunkEncoder(files, threads)  # type: ignore[arg-type]
    kept = torch.empty_like(weight)
    records = [
        encoder.planes(box, weight),
        encoder.delta(box, weight, reference),
        *encoder.joint(parts, found.quantiser, kept),
    ]
    return [found.error, found.quantiser.to_json(), records, bits(kept), files.payloads]


def test_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    one, three = everything(1, monkeypatch), everything(3, monkeypatch)
    assert len(one[-1]) == 5 * 8  # type: ignore[arg-type]
    assert one == three
    assert threading.active_count() == before


def test_few_results_wait_to_be_taken() -> None:
    begun: list[int] = []

    def note(index: int) -> int:
        begun.append(index)
        return index

    for taken, index in enumerate(in_order(note, range(50), 3)):
        assert index == taken
        assert len(begun) <= taken + 1 + 3


def test_a_failure_on_a_thread_is_raised_where_results_are_taken() -> None:
    def fail_at_three(index: int) -> int:
        if index == 3:
            raise OSError("no space")
        return index

    taken: list[int] = []
    with pytest.raises(OSError, match="no space"):
        taken.extend(in_order(fail_at_three, range(50), 2))
    assert taken == [0, 1, 2]
