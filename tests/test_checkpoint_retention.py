"""Which checkpoints stay, and that the removal of the others never breaks what stays."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effx_dist.checkpoint.saving.retention import (
    pin,
    remove_leftovers,
    retire,
    set_aside_newer,
    wanted_steps,
    with_parents,
)
from effx_dist.checkpoint.storage.places import Location, location
from effx_dist.checkpoint.storage.steps import (
    MANIFEST,
    MERGED,
    MOMENTS_REMOVED,
    PINNED,
    REMOVING,
    committed_steps,
    newest_step,
    step_name,
)
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError
from tests.made_up_steps import FILES, MOMENTS, WEIGHTS, make_chain, make_step

TWO_CHAINS: dict[int, int | None] = {0: None, 1: 0, 2: 1, 3: None, 4: 3, 5: 4}


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A run's folder, not made yet."""
    return location(
        tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"
    )


def keep(k: int, **settings: Any) -> ExcpConfig:
    return ExcpConfig(keep_latest_k=k, **settings)


# The rule


@st.composite
def chains(draw: st.DrawFn) -> dict[int, int | None]:
    """Steps and their parents, each an older step or none."""
    steps = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=12)))
    return {step: draw(st.sampled_from([None, *steps[:index]])) for index, step in enumerate(steps)}


RULES = st.builds(
    ExcpConfig, keep_latest_k=st.integers(0, 4), keep_every_n=st.sampled_from([0, 1, 3, 10])
)


@given(chains(), RULES, st.data())
def test_what_is_kept_has_its_parents_and_the_newest_good_ones(
    parent_of: dict[int, int | None], config: ExcpConfig, data: st.DataObject
) -> None:
    steps = sorted(parent_of)
    whole = data.draw(st.sets(st.sampled_from(steps)))
    pinned = data.draw(st.sets(st.sampled_from(steps)))
    kept = with_parents(wanted_steps(steps, whole, pinned, config), parent_of)
    assert kept <= parent_of.keys()
    assert all(parent_of[step] is None or parent_of[step] in kept for step in kept)
    assert pinned <= kept
    assert max(steps) in kept
    assert set(sorted(whole)[-config.keep_latest_k :]) <= kept


@given(chains(), RULES)
def test_nothing_is_kept_without_a_reason(
    parent_of: dict[int, int | None], config: ExcpConfig
) -> None:
    kept = with_parents(wanted_steps(parent_of, parent_of.keys(), (), config), parent_of)
    num_latest = config.keep_latest_k or len(parent_of)
    wanted = set(sorted(parent_of)[-num_latest:])
    wanted |= {s for s in parent_of if config.keep_every_n and s % config.keep_every_n == 0}
    assert wanted <= kept
    assert all(any(parent_of[child] == step for child in kept) for step in kept - wanted)


@settings(max_examples=60)
@given(chains(), RULES, st.data())
def test_retire_on_random_folders(
    parent_of: dict[int, int | None], config: ExcpConfig, data: st.DataObject
) -> None:
    """Chains with pins and damaged files: what stays reaches its base, whatever is good enough to go
    on from stays as the rule says, and a second call finds nothing to do."""
    steps = sorted(parent_of)
    damaged = data.draw(st.sets(st.sampled_from(steps), max_size=3))
    pinned = data.draw(st.sets(st.sampled_from(steps), max_size=3))
    place = location(f"memory://{uuid.uuid4().hex}")
    make_chain(place, parent_of)
    for step in damaged:
        (place / step_name(step)).remove_file(data.draw(st.sampled_from(sorted(FILES))))
    for step in pinned:
        pin(place, step)
    good = [step for step in steps if _is_good(place, step, parent_of)]
    removed = retire(place, config)
    left = set(committed_steps(place))
    assert left | set(removed) == set(steps)
    assert all(parent_of[step] is None or parent_of[step] in left for step in left)
    assert pinned <= left
    must_stay = set(good[-config.keep_latest_k :]) | (pinned & set(good))
    assert must_stay <= left
    assert all(_is_good(place, step, parent_of) for step in must_stay)
    assert retire(place, config) == []
    assert set(committed_steps(place)) == left
    place.remove()


def _is_good(place: Location, step: int, parent_of: Mapping[int, int | None]) -> bool:
    """Whether a run could go on from a step: its files, and the weights of all those below it."""
    needed: int | None = step
    while needed is not None:
        names = FILES if needed == step else [WEIGHTS]
        if not all((place / step_name(needed)).has_file(name) for name in names):
            return False
        needed = parent_of[needed]
    return True


# On folders


def test_retire_removes_the_rest_and_no_base_that_is_needed(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    assert retire(place, keep(1)) == [2, 1, 0]
    assert committed_steps(place) == [3, 4, 5]
    assert sorted(place.folders()) == ["step-3", "step-4", "step-5"]
    assert retire(place, keep(1)) == []


def test_retire_keeps_everything_when_told_to(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    assert retire(place, keep(0)) == []
    assert committed_steps(place) == [0, 1, 2, 3, 4, 5]


def test_every_nth_step_stays(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    assert retire(place, keep(1, keep_every_n=2)) == []
    assert MOMENTS in (place / "step-2").files()
    assert MOMENTS not in (place / "step-1").files()


def test_steps_kept_for_their_weights_let_go_of_their_moments(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    retire(place, keep(2))
    assert set((place / "step-3").files()) == {MANIFEST, WEIGHTS, MOMENTS_REMOVED}
    for step in ("step-4", "step-5"):
        assert set((place / step).files()) == {MANIFEST, WEIGHTS, MOMENTS}
    assert newest_step(place) == 5


def test_a_step_without_moments_is_not_the_newest_to_go_on_from(place: Location) -> None:
    make_chain(place, {1: None, 2: 1})
    (place / "step-2").replace_file(MOMENTS_REMOVED, b"x")
    assert newest_step(place) == 1


def test_a_pinned_step_stays_with_its_moments_and_its_chain(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    pin(place, 1)
    assert retire(place, keep(1)) == [2]
    assert MOMENTS in (place / "step-1").files()
    assert MOMENTS not in (place / "step-0").files()
    pin(place, 1, is_pinned=False)
    assert retire(place, keep(1)) == [1, 0]


def test_only_a_committed_step_can_be_pinned(place: Location) -> None:
    make_chain(place, {1: None})
    with pytest.raises(CheckpointNotFoundError, match=r"step 2 .* \[1\]"):
        pin(place, 2)


def test_a_pin_that_comes_too_late_says_so(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chain(place, {1: None})
    real = type(place).replace_file

    def replace_file(self: Location, name: str, content: bytes) -> None:
        if name == PINNED:
            (place / "step-1").remove()
        real(self, name, content)

    monkeypatch.setattr(type(place), "replace_file", replace_file)
    with pytest.raises(CheckpointNotFoundError, match="removed before it could be pinned"):
        pin(place, 1)
    assert place.folders() == []


def test_a_pin_set_while_old_steps_are_removed_is_respected(
    place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_chain(place, TWO_CHAINS)
    from effx_dist.checkpoint.saving import retention

    real = retention.remove_step

    def remove_step_and_pin(folder: Location, step: int) -> None:
        real(folder, step)
        if step == 2:
            pin(place, 1)

    monkeypatch.setattr(retention, "remove_step", remove_step_and_pin)
    assert retire(place, keep(1)) == [2]
    assert committed_steps(place) == [0, 1, 3, 4, 5]
    assert MOMENTS in (place / "step-1").files()


@pytest.mark.parametrize("name", [WEIGHTS, MOMENTS])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_the_last_good_one_never_goes(name: str, damage: str, place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    newest = place / "step-5"
    newest.remove_file(name)
    if damage == "cut":
        newest.replace_file(name, b"0")
    retire(place, keep(1))
    assert committed_steps(place) == [3, 4, 5]
    assert MOMENTS in (place / "step-4").files()


def test_a_chain_whose_base_is_damaged_is_not_counted(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    (place / "step-3").remove_file(WEIGHTS)
    retire(place, keep(1))
    assert committed_steps(place) == [0, 1, 2, 3, 4, 5]
    assert MOMENTS in (place / "step-2").files()


def test_a_chain_upon_another_parent_is_not_counted(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    (place / "step-3").remove()
    make_step(place, 3, files={WEIGHTS: 6, MOMENTS: 6})
    assert retire(place, keep(1)) == [2, 1, 0]
    # step 3 is the newest good one, and what is newer stays as it is
    assert {MOMENTS in (place / step_name(s)).files() for s in (4, 5)} == {True}


def test_a_damaged_manifest_keeps_all_up_to_it(place: Location) -> None:
    make_chain(place, {**TWO_CHAINS, 6: None, 7: 6, 8: None})
    (place / "step-4").replace_file(MANIFEST, b"{damaged")
    assert retire(place, keep(1)) == [7, 6, 5]
    assert committed_steps(place) == [0, 1, 2, 3, 4, 8]
    assert MOMENTS in (place / "step-1").files()


def test_a_merged_step_lets_its_chain_go(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    make_step(place / "step-4", 4, files={WEIGHTS: 3}, at=MERGED)
    assert retire(place, keep(1)) == [3, 2, 1, 0]
    assert (place / "step-4" / MERGED).has_file(WEIGHTS)


def test_a_merged_base_that_is_damaged_does_not(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    make_step(place / "step-4", 4, files={WEIGHTS: 3}, at=MERGED)
    (place / "step-4" / MERGED).remove_file(WEIGHTS)
    assert retire(place, keep(1)) == [2, 1, 0]


def test_saves_under_way_are_left_alone(place: Location) -> None:
    make_chain(place, TWO_CHAINS)
    staging = (place / "step-6").staging("0123456789")
    staging.make()
    staging.create_file(WEIGHTS).commit()
    retire(place, keep(1))
    assert staging.has_file(WEIGHTS)


# What else is removed or set aside


def test_leftovers_go_and_committed_steps_stay(place: Location) -> None:
    make_chain(place, {1: None})
    cut_off = (place / "step-5").staging("0123456789").name
    for name in ("step-2", cut_off, f"{REMOVING}0a", "notes", "superseded-0a-step-4"):
        (place / name).make()
        (place / name).replace_file(WEIGHTS, b"1")
    make_step(place, 3, at="superseded-0b-step-3")
    remove_leftovers(place)
    left = {"notes", "step-1", "superseded-0b-step-3"}
    if place.has_rename:  # a step set aside is never half there
        left |= {"superseded-0a-step-4"}
    assert set(place.folders()) == left


def test_newer_checkpoints_are_set_aside_and_not_lost(place: Location) -> None:
    make_chain(place, {1: None, 2: 1, 3: 2})
    names = set_aside_newer(place, 1)
    assert [name.rpartition("-step-")[2] for name in names] == ["3", "2"]
    assert committed_steps(place) == [1]
    assert all((place / name).has_file(MANIFEST) for name in names)
    make_step(place, 2, 1)
    assert len(set(set_aside_newer(place, 1)) | set(names)) == 3
    assert set_aside_newer(place, 1) == []
