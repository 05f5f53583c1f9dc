"""A wrapped optimizer is a torch optimizer: what torch lets callers do with one, and failures."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.optim import CautiousWrapper, cautious
from effx_dist.shard import ShardMap
from tests.inner_optimizers import PlainLion


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def adamw(params: Any = None, **options: Any) -> torch.optim.AdamW:
    if params is None:
        params = [normal(seed, (6, 3)).requires_grad_() for seed in (1, 2)]
    return torch.optim.AdamW(params, **{"lr": 0.05, "weight_decay": 0.2, **options})


def step_on(opt: Optimizer, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(p for group in opt.param_groups for p in group["params"]):
            param.grad = normal(100 * step + index, tuple(param.shape), param.dtype)
        opt.step()


def params_of(opt: Optimizer) -> list[torch.Tensor]:
    return [param.detach().clone() for group in opt.param_groups for param in group["params"]]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_groups_state_and_defaults_are_the_inner_ones_also_after_loading() -> None:
    inner = adamw()
    opt = cautious(inner)
    assert isinstance(opt, Optimizer)
    step_on(opt, range(2))
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    inner.load_state_dict(copy.deepcopy(inner.state_dict()))
    assert opt.param_groups is inner.param_groups
    assert opt.state is inner.state
    assert opt.defaults is inner.defaults
    step_on(opt, range(2, 3))
    assert opt.state[opt.param_groups[0]["params"][0]]["step"] == 3


def test_a_checkpoint_goes_into_the_bare_optimizer_and_back() -> None:
    opt = cautious(adamw())
    step_on(opt, range(2))
    saved = copy.deepcopy(opt.state_dict())
    bare = adamw([param.requires_grad_() for param in params_of(opt)])
    bare.load_state_dict(saved)
    other = cautious(adamw([param.requires_grad_() for param in params_of(opt)]))
    other.load_state_dict(copy.deepcopy(bare.state_dict()))
    assert bare.state_dict().keys() == saved.keys()
    for optimizer in (opt, other):
        step_on(optimizer, range(2, 4))
    assert_equal(params_of(other), params_of(opt))
    assert other.alignment == opt.alignment


def test_torch_checkpoint_helpers_take_it() -> None:
    models = [nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    opts = [cautious(adamw(model.parameters())) for model in models]
    step_on(opts[0], range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], opts[0]))
    assert set(saved["state"]["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    before = params_of(opts[1])
    set_optimizer_state_dict(models[1], opts[1], saved)
    assert_equal(params_of(opts[1]), before)
    models[1].load_state_dict(models[0].state_dict())
    for opt in opts:
        step_on(opt, range(2, 4))
    assert_equal(params_of(opts[1]), params_of(opts[0]))


@pytest.mark.parametrize("through", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_goes_on_as_the_original(through: Callable[[Any], Any]) -> None:
    original = cautious(PlainLion([normal(1, (6, 3)).requires_grad_()], weight_decay=0.5))
    step_on(original, range(2))
    other = through(original)
    assert isinstance(other, CautiousWrapper)
    assert other.optimizer is not original.optimizer
    for opt in (original, other):
        step_on(opt, range(2, 4))
    assert_equal(params_of(other), params_of(original))
    assert other.alignment == original.alignment


def test_a_copy_keeps_what_it_was_told_of_the_decay() -> None:
    opt = copy.deepcopy(
        cautious(PlainLion([torch.ones(2)], weight_decay=0.5), decoupled_weight_decay=True)
    )
    (param,) = opt.param_groups[0]["params"]
    param.grad = torch.zeros(2)
    opt.step()
    assert torch.equal(param, torch.ones(2) * (1 - 0.01 * 0.5))


def test_a_copy_without_its_shard_map_refuses_to_step() -> None:
    param = torch.ones(3, requires_grad=True)
    opt = cautious(torch.optim.SGD([param], lr=0.1), shard_map=ShardMap.of_tensors([("w", param)]))
    other = copy.deepcopy(opt)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = torch.ones(3)
    with pytest.raises(LayoutMismatchError, match=r"set opt\.shard_map"):
        other.step()
    assert torch.equal(twin, torch.ones(3))
    other.shard_map = ShardMap.of_tensors([("w", twin)])
    other.step()
    assert other.alignment == {"w": 1.0}


def test_a_scheduler_that_cycles_momentum() -> None:
    """It looks for betas in ``defaults`` and sets them in the groups."""
    opt = cautious(adamw())
    cycle = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.1, total_steps=4)
    step_on(opt, range(1))
    cycle.step()
    cycle.step()
    assert opt.optimizer.param_groups[0]["betas"][0] < 0.95


def test_a_scheduler_changes_the_decay_of_the_step() -> None:
    opt = cautious(torch.optim.AdamW([torch.ones(2)], lr=0.1, weight_decay=0.5))
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    (param,) = opt.param_groups[0]["params"]
    param.grad = torch.zeros(2)
    opt.step()
    scheduler.step()
    opt.step()
    assert torch.equal(param, torch.ones(2) * (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5))


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}])
def test_grad_scaler(options: dict[str, Any]) -> None:
    """Scaled gradients lead to the step of unscaled ones, and an overflow to none."""
    plain, scaled = cautious(adamw(**options)), cautious(adamw(**options))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(3):
        step_on(plain, range(step, step + 1))
        for index, param in enumerate(scaled.param_groups[0]["params"]):
            param.grad = scaler.scale(normal(100 * step + index, (6, 3)))
        scaler.step(scaled)
        scaler.update()
    assert_equal(params_of(scaled), params_of(plain))
    assert scaled.alignment == plain.alignment
    for param in scaled.param_groups[0]["params"]:
        param.grad = torch.full((6, 3), float("inf"))
    scaler.step(scaled)
    scaler.update()
    assert scaler.get_scale() == 512
    assert_equal(params_of(scaled), params_of(plain))


def test_the_closure_runs_once_with_gradients_on_before_the_decay() -> None:
    param = torch.tensor([1.0, -2.0], requires_grad=True)
    opt = cautious(torch.optim.AdamW([param], lr=0.5, weight_decay=0.1))
    losses = []

    def closure() -> float:
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        losses.append(loss.item())
        return loss.item()

    assert opt.step(closure) == 5.0
    assert losses == [5.0]
    assert opt.step() is None


def test_hooks_of_both_are_called_with_their_own() -> None:
    inner = adamw()
    opt = cautious(inner)
    called: list[tuple[str, Optimizer]] = []
    for optimizer in (opt, inner):
        optimizer.register_step_pre_hook(lambda o, _a, _k: called.append(("pre", o)))
        optimizer.register_step_post_hook(lambda o, _a, _k: called.append(("post", o)))
        optimizer.register_state_dict_pre_hook(lambda o: called.append(("state", o)))
        optimizer.register_load_state_dict_post_hook(lambda o: called.append(("loaded", o)))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "mark": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state: called.append(("mark", state["mark"])))
    step_on(opt, range(1))
    opt.load_state_dict(opt.state_dict())
    assert called == [
        ("pre", opt),
        ("pre", inner),
        ("post", inner),
        ("post", opt),
        ("state", opt),
        ("state", inner),
        ("mark", 1),
        ("loaded", inner),
        ("loaded", opt),
    ]


def test_groups_can_be_added_and_are_checked() -> None:
    opt = cautious(adamw([("a", torch.ones(2))]))
    step_on(opt, range(1))
    opt.add_param_group({"params": [("b", torch.ones(3))], "lr": 0.5})
    step_on(opt, range(1, 2))
    assert set(opt.alignment) == {"a", "b"}
    with pytest.raises(ConfigError, match=r"c: dtype torch\.int64"):
        opt.add_param_group({"params": [("c", torch.ones(2, dtype=torch.int64))]})
    assert len(opt.optimizer.param_groups) == 2
    opt.zero_grad()
    assert all(p.grad is None for group in opt.param_groups for p in group["params"])


def test_repr_shows_both() -> None:
    text = repr(cautious(adamw()))
    assert text.startswith("cautious(AdamW (")
    assert "weight_decay: 0.2" in text


def test_parameters_without_a_gradient_are_not_touched() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].bias.requires_grad_(False)
    opt = cautious(adamw(model.named_parameters(), weight_decay=0.5))
    model[:2](torch.ones(1, 3)).sum().backward()
    before = [model[0].bias.clone(), *(param.detach().clone() for param in model[2].parameters())]
    opt.step()
    assert set(opt.alignment) == {"0.weight", "1.weight", "1.bias"}
    assert_equal([model[0].bias, *(param.detach() for param in model[2].parameters())], before)


def test_a_tied_weight_is_stepped_once() -> None:
    first, second = (nn.Linear(3, 3, bias=False) for _ in range(2))
    second.weight = first.weight
    alone = first.weight.detach().clone().requires_grad_()
    opts = [cautious(adamw(nn.Sequential(first, second).parameters())), cautious(adamw([alone]))]
    for opt in opts:
        step_on(opt, range(2))
    assert torch.equal(second.weight, alone)
    assert len(opts[0].alignment) == 1


def test_a_parameter_with_strides_of_its_own() -> None:
    strided = normal(1, (4, 6)).t().requires_grad_()
    plain = normal(1, (4, 6)).t().contiguous().requires_grad_()
    opts = [cautious(PlainLion([param])) for param in (strided, plain)]
    for opt in opts:
        step_on(opt, range(3))
    assert_equal(params_of(opts[0]), params_of(opts[1]))


class FailsHalfway(PlainLion):
    """Moves the first parameter, then fails."""

    def _move(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        assert group["weight_decay"] == 0, "what is decoupled is the wrapper's"
        if param is self.param_groups[0]["params"][1]:
            raise RuntimeError("no memory left")
        super()._move(param, grad, group)


def test_a_failing_inner_step_leaves_parameters_and_decay_as_they_were() -> None:
    params = [normal(seed, (4,)).requires_grad_() for seed in (1, 2)]
    opt = cautious(FailsHalfway(params, weight_decay=0.3), decoupled_weight_decay=True)
    before = params_of(opt)
    with pytest.raises(RuntimeError, match="no memory left"):
        step_on(opt, range(1))
    assert_equal(params_of(opt), before)
    assert opt.param_groups[0]["weight_decay"] == 0.3
    assert opt.alignment == {}


class ChangesGradients(PlainLion):
    """As optimizers do that build the update where the gradient lies."""

    def _move(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        super()._move(param, grad.lerp_(self._moment(param, "exp_avg"), 0.9), group)


def test_an_inner_step_that_changes_gradients_is_refused() -> None:
    opt = cautious(ChangesGradients([normal(1, (4,)).requires_grad_()]))
    before = params_of(opt)
    with pytest.raises(ConfigError, match=r"ChangesGradients: must leave \.grad as it is"):
        step_on(opt, range(1))
    assert_equal(params_of(opt), before)


class ReplacesMemory(PlainLion):
    """Gives each parameter new memory instead of writing to the old."""

    def _move(self, param: torch.Tensor, grad: torch.Tensor, group: dict[str, Any]) -> None:
        moved = param.detach().clone()
        super()._move(moved, grad, group)
        param.data = moved


def test_an_inner_step_may_replace_memory() -> None:
    values = []
    for make in (PlainLion, ReplacesMemory):
        param = normal(1, (9,)).requires_grad_()
        step_on(cautious(make([param])), range(1))
        values.append(param.detach())
    assert torch.equal(*values)


def test_gradients_stay_as_they_were() -> None:
    opt = cautious(adamw(maximize=True))
    step_on(opt, range(1))
    for index, param in enumerate(opt.param_groups[0]["params"]):
        assert torch.equal(param.grad, normal(index, (6, 3)))
