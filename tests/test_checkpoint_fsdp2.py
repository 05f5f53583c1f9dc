"""Real FSDP2 ranks: what one world saves, every other loads and goes on from.

All that needs one number of ranks runs in one spawn, since starting ranks is what these tests cost.
The 2 ranks save a chain; 1, 3 and 4 ranks load it; the 4 ranks add a link; 2 ranks read that.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.config import ExcpConfig
from effx_dist.optim import CautiousAdamW
from tests.chain_runs import codings, read_whole, same_bits
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

SHAPES = {"embed": (65, 64), "wide": (3, 65), "row": (1, 7), "bias": (5,), "norm": (33,)}
OPTIMIZERS = {"cautious": CautiousAdamW, "adamw": torch.optim.AdamW}
LOSSLESS, BALANCED = "lossless", "balanced"
CHAINS = ("lossless-cautious", "lossless-adamw", "balanced-cautious")
State = dict[str, np.ndarray]


class Model(nn.Module):
    """Parameters whose shards are uneven and empty, two of them tied; layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Module()
        for name, shape in SHAPES.items():
            value = nn.Parameter(torch.randn(shape, generator=generator))
            (self.layer if name in ("wide", "row") else self).register_parameter(name, value)
        self.tied = nn.Linear(64, 65, bias=False)
        self.tied.weight = self.embed
        self.register_buffer("count", torch.tensor(3))


class Session:
    """One world's model, optimizer and mesh. Gradients are whole, equal on all ranks, by step."""

    def __init__(self, layout: str, optimizer: str = "cautious") -> None:
        self.model: nn.Module = Model()
        size = dist.get_world_size() if dist.is_initialized() else 1
        if layout == "fsdp":
            self._shard(init_device_mesh("cpu", (size,)))
        elif layout == "hsdp":
            self._shard(
                init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
            )
        elif layout == "ddp":
            self.model = DistributedDataParallel(self.model)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters(), lr=1e-2)

    def _shard(self, mesh: DeviceMesh) -> None:
        fully_shard(self.model.layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in self.model.parameters())

    def train(self, first: int, stop: int) -> None:
        """Steps ``first`` to ``stop - 1``, each with its own gradients."""
        for step in range(first, stop):
            generator = torch.Generator().manual_seed(step)
            for parameter in self.model.parameters():
                grad = torch.randn(parameter.shape, generator=generator)
                if isinstance(parameter, DTensor):
                    mesh, placements = parameter.device_mesh, parameter.placements
                    parameter.grad = distribute_tensor(grad, mesh, placements, src_data_rank=None)
                else:
                    parameter.grad = grad
            self.optimizer.step()

    def state(self) -> State:
        """Parameters, moments and steps as whole arrays, by name. Collective."""
        found = {}
        for raw, parameter in self.model.named_parameters():
            name = raw.removeprefix("module.")
            found[f"model.{name}"] = whole(parameter)
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = whole(value)
        return found

    def groups(self) -> list[dict[str, Any]]:
        """Options of the parameter groups."""
        groups = self.optimizer.param_groups
        return [{k: v for k, v in group.items() if k != "params"} for group in groups]


def whole(tensor: torch.Tensor) -> np.ndarray:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().numpy().copy()


def config(profile: str, **settings: Any) -> ExcpConfig:
    values = {"profile": profile, "async_mode": "thread", "keep_latest_k": 0, **settings}
    return ExcpConfig.model_validate(values)


def save_chain(folder: Path, layout: str, profile: str, optimizer: str) -> State:
    """Steps 1, 2, 3, saved beside training; the live state at step 3, with another lr by then."""
    session = Session(layout, optimizer)
    with Checkpointer(folder, config(profile)) as checkpointer:
        for step in (1, 2, 3):
            session.train(step - 1, step)
            session.optimizer.param_groups[0]["lr"] = 0.1 / step
            checkpointer.async_save(
                step, session.model, session.optimizer, extra={"tokens": torch.tensor(10 * step)}
            )
    return session.state()


def go_on(
    folder: Path, layout: str, profile: str, optimizer: str, saves: bool = True
) -> list[State]:
    """Load the newest step, train two steps with a save after each; the states loaded and reached."""
    session = Session(layout, optimizer)
    states = []
    with Checkpointer(folder, config(profile)) as checkpointer:
        extra = checkpointer.load(session.model, session.optimizer)
        step = extra["step"]
        assert extra["tokens"].item() == 10 * step
        assert session.groups()[0]["lr"] == 0.1 / 3
        states.append(session.state())
        for after in (step + 1, step + 2):
            session.train(after - 1, after)
            if saves:
                tokens = {"tokens": torch.tensor(10 * after)}
                pending = checkpointer.async_save(
                    after, session.model, session.optimizer, extra=tokens
                )
                assert pending.result.kind == "link"
    return [*states, session.state()]


def two_ranks(root: Path) -> dict[str, State]:
    chains = {}
    for name in CHAINS:
        profile, optimizer = name.split("-")
        chains[name] = save_chain(root / name, "fsdp", profile, optimizer)
    chains["ddp"] = save_chain(root / "ddp", "ddp", BALANCED, "cautious")
    return chains


def many_ranks(root: Path, layouts: list[str], name: str) -> dict[str, list[State]]:
    """Each layout goes on from its own copy of each chain."""
    found = {}
    for layout in layouts:
        for chain in CHAINS:
            copy = root / f"{chain}-{name}-{layout}"
            if not dist.is_initialized() or dist.get_rank() == 0:
                shutil.copytree(root / chain, copy)
            if dist.is_initialized():
                dist.barrier()
            profile, optimizer = chain.split("-")
            found[f"{chain}-{name}-{layout}"] = go_on(copy, layout, profile, optimizer)
    return found


def two_ranks_again(root: Path) -> dict[str, list[State]]:
    """2 ranks read what 4 ranks added to what 2 ranks had saved, and go on."""
    names = [
        f"{profile}-cautious-four-{layout}"
        for profile in (LOSSLESS, BALANCED)
        for layout in ("fsdp", "hsdp")
    ]
    return {name: go_on_again(root / name, name.split("-")[0]) for name in names}


def go_on_again(folder: Path, profile: str) -> list[State]:
    session = Session("fsdp")
    with Checkpointer(folder, config(profile)) as checkpointer:
        assert checkpointer.load(session.model, session.optimizer)["step"] == 5
        states = [session.state()]
        session.train(5, 6)
        assert checkpointer.save(6, session.model, session.optimizer).result.kind == "link"
    return [*states, session.state()]


class Everything:
    """What all the worlds did, once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.saved = spawn(2, two_ranks, root / "ranks2", root)[0]
        self.reached = many_ranks(root, ["plain"], "one")
        self.reached |= spawn(3, many_ranks, root / "ranks3", root, ["fsdp"], "three")[0]
        self.reached |= spawn(4, many_ranks, root / "ranks4", root, ["fsdp", "hsdp"], "four")[0]
        self.again = spawn(2, two_ranks_again, root / "ranks2again", root)[0]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    return Everything(tmp_path_factory.mktemp("fsdp2"))


WORLDS = ["one-plain", "three-fsdp", "four-fsdp", "four-hsdp"]


def same(left: State, right: State) -> None:
    tensors = [{n: torch.from_numpy(np.array(a)) for n, a in s.items()} for s in (left, right)]
    same_bits(*tensors)


def alone(optimizer: str, num_steps: int) -> Session:
    """One process that was never interrupted."""
    session = Session("plain", optimizer)
    for step in range(num_steps):
        session.train(step, step + 1)
        session.optimizer.param_groups[0]["lr"] = 0.1 / min(step + 1, 3)
    return session


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_lossless_is_exact_at_every_world_size_and_training_goes_on(
    everything: Everything, world: str, optimizer: str
) -> None:
    loaded, reached = everything.reached[f"lossless-{optimizer}-{world}"]
    same(loaded, everything.saved[f"lossless-{optimizer}"])
    same(loaded, alone(optimizer, 3).state())
    same(reached, alone(optimizer, 5).state())


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_world_writes_the_same_lossless_chain(
    everything: Everything, world: str, optimizer: str
) -> None:
    folder = everything.root / f"lossless-{optimizer}-{world}"
    found, truth = read_whole(folder, 5), alone(optimizer, 5).state()
    same({name: found[name].numpy() for name in truth}, truth)
    kinds = [read_manifest(folder / step_name(step))[0].kind for step in range(1, 6)]
    assert kinds == ["base", "link", "link", "link", "link"]
    assert not verify_folder(folder).findings


@pytest.mark.parametrize("world", WORLDS)
def test_a_lossy_chain_does_not_know_the_world_size(everything: Everything, world: str) -> None:
    """All worlds loaded the same and fed the same gradients: so they wrote the same."""
    loaded, reached = everything.reached[f"balanced-cautious-{world}"]
    expected = everything.reached["balanced-cautious-one-plain"]
    same(loaded, expected[0])
    same(reached, expected[1])
    folder = everything.root / f"balanced-cautious-{world}"
    one = everything.root / "balanced-cautious-one-plain"
    for step in range(1, 6):
        here, there = (codings(read_manifest(f / step_name(step))[0]) for f in (folder, one))
        common = {name for name in there if not name.startswith("rng.")}
        assert {n: here[n] for n in common} == {n: there[n] for n in common}
        found, truth = read_whole(folder, step), read_whole(one, step)
        same_bits({n: found[n] for n in common}, {n: truth[n] for n in common})
    assert codings(read_manifest(folder / "step-5")[0])["model.embed"] == "joint_weight"
    assert not verify_folder(folder).findings


def test_what_is_loaded_is_what_was_written(everything: Everything) -> None:
    """Lossy, so not the live state; close to it."""
    live, loaded = (
        everything.saved["balanced-cautious"],
        everything.reached["balanced-cautious-three-fsdp"][0],
    )
    written = read_whole(everything.root / "balanced-cautious", 3)
    same(loaded, {name: written[name].numpy() for name in loaded})
    assert not np.array_equal(loaded["model.embed"], live["model.embed"])
    error = np.linalg.norm(loaded["model.embed"] - live["model.embed"])
    assert error < 0.05 * np.linalg.norm(live["model.embed"])


@pytest.mark.parametrize("layout", ["fsdp", "hsdp"])
@pytest.mark.parametrize("profile", [LOSSLESS, BALANCED])
def test_two_ranks_go_on_from_what_four_ranks_added_to_a_chain_of_two(
    everything: Everything, layout: str, profile: str
) -> None:
    name = f"{profile}-cautious-four-{layout}"
    loaded, reached = everything.again[name]
    written = read_whole(everything.root / name, 5)
    same(loaded, {n: written[n].numpy() for n in loaded})
    if profile == LOSSLESS:
        same(reached, alone("cautious", 6).state())
    sizes = [
        read_manifest(everything.root / name / step_name(s))[0].world_size for s in range(1, 7)
    ]
    assert sizes == [2, 2, 2, 4, 4, 2]
    assert not verify_folder(everything.root / name).findings


def test_replicas_save_the_chain_that_one_process_saves(everything: Everything) -> None:
    """DDP: every rank holds everything, and links are differences all the same."""
    for step in (2, 3):
        found, _ = read_manifest(everything.root / "ddp" / step_name(step))
        truth, _ = read_manifest(everything.root / "balanced-cautious" / step_name(step))
        assert codings(found) == codings(truth)
