"""What `convert` writes is read back by what it was written for, value for value."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.format import whole_tensors as pieces
from effx_dist.checkpoint.tools.convert import TARGETS, ConvertOptions, convert_checkpoint
from effx_dist.checkpoint.tools.convert.hugging_face import parse_size
from effx_dist.config import ExcpConfig
from effx_dist.errors import ConfigError, CorruptCheckpointError
from tests import small_chain

ROOT = Path(__file__).parents[1]
HF_CONFIG = {"model_type": "llama", "hidden_size": 24}
CONFIG = ExcpConfig(async_mode="sync", keep_latest_k=0)


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model whose parameters' order is not that of their names, in two groups, one tensor tied."""
    torch.manual_seed(3)
    model = torch.nn.ModuleDict(
        {
            "second": torch.nn.Linear(24, 24),
            "first": torch.nn.Linear(24, 24),
            "tied": torch.nn.Linear(24, 24, bias=False),
            "norm": torch.nn.BatchNorm1d(24),
        }
    )
    model["tied"].weight = model["first"].weight
    decayed = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "lr": 0.02}]
    return model, torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    model["norm"].running_mean.add_(step)  # type: ignore[index]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two links."""
    folder = tmp_path_factory.mktemp("chain")
    model, optimizer = make()
    with Checkpointer(folder, CONFIG) as checkpointer:
        for step in (1, 2, 3):
            train(model, optimizer, step)
            extra = {"samples": 8 * step, "mean": torch.arange(4.0), "nan": math.nan, "t": (1, 2)}
            checkpointer.save(step, model, optimizer, extra=extra)
    return folder


def loaded(chain: Path, step: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """What our own load gives."""
    model, optimizer = make()
    with Checkpointer(chain, CONFIG) as checkpointer:
        checkpointer.load(model, optimizer, step=step)
    return model, optimizer


def assert_same(a: Any, b: Any) -> None:
    """Nested values and tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture(params=[10**9, 50], ids=["whole", "in pieces"])
def piece_numel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pieces, "PIECE_NUMEL", request.param)
    return


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.usefixtures("piece_numel")
class TestTorch:
    def test_loads_into_a_plain_model_and_optimizer(
        self, chain: Path, step: int, tmp_path: Path
    ) -> None:
        assert convert_checkpoint(chain, "torch", tmp_path / "out.pt", step=step) == step
        file = torch.load(tmp_path / "out.pt", weights_only=True)
        model, optimizer = make()
        model.load_state_dict(file["model"])
        optimizer.load_state_dict(file["optimizer"])
        expected_model, expected_optimizer = loaded(chain, step)
        assert_same(model.state_dict(), expected_model.state_dict())
        assert_same(optimizer.state_dict(), expected_optimizer.state_dict())
        assert (file["step"], file["extra"]["samples"]) == (step, 8 * step)
        assert file["extra"]["t"] == (1, 2)
        assert torch.equal(file["extra"]["mean"], torch.arange(4.0))
        assert math.isnan(file["extra"]["nan"])

    def test_training_goes_on_as_it_would(self, chain: Path, step: int, tmp_path: Path) -> None:
        convert_checkpoint(chain, "torch", tmp_path / "out.pt", step=step)
        file = torch.load(tmp_path / "out.pt", weights_only=True)
        model, optimizer = make()
        model.load_state_dict(file["model"])
        optimizer.load_state_dict(file["optimizer"])
        ours, our_optimizer = loaded(chain, step)
        train(model, optimizer, 9)
        train(ours, our_optimizer, 9)
        assert_same(model.state_dict(), ours.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.usefixtures("piece_numel")
def test_dcp_loads_with_the_stock_reader(chain: Path, step: int, tmp_path: Path) -> None:
    convert_checkpoint(chain, "dcp", tmp_path / "out", step=step)
    model, optimizer = make()
    train(model, optimizer, 7)  # so that there is a state to load into, and another
    state: dict[str, Any] = {
        "model": get_model_state_dict(model),
        "optim": get_optimizer_state_dict(model, optimizer),
        "step": 0,
    }
    dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    expected_model, expected_optimizer = loaded(chain, step)
    assert state["step"] == step
    assert_same(model.state_dict(), expected_model.state_dict())
    assert_same(optimizer.state_dict()["state"], expected_optimizer.state_dict()["state"])
    assert [g["lr"] for g in optimizer.param_groups] == [0.01, 0.02]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("target", ["torch", "dcp"])
def test_the_weights_alone(chain: Path, target: Any, tmp_path: Path) -> None:
    options = ConvertOptions(weights_only=True)
    convert_checkpoint(chain, target, tmp_path / "out", options=options)
    model, _ = make()
    if target == "torch":
        file = torch.load(tmp_path / "out", weights_only=True)
        assert file.keys() == {"model", "step"}
        model.load_state_dict(file["model"])
    else:
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=tmp_path / "out", no_dist=True)
        names = dcp.FileSystemReader(tmp_path / "out").read_metadata().state_dict_metadata
        assert not [name for name in names if name.startswith("optim")]
    assert_same(model.state_dict(), loaded(chain, 3)[0].state_dict())


class TestSafetensors:
    def test_shards_hold_the_weights_once(self, chain: Path, tmp_path: Path) -> None:
        options = ConvertOptions(config=HF_CONFIG, max_shard_size="3kB")
        convert_checkpoint(chain, "safetensors", tmp_path / "out", options=options)
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        assert files == sorted(set(index["weight_map"].values()))
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        found = {}
        for file in files:
            shard = load_file(tmp_path / "out" / file)
            assert dict.fromkeys(shard, file) == {
                name: place for name, place in index["weight_map"].items() if place == file
            }
            assert len(shard) == 1 or sum(t.nbytes for t in shard.values()) <= 3000
            found |= shard
        expected = loaded(chain, 3)[0].state_dict()
        del expected["tied.weight"]
        assert_same(dict(sorted(found.items())), dict(sorted(expected.items())))
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == HF_CONFIG

    def test_one_file_where_it_fits(self, chain: Path, tmp_path: Path) -> None:
        options = ConvertOptions(config=HF_CONFIG)
        convert_checkpoint(chain, "safetensors", tmp_path / "out", options=options)
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"model.safetensors", "config.json"}

    def test_without_a_configuration_it_is_refused(self, chain: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--config FILE"):
            convert_checkpoint(chain, "safetensors", tmp_path / "out")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("tied", [False, True])
    def test_from_pretrained_gives_the_same_model(self, tied: bool, tmp_path: Path) -> None:
        transformers = pytest.importorskip("transformers")
        from launch.llama.model import build_llama
        from launch.llama.settings import ModelSettings

        settings = ModelSettings(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            tie_embeddings=tied,
        )
        model = build_llama(settings, 16, seed=1)
        config = json.loads(model.config.to_json_string())
        with Checkpointer(tmp_path / "chain", CONFIG) as checkpointer:
            checkpointer.save(1, model, extra={"config": config})
        options = ConvertOptions(max_shard_size="40kB")
        convert_checkpoint(tmp_path / "chain", "safetensors", tmp_path / "out", options=options)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
        assert_same(again.state_dict(), model.state_dict())
        tokens = torch.arange(12).view(1, -1)
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("text", "num_bytes"), [("5GB", 5 * 10**9), ("1.5 KiB", 1536), ("200mb", 2 * 10**8), ("7B", 7)]
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["", "5", "GB", "-1GB", "0MB", "5XB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max_shard_size"):
        parse_size(text)


@pytest.mark.parametrize("target", TARGETS)
class TestOutput:
    def test_what_is_there_stays(self, chain: Path, target: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "kept").touch()
        with pytest.raises(ConfigError, match="is there already"):
            convert_checkpoint(chain, target, tmp_path / "out")
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "kept"]

    def test_a_damaged_checkpoint_leaves_nothing(self, target: Any, tmp_path: Path) -> None:
        small_chain.build(tmp_path / "chain")
        for path in (tmp_path / "chain").glob("step-1/rank-*"):
            content = bytearray(path.read_bytes())
            content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
            path.write_bytes(content)
        options = ConvertOptions(config={"model_type": "llama"})
        with pytest.raises(CorruptCheckpointError):
            convert_checkpoint(tmp_path / "chain", target, tmp_path / "out", options=options)
        assert [path.name for path in tmp_path.iterdir()] == ["chain"]

    def test_an_empty_folder_is_taken(self, chain: Path, target: Any, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        options = ConvertOptions(config={"model_type": "llama"})
        if target == "torch":
            with pytest.raises(ConfigError, match="name a file"):
                convert_checkpoint(chain, target, tmp_path / "out", options=options)
        else:
            convert_checkpoint(chain, target, tmp_path / "out", options=options)
            assert list((tmp_path / "out").iterdir())


DEEPSPEED = """
import sys, torch, deepspeed
sys.path.insert(0, {root!r})
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from tests.test_checkpoint_convert import make
torch.set_num_threads(1)
deepspeed.init_distributed("gloo")
model, optimizer = make()
config = {{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {{"stage": {stage}}},
          "zero_allow_untested_optimizer": True, "checkpoint": {{"load_universal": True}}}}
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
path, client = engine.load_checkpoint({folder!r}, load_lr_scheduler_states=False)
assert path and client["extra"]["samples"] == 24 and engine.global_steps == 3
found = {{}}
for name, parameter in engine.module.named_parameters():
    values = {{"fp32": safe_get_full_fp32_param(parameter)}}
    for key in ("exp_avg", "exp_avg_sq"):
        values[key] = safe_get_full_optimizer_state(parameter, key)
    found[name] = {{key: value.clone() for key, value in values.items()}}
torch.save(found, {result!r} + str(dist.get_rank()))
"""


@pytest.mark.deepspeed
@pytest.mark.ranks
@pytest.mark.parametrize(
    "stage", [pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_deepspeed_loads_the_universal_checkpoint(chain: Path, stage: int, tmp_path: Path) -> None:
    """On two ranks, which wrote none of it."""
    pytest.importorskip("deepspeed")
    convert_checkpoint(chain, "universal", tmp_path / "out")
    result, script = str(tmp_path / "result"), tmp_path / "script.py"
    folder = str(tmp_path / "out")
    script.write_text(DEEPSPEED.format(root=str(ROOT), stage=stage, folder=folder, result=result))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", str(script)]
    done = subprocess.run(launcher, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    model, optimizer = loaded(chain, 3)
    for rank in (0, 1):
        found = torch.load(f"{result}{rank}", weights_only=True)
        for name, parameter in model.named_parameters():
            state = optimizer.state[parameter]
            assert torch.equal(found[name]["fp32"], parameter)
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(found[name][key].view_as(state[key]), state[key])
