"""torch.distributed.checkpoint over several ranks of FSDP2, with our writer, reader and planners and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from effx_dist.checkpoint import (
    ExcpLoadPlanner,
    ExcpReader,
    ExcpSavePlanner,
    ExcpWriter,
    verify_folder,
)
from effx_dist.config import ExcpConfig
from tests.ranks import spawn

pytestmark = pytest.mark.ranks


def build(is_sharded: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.Linear(65, 3), nn.Linear(3, 1))
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(16, 33, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(inputs).square().mean().backward()
    optimizer.step()


def whole(value: Any) -> Any:
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(entry) for key, entry in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "epoch": epoch}


def save_on_ranks(folder: str, profile: str) -> list[dict[str, Any]]:
    """Three asynchronous saves while training goes on; the whole state at each."""
    model, optimizer = build(is_sharded=True)
    config = ExcpConfig.model_validate({"profile": profile})
    writer = ExcpWriter(Path(folder) / "step-0", config)
    states = []
    for epoch in range(3):
        train(model, optimizer, epoch)
        state = state_of(model, optimizer, epoch)
        states.append(whole(state))
        saving = dcp.async_save(
            state,
            storage_writer=writer,
            checkpoint_id=Path(folder) / f"step-{epoch}",
            planner=ExcpSavePlanner(),
            process_group=dist.new_group(backend="gloo"),
        )
        train(model, optimizer, 100 + epoch)  # collectives of its own, beside those of the save
        saving.result()
    return states


def load_whole(folder: Path, step: int) -> dict[str, Any]:
    """Into a model that is not sharded, in this process."""
    model, optimizer = build(is_sharded=False)
    state = state_of(model, optimizer, -1)
    dcp.load(state, storage_reader=ExcpReader(folder / f"step-{step}"), planner=ExcpLoadPlanner())
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
    )
    return state_of(model, optimizer, state["epoch"])


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_asynchronous_saves_of_two_ranks_load_into_one(tmp_path: Path) -> None:
    folder = tmp_path / "lossless"
    states = spawn(2, save_on_ranks, tmp_path / "ranks", str(folder), "lossless")[0]
    for step, expected in enumerate(states):
        found = load_whole(folder, step)
        assert found["epoch"] == step
        assert_same(found["model"], expected["model"])
        assert_same(found["optim"]["state"], expected["optim"]["state"])
    assert verify_folder(folder).findings == []


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_lossy_saves_of_two_ranks_are_links_and_load(tmp_path: Path) -> None:
    folder = tmp_path / "balanced"
    states = spawn(2, save_on_ranks, tmp_path / "ranks", str(folder), "balanced")[0]
    chain = ExcpReader(folder / "step-2").chain
    assert chain.top.manifest.kind == "link"
    assert chain.top.manifest.tensors["model.0.weight"].coding.kind == "joint_weight"
    found = load_whole(folder, 2)
    for name, weight in states[2]["model"].items():
        moved = (weight - states[1]["model"][name]).norm()
        assert (found["model"][name] - weight).norm() <= 2 * moved, name
    assert_same(found["model"]["0.bias"], states[2]["model"]["0.bias"])
