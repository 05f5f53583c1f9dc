"""Real ranks in every mesh: what one saves, every other loads, goes on from and links to.

Each source saves a chain; each target goes on from its own copy of it; then one process, and two
ranks of FSDP2, read what the targets wrote. All that needs one number of ranks runs in one spawn.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.config import ExcpConfig
from effx_dist.shard import Box, local_of, pieces_of_tensor
from tests.chain_runs import codings, read_whole, same_bits
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

State = dict[str, torch.Tensor]
PROFILES = ("lossless", "balanced")
SOURCES = {1: ("plain",), 2: ("fsdp", "ddp"), 4: ("fsdp", "hsdp", "fsdp_tp")}
TARGETS = {1: ("plain",), 2: ("ddp",), 3: ("fsdp",), 4: ("fsdp", "hsdp", "fsdp_tp")}
THIRD_FROM = ("-hsdp4", "-fsdp_tp4")
LOSSY_SOURCES = ("plain1", "ddp2", "fsdp_tp4")
SAVED, REACHED = 2, 4
"""Steps that the sources take and save, each; steps after the targets went on."""


def names_of(worlds: dict[int, tuple[str, ...]]) -> list[str]:
    return [f"{layout}{size}" for size, layouts in worlds.items() for layout in layouts]


def chains() -> list[tuple[str, str]]:
    """Profile and source of every chain that is saved; a sample of the sources where it is lossy."""
    lossless = [("lossless", source) for source in names_of(SOURCES)]
    return lossless + [("balanced", source) for source in LOSSY_SOURCES]


class Model(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, and parameters that are tied,
    frozen, of one dimension and of none but one element; layers for tensor parallelism; buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 12)
        self.up = nn.Linear(12, 26)
        self.down = nn.Linear(26, 12)
        self.frozen = nn.Linear(12, 5).requires_grad_(False)
        self.row = nn.Parameter(torch.empty(1, 7))
        self.scale = nn.Parameter(torch.empty(1))
        self.head = nn.Linear(12, 13, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("table", torch.arange(24.0).view(4, 6))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def distributed(layout: str) -> nn.Module:
    """The model, laid out over all ranks."""
    model = Model()
    size = dist.get_world_size() if dist.is_initialized() else 1
    match layout:
        case "fsdp":
            fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        case "hsdp":
            names = ("replicate", "shard")
            fully_shard(model, mesh=init_device_mesh("cpu", (2, size // 2), mesh_dim_names=names))
        case "fsdp_tp":
            mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
            plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(model, mesh["tp"], plan)
            fully_shard(model, mesh=mesh["dp"])
        case "ddp":
            return DistributedDataParallel(model)
    return model


class Session:
    """One world's model and optimizer, fed with whole gradients that depend on the step alone."""

    def __init__(self, layout: str) -> None:
        self.model = distributed(layout)
        self.optimizer = torch.optim.AdamW(
            (p for p in self.model.parameters() if p.requires_grad), lr=1e-2
        )

    def train(self, first: int, stop: int) -> None:
        """Steps ``first`` to ``stop - 1``."""
        for step in range(first, stop):
            generator = torch.Generator().manual_seed(step)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    grad = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = cut_like(name, parameter, grad)
            self.optimizer.step()

    def state(self) -> State:
        """Parameters, buffers, moments and steps as whole tensors, by name. Collective."""
        named = dict(self.model.named_parameters())
        found = {f"model.{n}": t for n, t in (*named.items(), *self.model.named_buffers())}
        for name, parameter in named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = value
        return {name.replace(".module.", "."): whole(tensor) for name, tensor in found.items()}


def cut_like(name: str, parameter: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """``grad`` in the layout of the parameter."""
    if not isinstance(parameter, DTensor):
        return grad
    local = torch.zeros_like(local_of(parameter))
    for piece in pieces_of_tensor(name, parameter)[1]:
        piece.view(local).copy_(grad[piece.box.slices])
    mesh, placements = parameter.device_mesh, parameter.placements
    shape, stride = grad.shape, grad.stride()
    return DTensor.from_local(local, mesh, placements, shape=shape, stride=stride, run_check=False)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().clone()


def config(profile: str) -> ExcpConfig:
    values = {"profile": profile, "async_mode": "sync", "keep_latest_k": 0}
    return ExcpConfig.model_validate(values)


def save_chains(root: Path, layouts: tuple[str, ...], size: int) -> None:
    """Steps 1 and 2 of each layout and profile."""
    for profile, source in chains():
        if source in names_of({size: layouts}):
            session = Session(source.removesuffix(str(size)))
            with Checkpointer(root / profile / source, config(profile)) as checkpointer:
                for step in range(1, SAVED + 1):
                    session.train(step - 1, step)
                    checkpointer.save(step, session.model, session.optimizer)


def go_on(folder: Path, layout: str, profile: str) -> tuple[State, State]:
    """Load, train on, and save each step; the states as loaded and as reached."""
    session = Session(layout)
    with Checkpointer(folder, config(profile)) as checkpointer:
        step = checkpointer.load(session.model, session.optimizer)["step"]
        loaded = session.state()
        for after in (step + 1, step + 2):
            session.train(after - 1, after)
            result = checkpointer.save(after, session.model, session.optimizer).result
            assert result.kind == "link"
    return loaded, session.state()


def go_on_from_all(
    root: Path, layouts: tuple[str, ...], size: int
) -> dict[str, tuple[State, State]]:
    """Each layout goes on from its own copy of every source's chains."""
    found = {}
    for layout in layouts:
        for profile, source in chains():
            name = f"{profile}/{source}-{layout}{size}"
            if not dist.is_initialized() or dist.get_rank() == 0:
                shutil.copytree(root / profile / source, root / name)
            if dist.is_initialized():
                dist.barrier()
            found[name] = go_on(root / name, layout, profile)
    return found


def third_mesh(root: Path, names: list[str]) -> dict[str, tuple[State, State]]:
    """Two ranks go on from what others added to the chains of others."""
    return {name: go_on(root / name, "fsdp", name.partition("/")[0]) for name in names}


class Everything:
    """What all the worlds did, once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for size, layouts in SOURCES.items():
            self._run(size, save_chains, f"save{size}", root, layouts, size)
        self.reached: dict[str, tuple[State, State]] = {}
        for size, layouts in TARGETS.items():
            self.reached |= self._run(size, go_on_from_all, f"load{size}", root, layouts, size)
        self.third = [n for n in self.reached if n.endswith(THIRD_FROM)]
        self.again = self._run(2, third_mesh, "third", root, self.third)

    def _run(self, size: int, body: Any, name: str, *args: Any) -> Any:
        if size == 1:
            return body(*args)
        return spawn(size, body, self.root / "ranks" / name, *args)[0]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Everything:
    return Everything(tmp_path_factory.mktemp("meshes"))


def alone(num_steps: int) -> State:
    """One process that was never interrupted."""
    session = Session("plain")
    session.train(0, num_steps)
    return session.state()


def of_the_run(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.startswith("rng.")}


@pytest.mark.parametrize("target", names_of(TARGETS))
@pytest.mark.parametrize("source", names_of(SOURCES))
def test_lossless_is_that_of_one_process_in_every_mesh(
    everything: Everything, source: str, target: str
) -> None:
    name = f"lossless/{source}-{target}"
    loaded, reached = everything.reached[name]
    same_bits(loaded, alone(SAVED))
    same_bits(reached, alone(REACHED))
    same_bits(
        of_the_run(read_whole(everything.root / name, REACHED)), dict(sorted(reached.items()))
    )


@pytest.mark.parametrize("target", names_of(TARGETS))
@pytest.mark.parametrize("source", LOSSY_SOURCES)
def test_a_lossy_chain_knows_no_mesh(everything: Everything, source: str, target: str) -> None:
    """Every source wrote what one process writes, and every target added what one process adds."""
    name, one = f"balanced/{source}-{target}", everything.root / "balanced/plain1-plain1"
    loaded, reached = everything.reached[name]
    expected = everything.reached["balanced/plain1-plain1"]
    same_bits(loaded, expected[0])
    same_bits(reached, expected[1])
    for step in range(1, REACHED + 1):
        found = of_the_run(read_whole(everything.root / name, step))
        same_bits(found, of_the_run(read_whole(one, step)))
        here, there = (
            of_the_run(codings(read_manifest(folder / step_name(step))[0]))  # type: ignore[arg-type]
            for folder in (everything.root / name, one)
        )
        assert here == there
    assert codings(read_manifest(one / step_name(REACHED))[0])["model.up.weight"] == "joint_weight"


def test_every_chain_verifies(everything: Everything) -> None:
    for name in everything.reached:
        assert not verify_folder(everything.root / name).findings, name


@pytest.mark.parametrize("profile", PROFILES)
def test_a_third_mesh_goes_on_from_the_second(everything: Everything, profile: str) -> None:
    names = [name for name in everything.third if name.startswith(profile)]
    assert len(names) == len(THIRD_FROM) * len([c for c in chains() if c[0] == profile])
    for name in names:
        loaded, reached = everything.again[name]
        written = of_the_run(read_whole(everything.root / name, REACHED))
        same_bits(dict(sorted(loaded.items())), written)
        if profile == "lossless":
            same_bits(reached, alone(REACHED + 2))
        same_bits(reached, everything.again[names[0]][1])


@pytest.mark.parametrize("source", names_of(SOURCES))
def test_every_element_is_written_once(everything: Everything, source: str) -> None:
    """Replicas too: the boxes tile each tensor, and no rank's file repeats another's."""
    manifest, _ = read_manifest(everything.root / "lossless" / source / step_name(1))
    for name, record in manifest.tensors.items():
        covered = np.zeros(record.shape, dtype=np.int64)
        for chunk in record.chunks:
            covered[Box(tuple(chunk.offsets), tuple(chunk.sizes)).slices] += 1
        assert (covered == 1).all(), name
    assert manifest.aliases == {"model.head.weight": "model.embed.weight"}
    assert "optimizer.frozen.weight.exp_avg" not in manifest.tensors
    assert set(manifest.tensors) >= {"model.frozen.weight", "model.count", "model.table"}
