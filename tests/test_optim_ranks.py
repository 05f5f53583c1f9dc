"""The optimisers on real ranks: FSDP2, HSDP, DDP and DTensors equal one process, bit for bit.

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
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from effx_dist.errors import LayoutMismatchError
from effx_dist.optim import CautiousAdamW, CautiousLion
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.shard import ShardMap, TorchGroup, WholeTensor
from tests.conformance import cautious as conformance
from tests.conformance.cautious import SHAPES, Engine, Scenario, TensorSession
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

# fully_shard refuses 0-d parameters.
FSDP2_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "scalar"}


def fsdp2(mesh: DeviceMesh) -> Engine:
    """One module whose parameters are sharded (and, on a 2-d mesh, replicated) by fully_shard."""

    def build(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> TensorSession:
        model = nn.Module()
        for name, whole in wholes.items():
            model.register_parameter(name, nn.Parameter(whole.clone()))
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
                whole.clone(), *placements_of(i), src_data_rank=None
            ).requires_grad_()
            for i, (name, whole) in enumerate(wholes.items())
        }
        return TensorSession(scenario, params)

    return build


def small_model(width: int = 5) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def backward(model: nn.Module, step: int, ranks_per_sample: int = 1) -> None:
    """A backward pass on data of this rank's own, or of its tensor-parallel peers' and its own."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank() // ranks_per_sample)
    model(torch.randn(4, 6, generator=generator)).square().sum().backward()


def whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def check_training(
    shard: Callable[[nn.Module], nn.Module], width: int = 5, ranks_per_sample: int = 1
) -> None:
    """Real backward passes; the engine's averaged gradients are also fed to one process."""
    for optimizer in (CautiousAdamW, CautiousLion):
        model, twin = shard(small_model(width)), small_model(width)
        opt, reference = (
            optimizer(model.parameters(), lr=0.02),
            optimizer(twin.parameters(), lr=0.02),
        )
        for step in range(3):
            opt.zero_grad()
            backward(model, step, ranks_per_sample)
            for param, other in zip(model.parameters(), twin.parameters(), strict=True):
                other.grad = whole(param.grad)
            opt.step()
            reference.step()
        assert opt.alignment == reference.alignment
        for param, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(whole(param), other)


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
    """torch's own helpers carry the state, sharded or whole, into a fresh model and optimiser."""
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


class CountingGroup(TorchGroup):
    """A process group that counts what goes through it."""

    num_all_reduces = 0

    def all_reduce(self, tensor: torch.Tensor, op: Any = "sum") -> torch.Tensor:
        self.num_all_reduces += 1
        assert tensor.dtype == torch.int64
        return super().all_reduce(tensor, op)


def check_one_all_reduce() -> None:
    model, _ = sharded_and_trained(0)
    named = list(model.named_parameters())
    group = CountingGroup(dist.group.WORLD)
    drawn = ShardMap.of_tensors(named)
    wholes = [WholeTensor(w.name, w.shape, (group,)) for w in drawn.wholes]
    opt = CautiousAdamW(model.parameters(), shard_map=ShardMap(wholes, drawn.pieces))
    train(model, opt, range(3))
    assert group.num_all_reduces == 3
    assert all(len(w.groups) == 1 for w in drawn.wholes)
    assert len(drawn.by_groups) == 1, "so a drawn map does with one all-reduce as well"


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


def on_two_ranks() -> None:
    mesh = init_device_mesh("cpu", (2,))
    conformance.check(fsdp2(mesh), shapes=FSDP2_SHAPES)
    check_training(lambda model: fully_shard(model) or model)
    check_training(DistributedDataParallel)
    check_state_dict(StateDictOptions())
    check_state_dict(StateDictOptions(full_state_dict=True))
    check_one_all_reduce()
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
