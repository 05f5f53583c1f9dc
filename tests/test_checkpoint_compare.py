"""Two checkpoints side by side: what differs, by how much, in which order."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.format import whole_tensors as pieces
from effx_dist.checkpoint.format.reader import open_checkpoint
from effx_dist.checkpoint.tools.compare import (
    CheckpointDifference,
    TensorDifference,
    compare_checkpoints,
)
from effx_dist.config import ExcpConfig
from tests import small_chain

EXACT = ExcpConfig(enabled=False, async_mode="sync", keep_latest_k=0)


def save(folder: Path, change: Callable[[torch.nn.Module], Any] | None = None) -> Path:
    """Save step 1 of a model of known values, changed as told; the folder."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view(parameter.shape) + i + 1)
        if change is not None:
            change(model)
    with Checkpointer(folder, EXACT) as checkpointer:
        checkpointer.save(1, model, extra={"lr": 0.5, "names": ["a", "b"]})
    return folder


def compare(a: Path, b: Path, *steps: int) -> CheckpointDifference:
    step_a, step_b = steps or (None, None)
    with open_checkpoint(a, step_a) as chain_a, open_checkpoint(b, step_b) as chain_b:
        return compare_checkpoints(chain_a, chain_b)


def model_part(found: CheckpointDifference) -> list[TensorDifference]:
    """What differs but for the random generators' states."""
    return [tensor for tensor in found.changed if tensor.name.startswith("model.")]


def test_a_copy_is_identical(tmp_path: Path) -> None:
    small_chain.build(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = compare(tmp_path / "a", tmp_path / "b")
    assert found.identical
    assert len(found.tensors) == len(small_chain.document_of(tmp_path / "a", 3)["tensors"])
    assert all(tensor.relative == 0 for tensor in found.tensors)


def test_the_change_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_NUMEL", 7)

    def change(model: Any) -> None:
        model[0].weight[2, 3] += 4
        model[0].weight[4, 1] -= 3
        model[1].bias.mul_(1.5)

    found = compare(save(tmp_path / "a"), save(tmp_path / "b", change))
    bias, weight = model_part(found)  # the larger relative change first
    assert (bias.name, weight.name) == ("model.1.bias", "model.0.weight")
    assert bias.relative == pytest.approx(0.5)
    assert weight.relative == pytest.approx(5 / math.sqrt(sum(i * i for i in range(1, 31))))
    assert (weight.largest, weight.num_changed) == (4.0, 2)
    assert (bias.largest, bias.num_changed) == (3.5, 4)
    assert not found.identical


def test_pieces_give_the_same_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_chain.build(tmp_path)
    whole = compare(tmp_path, tmp_path, 1, 3)
    monkeypatch.setattr(pieces, "PIECE_NUMEL", 100)
    cut = compare(tmp_path, tmp_path, 1, 3)
    assert [t.name for t in cut.changed] == [t.name for t in whole.changed]
    for a, b in zip(cut.changed, whole.changed, strict=True):
        assert (a.largest, a.num_changed) == (b.largest, b.num_changed)
        assert a.relative == pytest.approx(b.relative)


def test_names_shapes_and_dtypes(tmp_path: Path) -> None:
    def change(model: Any) -> None:
        model[0].weight = torch.nn.Parameter(torch.zeros(5, 7))
        model[0].bias = torch.nn.Parameter(model[0].bias.double())
        model[1].bias = None
        model.register_buffer("new", torch.ones(3))

    found = compare(save(tmp_path / "a"), save(tmp_path / "b", change))
    kinds = {tensor.name: (tensor.kind, tensor.other) for tensor in model_part(found)}
    assert kinds == {
        "model.0.weight": ("shape", "(5, 7)"),
        "model.0.bias": ("dtype", "float64"),
        "model.1.bias": ("only in A", ""),
        "model.new": ("only in B", ""),
    }
    first = [tensor.kind for tensor in model_part(found)[:3]]
    assert "dtype" not in first  # what could not be subtracted comes first


def test_what_is_not_finite_counts_as_a_change(tmp_path: Path) -> None:
    def poison(model: Any) -> None:
        model[0].weight[0, 0] = math.nan
        model[0].weight[0, 1] = math.inf

    (weight,) = model_part(compare(save(tmp_path / "a"), save(tmp_path / "b", poison)))
    assert weight.num_changed == 2
    assert weight.relative is not None
    assert not math.isfinite(weight.relative)
    (again,) = model_part(compare(tmp_path / "b", save(tmp_path / "c")))
    assert again.num_changed == 2
    assert not model_part(compare(tmp_path / "b", save(tmp_path / "d", poison)))


def test_zero_and_minus_zero_differ_by_nothing_but_their_bits(tmp_path: Path) -> None:
    def zero(model: Any) -> None:
        model[1].bias.zero_()

    def minus_zero(model: Any) -> None:
        model[1].bias.fill_(-0.0)

    (bias,) = model_part(compare(save(tmp_path / "a", zero), save(tmp_path / "b", minus_zero)))
    assert (bias.relative, bias.largest, bias.num_changed) == (0.0, 0.0, 4)


def test_values_that_are_no_tensors(tmp_path: Path) -> None:
    save(tmp_path / "a")
    model = torch.nn.Linear(2, 2)
    with Checkpointer(tmp_path / "b", EXACT) as checkpointer:
        checkpointer.save(1, model, extra={"lr": 0.25, "names": ["a", "c"], "more": True})
    found = compare(tmp_path / "a", tmp_path / "b")
    assert [path for path in found.values if path.startswith("extra.")] == [
        "extra.lr",
        "extra.more",
        "extra.names.1",
    ]
