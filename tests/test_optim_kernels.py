"""The compiled step gives the bits of the eager one, whatever the dtypes, the sizes and the threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.core.update_rules import SGD, AdamW, Lion, NesterovSGD, UpdateRule
from effx_dist.errors import ConfigError
from effx_dist.optim import CautiousAdamW
from effx_dist.optim.kernels import (
    NUM_COLUMNS,
    EagerKernels,
    Item,
    Kernels,
    compiled,
    kernels_class,
)
from effx_dist.optim.kernels.compiled import CompiledKernels
from effx_dist.optim.kernels.interface import working_dtype

pytestmark = pytest.mark.skipif(not compiled.is_available(), reason="no C++ compiler with OpenMP")

RULES: list[UpdateRule] = [AdamW(), Lion(), SGD(), NesterovSGD()]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-6, "momentum": 0.9}
SPECIAL = [0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 1e-30, 3e38, -1e-30]
by_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


@pytest.fixture
def threads() -> Iterator[None]:
    """Leave torch's number of threads as it was."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def values(seed: int, numel: int, dtype: torch.dtype, special: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(numel, generator=generator, dtype=torch.float64)
    drawn *= 10.0 ** torch.randint(-12, 4, (numel,), generator=generator)
    if special:
        places = torch.randint(0, max(numel, 1), (len(SPECIAL),), generator=generator)
        for place, value in zip(places.tolist()[:numel], SPECIAL, strict=False):
            drawn[place] = value
    return drawn.to(dtype)


def make_item(
    rule: UpdateRule,
    numel: int,
    param_dtype: torch.dtype = torch.float32,
    grad_dtype: torch.dtype | None = None,
    seed: int = 0,
    special: bool = False,
    row: int = 0,
    slot: int = 0,
    decays_cautiously: bool = False,
) -> Item:
    param = values(seed, numel, param_dtype, special)
    moments = [
        values(seed + 2 + i, numel, working_dtype(param), special)
        for i in range(len(rule.moment_names))
    ]
    if len(moments) == 2:
        moments[1].abs_()
    grad = values(seed + 1, numel, grad_dtype or param_dtype, special)
    return Item(param, grad, tuple(moments), row, slot, decays_cautiously)


def copied(item: Item) -> Item:
    moments = tuple(moment.clone() for moment in item.moments)
    return Item(item.param.clone(), item.grad, moments, item.row, item.slot, item.decays_cautiously)


def rows_of(rule: UpdateRule, *options: tuple[float, float, float, float]) -> torch.Tensor:
    """Rows for (lr, decay, gradient factor, step)."""
    rows = [[*common, *rule.coefficients(SETTINGS, step)] for *common, step in options]
    return torch.tensor([row + [0.0] * (NUM_COLUMNS - len(row)) for row in rows]).double()


def walk(
    form: type[Kernels],
    rule: UpdateRule,
    items: Sequence[Item],
    rows: torch.Tensor,
    scales: torch.Tensor,
    skip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[Item]]:
    """Both walks over copies: the counts, and the items as they are left."""
    items = [copied(item) for item in items]
    walks = form(rule, items, rows)
    counts = torch.zeros(len(scales), dtype=torch.int64)
    walks.count_into(counts)
    walks.update(scales, skip)
    return counts, items


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """As integers, with one NaN for all: payloads and signs of NaN are nobody's promise."""
    canonical = torch.where(tensor.isnan(), torch.full_like(tensor, float("nan")), tensor)
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return canonical.view(whole)


def assert_same(rule: UpdateRule, items: Sequence[Item], rows: torch.Tensor) -> None:
    num_slots = 1 + max(item.slot for item in items)
    scales = torch.linspace(1.0, 3.7, num_slots, dtype=torch.float64)
    counts, found = walk(CompiledKernels, rule, items, rows, scales)
    expected_counts, expected = walk(EagerKernels, rule, items, rows, scales)
    assert torch.equal(counts, expected_counts)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(bits(ours.param), bits(theirs.param))
        for moment, other in zip(ours.moments, theirs.moments, strict=True):
            assert torch.equal(bits(moment), bits(other))


@by_rule
@pytest.mark.parametrize("decays_cautiously", [False, True])
@pytest.mark.parametrize(("param_dtype", "grad_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_every_dtype_gives_the_eager_bits(
    rule: UpdateRule, decays_cautiously: bool, param_dtype: torch.dtype, grad_dtype: torch.dtype
) -> None:
    items = [
        make_item(rule, 1000 + i, param_dtype, grad_dtype, 10 * i, i == 1, 0, i, decays_cautiously)
        for i in range(2)
    ]
    assert_same(rule, items, rows_of(rule, (0.01, 0.97, 1.0, 3.0)))


@by_rule
def test_items_have_rows_slots_and_dtypes_of_their_own(rule: UpdateRule, threads: None) -> None:
    numels = [1, 0, 7, 40_000, 33, 2, 70_001, 16]
    items = [
        make_item(rule, numel, DTYPES[i % 4], None, i, True, i % 3, i // 2, i % 2 == 0)
        for i, numel in enumerate(numels)
    ]
    rows = rows_of(rule, (0.1, 0.9, -1.0, 1.0), (0.01, 1.0, 0.3, 2.0), (1.0, 0.5, 1e-4, 900.0))
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        assert_same(rule, items, rows)


@by_rule
def test_both_walks_at_once_give_the_eager_bits(rule: UpdateRule, threads: None) -> None:
    numels = [1, 20_000, 0, 300_001, 7, 16_384, 70_001, 33]
    items = [
        make_item(rule, numel, DTYPES[i % 4], None, i, True, i % 2, len(numels) - i, i % 3 == 0)
        for i, numel in enumerate(numels)
    ]
    rows = rows_of(rule, (0.1, 0.9, -1.0, 1.0), (0.01, 1.0, 0.3, 2.0))
    slots = torch.zeros(len(numels) + 2, dtype=torch.int64)
    for item in items:
        slots[item.slot] = item.param.numel()
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        results = []
        for form in (CompiledKernels, EagerKernels):
            stepped, counts = [copied(item) for item in items], torch.zeros_like(slots)
            form(rule, stepped, rows).step_wholes(counts, slots)
            parts = [part for item in stepped for part in (item.param, *item.moments)]
            results.append([counts, *map(bits, parts)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@by_rule
@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_where_a_piece_starts_in_memory_changes_nothing(rule: UpdateRule, start: int) -> None:
    whole = make_item(rule, 5000)
    rows, scales = rows_of(rule, (0.01, 0.97, 1.0, 3.0)), torch.ones(1, dtype=torch.float64)
    count, (stepped,) = walk(CompiledKernels, rule, [whole], rows, scales)
    cuts = [0, start, start + 1, start + 1 + 1000, 5000]
    pieces = copied(whole)
    cut = [
        Item(
            pieces.param[a:b], pieces.grad[a:b], tuple(m[a:b] for m in pieces.moments), 0, 0, False
        )
        for a, b in itertools.pairwise(cuts)
    ]
    walks = CompiledKernels(rule, cut, rows)
    counts = torch.zeros(1, dtype=torch.int64)
    walks.count_into(counts)
    walks.update(scales, None)
    assert torch.equal(counts, count)
    assert torch.equal(pieces.param, stepped.param)
    assert all(torch.equal(a, b) for a, b in zip(pieces.moments, stepped.moments, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_and_written_back(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    rule, one = SGD(), torch.ones(1, dtype=torch.float64)
    # A moment of -0 leaves zeros their sign.
    item = Item(every.clone(), every, (torch.full((len(every),), -0.0),), 0, 0, False)
    still = rows_of(rule, (0.0, 1.0, 1.0, 1.0))
    # Infinite gradients times a step of 0 are NaN, and zeros may change sign; all else must stay.
    _, (left,) = walk(CompiledKernels, rule, [item], still, one)
    stays = every.isfinite() & (every != 0)
    assert torch.equal(bits(left.param)[stays], bits(every)[stays])
    assert torch.equal(bits(left.moments[0]), bits(every.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_to_16_bits_is_to_the_nearest_even(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    rule, one = SGD(), torch.ones(1, dtype=torch.float64)
    for decay in (0.5, 1 + 2**-9, 1 + 2**-12, 3.0, 2**-9 * 1.5):  # halves, ties, overflows
        item = Item(every, torch.zeros_like(every), (torch.zeros(len(every)),), 0, 0, False)
        rows = rows_of(rule, (0.0, decay, 1.0, 1.0))
        _, (left,) = walk(CompiledKernels, rule, [item], rows, one)
        rounded = (every.float() * torch.tensor(decay, dtype=torch.float32)).to(dtype)
        assert torch.equal(bits(left.param), bits(rounded))


finite = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(max_examples=60, deadline=None)
@given(
    rule=st.sampled_from(RULES),
    elements=st.lists(st.tuples(finite, finite, finite, finite), min_size=1, max_size=70),
    common=st.tuples(
        st.floats(0, 10), st.floats(-1, 1), st.floats(-4, 4), st.integers(1, 10**6).map(float)
    ),
    decays_cautiously=st.booleans(),
)
def test_any_values_give_the_eager_bits(
    rule: UpdateRule,
    elements: list[tuple[float, float, float, float]],
    common: tuple[float, float, float, float],
    decays_cautiously: bool,
) -> None:
    param, grad, first, second = torch.tensor(elements, dtype=torch.float32).unbind(1)
    moments = (first.clone(), second.abs())[: len(rule.moment_names)]
    item = Item(param.clone(), grad.contiguous(), moments, 0, 0, decays_cautiously)
    assert_same(rule, [item], rows_of(rule, common))


@by_rule
def test_the_first_walk_writes_nothing_and_a_skip_neither(rule: UpdateRule) -> None:
    item = make_item(rule, 999, special=True)
    before = copied(item)
    rows = rows_of(rule, (0.01, 0.97, 1.0, 3.0))
    for form in (CompiledKernels, EagerKernels):
        walks = form(rule, [item], rows)
        counts = torch.zeros(1, dtype=torch.int64)
        walks.count_into(counts)
        assert 0 < int(counts) < 999
        walks.update(torch.ones(1, dtype=torch.float64), torch.tensor(1.0))
        for ours, theirs in zip(
            (item.param, *item.moments), (before.param, *before.moments), strict=True
        ):
            assert torch.equal(bits(ours), bits(theirs))
    grad_before = before.grad.clone()
    CompiledKernels(rule, [item], rows).update(
        torch.ones(1, dtype=torch.float64), torch.tensor(False)
    )
    assert torch.equal(bits(item.grad), bits(grad_before))
    assert not torch.equal(bits(item.param), bits(before.param))


def test_autograd_learns_that_a_parameter_was_written() -> None:
    param = torch.ones(3, requires_grad=True)
    opt = CautiousAdamW([param], implementation="compiled")
    product = (param * param).sum()
    param.grad = torch.ones(3)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda whole: whole.view(6, 20).t(),
    "channels last": lambda whole: whole.contiguous(memory_format=torch.channels_last),
    "with gaps": lambda whole: whole.view(6, 20)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_any_kind(layout: str) -> None:
    results = []
    for implementation in ("eager", "compiled"):
        whole = values(1, 2 * 3 * 4 * 5, torch.float32).view(2, 3, 4, 5)
        param = LAYOUTS[layout](whole).detach().requires_grad_()
        opt = CautiousAdamW([param], lr=0.1, implementation=implementation)
        for step in range(3):
            # a gradient whose elements lie in the plain order, whatever the parameter's do
            param.grad = values(10 + step, param.numel(), torch.float32).view(param.shape)
            opt.step()
        results.append((param.detach().clone(), opt.alignment))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_device_that_an_implementation_is_not_for_is_named() -> None:
    assert kernels_class("auto", torch.device("cpu")) is CompiledKernels
    assert kernels_class("auto", torch.device("meta")) is EagerKernels
    assert kernels_class("eager", torch.device("cuda")) is EagerKernels
    with pytest.raises(ConfigError, match=r"implementation='compiled' is for the CPU.*cuda:1"):
        kernels_class("compiled", torch.device("cuda:1"))
