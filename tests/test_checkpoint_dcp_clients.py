"""Clients of torch.distributed.checkpoint that bring no template, a model on the meta device, or a stock planner."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,
    _load_state_dict_from_keys,
)

from effx_dist.checkpoint import (
    Checkpointer,
    ExcpLoadPlanner,
    ExcpReader,
    ExcpSavePlanner,
    ExcpWriter,
    Fragment,
    verify_folder,
)
from effx_dist.checkpoint.format.manifest import DTYPES
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.saving.old_torch import COPIES_BY_ITSELF, CopyingStager
from effx_dist.checkpoint.storage.steps import committed_steps
from effx_dist.config import ExcpConfig
from effx_dist.errors import ConfigError
from effx_dist.shard import whole_box
from tests.runs import lossless

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is (disabled, )?unavailable or uninit"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:.*_get_pg_default_device. will be deprecated"),
    pytest.mark.filterwarnings("ignore:Multiple backends are registered"),
]


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(30, 20), nn.Linear(20, 10))


def save(folder: Path, state: dict[str, Any], **options: Any) -> None:
    writer = ExcpWriter(folder, lossless())
    dcp.save(state, storage_writer=writer, planner=ExcpSavePlanner(**options))


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_on_the_meta_device_is_filled_without_ranks(tmp_path: Path) -> None:
    check_meta(ExcpLoadPlanner, tmp_path)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("planner", [None, ExcpLoadPlanner], ids=["torch's", "ours"])
def test_a_model_on_the_meta_device_is_filled(planner: Any, tmp_path: Path) -> None:
    check_meta(planner, tmp_path)


def check_meta(planner: Any, tmp_path: Path) -> None:
    model = model_of()
    save(tmp_path / "step-1", model.state_dict())
    with torch.device("meta"):
        empty = model_of()
    state = empty.state_dict()
    made = None if planner is None else planner()
    dcp.load(state, storage_reader=ExcpReader(tmp_path / "step-1"), planner=made)
    assert {name: value.device.type for name, value in state.items()} == dict.fromkeys(state, "cpu")
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
    empty.load_state_dict(state, assign=True)


class TestWithoutATemplate:
    """As torch's own converters load."""

    def state(self) -> dict[str, Any]:
        notes = {"names": ["a", "b"], "rate": 0.5, "steps": [{"x": torch.arange(300)}, 7]}
        return {"model": dict(model_of().state_dict()), "epoch": 3, "notes": notes}

    def check(self, found: Any, expected: Any) -> None:
        if isinstance(expected, dict):
            assert list(found) == list(expected) or sorted(found) == sorted(expected)
            for key, value in expected.items():
                self.check(found[key], value)
        elif isinstance(expected, list):
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                self.check(one, other)
        elif isinstance(expected, torch.Tensor):
            assert torch.equal(found, expected)
        else:
            assert found == expected

    def test_everything_comes_back_nested(self, tmp_path: Path) -> None:
        save(tmp_path / "step-1", self.state())
        found: dict[str, Any] = {}
        _load_state_dict(
            found,
            storage_reader=ExcpReader(tmp_path / "step-1"),
            planner=_EmptyStateDictLoadPlanner(),
            no_dist=True,
        )
        self.check(found, self.state())

    def test_single_keys(self, tmp_path: Path) -> None:
        save(tmp_path / "step-1", self.state())
        reader = ExcpReader(tmp_path / "step-1")
        found = _load_state_dict_from_keys({"model", "epoch"}, storage_reader=reader)
        expected = self.state()
        self.check(found, {"model": expected["model"], "epoch": 3})

    def test_names_of_a_checkpointer_stay_flat(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.save(1, model_of())
        found: dict[str, Any] = {}
        reader = ExcpReader(tmp_path)
        _load_state_dict(found, reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
        assert "model.0.weight" in found

    def test_keys_with_dots_and_numbers_keep_their_paths(self, tmp_path: Path) -> None:
        state = {"a.b": {"c": torch.ones(300)}, "a": {"b.c": torch.zeros(300)}}
        with pytest.raises((CheckpointException, ValueError)):
            save(tmp_path / "step-1", state)  # both flatten to a.b.c
        save(tmp_path / "step-2", {"l": [{"t": torch.ones(300)}, torch.zeros(300)]})
        manifest, _ = read_manifest(tmp_path / "step-2")
        assert manifest.paths == {"l.0.t": ["l", 0, "t"], "l.1": ["l", 1]}


class TestPlanCaching:
    def test_every_save_is_right(self, tmp_path: Path) -> None:
        model = model_of()
        config = ExcpConfig(profile="lossless", base_every=10)
        writer = ExcpWriter(tmp_path / "step-0", config)
        for step in range(4):
            with torch.no_grad():
                model[0].weight += step
            state = dict(model.state_dict())
            if step >= 2:
                state["more"] = torch.full((300,), step)
            planner = ExcpSavePlanner(enable_plan_caching=True)
            folder = tmp_path / f"step-{step}"
            dcp.save(state, checkpoint_id=folder, storage_writer=writer, planner=planner)
            found = {name: torch.zeros_like(value) for name, value in state.items()}
            dcp.load(found, storage_reader=ExcpReader(folder))
            assert all(torch.equal(found[name], value) for name, value in state.items())
        assert verify_folder(tmp_path, decode=True).findings == []
        assert read_manifest(tmp_path / "step-3")[0].kind == "link"

    def test_torchs_own_planner_is_refused_before_anything_is_written(self, tmp_path: Path) -> None:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        with pytest.raises(CheckpointException, match=r"enable_plan_caching=True\) does not tell"):
            dcp.save(
                {"w": torch.ones(300)},
                storage_writer=ExcpWriter(tmp_path / "step-1", lossless()),
                planner=planner,
            )
        assert committed_steps(tmp_path) == []


def test_a_cast_is_made_as_torch_makes_it_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = torch.randn(40, 30)
    save(tmp_path / "step-1", {"w": values, "same": values})
    found = {"w": torch.zeros(40, 30, dtype=torch.bfloat16), "same": torch.zeros(40, 30)}
    with caplog.at_level(logging.WARNING, "effx_dist"):
        dcp.load(found, storage_reader=ExcpReader(tmp_path / "step-1"))
    assert torch.equal(found["w"], values.bfloat16())
    [record] = [r for r in caplog.records if "cast" in r.message]
    assert "1 tensors are cast: w from torch.float32 to torch.bfloat16" in record.message


# dtypes: whatever torch has is stored as its bytes

OPERATED = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.parametrize("name", DTYPES)
def test_any_dtype_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    dtype = DTYPES[name]
    generator = torch.Generator().manual_seed(1)

    def bits(step: int) -> torch.Tensor:
        drawn = torch.randint(0, 256, (64 * 48 * dtype.itemsize,), generator=generator)
        drawn[: 100 * step] = 0
        return (drawn % 2 if dtype is torch.bool else drawn).to(torch.uint8)

    module = nn.Module()
    module.register_buffer("w", bits(0).view(dtype).view(64, 48))
    with Checkpointer(tmp_path, lossless(base_every=5)) as checkpointer:
        for step in range(3):
            module.w.view(-1).view(torch.uint8).copy_(bits(step))
            checkpointer.save(step, module)
        expected = module.w.view(-1).view(torch.uint8).clone()
        module.w.view(-1).view(torch.uint8).zero_()
        checkpointer.load(module)
    assert torch.equal(module.w.view(-1).view(torch.uint8), expected)
    assert verify_folder(tmp_path, decode=True).findings == []
    assert read_manifest(tmp_path / "step-2")[0].tensors["model.w"].dtype == name


@pytest.mark.parametrize("profile", ["balanced", "excp"])
@pytest.mark.parametrize("name", [n for n, d in DTYPES.items() if d.is_floating_point])
def test_any_weight_beside_moments_is_saved(name: str, profile: str, tmp_path: Path) -> None:
    """Those that torch does no arithmetic on stay lossless."""
    dtype = DTYPES[name]
    state = {"model": {"w": torch.randint(0, 60, (64, 48), dtype=torch.uint8)}}
    if dtype.itemsize == 1:
        state["model"]["w"] = state["model"]["w"].view(dtype)
    else:
        state["model"]["w"] = torch.randn(64, 48).to(dtype)
    state["optim"] = {"w.exp_avg": torch.randn(64, 48), "w.exp_avg_sq": torch.rand(64, 48)}
    writer = ExcpWriter(tmp_path / "step-0", ExcpConfig.model_validate({"profile": profile}))
    for step in range(2):
        folder = tmp_path / f"step-{step}"
        planner = ExcpSavePlanner()
        dcp.save(state, checkpoint_id=folder, storage_writer=writer, planner=planner)
    assert verify_folder(tmp_path, decode=True).findings == []
    kind = read_manifest(tmp_path / "step-1")[0].tensors["model.w"].coding.kind
    is_coded = dtype in OPERATED or name in ("float8_e4m3fn", "float8_e5m2")
    assert kind == ("joint_weight" if is_coded else "delta")


def test_a_dtype_whose_values_are_not_its_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="deprecated"):
        quantised = torch.quantize_per_tensor(torch.randn(8, 8), 0.1, 0, torch.qint8)
    with pytest.raises(CheckpointException, match=r"w: has dtype torch.qint8"):
        save(tmp_path / "step-1", {"w": quantised})
    with (
        pytest.raises(TypeError, match=r"extra.w: has dtype torch.qint8"),
        Checkpointer(tmp_path, lossless()) as checkpointer,
    ):
        checkpointer.save(1, model_of(), extra={"w": quantised})


def test_lazy_views_are_saved_and_filled(tmp_path: Path) -> None:
    numbers = torch.randn(40, 30, dtype=torch.complex64)
    state = {"conj": numbers.conj(), "neg": numbers.conj().imag, "real": numbers.real}
    assert state["conj"].is_conj()
    assert state["neg"].is_neg()
    save(tmp_path / "step-1", state)
    other = torch.zeros(40, 30, dtype=torch.complex64)
    found = {
        "conj": other.conj(),
        "neg": torch.zeros_like(numbers).conj().imag,
        "real": torch.zeros(40, 30),
    }
    dcp.load(found, storage_reader=ExcpReader(tmp_path / "step-1"))
    for name, value in state.items():
        assert torch.equal(
            found[name].resolve_conj().resolve_neg(), value.resolve_conj().resolve_neg()
        )
    assert torch.equal(other, numbers)


# What async_save of an older torch needs


def test_the_copy_is_whole_and_no_view() -> None:
    assert isinstance(CopyingStager(), AsyncStager)
    value = torch.arange(4.0)
    fragment = Fragment((4,), torch.float32, [(whole_box((4,)), value)])
    state = {"a": [value, {"b": (value, 3)}], "f": fragment}
    staged = CopyingStager().stage(state)
    value.fill_(-1)
    assert staged["a"][0].tolist() == staged["a"][1]["b"][0].tolist() == [0, 1, 2, 3]
    assert staged["f"].pieces[0][1].tolist() == [0, 1, 2, 3]
    assert staged["a"][1]["b"][1] == 3
    assert (isinstance(ExcpWriter("x"), AsyncStager)) == (not COPIES_BY_ITSELF)


@pytest.mark.usefixtures("one_rank")
def test_async_save_stores_what_was_there_at_the_call(tmp_path: Path) -> None:
    state = {"w": torch.zeros(2**21)}
    future = dcp.async_save(
        state,
        storage_writer=ExcpWriter(tmp_path / "step-1", lossless()),
        planner=ExcpSavePlanner(),
        async_stager=CopyingStager(),
    )
    state["w"].fill_(9)
    future.result()
    found = {"w": torch.ones(2**21)}
    dcp.load(found, storage_reader=ExcpReader(tmp_path / "step-1"))
    assert not found["w"].any()


# Optimizers whose state has no names


@pytest.mark.parametrize("has_stepped", [False, True])
def test_a_parameter_outside_the_model_is_refused(has_stepped: bool, tmp_path: Path) -> None:
    model, other = nn.Linear(4, 3), nn.Parameter(torch.ones(2, 5))
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, {"params": [other]}])
    if has_stepped:
        other.grad = torch.ones(2, 5)
        optimizer.step()
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        with pytest.raises(ConfigError, match=r"parameter 0 of group 1, shape \(2, 5\)"):
            checkpointer.save(1, model, optimizer)
        checkpointer.save(2, nn.ModuleList([model, nn.ParameterList([other])]), optimizer)


def test_lbfgs_is_refused_and_its_remedy_works(tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, torch.optim.LBFGS(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().sum()
            loss.backward()
            return loss

        return float(optimizer.step(closure).detach())

    model, optimizer = made()
    step(model, optimizer)
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        with pytest.raises(ConfigError, match="LBFGS keeps one state for all parameters"):
            checkpointer.save(1, model, optimizer)
        checkpointer.save(1, model, stateful={"optimizer": optimizer})
        again, its_optimizer = made()
        checkpointer.load(again, stateful={"optimizer": its_optimizer})
    assert step(model, optimizer) == step(again, its_optimizer)


@pytest.mark.parametrize("profile", ["excp", "safe", "balanced", "small"])
def test_amsgrads_largest_moment_is_kept_beside_the_others(profile: str, tmp_path: Path) -> None:
    model = model_of()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    config = ExcpConfig.model_validate({"profile": profile, "async_mode": "sync", "base_every": 9})
    with Checkpointer(tmp_path, config) as checkpointer:
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
            checkpointer.save(step, model, optimizer)
        before = {p: s["max_exp_avg_sq"].clone() for p, s in optimizer.state.items()}
        checkpointer.load(model, optimizer)
    assert verify_folder(tmp_path, decode=True).findings == []
    for parameter, value in before.items():
        assert torch.equal(optimizer.state[parameter]["max_exp_avg_sq"], value), "stored as it is"
