"""Flat local tensors of several pieces, cut anywhere and padded, as ZeRO has them: ranks as
threads.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from effx_dist.errors import LayoutMismatchError
from effx_dist.optim import CautiousAdamW
from effx_dist.shard import (
    Group,
    Piece,
    ShardMap,
    SoloGroup,
    WholeTensor,
    pieces_of_flat_range,
    whole_box,
)
from tests.conformance import cautious as conformance
from tests.conformance.cautious import SCENARIOS, SHAPES, Scenario, Session
from tests.thread_ranks import run_ranks

PADDING = 0.25  # not zero, so that a step that touches padding shows
WITHOUT_GRAD = "adamw, steps without a gradient"  # a flat gradient has no holes


class FlatSession(Session):
    """ZeRO's layout: one flat tensor per parameter group, padded, one equal cut of it on each rank."""

    def __init__(
        self, group: Group, scenario: Scenario, wholes: Mapping[str, torch.Tensor]
    ) -> None:
        self._group = group
        self._scenario = scenario
        self._shapes = {name: tuple(whole.shape) for name, whole in wholes.items()}
        self._names = scenario.groups(list(wholes))
        self._described = {
            name: WholeTensor(name, shape, (group,)) for name, shape in self._shapes.items()
        }
        self.locals = [
            self._cut(self._flatten(names, wholes)).requires_grad_() for names in self._names
        ]
        self.grads: dict[str, torch.Tensor] = {}
        self.optimizer = self._build()

    def _build(self) -> CautiousAdamW:
        pieces = [self._pieces_of(names) for names in self._names]
        named = [[(f"flat {i}", local)] for i, local in enumerate(self.locals)]
        return self._scenario.build(named, ShardMap(list(self._described.values()), pieces))

    def _flatten(self, names: list[str], wholes: Mapping[str, torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([wholes[name].reshape(-1) for name in names])
        align = 3 * self._group.size
        num_padding = -len(flat) % align + align  # a rank's worth at least, as after a small group
        return torch.cat([flat, flat.new_full((num_padding,), PADDING)])

    def _cut(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.chunk(self._group.size)[self._group.rank].clone()

    def _pieces_of(self, names: list[str]) -> tuple[Piece, ...]:
        numels = [self._described[name].numel for name in names]
        cut = (sum(numels) + -sum(numels) % (3 * self._group.size)) // self._group.size + 3
        first = cut * self._group.rank
        pieces: list[Piece] = []
        position = 0
        for name, numel in zip(names, numels, strict=True):
            start = min(max(first - position, 0), numel)
            stop = min(max(first + cut - position, 0), numel)
            local_start = position + start - first
            pieces += pieces_of_flat_range(self._described[name], start, stop, local_start)
            position += numel
        return tuple(pieces)

    def set_grad(self, name: str, whole_grad: torch.Tensor | None) -> None:
        assert whole_grad is not None
        self.grads[name] = whole_grad
        for names, local in zip(self._names, self.locals, strict=True):
            if all(name in self.grads for name in names):
                local.grad = self._cut(self._flatten(names, self.grads))

    def whole_values(self, name: str) -> dict[str, torch.Tensor]:
        index = next(i for i, names in enumerate(self._names) if name in names)
        local = self.locals[index]
        state = self.optimizer.state[local]
        found = {"param": self._gather(name, index, local.detach())}
        for key, value in state.items():
            found[key] = self._gather(name, index, value) if value.dim() else value
        return found

    def _gather(self, name: str, index: int, local: torch.Tensor) -> torch.Tensor:
        flat = torch.cat(self._group.all_gather_object(local))
        start = 0
        for other in self._names[index]:
            numel = self._described[other].numel
            if other == name:
                return flat[start : start + numel].view(self._shapes[name])
            start += numel
        raise KeyError(name)

    def padding(self) -> list[torch.Tensor]:
        """The elements that no piece covers, of each flat tensor and its state, on this rank."""
        found = []
        for names, local in zip(self._names, self.locals, strict=True):
            is_padding = torch.ones(local.numel(), dtype=torch.bool)
            for piece in self._pieces_of(names):
                piece.flat_view(is_padding).fill_(False)
            moments = [v for v in self.optimizer.state[local].values() if v.dim()]
            found += [tensor.detach()[is_padding] for tensor in (local, *moments)]
        return found


class LocalMeanSession(FlatSession):
    """Wrong by design: scales by the mean of the mask over whatever piece the rank holds."""

    def _build(self) -> CautiousAdamW:
        described = self._described
        self._described = {
            name: WholeTensor(name, whole.shape) for name, whole in described.items()
        }
        optimizer = super()._build()
        self._described = described
        return optimizer


FLAT_SCENARIOS = [scenario for scenario in SCENARIOS if scenario.name != WITHOUT_GRAD]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_flat_cuts_equal_one_process(world: int) -> None:
    def body(group: Group) -> None:
        conformance.check(lambda s, w: FlatSession(group, s, w), FLAT_SCENARIOS)

    run_ranks(world, body)


def test_the_conformance_suite_notices_a_local_mean() -> None:
    def body(group: Group) -> None:
        conformance.check(lambda s, w: LocalMeanSession(group, s, w), FLAT_SCENARIOS[:1])

    with pytest.raises(AssertionError, match=r"adamw: .*large\.param"):
        run_ranks(2, body)


def test_padding_stays_as_it_is() -> None:
    def body(group: Group) -> int:
        scenario = FLAT_SCENARIOS[0]
        wholes = conformance.whole_params(SHAPES, torch.float32)
        session = FlatSession(group, scenario, wholes)
        for name, whole in wholes.items():
            session.set_grad(name, torch.ones_like(whole))
        session.optimizer.step()
        param, *moments = session.padding()
        assert torch.equal(param, torch.full_like(param, PADDING))
        assert all(not moment.any() for moment in moments)
        return param.numel()

    assert sum(run_ranks(3, body)) > 0


class CountingGroup(SoloGroup):
    """Alone, and counting what it is asked to reduce."""

    def __init__(self) -> None:
        self.reduced: list[torch.Tensor] = []

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        self.reduced.append(tensor.clone())
        return tensor


def test_one_all_reduce_of_all_counts_per_step() -> None:
    group = CountingGroup()
    wholes = [WholeTensor(name, (4,), (group,)) for name in "abc"]
    params = [torch.zeros(4, requires_grad=True) for _ in wholes]
    params[0].grad = torch.tensor([1.0, 2.0, 0.0, -1.0])
    pieces = [(Piece(whole, whole_box(whole.shape)),) for whole in wholes]
    opt = CautiousAdamW(params, shard_map=ShardMap(wholes, pieces))
    opt.step()
    assert len(group.reduced) == 1
    assert group.reduced[0].dtype == torch.int64
    assert group.reduced[0].tolist() == [3, 0, 0], "also those without a gradient take part"
    assert opt.alignment == {"a": 0.75}
    opt.step()
    assert len(group.reduced) == 2


def test_a_drawn_shard_map_is_redrawn_for_other_groups() -> None:
    """As ZeRO steps: one group after the other put into ``param_groups``, one step() each."""
    drawn: list[int] = []

    def draw(params: object) -> ShardMap:
        tensors = list(params)  # type: ignore[call-overload]
        drawn.append(len(tensors))
        names = [f"{len(tensors)}-{i}" for i in range(len(tensors))]
        return ShardMap.of_tensors(list(zip(names, tensors, strict=True)))

    params = [torch.ones(2, requires_grad=True) for _ in range(3)]
    opt = CautiousAdamW([{"params": params[:1]}, {"params": params[1:]}], shard_map=draw)
    for param in params:
        param.grad = torch.ones(2)
    groups = opt.param_groups
    for _ in range(2):
        for group in groups:
            opt.param_groups = [group]
            opt.step()
    assert drawn == [1, 2], "drawn once per list of parameters"
    assert opt.alignment == {"1-0": 1.0, "2-0": 1.0, "2-1": 1.0}


def step_with(pieces: list[tuple[Piece, ...]], local: torch.Tensor) -> None:
    wholes = list({piece.whole.name: piece.whole for row in pieces for piece in row}.values())
    local.grad = torch.ones_like(local)
    CautiousAdamW([local], shard_map=ShardMap(wholes, pieces)).step()


def test_a_shard_map_that_does_not_fit_is_refused() -> None:
    whole = WholeTensor("w", (6,))
    fits = pieces_of_flat_range(whole, 0, 6)
    with pytest.raises(LayoutMismatchError, match=r"2 local tensors.*1 parameters"):
        step_with([fits, ()], torch.zeros(6, requires_grad=True))
    with pytest.raises(LayoutMismatchError, match=r"parameter 0: .* of w .*\[0, 5\)"):
        step_with([fits], torch.zeros(5, requires_grad=True))
    twice = pieces_of_flat_range(whole, 0, 2) + pieces_of_flat_range(whole, 2, 4, 1)
    with pytest.raises(LayoutMismatchError, match="behind the last piece"):
        step_with([twice], torch.zeros(6, requires_grad=True))
    with pytest.raises(LayoutMismatchError, match=r"contiguous, since"):
        step_with([fits], torch.zeros(4, 2).t().requires_grad_())


def test_a_gradient_with_strides_of_its_own() -> None:
    whole = WholeTensor("w", (5,))
    values = []
    for grad in (torch.arange(6.0).view(3, 2).t(), torch.arange(6.0).view(3, 2).t().contiguous()):
        local = torch.ones(2, 3, requires_grad=True)
        local.grad = grad
        CautiousAdamW(
            [local], shard_map=ShardMap([whole], [pieces_of_flat_range(whole, 0, 5)])
        ).step()
        values.append(local.detach())
    assert torch.equal(*values)


def test_a_flat_tensor_in_the_place_of_the_parameters_is_refused_without_a_map() -> None:
    params = [torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)]
    opt = CautiousAdamW(params)
    flat = torch.ones(
        5, requires_grad=True
    )  # what ZeRO puts into the groups of the optimizer given to it
    opt.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(5)
    with pytest.raises(
        LayoutMismatchError, match=r"parameter 0 of group 0, of shape \(5,\).*shard_map"
    ):
        opt.step()
    assert torch.equal(flat, torch.ones(5))
    opt.shard_map = lambda found: ShardMap.of_tensors([("flat", found[0])])
    opt.step()
    assert opt.alignment == {"flat": 1.0}
