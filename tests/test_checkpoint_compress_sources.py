"""What plain checkpoints may look like, what is refused, and that nothing in them is run."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from effx_dist.checkpoint import Checkpointer, ExcpSavePlanner, Fragment
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.storage.places import location
from effx_dist.checkpoint.tools.compress import ReadOptions, compress_series
from effx_dist.errors import ConfigError, CorruptCheckpointError
from effx_dist.shard import Box, Group, SoloGroup
from tests import plain_series as plain
from tests.deepspeed_checkpoint_runs import State, sharded, state_of_fsdp, train_fsdp
from tests.plain_series import LOSSLESS, all_of_them, assert_same, compressed, named_state, trained
from tests.ranks import spawn
from tests.thread_ranks import run_ranks


class Touch:
    """Unpickling one leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


class Arguments:
    """Harmless, but nobody has said so."""


class Stated(nn.Module):
    """A buffer, and a state that is no tensor but holds one."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(2))
        self.state: dict[str, Any] = {"seen": torch.zeros(2, 2), "of": "b"}

    def get_extra_state(self) -> dict[str, Any]:
        return self.state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.state = state


class TestModels:
    @pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict", "module"])
    def test_are_found_under_the_usual_names(self, key: str | None, tmp_path: Path) -> None:
        state = {"layer.weight": torch.randn(3, 4), "layer.bias": torch.randn(3)}
        found = compressed(tmp_path, state if key is None else {key: state, "epoch": 3})
        assert_same(found, {f"model.{name}": tensor for name, tensor in state.items()})

    def test_wrappers_are_no_part_of_a_name(self, tmp_path: Path) -> None:
        state = {"module._orig_mod.a": torch.ones(2), "module._orig_mod.b": torch.ones(2, 2)}
        assert compressed(tmp_path, {"model": state}).keys() == {"model.a", "model.b"}

    def test_every_kind_of_tensor(self, tmp_path: Path) -> None:
        state = {
            "scalar": torch.tensor(1.5),
            "nothing": torch.empty(0, 3),
            "turned": torch.arange(12.0).view(3, 4).t(),
            "part": torch.arange(20).view(4, 5)[1:3, 2:],
            "flags": torch.tensor([True, False]),
            "low": torch.randn(3, 3).to(torch.float8_e4m3fn),
            "parameter": nn.Parameter(torch.randn(2, 2)),
        }
        found = compressed(tmp_path, state)
        assert found.keys() == {f"model.{name}" for name in state}
        for name, tensor in state.items():
            assert found[f"model.{name}"].dtype == tensor.dtype
            assert torch.equal(found[f"model.{name}"].float(), tensor.detach().float())

    def test_what_is_no_model_is_refused(self, tmp_path: Path) -> None:
        for content in ({"net": {"a": torch.ones(2)}}, {"a": 1}, [torch.ones(2)], {}):
            with pytest.raises(ConfigError, match=r"5\.pt"):
                compressed(tmp_path, content)
        both = {"model": {"a": torch.ones(2)}, "state_dict": {"a": torch.ones(2)}}
        with pytest.raises(ConfigError, match="which of them"):
            compressed(tmp_path, both)

    def test_sparse_tensors_are_refused_by_name(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"5\.pt: model\.a: .*sparse"):
            compressed(tmp_path, {"model": {"a": torch.eye(3).to_sparse()}})

    def test_a_model_alone_as_a_dcp_folder(self, tmp_path: Path) -> None:
        model, _ = trained(all_of_them)
        plain.save_dcp(tmp_path / "step-5", dict(model.state_dict()))
        compress_series([tmp_path / "step-5"], tmp_path / "out", LOSSLESS)
        found = plain.values_of(tmp_path / "out", 5)
        assert_same(found, {f"model.{name}": t for name, t in model.state_dict().items()})

    def test_another_tree_in_a_dcp_folder_keeps_its_names(self, tmp_path: Path) -> None:
        tree = {"net": {"a": torch.ones(2, 2)}, "ema": [torch.zeros(3)]}
        plain.save_dcp(tmp_path / "step-5", tree)
        compress_series([tmp_path / "step-5"], tmp_path / "out", LOSSLESS)
        found = plain.values_of(tmp_path / "out", 5)
        assert_same(found, {"model.net.a": torch.ones(2, 2), "model.ema.0": torch.zeros(3)})

    def test_a_stateful_app_in_a_dcp_folder(self, tmp_path: Path) -> None:
        model, optimizer = trained(all_of_them)
        app = {
            "model": get_model_state_dict(model),
            "optim": get_optimizer_state_dict(model, optimizer),
        }
        plain.save_dcp(tmp_path / "step-5", {"app": app})
        compress_series([tmp_path / "step-5"], tmp_path / "out", LOSSLESS)
        assert_same(plain.values_of(tmp_path / "out", 5), named_state(model, optimizer))


class TestOtherEntries:
    def test_of_a_models_state_are_kept_in_it(self, tmp_path: Path) -> None:
        model = Stated()
        for step in (1, 2):
            state = {"a": torch.ones(2), "_extra_state": {"seen": torch.ones(2, 2), "of": "c"}}
            torch.save({"model": state}, tmp_path / f"{step}.pt")
            compress_series([tmp_path], tmp_path / "out", LOSSLESS)
        with Checkpointer(tmp_path / "out", LOSSLESS, group=SoloGroup()) as checkpoints:
            checkpoints.load(model)
        assert_same(model.state, {"seen": torch.ones(2, 2), "of": "c"})

    def test_are_kept_as_extra(self, tmp_path: Path) -> None:
        content = {
            "model": {"a": torch.ones(2)},
            "epoch": 3,
            "best": (0.5, [1, None]),
            "scheduler": {"last_lr": [0.1]},
            "mean": torch.arange(3.0),
        }
        compressed(tmp_path, content)
        with Checkpointer(tmp_path / "out", LOSSLESS, group=SoloGroup()) as checkpoints:
            model = nn.Module()
            model.register_parameter("a", nn.Parameter(torch.zeros(2)))
            extra = checkpoints.load(model)
        assert_same(extra, {**{k: content[k] for k in content if k != "model"}, "step": 5})

    def test_what_cannot_be_kept_is_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        found = compressed(tmp_path, {"model": {"a": torch.ones(2)}, "seen": {1, 2}})
        assert found.keys() == {"model.a"}
        assert "left out: extra.seen: a set" in caplog.text


class TestHostile:
    def test_a_torch_file_is_not_run(self, tmp_path: Path) -> None:
        content = {"model": {"a": torch.ones(2)}, "args": Touch(tmp_path / "ran")}
        with pytest.raises(ConfigError, match=r"5\.pt: holds more.*mkdir.*--trust"):
            compressed(tmp_path, content)
        assert not (tmp_path / "ran").exists()
        assert not (tmp_path / "out").exists()

    def test_trust_is_a_choice(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        content = {"model": {"a": torch.ones(2)}, "args": Arguments(), "epoch": 1}
        with pytest.raises(ConfigError, match=r"Arguments.*--trust"):
            compressed(tmp_path, content)
        found = compressed(tmp_path, content, ReadOptions(trust=True))
        assert_same(found, {"model.a": torch.ones(2)})
        assert "left out: extra.args: a Arguments" in caplog.text

    @pytest.mark.parametrize("is_pickle", [True, False])
    def test_the_description_of_a_dcp_folder_is_not_run(
        self, is_pickle: bool, tmp_path: Path
    ) -> None:
        plain.save_dcp(tmp_path / "step-5", {"a": torch.ones(2)})
        path = tmp_path / "step-5/.metadata"
        path.write_bytes(pickle.dumps(Touch(tmp_path / "ran")) if is_pickle else b"\x80\x04junk")
        error, said = (ConfigError, "mkdir") if is_pickle else (CorruptCheckpointError, "cannot be")
        with pytest.raises(error, match=rf"\.metadata: .*{said}"):
            compress_series([tmp_path / "step-5"], tmp_path / "out")
        assert not (tmp_path / "ran").exists()

    def test_the_values_in_a_dcp_folder_are_not_run(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        state = {"model": {"a": torch.ones(2)}, "args": Touch(tmp_path / "ran"), "epoch": 3}
        plain.save_dcp(tmp_path / "step-5", state)
        compress_series([tmp_path / "step-5"], tmp_path / "out", LOSSLESS)
        assert not (tmp_path / "ran").exists()
        assert "left out: args: " in caplog.text
        assert plain.values_of(tmp_path / "out", 5).keys() == {"model.a"}

    def test_a_dcp_folder_leads_nowhere_else(self, tmp_path: Path) -> None:
        plain.save_dcp(tmp_path / "step-5", {"a": torch.ones(2)})
        (tmp_path / "step-5/__0_0.distcp").rename(tmp_path / "elsewhere")
        path = tmp_path / "step-5/.metadata"
        metadata = pickle.loads(path.read_bytes())
        for entry in metadata.storage_data.values():
            entry.relative_path = "../elsewhere"
        path.write_bytes(pickle.dumps(metadata))
        with pytest.raises(CorruptCheckpointError, match="outside the folder"):
            compress_series([tmp_path / "step-5"], tmp_path / "out")

    def test_a_missing_file_of_a_dcp_folder(self, tmp_path: Path) -> None:
        plain.save_dcp(tmp_path / "step-5", {"a": torch.ones(2)})
        (tmp_path / "step-5/__0_0.distcp").unlink()
        with pytest.raises(FileNotFoundError, match="distcp"):
            compress_series([tmp_path / "step-5"], tmp_path / "out")

    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"\x80\x02}q\x00."])
    def test_a_file_that_is_none(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / "5.pt").write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=r"5\.pt: cannot be read"):
            compress_series([tmp_path / "5.pt"], tmp_path / "out")

    def test_torchs_old_format_is_said(self, tmp_path: Path) -> None:
        path = tmp_path / "5.pt"
        torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
        with pytest.raises(CorruptCheckpointError, match="_use_new_zipfile_serialization=True"):
            compress_series([path], tmp_path / "out")


def test_a_dcp_folder_of_pieces(tmp_path: Path) -> None:
    """Pieces of a tensor in two files, and no word on what was nested in what."""
    values = torch.arange(24.0).view(6, 4)
    boxes = [Box((0, 0), (2, 4)), Box((2, 0), (4, 4))]
    fragment = Fragment((6, 4), torch.float32, [(box, values[box.slices]) for box in boxes])
    state = {"model.layer.weight": fragment, "optim.state.layer.weight.exp_avg": fragment}
    writer = dcp.FileSystemWriter(tmp_path / "step-5", thread_count=2)
    planner = ExcpSavePlanner(flatten_state_dict=False)
    plain.save_dcp(tmp_path / "step-5", state, storage_writer=writer, planner=planner)
    options = ReadOptions(weights_only=True)
    compress_series([tmp_path / "step-5"], tmp_path / "out", LOSSLESS, options=options)
    assert_same(plain.values_of(tmp_path / "out", 5), {"model.layer.weight": values})
    with pytest.raises(ConfigError, match="'param_groups'"):
        compress_series([tmp_path / "step-5"], tmp_path / "other", LOSSLESS)


def save_sharded(folder: Path) -> State:
    """On each of the ranks: an FSDP2 run's checkpoint after each of two steps, as torch writes it."""
    model, optimizer = sharded()
    for step in (1, 2):
        train_fsdp(model, optimizer, step)
        state = {
            "model": get_model_state_dict(model),
            "optim": get_optimizer_state_dict(model, optimizer),
        }
        dcp.save(state, checkpoint_id=folder / f"step-{step}")
    frozen = {
        f"model.{name}": param.full_tensor()  # type: ignore[attr-defined]
        for name, param in model.named_parameters()
        if not param.requires_grad
    }
    return state_of_fsdp(model, optimizer) | frozen


@pytest.mark.ranks
def test_what_an_fsdp2_run_saved(tmp_path: Path) -> None:
    expected = spawn(2, save_sharded, tmp_path / "ranks", tmp_path / "series")[0]

    def body(group: Group) -> None:
        compress_series([tmp_path / "series"], tmp_path / "out", LOSSLESS, group=group)

    run_ranks(3, body)
    found = plain.values_of(tmp_path / "out", 2)
    unused = {name: t for name, t in found.items() if name.startswith("optimizer.unused.")}
    assert_same({name: t for name, t in found.items() if name not in unused}, expected)
    manifest = read_manifest(location(tmp_path / "out/step-2"))[0]
    assert manifest.aliases == {"model.head.weight": "model.embed.weight"}
