"""Blocks of a chunk in a region: every element once, by whatever way it is cut."""

from __future__ import annotations

import math
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint.format import chunks
from effx_dist.checkpoint.format.chunks import blocks_in_box
from effx_dist.shard import Box


@st.composite
def boxes(draw: st.DrawFn) -> tuple[Box, Box]:
    """A chunk, and a region inside it."""
    sizes = draw(st.lists(st.integers(1, 6), max_size=4))
    offsets = draw(st.tuples(*[st.integers(0, 5) for _ in sizes]))
    starts = [draw(st.integers(0, size - 1)) for size in sizes]
    lengths = [draw(st.integers(1, s - a)) for a, s in zip(starts, sizes, strict=True)]
    region = Box(tuple(o + a for o, a in zip(offsets, starts, strict=True)), tuple(lengths))
    return Box(offsets, tuple(sizes)), region


@given(boxes(), st.integers(1, 40))
def test_what_is_loaded_and_stored_is_the_region(case: tuple[Box, Box], block_numel: int) -> None:
    chunk, region = case
    values = torch.arange(1, 1 + math.prod(chunk.sizes)).reshape(chunk.sizes)
    inside = region.relative_to(chunk).slices
    target = torch.zeros(region.sizes, dtype=values.dtype)
    with mock.patch.object(chunks, "BLOCK_NUMEL", block_numel):
        found = list(blocks_in_box(chunk, region))
    for block in found:
        start = block.index * block_numel
        expected = values.reshape(-1)[start : start + block.numel]
        flat = block.load(target)
        assert not flat.any()  # each element is in one block alone
        block.store(expected.clone(), target)
        loaded = block.load(target)
        assert torch.equal(loaded[loaded != 0], expected[loaded != 0])
    assert torch.equal(target, values[inside])


def test_a_block_that_is_a_stretch_of_the_region_shares_its_memory() -> None:
    chunk = Box((4, 0), (6, 8))
    target = torch.zeros(6, 8)
    [block] = blocks_in_box(chunk, chunk)
    block.load(target).fill_(2)
    assert torch.equal(target, torch.full((6, 8), 2.0))
    columns = torch.zeros(6, 16)[:, :8]
    block.load(columns).fill_(2)
    assert not columns.any()
