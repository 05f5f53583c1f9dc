"""Which parameters a numbered optimizer state is of, and which names are those of one tied tensor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from effx_dist.checkpoint import Checkpointer
from effx_dist.checkpoint.tools.compress import ReadOptions, compress_series
from effx_dist.errors import ConfigError
from effx_dist.shard import SoloGroup
from tests import plain_series as plain
from tests.plain_series import (
    LOSSLESS,
    all_of_them,
    assert_same,
    compressed,
    is_matrix,
    is_vector,
    named_state,
    trained,
)


class TestNamesOfParameters:
    def test_one_group_is_in_the_models_order(self, tmp_path: Path) -> None:
        model, optimizer = trained(all_of_them)
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        assert_same(compressed(tmp_path, content), named_state(model, optimizer))

    def test_groups_of_other_shapes_are_too(self, tmp_path: Path) -> None:
        model, optimizer = trained(is_matrix, is_vector)
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        assert_same(compressed(tmp_path, content), named_state(model, optimizer))

    @pytest.mark.parametrize("case", ["sorted", "shared shapes", "buffers", "frozen"])
    def test_are_never_guessed(self, case: str, tmp_path: Path) -> None:
        model, optimizer = trained(all_of_them)
        if case == "shared shapes":
            half = iter([True] * 4 + [False] * 4 + [False] * 4 + [True] * 4)
            model, optimizer = trained(lambda _: next(half), lambda _: next(half))
        if case == "frozen":
            model, optimizer = trained(is_matrix)
        state = model.state_dict()
        if case == "sorted":
            state = dict(sorted(state.items()))
        if case == "buffers":
            state["1.mean"] = torch.zeros(6)
        content = {"model": state, "optimizer": optimizer.state_dict()}
        with pytest.raises(ConfigError, match=r"does not name them.*--param-names"):
            compressed(tmp_path, content)
        found = compressed(tmp_path, content, ReadOptions(weights_only=True))
        assert_same(found, {f"model.{name}": tensor for name, tensor in state.items()})

    def test_may_be_given(self, tmp_path: Path) -> None:
        model, optimizer = trained(all_of_them)
        state = dict(sorted(model.state_dict().items()))
        names = [[name for name, _ in model.named_parameters()]]
        content = {"model": state, "optimizer": optimizer.state_dict()}
        found = compressed(tmp_path, content, ReadOptions(param_names=names))
        assert_same(found, named_state(model, optimizer))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda names: names[1:], r"\[8\] parameters, and there are names for \[7\]"),
            (
                lambda names: [*names[1:], names[0]],
                r"parameter 0 of shape \(6, 4\) would be 0.bias",
            ),
            (lambda names: ["other", *names[1:]], "would be other, which the model has not"),
            (lambda names: [*names[:6], names[4], names[7]], r"2\.weight is named twice"),
        ],
    )
    def test_that_do_not_fit_are_refused(
        self, change: Callable[[list[str]], list[str]], message: str, tmp_path: Path
    ) -> None:
        model, optimizer = trained(all_of_them)
        names = [change([name for name, _ in model.named_parameters()])]
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        with pytest.raises(ConfigError, match=message):
            compressed(tmp_path, content, ReadOptions(param_names=names))

    def test_of_fsdp_are_in_the_state(self, tmp_path: Path) -> None:
        model, optimizer = trained(is_matrix, is_vector)
        state = get_optimizer_state_dict(model, optimizer)
        content = {"model": model.state_dict(), "optimizer": state}
        assert_same(compressed(tmp_path, content), named_state(model, optimizer))

    def test_an_optimizer_that_is_none_is_refused(self, tmp_path: Path) -> None:
        content = {"model": {"a": torch.ones(2)}, "optimizer": {"a": torch.ones(2)}}
        with pytest.raises(ConfigError, match="'param_groups'"):
            compressed(tmp_path, content)


class TestTied:
    def test_equal_values_are_not_enough_without_an_optimizer(self, tmp_path: Path) -> None:
        tensors = {"a": torch.ones(3, 3), "b": torch.ones(3, 3)}
        assert compressed(tmp_path, tensors).keys() == {"model.a", "model.b"}

    def test_one_storage_is_one_tensor(self, tmp_path: Path) -> None:
        whole = torch.arange(12.0).view(4, 3)
        assert compressed(tmp_path, {"a": whole, "b": whole, "c": whole[:2]}).keys() == {
            "model.a",
            "model.c",
        }

    def test_a_frozen_copy_parts_from_its_weight_later(self, tmp_path: Path) -> None:
        """At the start it is stored as the weight's other name, for it has its values."""
        model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
        model["b"].load_state_dict(model["a"].state_dict())
        optimizer = torch.optim.AdamW(model["a"].parameters())
        expected = []
        for step in (1, 2):
            state = {
                "model": get_model_state_dict(model),
                "optim": get_optimizer_state_dict(model, optimizer),
            }
            plain.save_dcp(tmp_path / f"series/step-{step}", state)
            expected.append({n: t.clone() for n, t in model.state_dict().items()})
            for parameter in model["a"].parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        compress_series([tmp_path / "series"], tmp_path / "out", LOSSLESS)
        for step in (1, 2):
            with Checkpointer(tmp_path / "out", LOSSLESS, group=SoloGroup()) as checkpoints:
                checkpoints.load(model, step=step)
            assert_same(dict(model.state_dict()), expected[step - 1])
