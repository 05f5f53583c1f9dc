"""The optimizers where sharding is out of the ordinary: several meshes, sub-meshes, offloading, ZeRO by
DDP; and what a step sends.

All that needs one number of ranks runs in one spawn, since starting ranks is what these tests cost.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from effx_dist.optim import CautiousAdamW, CautiousLion
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.shard import Group, ShardMap, WholeTensor, pieces_of_flat_range
from effx_dist.shard.group import JointGroup
from tests.conformance import cautious as conformance
from tests.conformance.cautious import SCENARIOS, SHAPES, Engine, Scenario, TensorSession
from tests.optim_runs import (
    Traffic,
    assert_same_params,
    backward,
    check_training,
    small_model,
    traffic_of_steps,
    whole,
    whole_grads_to,
)
from tests.ranks import spawn
from tests.thread_ranks import run_ranks

FSDP2_SHAPES = {name: shape for name, shape in SHAPES.items() if name != "scalar"}
MATRICES = {"large": (65, 64), "few_rows": (3, 65), "cube": (2, 3, 5)}


class Model(nn.Module):
    """A flat list of named parameters."""

    def __init__(self, params: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


class ShardedSession(TensorSession):
    """Parameters and gradients alike are cut by the engine's own function."""

    def __init__(
        self, scenario: Scenario, wholes: dict[str, torch.Tensor], shard: Callable[[Model], object]
    ) -> None:
        self._shard = shard
        super().__init__(scenario, self._cut(wholes))

    def _cut(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        model = Model(values)
        self._shard(model)
        return dict(model.named_parameters())

    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        if whole_grad is not None:
            whole_grad = self._cut({name: whole_grad})[name].detach()
        self._params[name].grad = whole_grad


def sharded_by(shard: Callable[[Model], object]) -> Engine:
    return lambda scenario, wholes: ShardedSession(scenario, wholes, shard)


def tensor_parallel_first(mesh: DeviceMesh) -> Callable[[Model], object]:
    """Rows cut by tensor parallelism on axis "tp", and once more by fully_shard on axis "dp"."""

    def shard(model: Model) -> None:
        for name, param in list(model.named_parameters()):
            placed = distribute_tensor(param.detach(), mesh["tp"], [Shard(0)], src_data_rank=None)
            model.register_parameter(name, nn.Parameter(placed))
        fully_shard(model, mesh=mesh["dp"])
        for param in model.parameters():
            assert isinstance(param, DTensor)
            assert param.placements[0] != Shard(0), "both axes cut the rows"

    return shard


# ZeroRedundancyOptimizer


def check_zero_redundancy(parameters_as_bucket_view: bool) -> None:
    """Each rank steps whole parameters of its own; a consolidated state is that of one process."""
    # Its package calls torch.jit.script on import, which warns; here no warning is an error.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, twin = DistributedDataParallel(small_model()), small_model()
    zero = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=CautiousAdamW,
        parameters_as_bucket_view=parameters_as_bucket_view,
        lr=0.02,
        weight_decay=0.1,
    )
    reference = CautiousAdamW(twin.parameters(), lr=0.02, weight_decay=0.1)

    def train(steps: range) -> None:
        for step in steps:
            zero.zero_grad()
            backward(model, step)
            whole_grads_to(twin, model)
            zero.step()
            reference.step()

    train(range(3))
    assert_same_params(model, twin)
    zero.consolidate_state_dict(to=1)
    if dist.get_rank() == 1:
        saved = copy.deepcopy(zero.state_dict())
        expected = reference.state_dict()
        assert saved["state"].keys() == expected["state"].keys()
        for index, state in expected["state"].items():
            assert all(torch.equal(saved["state"][index][key], state[key]) for key in state)
        alone = CautiousAdamW(small_model().parameters())
        alone.load_state_dict(saved)
        assert alone.param_groups[0]["lr"] == 0.02
    box: list[Any] = [zero.state_dict() if dist.get_rank() == 1 else None]
    dist.broadcast_object_list(box, src=1)
    zero.load_state_dict(box[0])
    train(range(3, 5))
    assert_same_params(model, twin)


# What a step sends


def check_traffic_on_a_line() -> None:
    model = small_model()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    opt = CautiousAdamW(model.parameters())
    assert traffic_of_steps(model, opt) == [("allreduce", 8 * 4)]
    with Traffic() as traffic:
        opt.clip_grad_norm_(1.0)
    assert traffic.sent == [("allreduce", 8)]
    whole_here = small_model()
    assert traffic_of_steps(whole_here, CautiousAdamW(whole_here.parameters())) == []


def check_traffic_on_two_axes(mesh: DeviceMesh, line: DeviceMesh) -> None:
    replicated = small_model()
    fully_shard(replicated, mesh=mesh)
    opt: CautiousOptimizer = CautiousLion(replicated.parameters())
    assert traffic_of_steps(replicated, opt) == [("allreduce", 8 * 4)]

    both = small_model(width=8)
    parallelize_module(both, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(both, mesh=mesh["dp"])
    # Three are cut on both axes, and take one all-reduce and not two; the last bias only on "dp".
    opt = CautiousAdamW(both.parameters())
    assert traffic_of_steps(both, opt) == [("allreduce", 8), ("allreduce", 8 * 3)]

    experts = small_model()
    fully_shard(experts[0], mesh=mesh["tp"])
    fully_shard(experts, mesh=line)
    opt = CautiousAdamW(experts.parameters())
    assert traffic_of_steps(experts, opt) == [("allreduce", 8 * 2), ("allreduce", 8 * 2)]


# Meshes


def offloaded(model: nn.Module) -> nn.Module:
    fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    return model


def check_experts(mesh: DeviceMesh, line: DeviceMesh) -> None:
    """The two rows of the mesh hold different experts by one name, all ranks hold the rest."""
    row = mesh.get_local_rank("dp")
    generator = torch.Generator().manual_seed(row)
    expert = torch.randn(5, 7, generator=generator)
    rest = torch.ones(9, 2)
    params = {
        "expert": distribute_tensor(expert, mesh["tp"], [Shard(0)], src_data_rank=None),
        "rest": distribute_tensor(rest, line, [Shard(0)], src_data_rank=None),
    }
    twins = {"expert": expert.clone(), "rest": rest.clone()}
    opt, reference = CautiousAdamW(params.items()), CautiousAdamW(twins.items())
    for step in range(4):
        for name, twin in twins.items():
            seed = 10 * step + (row if name == "expert" else 5)
            twin.grad = torch.randn(twin.shape, generator=torch.Generator().manual_seed(seed))
            cut = params[name]
            cut.grad = distribute_tensor(
                twin.grad, cut.device_mesh, cut.placements, src_data_rank=None
            )
        opt.step()
        reference.step()
    for name, twin in twins.items():
        assert torch.equal(whole(params[name]), twin)
    assert opt.alignment == reference.alignment
    alignments: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(alignments, opt.alignment["expert"])
    assert len(set(alignments)) == 2, "each row its own"


def placed(mesh: DeviceMesh, placements: list[Any]) -> Callable[[Model], object]:
    def shard(model: Model) -> None:
        for name, param in list(model.named_parameters()):
            cut = distribute_tensor(param.detach(), mesh, placements, src_data_rank=None)
            model.register_parameter(name, nn.Parameter(cut))

    return shard


def on_two_ranks() -> None:
    check_zero_redundancy(parameters_as_bucket_view=False)
    check_zero_redundancy(parameters_as_bucket_view=True)
    check_traffic_on_a_line()
    conformance.check(sharded_by(offloaded), SCENARIOS[:2], FSDP2_SHAPES)
    check_training(offloaded)


def on_four_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    line = init_device_mesh("cpu", (4,))
    cube = init_device_mesh("cpu", (1, 2, 2))
    check_traffic_on_two_axes(mesh, line)
    check_experts(mesh, line)
    conformance.check(sharded_by(tensor_parallel_first(mesh)), SCENARIOS[:2], MATRICES)
    for placements in ([Shard(0), Shard(0), Shard(1)], [Shard(1), Replicate(), Shard(0)]):
        conformance.check(sharded_by(placed(cube, placements)), SCENARIOS[:2], MATRICES)


# A mesh that is not the world


@contextmanager
def made_groups() -> Iterator[list[list[int]]]:
    """The ranks of each process group that torch makes meanwhile."""
    ranks: list[list[int]] = []
    real = dist.new_group

    def new_group(*args: Any, **options: Any) -> Any:
        ranks.append(args[0])
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "new_group", new_group)
        yield ranks


def check_joint_group() -> None:
    """Ranks 0 to 3 of five: their joint group is made once; rank 4 is neither asked nor waits."""
    mesh = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    scenarios = SCENARIOS[:2]
    with made_groups() as groups:
        if dist.get_rank() < 4:
            engine = sharded_by(placed(mesh, [Shard(0), Shard(1)]))
            conformance.check(engine, scenarios, MATRICES)
            assert groups == [[0, 1, 2, 3]]
            cut = distribute_tensor(
                torch.ones(4, 4), mesh, [Shard(0), Shard(1)], src_data_rank=None
            )
            (group,) = ShardMap.of_tensors([("w", cut)]).wholes[0].groups
            assert isinstance(group, JointGroup), (
                "the comparison above would need no group of its own"
            )
        else:
            param = distribute_tensor(
                torch.ones(4, 4), mesh, [Shard(0), Shard(1)], src_data_rank=None
            )
            opt = CautiousAdamW([("elsewhere", param.requires_grad_()), ("own", torch.ones(3))])
            opt.param_groups[0]["params"][1].grad = torch.ones(3)
            param.grad = torch.ones_like(param)
            opt.step()
            assert opt.alignment["own"] == 1.0
            assert groups == []


def on_five_ranks(second_store: str) -> None:
    check_joint_group()
    rank = dist.get_rank()
    dist.barrier()
    dist.destroy_process_group()
    store = dist.FileStore(second_store, 5)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=5)
    check_joint_group()  # and so the group of the first time is not used again


@pytest.mark.ranks
@pytest.mark.parametrize("body", [on_two_ranks, on_four_ranks])
def test_ranks_equal_one_process(body: Callable[[], None], tmp_path: Path) -> None:
    world = {on_two_ranks: 2, on_four_ranks: 4}[body]
    assert spawn(world, body, tmp_path) == [None] * world


@pytest.mark.ranks
def test_a_mesh_of_some_ranks_makes_its_joint_group(tmp_path: Path) -> None:
    assert spawn(5, on_five_ranks, tmp_path, str(tmp_path / "second")) == [None] * 5


# A parameter that no machine here could hold


class WithDistantPeers(Group):
    """In its sums are also ranks that are not there, with counts of their own."""

    num_agreeing_there = 3_000_000_001

    def __init__(self, here: Group) -> None:
        self._here = here
        self.rank, self.size = here.rank, here.size

    def all_reduce(self, tensor: torch.Tensor, op: Any = "sum") -> torch.Tensor:
        assert tensor.dtype == torch.int64
        return self._here.all_reduce(tensor, op).add_(self.num_agreeing_there)

    def all_to_all(self, send: Any) -> list[torch.Tensor]:
        raise NotImplementedError

    def all_gather_object(self, value: Any) -> list[Any]:
        raise NotImplementedError


@pytest.mark.parametrize("implementation", ["eager", "auto"])
@pytest.mark.parametrize("first", [2**31 - 900, 2**32 + 5])
def test_counts_beyond_2_to_the_31(implementation: Any, first: int) -> None:
    """Neither 32 bits nor single precision hold the count; the fraction and the step are exact."""
    shape, num_local = (70_000, 70_000), 1000
    num_zeros = [0, 100, 999]
    count = WithDistantPeers.num_agreeing_there + 3 * num_local - sum(num_zeros)
    expected = Fraction(count, 70_000 * 70_000)

    def body(group: Group) -> None:
        whole_tensor = WholeTensor("table", shape, (WithDistantPeers(group),))
        start = first + group.rank * num_local
        pieces = pieces_of_flat_range(whole_tensor, start, start + num_local)
        param = torch.zeros(num_local, dtype=torch.float64, requires_grad=True)
        opt = CautiousLion(
            [param],
            lr=0.25,
            implementation=implementation,
            shard_map=ShardMap([whole_tensor], [pieces]),
        )
        param.grad = torch.full_like(param, -2.0)
        param.grad[: num_zeros[group.rank]] = 0.0
        opt.step()
        assert opt.alignment == {"table": float(expected)}
        stepped = param.detach()[num_zeros[group.rank] :]
        exact = torch.full_like(stepped, float(Fraction(1, 4) / expected))
        torch.testing.assert_close(stepped, exact, rtol=4e-16, atol=0.0)
        assert not param.detach()[: num_zeros[group.rank]].any()

    run_ranks(3, body)
