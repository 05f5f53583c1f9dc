"""The cautious optimizers keep torch.optim's conventions: states, scalers, hooks, graphs, clipping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effx_dist.errors import ConfigError
from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.shard import Group, ShardMap, SoloGroup, WholeTensor, pieces_of_flat_range
from tests.thread_ranks import run_ranks

ALL = pytest.mark.parametrize("optimizer", [CautiousAdamW, CautiousLion, CautiousSGD])
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["eager", "auto"])
SHAPES = [(4, 3), (7,), ()]


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make_params(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [normal(i, shape, dtype).requires_grad_() for i, shape in enumerate(SHAPES)]


def set_grads(opt: torch.optim.Optimizer, step: int, factor: float = 1.0) -> None:
    for index, param in enumerate(p for group in opt.param_groups for p in group["params"]):
        param.grad = normal(100 * step + 10 + index, tuple(param.shape), param.dtype) * factor


def train(opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        set_grads(opt, step)
        opt.step()


def snapshot(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Parameters and state, in order."""
    found = []
    for param in (p for group in opt.param_groups for p in group["params"]):
        state = opt.state.get(param, {})
        found += [param.detach().clone(), *(state[key].clone() for key in sorted(state))]
    return found


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# State dicts of torch.optim


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"maximize": True}])
def test_adamw_and_its_cautious_form_take_over_each_other_s_state(options: dict[str, Any]) -> None:
    plain = torch.optim.AdamW(make_params(), lr=0.02, betas=(0.8, 0.9), eps=1e-5, **options)
    train(plain, range(2))
    opt = CautiousAdamW(make_params(), lr=1.0)
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert opt.param_groups[0]["betas"] == (0.8, 0.9)
    assert opt.param_groups[0]["maximize"] is options.get("maximize", False)
    for param, other in zip(make_params_of(opt), make_params_of(plain), strict=True):
        assert {key: value.tolist() for key, value in opt.state[param].items()} == {
            key: value.tolist() for key, value in plain.state[other].items()
        }
    train(opt, range(2, 4))
    back = torch.optim.AdamW(make_params(), lr=3.0, **options)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    (first, *_) = make_params_of(back)
    assert back.state[first]["step"] == 4
    train(back, range(4, 5))
    assert back.param_groups[0]["lr"] == 0.02


def make_params_of(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param for group in opt.param_groups for param in group["params"]]


def test_sgd_and_its_cautious_form_take_over_each_other_s_state() -> None:
    plain = torch.optim.SGD(make_params(), lr=0.1, momentum=0.8, nesterov=True)
    train(plain, range(3))
    opt = CautiousSGD(make_params())
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert opt.param_groups[0]["nesterov"] is True
    for param, other in zip(make_params_of(opt), make_params_of(plain), strict=True):
        assert torch.equal(
            opt.state[param]["momentum_buffer"], plain.state[other]["momentum_buffer"]
        )
    train(opt, range(3, 4))
    back = torch.optim.SGD(make_params(), lr=1.0)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(back, range(4, 5))
    assert back.param_groups[0]["momentum"] == 0.8


def test_sgd_before_its_first_step_has_no_buffer_to_take_over() -> None:
    plain = torch.optim.SGD(make_params(), lr=0.1)
    train(plain, range(1))  # without momentum: state is there, the buffer is None
    opt = CautiousSGD(make_params())
    state = copy.deepcopy(plain.state_dict())
    state["param_groups"][0]["momentum"] = 0.9
    opt.load_state_dict(state)
    fresh = CautiousSGD(make_params(), lr=0.1)
    for each in (opt, fresh):
        train(each, range(1))
    assert_equal(snapshot(opt), snapshot(fresh))


def test_a_lion_that_counts_no_steps_can_be_taken_over() -> None:
    ours, theirs = CautiousLion(make_params()), CautiousLion(make_params())
    train(ours, range(2))
    state = copy.deepcopy(ours.state_dict())
    for of_param in state["state"].values():
        del of_param["step"]  # as in most Lions there are
    theirs.load_state_dict(state)
    for param, value in zip(make_params_of(theirs), make_params_of(ours), strict=True):
        param.data.copy_(value.detach())
    for opt in (ours, theirs):
        train(opt, range(2, 3))
    found, expected = ([param.detach() for param in make_params_of(opt)] for opt in (theirs, ours))
    assert_equal(found, expected)


@pytest.mark.parametrize(
    ("plain", "ours", "told"),
    [
        (torch.optim.AdamW, CautiousAdamW, "amsgrad=True"),
        (torch.optim.SGD, CautiousSGD, r"dampening=0\.5"),
    ],
)
def test_a_state_of_a_variant_that_is_not_here_is_refused(
    plain: Callable[..., torch.optim.Optimizer], ours: Callable[..., Any], told: str
) -> None:
    options = {"amsgrad": True} if ours is CautiousAdamW else {"momentum": 0.9, "dampening": 0.5}
    other = plain(make_params(), **options)
    train(other, range(1))
    opt = ours(make_params())
    before = opt.param_groups[0]["lr"]
    with pytest.raises(ConfigError, match=told):
        opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["lr"] == before


# torch.amp.GradScaler


@ALL
@IMPLEMENTATIONS
def test_a_grad_scaler_leaves_unscaling_to_the_step(optimizer: Any, implementation: str) -> None:
    scaled = optimizer(make_params(), implementation=implementation)
    plain = optimizer(make_params(), implementation=implementation)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(4):
        overflows = step == 2
        set_grads(scaled, step, factor=scaler.get_scale() if step else 2.0**10)
        if overflows:
            make_params_of(scaled)[1].grad[3] = float("inf")
        scaler.scale(torch.zeros(()))  # the scaler makes its scale on first use
        before = snapshot(scaled)
        scaler.step(scaled)
        if overflows:
            assert_equal(snapshot(scaled), before)
        else:
            set_grads(plain, step)
            plain.step()
        scaler.update()
    assert_equal(snapshot(scaled), snapshot(plain))
    assert not hasattr(scaled, "grad_scale")


@IMPLEMENTATIONS
@pytest.mark.parametrize("capturable", [False, True])
def test_an_overflow_on_one_rank_is_one_on_all(implementation: str, capturable: bool) -> None:
    def body(group: Group) -> list[torch.Tensor]:
        whole = WholeTensor("w", (9,), (group,))
        start = 4 * group.rank
        stop = min(start + 4, 9)
        local = normal(1, (9,))[start:stop].clone().requires_grad_()
        shard_map = ShardMap([whole], [pieces_of_flat_range(whole, start, stop)])
        opt = CautiousAdamW(
            [local], implementation=implementation, capturable=capturable, shard_map=shard_map
        )
        for step in range(3):
            local.grad = normal(20 + step, (9,))[start:stop].clone()
            before = snapshot(opt)
            # what GradScaler sets: whether this rank's gradients overflowed
            opt.found_inf = torch.tensor(float(step == 1 and group.rank == 2))  # type: ignore[attr-defined]
            opt.step()
            if step == 1:
                assert_equal(snapshot(opt), before)
        assert opt.state[local]["step"] == 2
        return [local.detach()]

    def without_overflow(group: Group) -> list[torch.Tensor]:
        alone = normal(1, (9,)).requires_grad_()
        opt = CautiousAdamW([alone])
        for step in (0, 2):
            alone.grad = normal(20 + step, (9,))
            opt.step()
        return [alone.detach()]

    found = torch.cat([part for (part,) in run_ranks(3, body)])
    assert torch.equal(found, without_overflow(SoloGroup())[0])


# Clipping within the step


@ALL
@IMPLEMENTATIONS
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_in_the_step_is_clipping_before_it(
    optimizer: Any, implementation: str, max_norm: float
) -> None:
    inside = optimizer(make_params(torch.float64), implementation=implementation)
    before = optimizer(make_params(torch.float64), implementation=implementation)
    for step in range(3):
        for opt in (inside, before):
            set_grads(opt, step)
        grads = [param.grad.clone() for param in make_params_of(inside)]
        norm = inside.clip_grad_norm_(max_norm)
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(grads), rtol=1e-6, atol=0)
        inside.step()
        assert_equal([param.grad for param in make_params_of(inside)], grads)
        torch.nn.utils.clip_grad_norm_(make_params_of(before), max_norm)
        before.step()
    for found, expected in zip(snapshot(inside), snapshot(before), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert inside.alignment == before.alignment


def test_scaled_gradients_are_clipped_to_the_same_norm() -> None:
    scaled, plain = CautiousSGD(make_params()), CautiousSGD(make_params())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(torch.zeros(()))
    for opt, factor in ((scaled, 2.0**12), (plain, 1.0)):
        set_grads(opt, 0, factor)
        assert opt.clip_grad_norm_(0.1) > factor
    scaler.step(scaled)
    plain.step()
    for found, expected in zip(snapshot(scaled), snapshot(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_a_clip_serves_one_step() -> None:
    opt, fresh = CautiousSGD(make_params()), CautiousSGD(make_params())
    for each in (opt, fresh):
        set_grads(each, 0)
    opt.clip_grad_norm_(1e-3)
    opt.step()
    start = snapshot(opt)
    for param, state in zip(make_params_of(fresh), make_params_of(opt), strict=True):
        param.data.copy_(state.detach())
        fresh.state[param]["momentum_buffer"] = opt.state[state]["momentum_buffer"].clone()
    assert_equal(snapshot(fresh), start)
    for each in (opt, fresh):
        set_grads(each, 1)
        each.step()
    assert_equal(snapshot(opt), snapshot(fresh))


def test_a_clip_goes_with_the_gradients_that_it_was_for() -> None:
    opt, fresh = CautiousSGD(make_params()), CautiousSGD(make_params())
    set_grads(opt, 7)
    opt.clip_grad_norm_(1e-3)
    opt.zero_grad()  # the step was left out
    for each in (opt, fresh):
        train(each, range(1))
    assert_equal(snapshot(opt), snapshot(fresh))


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_bound_of_no_sense_is_refused(max_norm: float) -> None:
    opt = CautiousAdamW(make_params())
    set_grads(opt, 0)
    with pytest.raises(ConfigError, match="max_norm"):
        opt.clip_grad_norm_(max_norm)


# capturable, tensor learning rates, hooks


@ALL
def test_capturable_steps_count_on_the_device_and_give_the_same(optimizer: Any) -> None:
    plain = optimizer(make_params(), lr=0.01)
    capturable = optimizer(make_params(), lr=torch.tensor(0.01, dtype=torch.float64))
    capturable.param_groups[0]["capturable"] = True
    for opt in (plain, capturable):
        train(opt, range(3))
    for found, expected in zip(snapshot(capturable), snapshot(plain), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)
    restored = optimizer(make_params())
    restored.load_state_dict(copy.deepcopy(capturable.state_dict()))
    assert restored.param_groups[0]["capturable"] is True
    for param, other in zip(make_params_of(restored), make_params_of(capturable), strict=True):
        state, expected = restored.state[param], capturable.state[other]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in expected)


def test_parameters_at_different_steps_share_a_group() -> None:
    together = CautiousAdamW(make_params())
    apart = [CautiousAdamW([param]) for param in make_params()]
    for step in range(5):
        set_grads(together, step)
        for index, opt in enumerate(apart):
            (param,) = make_params_of(opt)
            if (step + index) % 3 == 0:
                make_params_of(together)[index].grad = None
            else:
                param.grad = normal(100 * step + 10 + index, tuple(param.shape))
                opt.step()
        together.step()
    assert_equal(snapshot(together), [value for opt in apart for value in snapshot(opt)])


def test_hooks_run_around_the_step() -> None:
    opt = CautiousAdamW(make_params())
    calls: list[tuple[str, float]] = []
    first = make_params_of(opt)[0]
    opt.register_step_pre_hook(lambda *_: calls.append(("before", float(first.detach().sum()))))
    opt.register_step_post_hook(lambda *_: calls.append(("after", float(first.detach().sum()))))
    train(opt, range(1))
    assert [name for name, _ in calls] == ["before", "after"]
    assert calls[0][1] != calls[1][1]


class BrokenGroup(SoloGroup):
    """A peer died: every collective fails."""

    size = 2

    def all_reduce(self, tensor: torch.Tensor, op: Any = "sum") -> torch.Tensor:
        raise RuntimeError("connection closed by peer")


@ALL
@IMPLEMENTATIONS
def test_a_collective_that_fails_leaves_everything_as_it_was(
    optimizer: Callable[..., CautiousOptimizer], implementation: str
) -> None:
    param = normal(1, (6,)).requires_grad_()
    opt = optimizer([param], implementation=implementation)
    train(opt, range(2))
    before = snapshot(opt)
    whole = WholeTensor("w", (6,), (BrokenGroup(),))
    opt.shard_map = ShardMap([whole], [pieces_of_flat_range(whole, 0, 6)])
    set_grads(opt, 2)
    with pytest.raises(RuntimeError, match="closed by peer"):
        opt.step()
    assert_equal(snapshot(opt), before)


@pytest.mark.parametrize("momentum", [0.0, 1.0, -0.1])
def test_a_momentum_without_sense_is_refused(momentum: float) -> None:
    with pytest.raises(ConfigError, match=rf"momentum={momentum}: must be in \(0, 1\)"):
        CautiousSGD(make_params(), momentum=momentum)
