"""The optimizers on real ranks: FSDP2, HSDP, DDP and DTensors equal one process, bit for bit.

All that needs one number of ranks runs in one spawn, since starting ranks is what these tests cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from effx_dist.errors import LayoutMismatchError
from effx_dist.optim import CautiousAdamW
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.shard import ShardMap, WholeTensor
from tests.conformance import cautious as conformance
from tests.conformance.cautious import SHAPES, Engine, Scenario, TensorSession
from tests.optim_runs import backward, check_training, small_model, whole, whole_grads_to
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

# fully_shard refuses 0-d parameters.
FSDP2_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "scalar"}


def fsdp2(mesh: DeviceMesh) -> Engine:
    """One module whose parameters are sharded (and, on a 2-d mesh, replicated) by fully_shard."""

    def build(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> TensorSession:
        model = nn.Module()
        for name, value in wholes.items():
            model.register_parameter(name, nn.Parameter(value.clone()))
        fully_shard(model, mesh=mesh)
        params = dict(model.named_parameters())
        assert all(isinstance(param, DTensor) for param in params.values())
        return TensorSession(scenario, params)

    return build


def dtensors(placements_of: Callable[[int], tuple[DeviceMesh, tuple[Placement, ...]]]) -> Engine:
    """DTensors, the i-th placed as ``placements_of(i)`` says."""

    def build(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> TensorSession:
        params = {
            name: distribute_tensor(
                value.clone(), *placements_of(i), src_data_rank=None
            ).requires_grad_()
            for i, (name, value) in enumerate(wholes.items())
        }
        return TensorSession(scenario, params)

    return build


def sharded_and_trained(num_steps: int) -> tuple[nn.Module, CautiousOptimizer]:
    model = small_model()
    model[0].bias.requires_grad_(False)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    opt = CautiousAdamW(model.parameters(), lr=0.02)
    train(model, opt, range(num_steps))
    return model, opt


def train(model: nn.Module, opt: CautiousOptimizer, steps: range) -> None:
    for step in steps:
        opt.zero_grad()
        backward(model, step)
        opt.step()


def check_state_dict(options: StateDictOptions) -> None:
    """torch's own helpers carry the state, sharded or whole, into a fresh model and optimizer."""
    model, opt = sharded_and_trained(2)
    saved = copy.deepcopy(get_optimizer_state_dict(model, opt, options=options))
    moments = saved["state"]["0.weight"]
    assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
    assert isinstance(moments["exp_avg"], DTensor) != options.full_state_dict
    other, other_opt = sharded_and_trained(0)
    before = [whole(param) for param in other.parameters()]
    set_optimizer_state_dict(other, other_opt, saved, options=options)
    for value, param in zip(before, other.parameters(), strict=True):
        assert torch.equal(value, whole(param)), "taking a state must not move a parameter"
    with torch.no_grad():
        for param, value in zip(other.parameters(), model.parameters(), strict=True):
            param.copy_(value)
    train(model, opt, range(2, 4))
    train(other, other_opt, range(2, 4))
    for param, value in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(param), whole(value))
    assert other_opt.alignment == opt.alignment
    assert 1 not in opt.alignment, "frozen"


def tensor_parallel(mesh: DeviceMesh) -> Callable[[nn.Module], nn.Module]:
    """Tensor parallelism on the mesh's second axis, fully_shard on the first."""

    def shard(model: nn.Module) -> nn.Module:
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        fully_shard(parallelize_module(model, mesh["shard"], plan), mesh=mesh["replicate"])
        strided = next(model.parameters())
        assert isinstance(strided, DTensor)
        assert strided.placements[0] != Shard(0), "both axes cut the same dimension"
        return model

    return shard


class LocalMean(CautiousAdamW):
    """Wrong by design: each rank scales by the mean over its own shard."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **{**options, "shard_map": self.draw})

    @staticmethod
    def draw(params: Any) -> ShardMap:
        drawn = ShardMap.of_tensors([(str(i), param) for i, param in enumerate(params)])
        return ShardMap([WholeTensor(w.name, w.shape) for w in drawn.wholes], drawn.pieces)


def check_a_local_mean_is_noticed(mesh: DeviceMesh) -> None:
    def build(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> TensorSession:
        session = fsdp2(mesh)(scenario, wholes)
        session.optimizer = LocalMean(session.optimizer.param_groups[0]["params"])
        return session

    scenario = Scenario(name="local mean")
    found = conformance.run(build, scenario, {"large": SHAPES["large"]})
    right = conformance.run(fsdp2(mesh), scenario, {"large": SHAPES["large"]})
    assert torch.equal(found["large.exp_avg"], right["large.exp_avg"])
    assert not torch.equal(found["large.param"], right["large.param"])


def check_refusals(mesh: DeviceMesh) -> None:
    param = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]).requires_grad_()
    opt = CautiousAdamW([("w", param)])
    param.grad = distribute_tensor(torch.ones(4, 2), mesh, [Replicate()])
    with pytest.raises(LayoutMismatchError, match=r"w: the gradient is laid out as .*Replicate"):
        opt.step()
    pending = DTensor.from_local(torch.ones(2), mesh, [Partial()]).requires_grad_()
    pending.grad = torch.ones_like(pending)
    with pytest.raises(LayoutMismatchError, match="pending reduction"):
        CautiousAdamW([("w", pending)]).step()


def check_clipping() -> None:
    """The norm is that of one process, and the step that after torch's own clipping."""
    model, twin = small_model().double(), small_model().double()
    fully_shard(model)
    by_hand = small_model().double()
    opts = [CautiousAdamW(m.parameters(), lr=0.02) for m in (model, twin, by_hand)]
    for step in range(3):
        opts[0].zero_grad()
        backward(model, step)
        for other in (twin, by_hand):
            whole_grads_to(other, model)
        max_norm = [1e-3, 0.5, 1e6][step]
        norm, twin_norm = (opt.clip_grad_norm_(max_norm) for opt in opts[:2])
        expected = nn.utils.clip_grad_norm_(by_hand.parameters(), max_norm)
        torch.testing.assert_close(norm, twin_norm, rtol=1e-12, atol=0.0)
        torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0.0)
        for opt in opts:
            opt.step()
        grads = [whole(param.grad) for param in model.parameters()]
        unclipped = [param.grad for param in twin.parameters()]
        assert all(map(torch.equal, grads, unclipped)), "the gradients themselves stay as they are"
    for param, *others in zip(*(m.parameters() for m in (model, twin, by_hand)), strict=True):
        for other in others:
            torch.testing.assert_close(whole(param), other.detach(), rtol=1e-9, atol=1e-12)


def values_of(opt: CautiousOptimizer) -> list[torch.Tensor]:
    """Parameters and their state, whole."""
    params = [param for group in opt.param_groups for param in group["params"]]
    states = [value for state in opt.state.values() for value in state.values()]
    return [whole(value) for value in (*params, *states)]


def check_an_overflow_on_one_rank() -> None:
    """All ranks skip the step, and go on with the next."""
    model, opt = sharded_and_trained(1)
    for found in (1.0, 0.0):
        before = values_of(opt)
        backward(model, 1)
        opt.found_inf = torch.tensor(found if dist.get_rank() == 0 else 0.0)
        opt.step()
        is_same = [torch.equal(a, b) for a, b in zip(values_of(opt), before, strict=True)]
        assert all(is_same) if found else not all(is_same)
    del opt.found_inf
    assert {float(state["step"]) for state in opt.state.values()} == {2.0}


def check_a_grad_scaler() -> None:
    """It leaves unscaling to the step. An overflow in one rank's shard is one of all ranks."""
    model, twin = small_model(), small_model()
    fully_shard(model)
    opt, reference = CautiousAdamW(model.parameters()), CautiousAdamW(twin.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    for step in range(3):
        opt.zero_grad()
        seed = 10 * step + dist.get_rank()
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        scaler.scale(model(inputs).square().sum()).backward()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = whole(param.grad) / scaler.get_scale()
        if step == 1 and dist.get_rank() == 1:
            grad = model[0].weight.grad
            assert isinstance(grad, DTensor)
            grad.to_local()[0] = float("inf")
        scaler.step(opt)
        scaler.update()
        if step != 1:
            reference.step()
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(whole(param), other)
    assert scaler.get_scale() == 4.0


class Tied(nn.Module):
    """Two names for one weight, a frozen layer and one that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(9)
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.frozen, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(self.frozen(self.first(inputs)).tanh())


def check_tied_frozen_unused_and_nan() -> None:
    model, twin = Tied(), Tied()
    fully_shard(model)
    opt, reference = CautiousAdamW(model.named_parameters()), CautiousAdamW(twin.named_parameters())
    for step in range(3):
        opt.zero_grad()
        model(torch.randn(4, 5, generator=torch.Generator().manual_seed(step))).sum().backward()
        if step == 2 and dist.get_rank() == 1:
            grad = model.second.bias.grad
            assert isinstance(grad, DTensor)
            grad.to_local()[0] = float("nan")
        whole_grads_to(twin, model)
        opt.step()
        reference.step()
    assert set(opt.alignment) == {"first.weight", "first.bias", "second.bias"}
    assert opt.alignment == reference.alignment
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(whole(param).nan_to_num(7.0), other.nan_to_num(7.0))
    assert whole(model.second.bias).isnan().sum() == 1


def on_two_ranks() -> None:
    mesh = init_device_mesh("cpu", (2,))
    conformance.check(fsdp2(mesh), shapes=FSDP2_SHAPES)
    check_training(lambda model: fully_shard(model) or model)
    check_training(DistributedDataParallel)
    check_state_dict(StateDictOptions())
    check_state_dict(StateDictOptions(full_state_dict=True))
    check_clipping()
    check_an_overflow_on_one_rank()
    check_a_grad_scaler()
    check_tied_frozen_unused_and_nan()
    check_a_local_mean_is_noticed(mesh)
    check_refusals(mesh)


def on_three_ranks() -> None:
    mesh = init_device_mesh("cpu", (3,))
    conformance.check(fsdp2(mesh), shapes=FSDP2_SHAPES)
    check_training(lambda model: fully_shard(model) or model)


def on_four_ranks() -> None:
    hsdp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    line = init_device_mesh("cpu", (4,))
    conformance.check(fsdp2(hsdp), shapes=FSDP2_SHAPES)
    check_training(lambda model: fully_shard(model, mesh=hsdp) or model)
    check_training(tensor_parallel(hsdp), width=8, ranks_per_sample=2)
    matrices = {"large": (65, 64), "few_rows": (3, 65), "cube": (2, 3, 5)}
    on_both_axes = [
        (hsdp, (Shard(0), Shard(1))),
        (hsdp, (Shard(1), Shard(1))),
        (hsdp, (Shard(0), Replicate())),
    ]
    conformance.check(dtensors(on_both_axes.__getitem__), shapes=matrices)
    several_meshes = [(line, (Shard(0),)), (hsdp["shard"], (Shard(0),)), (line, (Replicate(),))]
    conformance.check(dtensors(lambda i: several_meshes[i % 3] if i < 6 else several_meshes[2]))


@pytest.mark.parametrize("body", [on_two_ranks, on_three_ranks, on_four_ranks])
def test_ranks_equal_one_process(body: Callable[[], None], tmp_path: Path) -> None:
    world = {on_two_ranks: 2, on_three_ranks: 3, on_four_ranks: 4}[body]
    assert spawn(world, body, tmp_path) == [None] * world
