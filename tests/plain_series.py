"""Helpers of the test_checkpoint_compress files: a small model, series of plain checkpoints of it, and chains
read back."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.format.reader import open_checkpoint
from effx_dist.checkpoint.format.whole_tensors import read_whole
from effx_dist.checkpoint.tools.compress import ReadOptions, compress_series
from effx_dist.config import ExcpConfig
from effx_dist.shard import SoloGroup

STEPS = (10, 20, 30)
LOSSLESS = ExcpConfig(profile="lossless", async_mode="sync", keep_latest_k=0)
BALANCED = ExcpConfig(profile="balanced", async_mode="sync", keep_latest_k=0)
Write = Callable[[Path, nn.Module, torch.optim.Optimizer], None]


class Model(nn.Module):
    """Tensors of one dimension and of two, one far larger than the others, one tied, one bf16, and
    buffers. The order of the parameters is not that of their names."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__()
        self.embed = nn.Embedding(300, 24)
        self.second = nn.Linear(24, 24)
        self.first = nn.Linear(24, 24)
        self.low = nn.Parameter(torch.randn(24, 12).bfloat16())
        self.norm = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 300, bias=False)
        self.head.weight = self.embed.weight


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model, and an optimizer that knows the names of its parameters, in two groups."""
    model = Model()
    named = list(model.named_parameters())
    groups = [
        {"params": [pair for pair in named if pair[1].dim() == 1], "weight_decay": 0.0},
        {"params": [pair for pair in named if pair[1].dim() == 2], "lr": 0.02},
    ]
    return model, torch.optim.AdamW(groups, lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step with gradients that depend on ``step`` alone."""
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.grad = noise.to(parameter.dtype)
    optimizer.step()
    norm = model.norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    norm.running_mean.add_(step)


def write_torch(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As a plain training loop does."""
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
    torch.save(whole, path.with_suffix(".pt"))


def write_dcp(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """As torch's own examples do."""
    optim = get_optimizer_state_dict(model, optimizer)
    save_dcp(path, {"model": get_model_state_dict(model), "optim": optim, "epoch": 2})


def save_dcp(path: Path, state: dict[str, Any], **options: Any) -> None:
    """``dcp.save`` in this process alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(state, checkpoint_id=path, no_dist=True, **options)


def write_series(folder: Path, write: Write, steps: tuple[int, ...] = STEPS) -> Path:
    """A checkpoint after every step of ``steps``, under names that end in it."""
    folder.mkdir(parents=True, exist_ok=True)
    model, optimizer = make()
    for step in steps:
        train(model, optimizer, step)
        write(folder / f"checkpoint-{step}", model, optimizer)
    return folder


def write_chain(folder: Path, config: ExcpConfig, steps: tuple[int, ...] = STEPS) -> Path:
    """What a Checkpointer writes of the same run."""
    model, optimizer = make()
    with Checkpointer(folder, config, group=SoloGroup()) as checkpoints:
        for step in steps:
            train(model, optimizer, step)
            checkpoints.save(step, model, optimizer, extra={"epoch": 2})
    return folder


def live_at(step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The run itself, after one of STEPS."""
    model, optimizer = make()
    for taken in STEPS:
        if taken <= step:
            train(model, optimizer, taken)
    return model, optimizer


def loaded(chain: Path, step: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """What a load gives to a fresh model and optimizer."""
    model, optimizer = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with Checkpointer(chain, LOSSLESS, group=SoloGroup()) as checkpoints:
        assert checkpoints.load(model, optimizer, step=step)["step"] == step
    return model, optimizer


def values_of(chain: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a step but the random states, decoded."""
    with open_checkpoint(chain, step) as opened:
        names = [n for n in opened.top.manifest.tensors if not n.startswith("rng.")]
        return {name: read_whole(opened, name) for name in names}


def assert_same(found: Any, expected: Any) -> None:
    """Nested values and tensors, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert found == expected


def digests(folder: Path) -> dict[str, str]:
    """A hash of every file below."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def trained(*groups: Callable[[nn.Parameter], bool]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model without buffers and an optimizer that knows no names, with a group for each rule."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 6))
    params = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": list(filter(rule, params))} for rule in groups])
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    return model, optimizer


def all_of_them(_: nn.Parameter) -> bool:
    return True


def is_matrix(param: nn.Parameter) -> bool:
    return param.dim() == 2


def is_vector(param: nn.Parameter) -> bool:
    return param.dim() == 1


def compressed(
    folder: Path, content: Any, options: ReadOptions | None = None
) -> dict[str, torch.Tensor]:
    """What is in the chain of one torch file."""
    torch.save(content, folder / "5.pt")
    compress_series([folder / "5.pt"], folder / "out", LOSSLESS, options=options)
    return values_of(folder / "out", 5)


def named_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """What the chain should hold."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"optimizer.{name}.{key}"] = value
    return found
