"""What was planned is what is trained, in whatever order, with repeats and interruptions; or it is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from effx_dist.data import EffxWarning, InfoBatchSampler, with_sample_ids
from effx_dist.errors import ConfigError
from effx_dist.shard import Group
from tests.data_runs import consume, plain_losses
from tests.thread_ranks import run_ranks


@dataclass(frozen=True)
class Stretch:
    """One part of a run: its ranks, and what each of them does with what it is given."""

    world: int
    batch_size: int
    order: int
    """Seed of the order in which batches are weighed; 0: as they come."""
    regroup: int
    """Samples that are weighed together."""
    repeats: bool
    share: float
    """Of what is left, how much is weighed before the interruption."""


stretches = st.builds(
    Stretch,
    world=st.integers(1, 4),
    batch_size=st.integers(1, 5),
    order=st.integers(0, 3),
    regroup=st.integers(1, 7),
    repeats=st.booleans(),
    share=st.floats(0, 1),
)


def train_some(sampler: InfoBatchSampler, how: Stretch, is_last: bool) -> list[int]:
    """Weigh a part of what is left of the epoch, or all; the samples that had a gradient, repeats left out."""
    ids = list(sampler)
    num = len(ids) if is_last else int(how.share * len(ids)) // how.batch_size * how.batch_size
    chosen = np.array(ids[:num], dtype=np.int64)
    if how.order:  # samples move within the part: lengths were sorted, say
        chosen = np.random.default_rng(how.order).permutation(chosen)
    trained: list[int] = []
    for start in range(0, num, how.regroup):
        batch = chosen[start : start + how.regroup]
        losses = torch.from_numpy(plain_losses(sampler.epoch, batch)).requires_grad_()
        ids_of_batch = torch.from_numpy(batch)
        (gradient,) = torch.autograd.grad(sampler.weigh(losses, ids_of_batch), losses)
        trained += batch[gradient.numpy() > 0].tolist()
        if how.repeats:
            (again,) = torch.autograd.grad(sampler.weigh(losses, ids_of_batch), losses)
            assert torch.equal(again, gradient)
    return trained


@pytest.mark.filterwarnings("ignore:.*fewer than one global batch")  # such an epoch is not pruned
@settings(max_examples=40, deadline=None)
@given(
    num_samples=st.integers(24, 90),
    epoch=st.integers(0, 1),
    drop_last=st.booleans(),
    parts=st.lists(stretches, min_size=1, max_size=4),
)
def test_all_parts_together_are_the_plan(
    num_samples: int, epoch: int, drop_last: bool, parts: list[Stretch]
) -> None:
    kept: set[int] = set()
    seen: Counter[int] = Counter()
    saved: list[Any] = []
    for number, how in enumerate(parts):
        is_last = number == len(parts) - 1

        def body(
            group: Group, how: Stretch = how, is_last: bool = is_last, states: Any = saved
        ) -> Any:
            sampler = InfoBatchSampler(
                num_samples, how.batch_size, 3, seed=5, drop_last=drop_last, group=group
            )
            if states:
                sampler.load_state_dict(states)
            else:
                for before in range(epoch):
                    sampler.set_epoch(before)
                    consume(sampler, plain_losses)
            sampler.set_epoch(epoch)
            of_plan = set(sampler.plan.local_ids.tolist())
            mine = train_some(sampler, how, is_last)
            if is_last:
                sampler.set_epoch(epoch + 1)  # it was all trained
            return mine, of_plan, sampler.state_dict()

        ranks = run_ranks(how.world, body)
        saved = [state for _, _, state in ranks]
        for mine, of_plan, _ in ranks:
            seen.update(mine)
            kept |= of_plan
    assert set(seen.values()) <= {1}, "a sample was trained twice"
    dropped = kept - set(seen)
    size = max(how.world * how.batch_size for how in parts)
    assert len(dropped) < size if drop_last else not dropped


def test_two_weighs_of_a_batch_count_once_and_the_last_losses_score() -> None:
    """As a SAM step or the closure of LBFGS does, on the host and by ids in the same tensor."""
    sampler = InfoBatchSampler(96, batch_size=8, drop_last=False)
    for batch in DataLoader(with_sample_ids(list(range(96))), 8, sampler=sampler):
        for scale in (3.0, 1.0):
            sampler.weigh(torch.full((8,), scale), batch[1])
        if sampler.position == 40:
            break
    assert sampler.progress == 40 / 96
    state = sampler.state_dict()
    twin = InfoBatchSampler(96, batch_size=8, drop_last=False)
    twin.load_state_dict(state)
    assert list(twin) == sampler.plan.local_ids[40:].tolist()
    losses = state["recorded"].local
    assert set(losses[:40].tolist()) == {1.0}


def test_ids_on_a_device_count_once_by_their_tensor() -> None:
    """The path of an accelerator, which never reads a value, run on the host by a device of the same kind."""
    sampler = InfoBatchSampler(40, batch_size=8)
    sampler.set_epoch(0)
    assert sampler._run is not None
    recorder = sampler._run.recorder
    first = torch.from_numpy(sampler.plan.local_ids[:8])
    for _ in range(2):
        sampler.weigh(torch.ones(8), first)
    assert sampler.position == 8
    first.copy_(torch.from_numpy(sampler.plan.local_ids[8:16]))  # a static buffer, refilled
    sampler.weigh(torch.ones(8), first)
    assert sampler.position == 16
    del first
    assert not recorder._batches


def test_regrouped_by_length_within_an_epoch_resumes_exactly() -> None:
    """Samples of several batches are sorted by length and dealt anew, as length-grouped samplers do."""
    sampler = InfoBatchSampler(120, batch_size=6)
    sampler.set_epoch(0)
    ids = list(islice(sampler, 96))
    ids.sort(key=lambda i: i % 7)
    for start in range(0, 60, 6):
        batch = ids[start : start + 6]
        sampler.weigh(torch.from_numpy(plain_losses(0, np.array(batch))), batch)
    twin = InfoBatchSampler(120, batch_size=6)
    twin.load_state_dict(sampler.state_dict())
    assert (twin.position, twin.num_remaining) == (60, 60)
    rest = consume(twin, plain_losses)
    assert sorted(rest + ids[:60]) == list(range(120))
    twin.set_epoch(1)


def test_a_step_does_not_communicate_and_reads_no_value() -> None:
    """weigh, state_dict and the figures: counted over a group that notes what is asked of it."""
    calls: list[str] = []

    def body(group: Group) -> None:
        sampler = InfoBatchSampler(96, batch_size=8, group=group)
        sampler.set_epoch(0)
        batches = list(islice(sampler, 48))
        for name in ("all_reduce", "all_to_all", "all_gather_object"):
            setattr(group, name, lambda *_, name=name, **__: calls.append(name))
        for start in range(0, 48, 8):
            sampler.weigh(torch.ones(8), batches[start : start + 8])
            _ = sampler.progress, sampler.metrics(), sampler.num_remaining, len(sampler)
        sampler.state_dict()
        sampler.end_epoch()

    run_ranks(2, body)
    assert not calls


class OnMeta(torch.Tensor):
    """Refuses to be read: what a host sync on an accelerator would be."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in ("item", "tolist", "__bool__", "cpu", "numpy", "__int__"), name
        return super().__torch_function__(func, types, args, kwargs or {})


def test_losses_are_not_read_in_a_step() -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    ids = list(islice(sampler, 8))
    losses = torch.ones(8).as_subclass(OnMeta)
    loss = sampler.weigh(losses, ids, weights=torch.ones(8).as_subclass(OnMeta))
    assert isinstance(loss, OnMeta)


class Files(Sequence[Mapping[str, Any]]):
    """States that are read one by one, as from files of their own; notes which."""

    def __init__(self, states: list[dict[str, Any]]) -> None:
        self._states = states
        self.read: set[int] = set()

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, index: Any) -> Any:
        self.read.add(index)
        return self._states[index]


def test_a_load_reads_only_the_states_that_hold_what_is_its_own() -> None:
    def save(group: Group) -> Any:
        sampler = InfoBatchSampler(160, batch_size=2, group=group)
        consume(sampler, plain_losses, 4)
        return sampler.state_dict()

    states = run_ranks(8, save)

    def load(group: Group) -> tuple[set[int], list[int]]:
        files = Files(states)
        sampler = InfoBatchSampler(160, batch_size=4, group=group)
        sampler.load_state_dict(files)
        return files.read, list(sampler)

    ranks = run_ranks(4, load)
    assert [read for read, _ in ranks] == [{2 * r, 2 * r + 1} | {0} for r in range(4)]
    assert len({i for _, ids in ranks for i in ids}) == 160 - 64


def test_d19_an_iteration_that_is_begun_twice_advances_nothing() -> None:
    """torch's loader with batch_size=None and workers calls iter twice an epoch."""
    sampler = InfoBatchSampler(96, batch_size=8, num_epochs=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        given: Iterator[int] = iter(sampler)
        given = iter(sampler)
        for sample_id in given:
            sampler.weigh(torch.from_numpy(plain_losses(epoch, np.array([sample_id]))), [sample_id])
        assert sampler.epoch == epoch
    assert sampler.finished_epochs == 3


def test_d20_weights_are_those_of_the_epoch_with_workers_that_live_on() -> None:
    sampler = InfoBatchSampler(96, batch_size=8, num_epochs=4)
    loader = DataLoader(
        with_sample_ids(list(range(96))),
        8,
        sampler=sampler,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for epoch in range(3):
        sampler.set_epoch(epoch)
        found = []
        for _, ids in loader:
            losses = torch.from_numpy(plain_losses(epoch, ids.numpy())).requires_grad_()
            (gradient,) = torch.autograd.grad(sampler.weigh(losses, ids), losses)
            found += (gradient * len(ids)).tolist()
        assert found == sampler.plan.local_weights.tolist()
        assert (2.0 in found) == sampler.plan.pruned == (epoch > 0)


def test_d11_one_huge_loss_is_warned_of_and_one_nan_prunes_as_before() -> None:
    def losses(value: float) -> Any:
        def of(epoch: int, ids: np.ndarray) -> np.ndarray:
            found = plain_losses(epoch, ids)
            found[ids == 7] = value
            return found

        return of

    huge, bad, plain = (InfoBatchSampler(1600, batch_size=8) for _ in range(3))
    consume(huge, losses(1e6))
    with pytest.warns(EffxWarning, match=r"99\.\d% of the samples have a score below the mean"):
        huge.set_epoch(1)
    consume(bad, losses(float("nan")))
    with pytest.warns(EffxWarning, match="NaN or infinite"):
        bad.set_epoch(1)
    consume(plain, plain_losses)
    plain.set_epoch(1)
    assert abs(bad.kept_fraction - plain.kept_fraction) < 0.01


def test_user_weights_multiply_the_loss_and_not_the_score() -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    ids = list(islice(sampler, 8))
    losses = torch.arange(1.0, 9.0, requires_grad=True)
    weights = torch.tensor([0.0, 1, 2, 0.5, 1, 1, 1, 3])
    loss = sampler.weigh(losses, ids, weights=weights)
    loss.backward()
    assert loss == (losses * weights).mean()
    assert losses.grad is not None
    assert torch.equal(losses.grad, weights / 8)
    assert sampler.state_dict()["recorded"].local[:8].tolist() == losses.tolist()
    with pytest.raises(ConfigError, match="one a loss"):
        sampler.weigh(losses, ids, weights=torch.ones(7))
