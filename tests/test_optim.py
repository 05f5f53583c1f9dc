"""The optimizers on one device: what torch.optim lets callers do, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effx_dist.errors import ConfigError, LayoutMismatchError
from effx_dist.optim import CautiousAdamW, CautiousLion
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.shard import ShardMap

NAN = float("nan")
BOTH = pytest.mark.parametrize("optimizer", [CautiousAdamW, CautiousLion])


def normal(seed: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def trained(optimizer: Callable[..., CautiousOptimizer], num_steps: int, **options: Any) -> Any:
    """An optimizer over two parameters after some steps."""
    params = [normal(seed, (4, 3)).requires_grad_() for seed in (1, 2)]
    opt = optimizer(params, **options)
    step_on(opt, range(num_steps))
    return opt


def step_on(opt: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for index, param in enumerate(p for group in opt.param_groups for p in group["params"]):
            param.grad = normal(100 * step + index, tuple(param.shape), param.dtype)
        opt.step()


def params_of(opt: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [param.detach().clone() for group in opt.param_groups for param in group["params"]]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_state_of_torch_adamw_can_be_taken_over() -> None:
    param = normal(1, (4, 3)).requires_grad_()
    plain = torch.optim.AdamW([param], lr=0.02)
    step_on(plain, range(3))
    opt = CautiousAdamW([param], lr=1.0, cautious_weight_decay=True)
    opt.load_state_dict(plain.state_dict())
    assert opt.param_groups[0]["lr"] == 0.02
    assert opt.param_groups[0]["cautious_weight_decay"] is True
    step_on(opt, range(3, 4))
    assert opt.state[param]["step"] == 4


def test_moments_of_half_parameters_survive_a_checkpoint() -> None:
    params = [normal(1, (8,), torch.bfloat16).requires_grad_() for _ in range(2)]
    first, second = CautiousAdamW(params[:1]), CautiousAdamW(params[1:])
    step_on(first, range(2))
    step_on(second, range(1))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert second.state[params[1]][key].dtype == torch.float32
        assert torch.equal(second.state[params[1]][key], first.state[params[0]][key])
    assert not torch.equal(
        first.state[params[0]]["exp_avg"].bfloat16().float(), first.state[params[0]]["exp_avg"]
    )


@BOTH
@pytest.mark.parametrize("through", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_goes_on_as_the_original(
    optimizer: type[CautiousOptimizer], through: Callable[[Any], Any]
) -> None:
    original = trained(optimizer, 2, weight_decay=0.1, cautious_weight_decay=True)
    other = through(original)
    for opt in (original, other):
        step_on(opt, range(2, 4))
    assert_equal(params_of(other), params_of(original))
    assert other.alignment == original.alignment
    assert other.implementation == original.implementation


@BOTH
def test_a_state_dict_goes_on_as_the_original(optimizer: type[CautiousOptimizer]) -> None:
    original = trained(optimizer, 2, lr=0.1)
    other = trained(optimizer, 0, lr=0.9)
    for param, value in zip(other.param_groups[0]["params"], params_of(original), strict=True):
        param.data.copy_(value)
    other.load_state_dict(copy.deepcopy(original.state_dict()))
    for opt in (original, other):
        step_on(opt, range(2, 4))
    assert_equal(params_of(other), params_of(original))


def test_a_copy_without_its_shard_map_refuses_to_step() -> None:
    param = normal(1, (3,)).requires_grad_()
    opt = CautiousAdamW([param], shard_map=ShardMap.of_tensors([("w", param)]))
    other = copy.deepcopy(opt)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = torch.ones(3)
    with pytest.raises(LayoutMismatchError, match=r"set opt\.shard_map"):
        other.step()
    other.shard_map = ShardMap.of_tensors([("w", twin)])
    other.step()
    assert other.alignment == {"w": 1.0}


def test_a_tensor_lr_is_read_at_every_step() -> None:
    lr = torch.tensor(0.05)
    by_tensor, by_float = (
        trained(CautiousAdamW, 2, lr=lr),
        trained(CautiousAdamW, 2, lr=float(lr)),
    )
    lr.fill_(0.5)
    by_float.param_groups[0]["lr"] = 0.5
    for opt in (by_tensor, by_float):
        step_on(opt, range(2, 4))
    assert_equal(params_of(by_tensor), params_of(by_float))


def test_a_scheduler_drives_it() -> None:
    opt = trained(CautiousAdamW, 1, lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.5**epoch)
    step_on(opt, range(1, 2))
    scheduler.step()
    assert opt.param_groups[0]["lr"] == 0.05


def test_groups_have_settings_of_their_own() -> None:
    options: list[dict[str, Any]] = [{"lr": 0.1}, {"lr": 0.2, "weight_decay": 0.5}]
    params = [normal(seed, (4,)).requires_grad_() for seed in (1, 2)]
    together = CautiousAdamW([{"params": [params[0]], **options[0]}], lr=9.0)
    step_on(together, range(1))
    together.add_param_group({"params": params[1], **options[1]})
    grads = [[normal(10 * step + i, (4,)) for i in range(2)] for step in range(3)]
    apart = []
    for i in range(2):
        param = normal(i + 1, (4,)).requires_grad_()
        alone = CautiousAdamW([param], **options[i])
        if i == 0:
            step_on(alone, range(1))
        for step in range(3):
            param.grad = grads[step][i]
            alone.step()
        apart.append(param.detach())
    for step in range(3):
        for param, grad in zip(params, grads[step], strict=True):
            param.grad = grad
        together.step()
    assert_equal(params_of(together), apart)
    assert set(together.alignment) == {0, 1}


def test_the_closure_runs_once_with_gradients_on() -> None:
    param = torch.tensor([1.0, -2.0], requires_grad=True)
    opt = CautiousLion([param], lr=0.5)
    calls = []

    def closure() -> float:
        opt.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        calls.append(loss.item())
        return loss.item()

    assert opt.step(closure) == 5.0
    assert calls == [5.0]
    assert param.tolist() == [0.5, -1.5]
    assert opt.step() is None


def test_alignment_goes_by_name_and_leaves_out_what_was_not_stepped() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2, bias=False))
    model[0].bias.requires_grad_(False)
    opt = CautiousAdamW(model.named_parameters())
    assert opt.alignment == {}
    model(torch.ones(1, 3)).sum().backward()
    bias = model[0].bias.clone()
    opt.step()
    assert set(opt.alignment) == {"0.weight", "1.weight"}
    assert torch.equal(model[0].bias, bias)
    assert model[0].bias not in opt.state


def test_a_tied_weight_is_stepped_once() -> None:
    first, second = (torch.nn.Linear(3, 3, bias=False) for _ in range(2))
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    alone = first.weight.detach().clone().requires_grad_()
    opt, reference = CautiousAdamW(model.parameters()), CautiousAdamW([alone])
    first.weight.grad = normal(1, (3, 3))
    alone.grad = normal(1, (3, 3))
    opt.step()
    reference.step()
    assert torch.equal(second.weight, alone)
    assert len(opt.alignment) == 1


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    param = torch.ones(shape, requires_grad=True)
    opt = CautiousAdamW([param], lr=0.1, weight_decay=0.0)
    param.grad = torch.ones(shape)
    opt.step()
    torch.testing.assert_close(param.detach(), torch.full(shape, 0.9))
    assert opt.alignment == {0: float(param.numel() > 0)}


def test_a_parameter_with_strides_of_its_own() -> None:
    strided = normal(1, (4, 6)).t().requires_grad_()
    plain = normal(1, (4, 6)).t().contiguous().requires_grad_()
    opts = [CautiousAdamW([strided]), CautiousAdamW([plain])]
    for opt in opts:
        step_on(opt, range(3))
    assert_equal(params_of(opts[0]), params_of(opts[1]))


def test_a_sparse_gradient_is_refused_before_anything_changes() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    other = torch.ones(2, requires_grad=True)
    opt = CautiousAdamW([("other", other), ("table.weight", table.weight)])
    table(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(2)
    with pytest.raises(
        LayoutMismatchError, match=r"table\.weight: .*torch\.sparse_coo.*sparse=False"
    ):
        opt.step()
    assert torch.equal(other, torch.ones(2))
    assert not opt.state


def test_a_gradient_of_another_shape_is_refused() -> None:
    param = torch.ones(4, requires_grad=True)
    opt = CautiousAdamW([("w", param)])
    param.grad = torch.ones(4)
    param.data = torch.ones(2)
    with pytest.raises(LayoutMismatchError, match=r"w: the gradient's shape is \(4,\).*\(2,\)"):
        opt.step()


@BOTH
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lr": -1.0}, "lr=-1.0: must be at least 0"),
        ({"lr": NAN}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0\.9, 1\.0\)"),
        ({"betas": (0.9,)}, "two numbers"),
        ({"implementation": "cuda"}, "implementation='cuda': must be one of 'auto', 'triton'"),
    ],
)
def test_settings_out_of_range_are_refused(
    optimizer: Callable[..., CautiousOptimizer], options: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        optimizer([torch.zeros(2, requires_grad=True)], **options)


def test_a_refused_group_is_not_kept() -> None:
    opt = trained(CautiousAdamW, 1)
    with pytest.raises(ConfigError, match=r"parameter 0: dtype torch\.complex64"):
        opt.add_param_group({"params": torch.zeros(2, dtype=torch.complex64, requires_grad=True)})
    with pytest.raises(ConfigError, match="eps=-1"):
        opt.add_param_group({"params": torch.zeros(2, requires_grad=True), "eps": -1})
    assert len(opt.param_groups) == 1
    step_on(opt, range(1, 2))
