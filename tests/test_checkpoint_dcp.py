"""ExcpWriter and ExcpReader handed to torch.distributed.checkpoint by somebody who uses nothing else of the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict

from effx_dist.checkpoint import (
    ExcpLoadPlanner,
    ExcpReader,
    ExcpSavePlanner,
    ExcpWriter,
    verify_folder,
)
from effx_dist.config import ExcpConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"
)


class Run:
    """A small model in training, and its state dict as the documentation of DCP builds it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Embedding(50, 40), torch.nn.Linear(40, 30))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.epoch = 0

    def step(self) -> None:
        self.epoch += 1
        loss = self.model(torch.arange(50)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        notes = {"names": ["a", "b"], "rate": 0.1, "nothing": None}
        return {"model": model, "optim": optimizer, "epoch": self.epoch, "notes": notes}


def zeroed(state: Any) -> Any:
    """The same structure with other values, to be filled by a load."""
    if isinstance(state, torch.Tensor):
        return torch.zeros_like(state)
    if isinstance(state, dict):
        return {key: zeroed(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(zeroed(value) for value in state)
    return None


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), path
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        for index, value in enumerate(expected):
            assert_same(found[index], value, f"{path}.{index}")
    else:
        assert found == expected, path


def test_a_lossless_chain_comes_back_exactly(tmp_path: Path) -> None:
    run = Run()
    writer = ExcpWriter(tmp_path / "first", ExcpConfig(profile="lossless"))
    for name in ("first", "second", "third"):
        run.step()
        dcp.save(
            run.state(),
            storage_writer=writer,
            checkpoint_id=tmp_path / name,
            planner=ExcpSavePlanner(),
        )
    assert writer.manifest is not None
    assert writer.manifest.kind == "link"
    found = zeroed(run.state())
    dcp.load(found, storage_reader=ExcpReader(tmp_path / "third"), planner=ExcpLoadPlanner())
    assert_same(found, run.state())


def test_stock_planners_save_and_load_tensors(tmp_path: Path) -> None:
    run = Run()
    run.step()
    state = {"model": run.state()["model"]}
    dcp.save(state, storage_writer=ExcpWriter(tmp_path / "step-1"))
    found = zeroed(state)
    dcp.load(found, storage_reader=ExcpReader(tmp_path / "step-1"))
    assert_same(found, state)


def test_the_pickles_of_the_stock_planner_are_refused(tmp_path: Path) -> None:
    run = Run()
    with pytest.raises(BaseException, match="ExcpSavePlanner") as caught:
        dcp.save(run.state(), storage_writer=ExcpWriter(tmp_path / "step-1"))
    assert "epoch" in str(caught.value) or "optim" in str(caught.value)
    assert not (tmp_path / "step-1" / "manifest.json").exists()


def test_moments_named_by_dcp_are_compressed_with_their_weights(tmp_path: Path) -> None:
    run = Run()
    writer = ExcpWriter(tmp_path / "a", ExcpConfig(profile="balanced"))
    for name in ("a", "b"):
        run.step()
        state = {"model": run.state()["model"], "optim": run.state()["optim"]["state"]}
        dcp.save(state, storage_writer=writer, checkpoint_id=tmp_path / name)
    assert writer.manifest is not None
    codings = {name: t.coding.kind for name, t in writer.manifest.tensors.items()}
    assert codings["model.1.weight"] == "joint_weight"
    assert codings["optim.1.weight.exp_avg"] == "joint_exp_avg"
    assert codings["optim.1.weight.exp_avg_sq"] == "joint_exp_avg_sq"
    assert codings["model.1.bias"] == "planes"
    assert codings["optim.1.weight.step"] == "planes"


@pytest.fixture
def gloo() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_async_save_keeps_what_training_then_changes(tmp_path: Path, gloo: None) -> None:
    run = Run()
    run.step()
    state = {"model": run.state()["model"]}
    expected = {"model": {name: t.clone() for name, t in state["model"].items()}}
    saving = dcp.async_save(state, storage_writer=ExcpWriter(tmp_path / "step-1"))
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(7.0)
    saving.result()
    found = zeroed(state)
    dcp.load(found, storage_reader=ExcpReader(tmp_path / "step-1"))
    assert_same(found, expected)
    assert verify_folder(tmp_path).findings == []


def test_a_save_never_writes_to_the_callers_tensors(tmp_path: Path) -> None:
    run = Run()
    writer = ExcpWriter(tmp_path / "a", ExcpConfig(profile="small"))
    for name in ("a", "b"):
        run.step()
        state = {"model": run.state()["model"], "optim": run.state()["optim"]["state"]}
        before = {key: t.clone() for key, t in run.model.state_dict().items()}
        dcp.save(state, storage_writer=writer, checkpoint_id=tmp_path / name)
        assert_same(run.model.state_dict(), before)
