"""weigh: its value and gradient, what it records, what it refuses."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from effx_dist.core.infobatch import PLAIN, RESCALED, weight_table
from effx_dist.data import EffxWarning, InfoBatchSampler
from effx_dist.data.recorder import LossRecorder
from effx_dist.errors import ConfigError, PlanNotTrainedError
from tests.data_runs import consume, plain_losses, recorded


def _pruned(num_samples: int = 960, **settings) -> InfoBatchSampler:
    """At the start of its first pruned epoch."""
    sampler = InfoBatchSampler(num_samples, batch_size=8, prune_ratio=0.3, **settings)
    consume(sampler, plain_losses)
    sampler.set_epoch(1)
    return sampler


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_against_a_double_oracle(dtype: torch.dtype) -> None:
    sampler = _pruned()
    ids = sampler.plan.local_ids[:8].tolist()
    weights = torch.from_numpy(sampler.plan.local_weights[:8]).double()
    assert len(set(weights.tolist())) == 2
    raw = torch.linspace(0.5, 4.0, 8, dtype=dtype, requires_grad=True)
    loss = sampler.weigh(raw.square(), torch.tensor(ids))
    loss.backward()
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = raw.detach().square().double()
    torch.testing.assert_close(loss.double(), (weights * exact).mean(), rtol=1e-6, atol=0)
    expected = weights * 2 * raw.detach().double() / 8
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3}.get(dtype, 1e-6)
    assert raw.grad is not None
    torch.testing.assert_close(raw.grad.double(), expected, rtol=tolerance, atol=0)
    assert recorded(sampler) == dict(zip(ids, raw.detach().square().float().tolist(), strict=True))


def test_losses_are_not_changed_in_place() -> None:
    sampler = _pruned()
    raw = torch.ones(8, requires_grad=True)
    losses = raw.exp()  # whose backward needs its own result
    before = losses.detach().clone()
    sampler.weigh(losses, sampler.plan.local_ids[:8].tolist()).backward()
    assert torch.equal(losses.detach(), before)


@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32, torch.int16])
def test_any_order_any_batching_and_any_integers(ids_dtype: torch.dtype) -> None:
    sampler = _pruned()
    ids = sampler.plan.local_ids
    order = np.random.default_rng(0).permutation(len(ids))
    weights = sampler.plan.local_weights
    for part in np.array_split(order, 37):
        losses = torch.from_numpy(plain_losses(1, ids[part]))
        mine = sampler.weigh(losses, torch.from_numpy(ids[part]).to(ids_dtype))
        torch.testing.assert_close(mine, (torch.from_numpy(weights[part]) * losses).mean())
    assert sampler.num_remaining == 0
    expected = dict(zip(ids.tolist(), plain_losses(1, ids).tolist(), strict=True))
    assert recorded(sampler) == expected


def test_ids_beyond_float32_and_float64_are_exact() -> None:
    ids = np.array([2**24 + 1, 2**24, 2**53 + 1, 2**53], dtype=np.int64)
    recorder = LossRecorder(ids, np.ones(4, dtype=np.float32))
    recorder.weigh(torch.tensor([1.0, 2.0]), torch.tensor([2**53 + 1, 2**24 + 1]))
    taken_ids, losses = recorder.taken()
    assert dict(zip(taken_ids.tolist(), losses.tolist(), strict=True)) == {
        2**53 + 1: 1,
        2**24 + 1: 2,
    }


def test_accumulated_micro_batches_are_the_large_batch() -> None:
    one, many = _pruned(gradient_accumulation_steps=1), _pruned(gradient_accumulation_steps=1)
    ids = one.plan.local_ids[:32]
    losses = torch.from_numpy(plain_losses(1, ids))
    whole = one.weigh(losses, ids.tolist())
    parts = [many.weigh(losses[i : i + 8], ids[i : i + 8].tolist()) / 4 for i in range(0, 32, 8)]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_the_place_of_a_pad_tells_it_from_its_sample() -> None:
    sampler = InfoBatchSampler(40, batch_size=16, drop_last=False)
    ids, weights = sampler.plan.local_ids, sampler.plan.local_weights
    assert (weights == 0).sum() == 8
    for start in range(0, 48, 16):
        losses = torch.arange(start, start + 16.0)
        sampler.weigh(losses, ids[start : start + 16].tolist())
    assert recorded(sampler) == {
        int(i): float(p) for p, (i, w) in enumerate(zip(ids, weights, strict=True)) if w
    }


def test_the_device_path_finds_the_same_places() -> None:
    """The look-up that ids on an accelerator take, which never asks the host, run here on the host."""
    sampler = InfoBatchSampler(40, batch_size=16, drop_last=False)
    sampler.set_epoch(0)
    assert sampler._run is not None
    recorder, ids = sampler._run.recorder, torch.from_numpy(sampler.plan.local_ids)
    everywhere = torch.arange(48)
    assert torch.equal(recorder._match(ids, everywhere), everywhere)  # pads, too, by their place
    is_real = torch.from_numpy(sampler.plan.local_weights) > 0
    elsewhere = recorder._match(ids[is_real], torch.full((40,), 10**6))
    assert torch.equal(elsewhere, everywhere[is_real])  # out of order, samples before pads
    expected = torch.arange(16, 24)
    foreign = torch.tensor([-1, 10**15, int(ids[3])])
    assert recorder._match(foreign, expected[:3]).tolist() == [len(ids), len(ids), 3]
    recorder._note_strays(foreign, torch.tensor([48, 48, 3]), None)
    recorder._note_strays(foreign[2:], torch.tensor([3]), None)
    with pytest.raises(PlanNotTrainedError, match="-1, 1000000000000000"):
        sampler.state_dict()


@pytest.mark.parametrize(
    ("losses", "ids", "named"),
    [
        (torch.ones(3), torch.tensor([0.0, 1.0, 2.0]), "must be integers"),
        (torch.ones(3), [0.0, 1.0, 2.0], "must be integers"),
        (torch.ones(3), torch.tensor([True, False, True]), "must be integers"),
        (torch.ones(3), [0, 1], "one id a loss"),
        (torch.ones(()), torch.tensor(0), "one floating loss a sample"),
        (torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64), "one floating loss a sample"),
        (torch.ones(3, dtype=torch.int64), [0, 1, 2], "one floating loss a sample"),
        (torch.ones(0), [], "one floating loss a sample"),
        (torch.ones(2), [96, -1], "96, -1"),
    ],
)
def test_what_does_not_fit_is_refused(losses: torch.Tensor, ids, named: str) -> None:
    sampler = InfoBatchSampler(96)
    sampler.set_epoch(0)
    with pytest.raises(ConfigError, match=named):
        sampler.weigh(losses, ids)
    assert sampler.position == 0


def test_a_pruned_sample_is_unknown_and_weighing_comes_after_planning() -> None:
    sampler = _pruned()
    dropped = next(iter(set(range(960)) - set(sampler.plan.local_ids.tolist())))
    with pytest.raises(ConfigError, match=f"sample_ids {dropped}: not among"):
        sampler.weigh(torch.ones(1), [dropped])
    with pytest.raises(ConfigError, match="no epoch is planned"):
        InfoBatchSampler(96).weigh(torch.ones(1), [0])


@pytest.mark.parametrize("kind", ["padded", "packed", "tokens", "own weights"])
def test_d23_the_expectation_over_all_plans_is_the_full_run(kind: str) -> None:
    """Every plan of seven samples, four of which may be left out, with its probability: sums are not estimated."""
    ratio, batch_size = 0.3, 2
    losses = torch.tensor([0.2, 0.4, 0.1, 0.3, 2.0, 5.0, 3.0], dtype=torch.float64)
    tokens = torch.tensor([3.0, 9, 1, 4, 2, 7, 5], dtype=torch.float64)
    own = torch.tensor([1.0, 0.5, 2, 0, 1, 3, 1], dtype=torch.float64)
    table = weight_table(ratio)
    # a loss is a mean over a sample's own targets; or a sum over them, divided by a constant
    values = losses * tokens if kind == "tokens" else losses
    weights = own if kind == "own weights" else None
    num_items = float(tokens.mean() * batch_size) if kind == "tokens" else float(batch_size)
    expected, total = 0.0, 0.0
    for plan in product([False, True], repeat=4):
        probability = float(np.prod([ratio if dropped else 1 - ratio for dropped in plan]))
        ids = [i for i in range(7) if i >= 4 or not plan[i]]
        role = np.array([table[RESCALED] if i < 4 else table[PLAIN] for i in ids])
        recorder = LossRecorder(np.array(ids), role.astype(np.float32))
        size = 3 if kind == "packed" else batch_size  # as many samples as fit into a sequence
        for start in range(0, len(ids), size):
            batch = torch.tensor(ids[start : start + size])
            mine = None if weights is None else weights[batch]
            loss = recorder.weigh(values[batch], batch, None, mine, num_items)
            expected += probability * float(loss)
        total += probability
    assert total == pytest.approx(1)
    full = values if weights is None else values * weights
    assert expected == pytest.approx(float(full.sum()) / num_items, rel=1e-6)


def test_a_cap_of_the_weight_is_biased_as_it_says() -> None:
    assert weight_table(0.9).tolist() == pytest.approx([0, 1, 10, 0])
    capped = weight_table(0.9, max_weight=2)
    assert capped.tolist() == [0, 1, 2, 0]
    with pytest.warns(EffxWarning, match=r"weigh 10, others 1.*count 0\.2 of"):
        InfoBatchSampler(96, prune_ratio=0.9)
    sampler = InfoBatchSampler(960, batch_size=8, prune_ratio=0.9, max_weight=2)
    consume(sampler, plain_losses)
    sampler.set_epoch(1)
    assert set(sampler.plan.local_weights.tolist()) == {1.0, 2.0}
