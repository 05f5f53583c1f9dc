"""The optimizers under FullyShardedDataParallel equal one process, bit for bit, by its shard map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from effx_dist.engines import fsdp1
from effx_dist.errors import LayoutMismatchError
from effx_dist.optim import CautiousAdamW, CautiousLion
from effx_dist.shard import ShardMap, TorchGroup, WholeTensor
from tests.conformance import cautious as conformance
from tests.conformance.cautious import SCENARIOS, SHAPES, Engine, Scenario, Session
from tests.optim_runs import GivenGrads, traffic_of_steps
from tests.ranks import spawn

pytestmark = pytest.mark.ranks

CPU = torch.device("cpu")
SHARD_GRAD_OP = ShardingStrategy.SHARD_GRAD_OP

# FullyShardedDataParallel refuses 0-d parameters; one without elements gets no gradient and no state.
FSDP1_SHAPES = {name: shape for name, shape in SHAPES.items() if name not in ("scalar", "nothing")}
# A unit has one gradient, which is zero and not missing where a parameter was not used.
FSDP1_SCENARIOS = [scenario for scenario in SCENARIOS if not scenario.without_grad]
INNER_UNITS = (("large", "few_rows"), ("one", "cube"))


def keep_own_part(_: None, grad: torch.Tensor, part: torch.Tensor) -> None:
    """In place of the mean over ranks, which rounds on three of them: all have the same gradient."""
    part.copy_(grad.chunk(dist.get_world_size())[dist.get_rank()])


class Fsdp1Session(Session):
    """Nested units whose gradients come by FSDP's own backward pass."""

    def __init__(
        self, scenario: Scenario, wholes: Mapping[str, torch.Tensor], **options: Any
    ) -> None:
        params = {name: nn.Parameter(whole.clone()) for name, whole in wholes.items()}
        units = self._units(scenario, list(params), splits_groups=not options["use_orig_params"])
        inner = [wrap(GivenGrads({n: params[n] for n in unit}), **options) for unit in units[:-1]]
        root = GivenGrads({name: params[name] for name in units[-1]}, inner)
        self._model = wrap(root, **options)
        if "device_mesh" not in options:
            self._model.register_comm_hook(None, keep_own_part)
        self._shard_group = self._model.process_group
        self._shapes = {name: whole.shape for name, whole in wholes.items()}
        self._grads: dict[str, torch.Tensor] = {}
        self._wholes: dict[str, dict[str, torch.Tensor]] = {}
        local: dict[tuple[str, ...], torch.Tensor]
        if options["use_orig_params"]:
            local = {(name,): param for name, param in params.items()}
        else:
            local = dict(self._flat(units, inner))
        groups = [
            [names for names in local if names[0] in group]
            for group in scenario.groups(list(params))
        ]
        self._names = [names for group in groups for names in group]
        self.optimizer = scenario.build(
            [[(names[0], local[names]) for names in group] for group in groups],
            fsdp1.shard_map(self._model),
        )

    @staticmethod
    def _units(
        scenario: Scenario, names: Sequence[str], splits_groups: bool
    ) -> list[tuple[str, ...]]:
        """Names by unit, the root's last. A flat parameter has one dtype and is in one group."""
        units: dict[Any, list[str]] = {}
        for name in names:
            place = next(
                (i for i, unit in enumerate(INNER_UNITS) if name in unit), len(INNER_UNITS)
            )
            in_second = splits_groups and name in scenario.second_group
            units.setdefault((place, scenario.dtype_of(name), in_second), []).append(name)
        return [tuple(units[key]) for key in sorted(units, key=str)]

    def _flat(
        self, units: Sequence[tuple[str, ...]], inner: Sequence[nn.Module]
    ) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
        of_inner = [next(iter(module.parameters())) for module in inner]
        (of_root,) = {*self._model.parameters()} - {*of_inner}
        return zip(units, [*of_inner, of_root], strict=True)

    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        assert whole_grad is not None
        self._grads[name] = whole_grad

    def step(self) -> None:
        self.optimizer.zero_grad()
        self._model(self._grads).backward()
        self.optimizer.step()

    def alignment(self) -> dict[str | int, float]:
        found = self.optimizer.alignment
        return {str(name).rpartition(".")[2]: value for name, value in found.items()}

    def whole_values(self, name: str) -> dict[str, torch.Tensor]:
        if not self._wholes:
            parts: list[Any] = [None] * dist.get_world_size(self._shard_group)
            dist.all_gather_object(parts, self._local_values(), group=self._shard_group)
            self._wholes = self._join(parts)
        return self._wholes[name]

    def _local_values(self) -> list[dict[str, torch.Tensor]]:
        """The parameter and its state of each of the optimizer's tensors, as this rank has them."""
        return [
            {"param": param.detach(), **self.optimizer.state.get(param, {})}
            for group in self.optimizer.param_groups
            for param in group["params"]
        ]

    def _join(
        self, parts: list[list[dict[str, torch.Tensor]]]
    ) -> dict[str, dict[str, torch.Tensor]]:
        """Parts of a flat tensor follow each other by rank; padding is at its end."""
        joined: dict[str, dict[str, torch.Tensor]] = {}
        for names, by_rank in zip(self._names, zip(*parts, strict=True), strict=True):
            numels = [self._shapes[name].numel() for name in names]
            for key in max(by_rank, key=len):
                found = [values[key] for values in by_rank if key in values]
                if key == "step":
                    split = [found[0]] * len(names)
                else:
                    split = torch.cat(found)[: sum(numels)].split(numels)
                    split = [v.view(self._shapes[n]) for n, v in zip(names, split, strict=True)]
                for name, value in zip(names, split, strict=True):
                    joined.setdefault(name, {})[key] = value
        return joined


def fsdp1_engine(**options: Any) -> Engine:
    def build(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> Session:
        return Fsdp1Session(scenario, wholes, **options)

    return build


def small_model() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))


def wrap(model: nn.Module, use_orig_params: bool = True, **options: Any) -> Fsdp:
    return Fsdp(model, device_id=CPU, use_orig_params=use_orig_params, **options)


def check_training(**options: Any) -> None:
    """Real backward passes on data of each rank's own; their gradients are also fed to one process."""
    for optimizer in (CautiousAdamW, CautiousLion):
        twin, layers = small_model(), small_model()
        layers[2] = wrap(layers[2], **options)
        model = wrap(layers, **options)
        opt = optimizer(model.parameters(), lr=0.02, shard_map=fsdp1.shard_map(model))
        reference = optimizer(twin.named_parameters(), lr=0.02)
        numels = [param.numel() for param in twin.parameters()]
        for step in range(3):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
            model(torch.randn(4, 6, generator=generator)).square().sum().backward()
            grads = torch.cat([whole_grad.flatten() for whole_grad in gathered(model, "grad")])
            for param, grad in zip(twin.parameters(), grads.split(numels), strict=True):
                param.grad = grad.view(param.shape)
            norms = [one.clip_grad_norm_(1e9) for one in (opt, reference)]
            torch.testing.assert_close(*norms, rtol=1e-6, atol=0.0)
            opt.step()
            reference.step()
        assert opt.alignment == reference.alignment
        values = torch.cat([value.flatten() for value in gathered(model, "data")])
        assert torch.equal(
            values, torch.cat([param.detach().flatten() for param in twin.parameters()])
        )
        sent = traffic_of_steps(model, opt)
        assert sent == [("allreduce", 8 * len(numels))], "one for all units"


def gathered(model: Fsdp, attribute: str) -> list[torch.Tensor]:
    """The local views (``use_orig_params=True``) of all ranks, put together."""
    local = [getattr(param, attribute) for param in model.parameters()]
    by_rank: list[Any] = [None] * dist.get_world_size(model.process_group)
    dist.all_gather_object(by_rank, local, group=model.process_group)
    found = zip(*by_rank, strict=True)
    return [torch.cat([part for part in parts if part is not None]) for parts in found]


class Unit(nn.Module):
    """One name for two parameters, one without elements, one that lies transposed, some ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(5, 7, bias=False)
        self.second.weight = self.first.weight
        self.nothing = nn.Parameter(torch.zeros(0, 3))
        self.transposed = nn.Parameter(torch.randn(3, 4).t())
        self.ignored = nn.Linear(3, 2)


def unit_and_head() -> nn.ModuleDict:
    torch.manual_seed(5)
    return nn.ModuleDict({"unit": Unit(), "head": nn.Linear(5, 1)})


def wrapped_unit_and_head(**options: Any) -> Fsdp:
    model = unit_and_head()
    ignored = [model["unit"].ignored]
    model["unit"] = wrap(model["unit"], ignored_modules=ignored, **options)
    return wrap(model, ignored_modules=ignored, **options)


def check_map(**options: Any) -> None:
    """The pieces of all ranks tile every whole parameter and hold its values."""
    expected = {name: param.detach() for name, param in unit_and_head().named_parameters()}
    is_sharded = options.get("sharding_strategy") is not ShardingStrategy.NO_SHARD
    if is_sharded or not options["use_orig_params"]:
        expected["unit.transposed"] = expected["unit.transposed"].t().flatten()
    model = wrapped_unit_and_head(**options)
    params = [*model.parameters()]
    drawn = fsdp1.shard_map(model)(params)
    assert sorted(whole.name for whole in drawn.wholes) == sorted(expected)
    times_held = {name: torch.zeros(value.shape) for name, value in expected.items()}
    for param, pieces in zip(params, drawn.pieces, strict=True):
        for piece in pieces:
            name, slices = piece.whole.name, piece.box.slices
            assert torch.equal(piece.view(param.detach()), expected[name][slices]), name
            times_held[name][slices] += 1
    for whole in drawn.wholes:
        assert whole.shape == expected[whole.name].shape
        spreads = is_sharded and ".ignored." not in whole.name
        assert whole.groups == ((TorchGroup(),) if spreads else ())
        dist.all_reduce(times_held[whole.name])
        assert (times_held[whole.name] == (1 if spreads else dist.get_world_size())).all()
    names: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(names, [whole.name for whole in drawn.wholes])
    assert all(other == names[0] for other in names)


def check_some_parameters_in_another_order() -> None:
    model = wrapped_unit_and_head()
    draw = fsdp1.shard_map(model)
    first, *_, last = params = [*model.parameters()]
    names = [whole.name for whole in draw(params).wholes]
    assert [whole.name for whole in draw([last, first]).wholes] == [names[-1], names[0]]


def check_refusals() -> None:
    """A cut parameter is never taken for a whole one."""
    for use_orig_params, names in ((True, "0.weight"), (False, "_fsdp_wrapped_module._flat_param")):
        model = wrap(small_model(), use_orig_params)
        opt = CautiousAdamW(model.named_parameters())
        with pytest.raises(LayoutMismatchError, match=rf"{names}.*FullySharded.*fsdp1\.shard_map"):
            opt.step()
        other = fsdp1.shard_map(wrap(small_model(), use_orig_params))
        opt = CautiousAdamW(model.parameters(), shard_map=other)
        with pytest.raises(LayoutMismatchError, match=r"parameter 0 .* that is not in the model"):
            opt.step()
    model = wrap(small_model())
    draw = fsdp1.shard_map(model)
    with (
        Fsdp.summon_full_params(model),
        pytest.raises(LayoutMismatchError, match=r"\d\.weight: .* at the moment"),
    ):
        draw([*model.parameters()])


def check_tensor_parallel_is_refused(mesh: DeviceMesh) -> None:
    layers = parallelize_module(small_model(), mesh["shard"], {"0": ColwiseParallel()})
    model = Fsdp(layers, device_mesh=mesh["replicate"], device_id=CPU, use_orig_params=True)
    with pytest.raises(LayoutMismatchError, match=r"0\.weight: .*tensor-parallel part"):
        fsdp1.shard_map(model)([*model.parameters()])


def check_a_local_mean_is_noticed() -> None:
    """What each rank would do without its peers is another step, so that the comparisons can fail."""

    def local(scenario: Scenario, wholes: dict[str, torch.Tensor]) -> Session:
        session = fsdp1_engine(use_orig_params=False)(scenario, wholes)
        draw = session.optimizer.shard_map
        assert callable(draw)
        drawn = draw(session.optimizer.param_groups[0]["params"])
        wholes_alone = [WholeTensor(whole.name, whole.shape) for whole in drawn.wholes]
        session.optimizer.shard_map = ShardMap(wholes_alone, drawn.pieces)
        return session

    with pytest.raises(AssertionError, match=r"large\.param.* differ from one process"):
        conformance.check(local, FSDP1_SCENARIOS[:1], FSDP1_SHAPES)


def check_a_unit_without_a_gradient() -> None:
    """It stays as it is, and its peers step as if it were not there."""
    for use_orig_params in (True, False):
        scenario = Scenario(name="one unit", defaults={"lr": 0.1})
        wholes = conformance.whole_params(FSDP1_SHAPES, scenario.dtype)
        session = fsdp1_engine(use_orig_params=use_orig_params)(scenario, wholes)
        used = [name for name in wholes if name not in INNER_UNITS[0]]
        reference = conformance.one_process(scenario, wholes)
        for name in used:
            for one in (session, reference):
                one.set_grad(name, conformance.whole_grad(name, 0, wholes[name]))
        for one in (session, reference):
            one.step()
        for name, value in wholes.items():
            assert torch.equal(
                session.whole_values(name)["param"], reference.whole_values(name)["param"]
            )
            assert torch.equal(session.whole_values(name)["param"], value) == (name not in used)


def on_two_ranks() -> None:
    conformance.check(fsdp1_engine(use_orig_params=True), FSDP1_SCENARIOS, FSDP1_SHAPES)
    zero2 = fsdp1_engine(use_orig_params=False, sharding_strategy=SHARD_GRAD_OP)
    conformance.check(zero2, FSDP1_SCENARIOS, FSDP1_SHAPES)
    check_training()
    check_training(sharding_strategy=SHARD_GRAD_OP)
    for use_orig_params in (True, False):
        check_map(use_orig_params=use_orig_params)
        check_map(use_orig_params=use_orig_params, sharding_strategy=ShardingStrategy.NO_SHARD)
    check_some_parameters_in_another_order()
    check_refusals()
    check_a_local_mean_is_noticed()
    check_a_unit_without_a_gradient()


def on_three_ranks() -> None:
    """Parts end in mid-row, and ranks hold nothing of some parameters."""
    for use_orig_params in (True, False):
        engine = fsdp1_engine(use_orig_params=use_orig_params)
        conformance.check(engine, FSDP1_SCENARIOS[:4], FSDP1_SHAPES)
        check_map(use_orig_params=use_orig_params)
    check_training()


def on_four_ranks() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for use_orig_params in (True, False):
        engine = fsdp1_engine(
            use_orig_params=use_orig_params,
            device_mesh=mesh,
            sharding_strategy=ShardingStrategy.HYBRID_SHARD,
        )
        conformance.check(engine, FSDP1_SCENARIOS[:3], FSDP1_SHAPES)
    check_training(device_mesh=mesh, sharding_strategy=ShardingStrategy.HYBRID_SHARD)
    check_tensor_parallel_is_refused(mesh)


@pytest.mark.parametrize("body", [on_two_ranks, on_three_ranks, on_four_ranks])
def test_ranks_equal_one_process(body: Callable[[], None], tmp_path: Path) -> None:
    world = {on_two_ranks: 2, on_three_ranks: 3, on_four_ranks: 4}[body]
    assert spawn(world, body, tmp_path) == [None] * world
