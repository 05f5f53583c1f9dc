"""Checks of the Triton step, for any device that it runs on.

Not collected by itself: Triton must learn before it is imported that it is to interpret, so
test_optim_triton.py has a process of its own run this file, and calls its functions on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effx_dist.core.update_rules import SGD, AdamW, Lion, NesterovSGD, UpdateRule
from effx_dist.optim import CautiousAdamW, CautiousLion, CautiousSGD
from effx_dist.optim.base import CautiousOptimizer
from effx_dist.optim.coefficients import Coefficients
from effx_dist.optim.kernels import EagerKernels, Item, Kernels, kernels_class
from effx_dist.optim.kernels.interface import working_dtype

RULES: tuple[UpdateRule, ...] = (AdamW(), Lion(), SGD(), NesterovSGD())
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PAIRS = tuple(itertools.product(DTYPES, DTYPES))
BLOCK = 4096
SIZES = (1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 77)
NUM_ROWS = 4
NUM_SLOTS = 3
MARGIN = 8  # elements of a tensor's memory on each side that are none of its own
CPU = torch.device("cpu")

# Zeros of both signs, NaN, infinities, values that are denormal in float16, bfloat16 and float32,
# halfway between two of them, at the edge of an overflow, and tiny enough for products to underflow.
SPECIAL = (
    *(0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 1e-39, -3e-41),
    *(1e-30, -1e-30, 1e-25, 6e-8, -2.98e-8, 65504.0, -65520.0, 3.4e38, -3.4e38, 1.0),
    *(-1.0, 1.00390625, 1.01171875, 1.00048828125),
)


@dataclass(frozen=True, slots=True)
class Case:
    """Items of one rule with the memory that their tensors are views of."""

    rule: UpdateRule
    memory: tuple[torch.Tensor, ...]
    items: tuple[Item, ...]
    rows: torch.Tensor


def memory_of(values: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory with a margin, and the view of it that holds ``values``, ``offset`` elements further on
    than at an address that is a multiple of 16.
    """
    whole = torch.full(
        (values.numel() + 2 * MARGIN,), 7.0, dtype=values.dtype, device=values.device
    )
    view = whole[MARGIN + offset :][: values.numel()]
    view.copy_(values.flatten())
    return whole, view.view(values.shape)


def make_case(
    rule: UpdateRule,
    tensors: Sequence[dict[str, torch.Tensor]],
    device: torch.device,
    offset: int = 0,
    maximize: bool = False,
) -> Case:
    """One item for each dict of param, grad and the moments, with rows and slots taken in turn."""
    memory, items = [], []
    for index, values in enumerate(tensors):
        views = {}
        for place, (name, tensor) in enumerate(values.items()):
            whole, views[name] = memory_of(tensor.to(device), (offset * (place + 1)) % MARGIN)
            memory.append(whole)
        moments = tuple(views[name] for name in rule.moment_names)
        item = Item(
            views["param"],
            views["grad"],
            moments,
            index % NUM_ROWS,
            index % NUM_SLOTS,
            index % 2 == 0,
        )
        items.append(item)
    rows = Coefficients()
    common = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.9, "maximize": maximize}
    for lr, weight_decay in ((0.1, 0.02), (3e-3, 0.0)):
        settings = {"lr": lr, "weight_decay": weight_decay, **common}
        rows.add(rule, settings, [1.0, 7.0])
    return Case(rule, tuple(memory), tuple(items), rows.on(device, torch.tensor(0.37)))


def random_tensors(
    rule: UpdateRule, sizes: Sequence[int], param: torch.dtype, grad: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(sum(sizes))

    def draw(size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    return [
        with_moments(rule, draw(size, param), draw(size, grad), draw(size, torch.float64))
        for size in sizes
    ]


def special_tensors(
    rule: UpdateRule, param: torch.dtype, grad: torch.dtype
) -> list[dict[str, torch.Tensor]]:
    """Every special parameter with every special gradient and moment."""
    special = torch.tensor(SPECIAL, dtype=torch.float64)
    params, grads, moments = (
        axis.flatten() for axis in torch.meshgrid([special] * 3, indexing="ij")
    )
    return [with_moments(rule, params.to(param), grads.to(grad), moments)]


def with_moments(
    rule: UpdateRule, param: torch.Tensor, grad: torch.Tensor, drawn: torch.Tensor
) -> dict[str, torch.Tensor]:
    working = working_dtype(param)
    moments = [drawn.to(working), drawn.roll(1).abs().to(working)]
    return {"param": param, "grad": grad, **dict(zip(rule.moment_names, moments, strict=False))}


def copied(case: Case) -> Case:
    """The same items in memory of their own, equally aligned."""
    fresh = {whole.untyped_storage().data_ptr(): whole.clone() for whole in case.memory}

    def moved(view: torch.Tensor) -> torch.Tensor:
        whole = fresh[view.untyped_storage().data_ptr()]
        return whole.as_strided(view.shape, view.stride(), view.storage_offset())

    items = tuple(
        replace(
            item,
            param=moved(item.param),
            grad=moved(item.grad),
            moments=tuple(moved(moment) for moment in item.moments),
        )
        for item in case.items
    )
    return replace(case, memory=tuple(fresh.values()), items=items)


def walk(form: type[Kernels], case: Case, skip: torch.Tensor | None) -> torch.Tensor:
    """Both walks; the counts, which do not start from zero."""
    device = case.rows.device
    counts = torch.arange(NUM_SLOTS, device=device) * 10**12
    scales = torch.tensor([1.0, 1.7, 1000.0], dtype=torch.float64, device=device)
    walks = form(case.rule, case.items, case.rows)
    walks.count_into(counts)
    walks.update(scales, skip)
    return counts


def assert_same_steps(case: Case, skip: torch.Tensor | None = None, max_ulps: int = 0) -> None:
    """Triton leaves in memory, margins included, what the eager form does. Counts are equal."""
    eager = copied(case)
    counts = walk(kernels_class("triton", case.rows.device), case, skip)
    assert torch.equal(counts, walk(EagerKernels, eager, skip))
    for ours, theirs in zip(case.memory, eager.memory, strict=True):
        assert ulps_between(ours, theirs) <= max_ulps


def ulps_between(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """The largest distance, counted in values of the dtype. NaN is 0 from NaN; so is not 0 from -0."""
    assert torch.equal(ours.isnan(), theirs.isnan())
    distance = (_rank(ours) - _rank(theirs)).masked_fill(ours.isnan(), 0)
    return int(distance.abs().max()) if distance.numel() else 0


def _rank(values: torch.Tensor) -> torch.Tensor:
    """An int64 that grows with the value: the place of each among its dtype's values."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.view(integer)
    magnitude = (bits & torch.iinfo(integer).max).long()
    return torch.where(bits < 0, -1 - magnitude, magnitude)


@pytest.fixture(autouse=True)
def _quiet_numpy() -> Iterator[None]:
    """The interpreter computes in NumPy, which tells of NaN and overflow by warnings."""
    with np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("offset", [0, 1])
def test_sizes_around_the_block(rule: UpdateRule, offset: int) -> None:
    tensors = random_tensors(rule, SIZES, torch.float32, torch.float32)
    assert_same_steps(make_case(rule, tensors, CPU, offset))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_all_dtypes_in_one_list(rule: UpdateRule) -> None:
    tensors = [
        found for param, grad in PAIRS for found in random_tensors(rule, (BLOCK + 3,), param, grad)
    ]
    assert_same_steps(make_case(rule, tensors, CPU))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(rule: UpdateRule, dtype: torch.dtype) -> None:
    tensors = special_tensors(rule, dtype, dtype) * 2  # with and without cautious decay
    assert_same_steps(make_case(rule, tensors, CPU, maximize=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_values_are_read_and_written_as_torch_does(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    tensors = with_moments(SGD(), every, torch.linspace(-1, 1, 2**16).to(dtype), every.double())
    assert_same_steps(make_case(SGD(), [tensors], CPU))


def test_tensors_with_strides_of_their_own() -> None:
    def transposed(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, 61).t()

    case = make_case(AdamW(), random_tensors(AdamW(), (61 * 90,), *(torch.float32,) * 2), CPU)
    item = case.items[0]
    item = replace(
        item,
        param=transposed(item.param),
        grad=transposed(item.grad),
        moments=tuple(transposed(moment) for moment in item.moments),
    )
    assert item.lies_flat
    assert_same_steps(replace(case, items=(item,)))


@pytest.mark.parametrize("flag", [0.0, 1.0, float("nan"), False, True])
def test_a_flag_skips_the_update(flag: float) -> None:
    case = make_case(AdamW(), random_tensors(AdamW(), (BLOCK + 1, 3), *(torch.float32,) * 2), CPU)
    before = copied(case)
    assert_same_steps(case, torch.tensor(flag))
    unchanged = [torch.equal(a, b) for a, b in zip(case.memory, before.memory, strict=True)]
    assert all(unchanged) == bool(flag)


def test_autograd_sees_the_update() -> None:
    param = torch.randn(4, requires_grad=True)
    opt = CautiousAdamW([param], implementation="triton")
    square = param.square().sum()
    param.grad = torch.ones(4)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_in_the_interpreter_it_is_for_the_cpu() -> None:
    from effx_dist.optim.kernels import triton_launch as triton_launch

    assert kernels_class("triton", CPU) is triton_launch.TritonKernels
    assert triton_launch.BLOCK == BLOCK
    assert not triton_launch.runs_on(torch.device("cuda"))  # the interpreter would read host memory


def make_params(device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [((70, 61), torch.float32), ((9,), torch.bfloat16), ((), torch.float32)]
    return [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape, dtype in shapes
    ]


def set_grads(params: Sequence[torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param)


def scaled(
    opt: CautiousOptimizer, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None
) -> None:
    """Tell ``opt`` what torch.amp.GradScaler does, and as it does."""
    for name, value in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        setattr(opt, name, value)


def assert_same_optimizers(
    ours: CautiousOptimizer, theirs: CautiousOptimizer, max_ulps: int = 0
) -> None:
    assert ours.alignment == theirs.alignment
    for param, other in zip(
        *(opt.param_groups[0]["params"] for opt in (ours, theirs)), strict=True
    ):
        assert ulps_between(param.detach(), other.detach()) <= max_ulps
        for name, value in theirs.state[other].items():
            assert ulps_between(ours.state[param][name], value) <= max_ulps, name


OPTIMISERS = [
    (CautiousAdamW, {"weight_decay": 0.1}),
    (CautiousAdamW, {"maximize": True, "capturable": True, "cautious_weight_decay": True}),
    (CautiousAdamW, {"lr": torch.tensor(0.02)}),
    (CautiousLion, {"weight_decay": 0.1, "cautious_weight_decay": True}),
    (CautiousSGD, {"lr": 0.1}),
    (CautiousSGD, {"lr": 0.1, "nesterov": True, "capturable": True}),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIMISERS)
def test_optimizers_take_the_same_steps(
    optimizer: type[CautiousOptimizer], options: dict[str, Any]
) -> None:
    both = [
        optimizer(make_params(CPU), implementation=implementation, **options)
        for implementation in ("triton", "eager")
    ]
    for step in range(5):
        for opt in both:
            set_grads(opt.param_groups[0]["params"], step)
            if step in (1, 2):
                opt.clip_grad_norm_(0.5)
            if step in (2, 3):  # an overflow in the last of them
                scaled(opt, torch.tensor(8.0), torch.tensor(float(step == 3)))
            opt.step()
            scaled(opt, None, None)
        assert_same_optimizers(both[0], both[1])


class HostReads(TorchDispatchMode):
    """Fails where the host waits for a value or a shape that a device would have to tell."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        told = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        is_known = kwargs.get("output_size") is not None
        assert is_known or not told & set(func.tags), f"{func} waits for the device"
        return func(*args, **kwargs)


def test_the_host_waits_for_nothing() -> None:
    opt = CautiousAdamW(make_params(CPU), capturable=True, implementation="triton")
    for step in range(2):
        set_grads(opt.param_groups[0]["params"], step)
        scaled(opt, torch.tensor(8.0), torch.tensor(0.0))
        with HostReads():
            opt.clip_grad_norm_(1.0)
            opt.step()
