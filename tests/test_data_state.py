"""Save and resume: within an epoch, at the same or another number of ranks, with the same or another global batch."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
import torch

from effx_dist.data import EffxWarning, InfoBatchSampler
from effx_dist.errors import ConfigError, EffxError, LayoutMismatchError
from effx_dist.shard import LocalRows
from tests.data_runs import LAYOUTS, Merged, consume, faulty_losses, make, merge_runs, train
from tests.thread_ranks import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:.*NaN or infinite", "ignore:.*is explained by when")

Layout = tuple[int, int, int]
BASE = {"num_samples": 1500, "num_epochs": 5, "seed": 4}


def _uninterrupted(layout: Layout, settings: dict[str, Any]) -> list[Merged]:
    return merge_runs(
        run_ranks(layout[0], lambda g: train(make(g, layout, **settings), faulty_losses))
    )


def _save(
    layout: Layout, settings: dict[str, Any], epoch: int, num_steps: int
) -> list[dict[str, Any]]:
    """States of all ranks after ``num_steps`` optimizer steps of ``epoch``."""

    def body(group):
        sampler = make(group, layout, **settings)
        train(sampler, faulty_losses, 0, epoch)
        sampler.set_epoch(epoch)
        consume(sampler, faulty_losses, num_steps * layout[2])
        return sampler.state_dict()

    return run_ranks(layout[0], body)


def _resume(layout: Layout, settings: dict[str, Any], states: Any) -> tuple[Merged, list[Merged]]:
    """The rest of the epoch, and all later ones."""

    def body(group):
        sampler = make(group, layout, **settings)
        sampler.load_state_dict(states if isinstance(states, list) else states(group))
        return train(sampler, faulty_losses, sampler.epoch)

    first, *later = merge_runs(run_ranks(layout[0], body))
    return first, later


def _assert_goes_on(rest: Merged, later: list[Merged], whole: list[Merged], position: int) -> None:
    epoch = whole[rest.epoch]
    assert rest.ids == epoch.ids[position:]
    assert rest.weights == epoch.weights[position:]
    assert rest.slots == epoch.slots[position:]
    assert later == whole[rest.epoch + 1 :]


@pytest.mark.parametrize("settings", [{}, {"score": "relative", "drop_last": False}], ids=str)
@pytest.mark.parametrize(("epoch", "num_steps"), [(0, 3), (1, 0), (1, 2), (2, 1)])
def test_resume_goes_on_bit_for_bit_at_any_world_size(epoch: int, num_steps: int, settings) -> None:
    settings = BASE | settings
    whole = _uninterrupted(LAYOUTS[3], settings)
    states = _save(LAYOUTS[3], settings, epoch, num_steps)
    for layout in LAYOUTS:
        rest, later = _resume(layout, settings, states)
        _assert_goes_on(rest, later, whole, num_steps * 168)


def test_resume_from_the_ranks_own_state_and_twice_in_one_epoch() -> None:
    layout, settings = LAYOUTS[4], BASE | {"score": "relative"}
    whole = _uninterrupted(layout, settings)
    states = _save(layout, settings, 1, 1)

    def again(group):
        sampler = make(group, layout, **settings)
        sampler.load_state_dict(states[group.rank])
        consume(sampler, faulty_losses, 2 * layout[2])
        return sampler.state_dict()

    states = run_ranks(layout[0], again)
    rest, later = _resume(layout, settings, lambda group: states[group.rank])
    _assert_goes_on(rest, later, whole, 3 * 168)


def test_resume_within_an_accumulation_at_the_same_layout() -> None:
    layout = LAYOUTS[1]  # 14 micro-batches a step

    def body(group):
        sampler = make(group, layout, **BASE)
        consume(sampler, faulty_losses, 19)
        state, rest = sampler.state_dict(), sampler.plan.local_ids[19 * 6 :].tolist()
        twin = make(group, layout, **BASE)
        twin.load_state_dict(state)
        return list(twin) == rest and twin.position == sampler.position == 19 * 12

    assert all(run_ranks(2, body))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("layout", [(3, 5, 1), (2, 16, 2), (1, 210, 1)], ids=str)
def test_another_global_batch_neither_repeats_nor_skips(layout: Layout, drop_last: bool) -> None:
    settings = BASE | {"drop_last": drop_last}
    whole = _uninterrupted(LAYOUTS[3], settings)[1]
    rest, later = _resume(layout, settings, _save(LAYOUTS[3], settings, 1, 2))
    seen = _real(whole)[: sum(w > 0 for w in whole.weights[:336])] + _real(rest)
    assert len(seen) == len(set(seen))
    size = layout[0] * layout[1] * layout[2]
    assert len(rest.ids) % size == 0
    num_kept = _num_kept(settings)
    assert len(seen) == num_kept if not drop_last else num_kept - len(seen) < size
    expected = dict(zip(whole.ids[:336], whole.weights[:336], strict=True))
    assert not set(_real(rest)) & {i for i, w in expected.items() if w > 0}
    assert [epoch.epoch for epoch in later] == [2, 3, 4]


def _real(epoch: Merged) -> list[int]:
    return [i for i, w in zip(epoch.ids, epoch.weights, strict=True) if w > 0]


def _num_kept(settings: dict[str, Any]) -> int:
    return int(_save(LAYOUTS[3], settings, 1, 0)[0]["num_kept"])


def test_a_checkpoint_layer_that_reshards_rows_in_place() -> None:
    """As one does: JSON through text, rows filled into the new layout's own leaves."""
    old, new = LAYOUTS[3], LAYOUTS[5]
    whole = _uninterrupted(old, BASE)
    states = _save(old, BASE, 1, 2)
    plain = {k: v for k, v in states[0].items() if not isinstance(v, LocalRows)}
    values = json.loads(json.dumps(plain, allow_nan=False))
    rows = {
        name: torch.cat([state[name].local for state in states])
        for name, value in states[0].items()
        if isinstance(value, LocalRows)
    }
    assert set(rows) == {"scores", "fresh_losses", "recorded", "progress"}

    def fill(group):
        state = make(group, new, **BASE).state_dict()
        for name, whole_rows in rows.items():
            start, stop = state[name].of(len(whole_rows))
            state[name] = LocalRows(whole_rows[start:stop].clone(), start, len(whole_rows))
        return state | values

    rest, later = _resume(new, BASE, fill)
    _assert_goes_on(rest, later, whole, 2 * 168)


def test_the_state_is_a_copy_and_saving_changes_nothing() -> None:
    def body(group, saves: bool):
        sampler = make(group, LAYOUTS[1], **BASE)
        consume(sampler, faulty_losses, 28)
        if saves:
            state = sampler.state_dict()
            kept = copy.deepcopy(state)
        plans = train(sampler, faulty_losses)
        if saves:
            for name in ("scores", "fresh_losses"):
                assert torch.equal(state[name].local.isnan(), kept[name].local.isnan())
        return plans, sampler.num_nonfinite, sampler.samples_saved

    saving, plain = (run_ranks(2, lambda g, s=s: body(g, s)) for s in (True, False))
    assert merge_runs([r[0] for r in saving]) == merge_runs([r[0] for r in plain])
    assert [r[1:] for r in saving] == [r[1:] for r in plain]


def test_counters_and_position_come_back() -> None:
    sampler = InfoBatchSampler(960, batch_size=8)
    consume(sampler, faulty_losses)
    sampler.set_epoch(1)
    consume(sampler, faulty_losses, 7)
    twin = InfoBatchSampler(960, batch_size=8)
    twin.load_state_dict(sampler.state_dict())
    names = "epoch position progress samples_saved num_nonfinite finished_epochs kept_fraction threshold_value"
    for name in names.split():
        assert getattr(twin, name) == getattr(sampler, name), name
    assert twin.samples_saved > 0
    assert len(twin) == len(sampler)
    assert twin.num_remaining == len(list(twin)) == len(sampler) - 56


def test_resume_at_the_end_of_an_epoch_does_not_repeat_or_skip_one() -> None:
    saved = InfoBatchSampler(96, batch_size=8)
    consume(saved, faulty_losses)
    state = saved.state_dict()
    by_hand, by_itself = InfoBatchSampler(96, batch_size=8), InfoBatchSampler(96, batch_size=8)
    by_hand.load_state_dict(state)
    by_itself.load_state_dict(state)
    by_hand.set_epoch(0)
    assert list(by_hand) == []
    by_hand.set_epoch(1)
    saved.set_epoch(1)
    assert list(by_hand) == list(by_itself) == list(saved)
    assert by_itself.epoch == 1


def test_a_state_of_nothing_is_a_fresh_start() -> None:
    state = InfoBatchSampler(96, batch_size=8).state_dict()
    twin = InfoBatchSampler(96, batch_size=8)
    consume(twin, faulty_losses)
    twin.load_state_dict(state)
    assert (twin.epoch, twin.position, len(list(twin))) == (0, 0, 96)


def test_more_ranks_than_samples() -> None:
    settings = {"num_samples": 3, "num_epochs": 4, "drop_last": False}
    whole = _uninterrupted((8, 1, 1), settings)
    rest, later = _resume((2, 4, 1), settings, _save((8, 1, 1), settings, 1, 0))
    assert [rest, *later] == whole[1:]


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"num_samples": 97}, LayoutMismatchError),
        ({"seed": 1}, ConfigError),
        ({"prune_ratio": 0.4}, ConfigError),
        ({"num_epochs": 5}, ConfigError),
        ({"threshold": 0.5}, ConfigError),
        ({"score": "relative"}, ConfigError),
        ({"drop_last": False}, ConfigError),
    ],
    ids=str,
)
def test_a_state_of_another_run_is_refused_by_name(setting, error: type[EffxError]) -> None:
    state = InfoBatchSampler(96).state_dict()
    with pytest.raises(error, match=next(iter(setting))):
        InfoBatchSampler(**({"num_samples": 96} | setting)).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"version": 3}, "version=3"),
        ({"position": -1}, "position"),
        ({"position": 10**9}, "position"),
        ({"epoch": "1"}, "epoch"),
        ({"num_kept": True}, "num_kept"),
        ({"num_kept": 95}, "scores keep 96 samples"),
        ({"pruned": None}, "pruned"),
        ({"config": []}, "config"),
        ({"scores": [0.0] * 96}, "scores"),
        ({"scores": LocalRows(torch.zeros(96, dtype=torch.float64), 0, 96)}, "scores"),
        ({"scores": LocalRows(torch.zeros(96, 2), 0, 96)}, "scores"),
        ({"fresh_losses": LocalRows(torch.zeros(90), 0, 96)}, "no row for sample 90"),
        ({"fresh_losses": LocalRows(torch.zeros(97), 0, 97)}, "fresh_losses"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_malformed_state_is_refused_by_name(change, named: str) -> None:
    sampler = InfoBatchSampler(96, batch_size=8)
    consume(sampler, faulty_losses, 3)
    with pytest.raises(EffxError, match=named):
        InfoBatchSampler(96, batch_size=8).load_state_dict(sampler.state_dict() | change)


def test_missing_keys_ranks_and_moments_are_refused() -> None:
    states = _save(LAYOUTS[3], BASE, 0, 1)
    later = _save(LAYOUTS[3], BASE, 0, 2)
    with pytest.raises(ConfigError, match="states="):
        InfoBatchSampler(1500).load_state_dict([])
    with pytest.raises(LayoutMismatchError, match="no row for sample 375"):
        InfoBatchSampler(1500, num_epochs=5, seed=4).load_state_dict(states[0])
    with pytest.warns(EffxWarning, match="2 to 4 micro-batches"):
        InfoBatchSampler(1500, num_epochs=5, seed=4).load_state_dict([*states[:3], later[3]])
    for name in states[0]:
        with pytest.raises(EffxError):
            InfoBatchSampler(1500, num_epochs=5, seed=4).load_state_dict(
                [{k: v for k, v in state.items() if k != name} for state in states]
            )


def test_rows_missing_on_one_rank_reach_the_other() -> None:
    states = _save((2, 4, 1), {"num_samples": 96}, 0, 1)

    def body(group):
        with pytest.raises(EffxError) as caught:
            make(group, (2, 4, 1), num_samples=96).load_state_dict(states[0])
        return str(caught.value)

    other, own = run_ranks(2, body)
    assert "no row for sample 48" in own
    assert "rank 1 failed" in other


def test_scores_are_stored_with_their_owner() -> None:
    states = _save((4, 4, 1), {"num_samples": 90}, 0, 2)
    assert [(s["scores"].start, len(s["scores"].local)) for s in states] == [
        (0, 23), (23, 23), (46, 23), (69, 21),
    ]  # fmt: skip
    losses = np.concatenate([s["recorded"].local.numpy() for s in states])
    assert len(losses) == 80
    assert int((~np.isnan(losses)).sum()) == 32


def test_the_state_of_what_was_handed_out_and_that_of_what_was_weighed_are_not_taken_for_each_other() -> (
    None
):
    sampler = InfoBatchSampler(96, batch_size=8)
    given = iter(sampler)
    _ = [next(given) for _ in range(24)]
    handed_out, weighed = given.state_dict(), sampler.state_dict()
    assert json.loads(json.dumps(handed_out)) == handed_out
    assert len(json.dumps(handed_out)) < 200
    with pytest.raises(ConfigError, match="what an iterator of the sampler handed out"):
        InfoBatchSampler(96, batch_size=8).load_state_dict(handed_out)
    twin = iter(InfoBatchSampler(96, batch_size=8))
    with pytest.raises(ConfigError, match=r"goes to sampler\.load_state_dict"):
        twin.load_state_dict(weighed)
    with pytest.raises(ConfigError, match="is of rank 1 of 2, this is rank 0 of 1"):
        twin.load_state_dict(handed_out | {"rank": 1, "size": 2})
    twin.load_state_dict(handed_out)
    assert list(twin) == list(given)
