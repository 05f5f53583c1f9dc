"""Helpers of the test_checkpoint files: a simulated training, cut over ranks in several ways."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from effx_dist.checkpoint import Chain, ExcpReader, ExcpWriter, Fragment
from effx_dist.checkpoint.format.manifest import Manifest, ParentRecord
from effx_dist.checkpoint.format.reader import ChainReader, read_manifest
from effx_dist.checkpoint.saving.drive import drive_load, drive_save
from effx_dist.checkpoint.saving.manifest_building import SaveFacts
from effx_dist.checkpoint.state.joints import is_chained
from effx_dist.checkpoint.storage.steps import newest_step, step_name
from effx_dist.config import ExcpConfig
from effx_dist.shard import Box, Group, flat_range_to_boxes, whole_box
from tests.thread_ranks import run_ranks

State = dict[str, torch.Tensor]
Cut = Callable[[tuple[int, ...], int, int], list[Box]]
"""The boxes of a whole tensor of a shape that a rank of so many holds."""

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (65, 64),
    "wide": (3, 65),
    "row": (1, 7),
    "cube": (4, 5, 6),
    "norm": (33,),
    "bias": (5,),
}


class Training:
    """AdamW on pure noise: weights walk at random, with the moments that Adam has then.

    Gradients are N(0, s_i^2) with log-normal s_i per element, so that moments spread over decades.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.num_steps = 0
        self.state: State = {}
        self.scale: State = {}
        for name, shape in shapes.items():
            self.state[f"model.{name}"] = 0.02 * self._normal(shape)
            self.state[f"optimizer.{name}.exp_avg"] = torch.zeros(shape)
            self.state[f"optimizer.{name}.exp_avg_sq"] = torch.zeros(shape)
            self.scale[name] = torch.exp(2 * self._normal(shape))

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randn(shape, generator=self.random)

    def advance(self, num_steps: int = 5, lr: float = 1e-3) -> State:
        """Take steps; a copy of the state after them."""
        for _ in range(num_steps):
            self.num_steps += 1
            for name, scale in self.scale.items():
                self._step(name, scale * self._normal(tuple(scale.shape)), lr)
        return {name: tensor.clone() for name, tensor in self.state.items()}

    def _step(self, name: str, grad: torch.Tensor, lr: float) -> None:
        m = self.state[f"optimizer.{name}.exp_avg"].lerp_(grad, 0.1)
        v = self.state[f"optimizer.{name}.exp_avg_sq"].lerp_(grad * grad, 0.01)
        m_hat = m / (1 - 0.9**self.num_steps)
        v_hat = v / (1 - 0.99**self.num_steps)
        self.state[f"model.{name}"] -= lr * m_hat / (v_hat.sqrt() + 1e-8)


def rows(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """Even rows as FSDP2 cuts them: the last ranks get less or nothing."""
    each = -(-shape[0] // size)
    return _rows(shape, min(rank * each, shape[0]), min((rank + 1) * each, shape[0]))


def uneven_rows(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """Rank 0 has nothing, the last rank half of the rows, the others what there is."""
    edges = [0, 0, *(shape[0] * k // (2 * size) for k in range(1, size - 1)), shape[0]]
    return _rows(shape, *edges[rank : rank + 2]) if size > 1 else _rows(shape, 0, shape[0])


def flat(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """Flat ranges that end in mid-row, as ZeRO and Megatron cut them: several boxes a rank."""
    numel = math.prod(shape)
    each = -(-numel // size)
    return list(flat_range_to_boxes(shape, min(rank * each, numel), min((rank + 1) * each, numel)))


def replicas(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """All of it on every rank, as under DDP."""
    return [whole_box(shape)]


def hybrid(shape: tuple[int, ...], rank: int, size: int) -> list[Box]:
    """Rows over half of the ranks, twice, as under HSDP."""
    return rows(shape, rank % (size // 2), size // 2)


def _rows(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    zeros = (0,) * (len(shape) - 1)
    return [Box((start, *zeros), (stop - start, *shape[1:]))] if stop > start else []


def cut_state(state: State, cut: Cut, group: Group) -> dict[str, Fragment]:
    """This rank's fragments of whole tensors; 0-d tensors whole on every rank."""
    fragments = {}
    for name, whole in state.items():
        shape = tuple(whole.shape)
        boxes = cut(shape, group.rank, group.size) if shape else [whole_box(())]
        parts = [(box, whole[box.slices].clone()) for box in boxes]
        fragments[name] = Fragment(shape, whole.dtype, parts)
    return fragments


class SavingRank:
    """One rank that saves states one after another, each a link to the one before."""

    def __init__(self, folder: Path, config: ExcpConfig, cut: Cut, group: Group) -> None:
        self.folder, self.config, self.cut, self.group = folder, config, cut, group
        self.chain = Chain()

    def save(self, step: int, state: State) -> Manifest:
        writer = ExcpWriter(
            self.folder / step_name(step),
            self.config,
            chain=self.chain,
            group=self.group,
            facts=SaveFacts(step),
        )
        return drive_save(dict(cut_state(state, self.cut, self.group)), writer, self.group)


def save_all(
    folder: Path, states: Sequence[State], config: ExcpConfig, size: int = 1, cut: Cut = rows
) -> list[Manifest]:
    """Save the states as steps 0, 1, ... on so many ranks (threads); returns the manifests."""

    def body(group: Group) -> None:
        saving = SavingRank(folder, config, cut, group)
        for step, state in enumerate(states):
            saving.save(step, state)

    run_ranks(size, body)
    return [read_manifest(folder / step_name(step))[0] for step in range(len(states))]


def go_on(
    folder: Path, states: Mapping[int, State], config: ExcpConfig, size: int, cut: Cut
) -> None:
    """Load the newest step of a folder as fragments on so many ranks, and save more steps."""

    def body(group: Group) -> None:
        saving = SavingRank(folder, config, cut, group)
        empty = {
            name: torch.zeros_like(tensor) for name, tensor in next(iter(states.values())).items()
        }
        fragments = cut_state(empty, cut, group)
        with ChainReader(folder / step_name(newest_step(folder))) as chain:
            reader = ExcpReader(chain.top.folder)
            drive_load(dict(fragments), reader)
            reader.close()
            top = chain.top
        references = {
            (name, box.offsets): part
            for name, fragment in fragments.items()
            for box, part in fragment.pieces
            if is_chained(name, fragment.facts)
        }
        parent = ParentRecord(name=top.folder.name, xxh3=top.checksum)
        saving.chain.restart(top.checksum, parent, top.manifest.figures, references)
        for step, state in states.items():
            saving.save(step, state)

    run_ranks(size, body)


def read_whole(folder: Path, step: int) -> State:
    """All tensors of a step as whole tensors."""
    with ChainReader(folder / step_name(step)) as chain:
        return {
            name: chain.read(name, whole_box(record.shape))
            for name, record in chain.top.manifest.tensors.items()
        }


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor, so that NaNs and signed zeros are told apart."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def same_bits(left: State, right: State) -> None:
    """Assert that two states have the same names, dtypes, shapes and bytes."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        other = right[name]
        assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
        assert np.array_equal(bits(tensor), bits(other)), name


def codings(manifest: Manifest) -> dict[str, str]:
    """How each tensor is stored."""
    return {name: record.coding.kind for name, record in manifest.tensors.items()}


def quantisers(manifest: Manifest) -> dict[str, object]:
    """The quantisers of the weights that have one, as JSON."""
    return {
        name: record.coding.quantiser
        for name, record in manifest.tensors.items()
        if record.coding.kind == "joint_weight"
    }
