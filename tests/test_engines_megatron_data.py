"""InfoBatch under Megatron-core: the batch sampler, the losses, and whole models in real processes."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from effx_dist.config import InfoBatchConfig
from effx_dist.data import InfoBatchSampler, with_sample_ids
from effx_dist.errors import ConfigError, EffxError, LayoutMismatchError
from effx_dist.shard import SoloGroup
from tests.data_runs import Merged, merge_runs, plain_losses, train
from tests.megatron_processes import call
from tests.peer_ranks import Grid, Place, run_grid
from tests.ranks import spawn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # megatron.core, of what is not installed beside it
    pytest.importorskip("megatron.core")
    from effx_dist.engines.megatron.data import DataFeed, sample_losses
    from effx_dist.engines.megatron.pretraining_sampler import InfoBatchPretrainingSampler

pytestmark = pytest.mark.megatron

CONFIG = InfoBatchConfig(num_epochs=5, seed=4)
TOTAL, GLOBAL, MICRO = 600, 24, 4
SOLO = Place(SoloGroup(), None, 0)  # type: ignore[arg-type]


def make(
    place: Place, consumed: int = 0, config: InfoBatchConfig = CONFIG, **settings: Any
) -> InfoBatchPretrainingSampler:
    data = place.data
    return InfoBatchPretrainingSampler(
        TOTAL,
        consumed,
        MICRO,
        data.rank,
        data.size,
        config=config,
        group=data,
        peers=place.peers,
        **{"global_batch_size": GLOBAL} | settings,
    )


def take_steps(
    sampler: InfoBatchPretrainingSampler, num_steps: int | None = None
) -> list[list[int]]:
    """Steps of Megatron's kind; the micro-batches of this rank."""
    size = sampler.global_batch_size // sampler.inner.group.size // MICRO
    batches = list(sampler)
    if num_steps is not None:
        batches = batches[: num_steps * size]
    for number, batch in enumerate(batches, start=1):
        if sampler.inner.peers.has_losses:
            losses = plain_losses(sampler.epoch, torch.tensor(batch).numpy())
            sampler.weigh(torch.from_numpy(losses), torch.tensor(batch))
        if number % size == 0:
            sampler.advance()
    return batches


def whole_run(config: InfoBatchConfig = CONFIG) -> list[Merged]:
    """By the sampler of effx_dist.data, on one rank."""
    return merge_runs([train(InfoBatchSampler.from_config(config, TOTAL, GLOBAL), plain_losses)])


def run_epochs(sampler: InfoBatchPretrainingSampler, first: int = 0) -> list[Any]:
    plans = []
    for epoch in range(first, CONFIG.num_epochs):
        sampler.set_epoch(epoch)
        plans.append(sampler.plan)
        batches = take_steps(sampler)
        assert [i for batch in batches for i in batch] == sampler.plan.local_ids.tolist()
        assert {len(batch) for batch in batches} == {MICRO}
    return plans


class TestSampler:
    @pytest.mark.parametrize("drop_last", [True, False])
    @pytest.mark.parametrize(
        "grid", [Grid(1), Grid(2), Grid(3), Grid(dp=2, tp=2), Grid(dp=3, pp=2)], ids=str
    )
    def test_every_layout_has_the_same_plans(self, grid: Grid, drop_last: bool) -> None:
        expected = whole_run(CONFIG.model_copy(update={"drop_last": drop_last}))
        assert any(len(epoch.ids) < 560 for epoch in expected)
        for runs in run_grid(grid, lambda place: run_epochs(make(place, drop_last=drop_last))):
            assert merge_runs(runs) == expected

    @pytest.mark.parametrize("epoch", [0, 2])
    def test_resumed_at_another_size_nothing_is_repeated_or_missing(self, epoch: int) -> None:
        def save(place: Place) -> Any:
            sampler = make(place)
            for before in range(epoch):
                sampler.set_epoch(before)
                take_steps(sampler)
            sampler.set_epoch(epoch)
            return take_steps(sampler, 3), sampler.state_dict()

        saved = run_grid(Grid(dp=2, pp=2), save)
        states = [state for _, state in saved[0]]
        before = [i for batches, _ in saved[0] for batch in batches for i in batch]
        expected = whole_run()
        consumed = sum(len(merged.ids) for merged in expected[:epoch]) + 3 * GLOBAL
        assert states[0]["consumed_samples"] == consumed

        def go_on(place: Place) -> Any:
            sampler = make(place, consumed)
            sampler.load_state_dict(states)
            assert (sampler.epoch, sampler.consumed_samples) == (epoch, consumed)
            plans = run_epochs(sampler, sampler.epoch)
            return plans, sampler.consumed_samples

        for peers in run_grid(Grid(dp=3, tp=2), go_on):
            rest, *later = merge_runs([plans for plans, _ in peers])
            assert rest.ids == expected[epoch].ids[3 * GLOBAL :]
            assert sorted(before + rest.ids) == sorted(expected[epoch].ids)
            assert later == expected[epoch + 1 :]
            assert {end for _, end in peers} == {sum(len(merged.ids) for merged in expected)}

    def test_consumed_samples_alone_go_on_within_the_first_epoch(self) -> None:
        expected = whole_run()[0].ids

        def body(place: Place) -> Any:
            sampler = make(place, 5 * GLOBAL)
            assert sampler.consumed_samples == 5 * GLOBAL
            sampler.set_epoch(0)
            assert (sampler.consumed_samples, len(sampler)) == (5 * GLOBAL, 600 // 8)
            batches = take_steps(sampler)
            assert sampler.state_dict()["consumed_samples"] == 600
            return batches

        for ranks in run_grid(Grid(dp=2, pp=2), body):
            micro_steps = zip(*ranks, strict=True)
            ids = [i for step in micro_steps for batch in step for i in batch]
            assert ids == expected[5 * GLOBAL :]

    def test_consumed_samples_beyond_the_first_epoch_need_a_state(self) -> None:
        sampler = make(SOLO, 600)
        with pytest.raises(ConfigError, match="load the sampler's state"):
            sampler.set_epoch(1)
        saved = make(SOLO)
        run_epochs(saved)
        state = saved.state_dict()
        given = make(SOLO, state["consumed_samples"])
        given.load_state_dict(state)
        assert given.consumed_samples == saved.consumed_samples

    def test_consumed_samples_that_contradict_the_state_are_refused(self) -> None:
        def body(place: Place) -> None:
            saved = make(place)
            saved.set_epoch(0)
            take_steps(saved, 2)
            other = make(place, 3 * GLOBAL if place.rank == 2 else 2 * GLOBAL)
            with pytest.raises(EffxError, match="consumed_samples=72, but the loaded state has 48"):
                other.load_state_dict(saved.state_dict())

        run_grid(Grid(dp=2, tp=2), body)

    def test_a_state_of_another_engine_goes_on(self) -> None:
        source = InfoBatchSampler.from_config(CONFIG, TOTAL, MICRO, GLOBAL // MICRO)
        plans = train(source, plain_losses, 0, 2)
        sampler = make(SOLO)
        sampler.load_state_dict(source.state_dict())
        assert merge_runs([[*plans, *run_epochs(sampler, 2)]]) == whole_run()

    def test_an_epoch_never_begins_within_the_schedule(self) -> None:
        sampler = make(SOLO)
        sampler.set_epoch(0)
        take_steps(sampler)
        with pytest.raises(ConfigError, match=r"call set_epoch\(1\) on every rank"):
            iter(sampler)
        sampler.set_epoch(0)  # as a loop does that goes on from the end of an epoch
        assert list(sampler) == []

    def test_a_loader_of_torch_fetches_ahead(self) -> None:
        sampler = make(SOLO)
        sampler.set_epoch(0)
        data = with_sample_ids([(torch.tensor(i),) for i in range(TOTAL)])
        loader: Any = DataLoader(data, batch_sampler=sampler)
        assert len(loader) == TOTAL // MICRO
        batches = iter(loader)
        values, ids = next(batches)
        assert values.tolist() == ids.tolist() == sampler.plan.local_ids[:MICRO].tolist()
        next(batches)
        sampler.weigh(torch.ones(MICRO), ids)
        assert sampler.consumed_samples == MICRO

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"consumed": -24}, "consumed_samples=-24"),
            ({"consumed": 25}, "consumed_samples=25: must be a multiple of 24"),
            ({"global_batch_size": 26}, "global_batch_size=26: must be a multiple of 4"),
            ({"config": InfoBatchConfig(num_epochs=1)}, "every epoch uses all samples"),
        ],
    )
    def test_a_value_that_cannot_be_is_refused(self, settings: Any, message: str) -> None:
        with pytest.raises((ConfigError, UserWarning), match=message):
            make(SOLO, **settings)

    def test_ranks_that_are_not_the_groups_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="has this rank as 0 of 1"):
            InfoBatchPretrainingSampler(
                8, 0, 2, 1, 2, config=CONFIG, global_batch_size=4, group=SoloGroup()
            )
        with pytest.raises(ConfigError, match="initialize_model_parallel"):
            InfoBatchPretrainingSampler(8, 0, 2, 0, 1, config=CONFIG, global_batch_size=4)


class TestLosses:
    def test_each_sequence_has_the_mean_of_its_own_targets(self) -> None:
        tokens = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, float("nan")]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]])
        losses = sample_losses(tokens.bfloat16().requires_grad_(), mask.flatten())
        assert losses.dtype == torch.float32
        assert losses.tolist() == [2.5, 7.0, 0.0]

    def test_a_loss_of_another_shape_is_refused(self) -> None:
        with pytest.raises(LayoutMismatchError, match=r"output_tensor \(4,\)"):
            sample_losses(torch.ones(4), torch.ones(4))
        with pytest.raises(LayoutMismatchError, match=r"loss_mask \(2, 3\)"):
            sample_losses(torch.ones(2, 4), torch.ones(2, 3))

    def test_per_token_normalisation_is_refused(self) -> None:
        per_token = SimpleNamespace(calculate_per_token_loss=True)
        with pytest.raises(ConfigError, match="calculate_per_token_loss=True"):
            DataFeed(CONFIG, [SimpleNamespace(calculate_per_token_loss=False), per_token])
        DataFeed(None, [per_token])


class TestFeed:
    def test_without_infobatch_there_is_a_mean_and_no_sampler(self) -> None:
        feed = DataFeed(CONFIG.model_copy(update={"enabled": False}))
        assert feed.weigh(torch.tensor([1.0, 4.0], dtype=torch.bfloat16), [7, 8]) == 2.5
        with pytest.raises(ConfigError, match=r"effx\.infobatch: is absent"):
            feed.make_sampler(8, micro_batch_size=2, global_batch_size=4)

    def test_an_evaluation_records_nothing(self) -> None:
        feed = DataFeed(CONFIG)
        losses = torch.tensor([1.0, 2.0])
        assert feed.weigh(losses, [0, 10**9]) == 1.5
        with pytest.raises(ConfigError, match="no sampler yet"):
            feed.weigh(losses.requires_grad_(), [0, 1])
        with pytest.raises(ConfigError, match="no sampler yet"):
            feed.advance()

    def test_the_rate_reaches_its_end_with_the_data(self) -> None:
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        def body(place: Place) -> list[float]:
            optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
            schedule = OptimizerParamScheduler(
                optimizer, 0.0, 1.0, 0.1, 60, 5 * TOTAL, "linear", 0.1, 0.1, 0, "constant"
            )
            feed = DataFeed(CONFIG)
            feed.sampler = make(place)
            rates = []
            for epoch in range(5):
                feed.sampler.set_epoch(epoch)
                while feed.sampler.inner.num_remaining:
                    size = GLOBAL // place.data.size // MICRO
                    for batch, _ in zip(feed.sampler, range(size), strict=False):
                        if place.peers.has_losses:
                            losses = plain_losses(epoch, torch.tensor(batch).numpy())
                            feed.weigh(torch.from_numpy(losses).requires_grad_(), batch)
                    feed.advance(schedule)
                    rates.append(float(optimizer.param_groups[0]["lr"]))
                    feed.sampler.set_epoch(epoch)  # the same one: goes on in it
            return rates

        by_peer = run_grid(Grid(dp=2, pp=2), body)
        assert by_peer[0] == by_peer[1]
        rates = by_peer[0][0]
        assert len(rates) < 5 * TOTAL // GLOBAL  # some were pruned
        assert rates[-1] == pytest.approx(0.1)
        assert max(rates) == pytest.approx(1.0, abs=0.02)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("megatron_data")
    return spawn(4, call, folder, "megatron_data_runs", "everything")


@pytest.mark.ranks
class TestOnFourRanks:
    @pytest.mark.parametrize("layout", ["tp2", "pp2"])
    def test_whole_models_under_their_schedules(
        self, seen: list[dict[str, Any]], layout: str
    ) -> None:
        ranks = [of_rank[layout] for of_rank in seen]
        by_data_rank = {
            number: [rank for rank in ranks if rank["data_rank"] == number] for number in range(2)
        }
        for one, other in by_data_rank.values():
            assert {**one, "max_error": None} == {**other, "max_error": None}
        first, pruned = zip(*(peers[0]["ids"] for peers in by_data_rank.values()), strict=True)
        assert sorted(i for ids in first for i in ids) == list(range(40))
        kept = [i for ids in pruned for i in ids]
        assert 8 <= len(set(kept)) == len(kept) < 40
        for rank in ranks:
            assert rank["max_error"] is not None, "no step had samples of more than one weight"
            assert rank["max_error"] < 1e-5

    def test_context_parallel_parts_add_up(self, seen: list[dict[str, Any]]) -> None:
        for of_rank in seen:
            losses, whole, gradient, expected = of_rank["cp2"]
            torch.testing.assert_close(losses, whole)
            torch.testing.assert_close(gradient, expected)
