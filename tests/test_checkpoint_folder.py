"""Names in a checkpoint folder, what counts as committed, and how steps appear and vanish."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint.saving.retention import remove_leftovers
from effx_dist.checkpoint.storage.places import Location, location
from effx_dist.checkpoint.storage.steps import (
    LATEST,
    MANIFEST,
    REMOVING,
    checked_rank_file_name,
    checked_sibling_name,
    claim_step_folder,
    committed_steps,
    is_moments_file,
    moments_file_name,
    newest_step,
    rank_file_name,
    remove_step,
    require_committed,
    step_name,
    step_of,
    uncommitted_steps,
    unfinished_steps,
)
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from tests.made_up_steps import WEIGHTS, make_chain, make_step

SAVE = "0123456789abcdef"
"""Names a save."""


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A run's folder, not made yet."""
    return location(
        tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"
    )


@given(st.integers(0, 10**18 - 1))
def test_step_names_read_back(step: int) -> None:
    assert step_of(step_name(step)) == step


@pytest.mark.parametrize(
    "name",
    [
        *("step-", "step-01", "step--1", "step-1 ", "step-1\n", "Step-1", "step-1.tmp"),
        *("step-\u0663", "step-1/..", "latest", "", "step-" + "9" * 19, "superseded-ab-step-3"),
    ],
)
def test_other_names_are_no_steps(name: str) -> None:
    assert step_of(name) is None


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="step=-1"):
        step_name(-1)


@given(st.integers(0, 99999))
def test_rank_file_names_pass_their_own_check(rank: int) -> None:
    for name in (rank_file_name(rank), moments_file_name(rank)):
        assert checked_rank_file_name(name, "here") == name
        assert is_moments_file(name) == (name == moments_file_name(rank))


HOSTILE = [
    *("..", ".", "", "/etc", "../x", "a/b", "a\\..\\b", "step-1/..", "~", "-rf", ".hidden", "a b"),
    *("a\0b", "step-1\n", "x" * 129, "rank-00000.effx\n", "rank-0.effx", "rank-00000.effx/.."),
    *("rank-" + 5 * "\u0660" + ".effx", "file:///x", "\u00e9"),
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_could_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(CorruptCheckpointError, match="nothing was opened"):
        checked_rank_file_name(name, "m.json")
    if name != "rank-0.effx":
        with pytest.raises(CorruptCheckpointError, match="nothing was opened"):
            checked_sibling_name(name, "m.json")


@pytest.mark.parametrize("name", ["step-1", "superseded-0a1b2c3d-step-7", "base_0", "A.b"])
def test_names_of_siblings_pass(name: str) -> None:
    assert checked_sibling_name(name, "m.json") == name


def test_a_checkpoint_exists_when_its_manifest_does(place: Location) -> None:
    make_step(place, 9)
    make_step(place, 10)
    for name in ("step-11", "step-12", "step-13"):
        (place / name).make()
    (place / "step-11").replace_file(WEIGHTS, b"1")
    (place / "step-12").replace_file(f"{MANIFEST}.0a.part", b"{")
    (place / "step-13" / MANIFEST).make()
    (place / "step-13" / MANIFEST).replace_file("data", b"1")
    place.replace_file("step-14", b"a file")
    place.replace_file(LATEST, b"step-11\n")
    assert committed_steps(place) == [9, 10]
    assert uncommitted_steps(place) == [11, 12, 13]
    assert newest_step(place) == 10
    assert require_committed(place, 9) == 9


def test_what_latest_names_counts_before_the_listing_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = location(f"memory://{uuid.uuid4().hex}/run")
    make_step(place, 1)
    make_step(place, 2)
    place.replace_file(LATEST, b"step-2\n")
    real = MemoryFileSystem.ls
    monkeypatch.setattr(
        MemoryFileSystem,
        "ls",
        lambda fs, path, **kw: [e for e in real(fs, path, **kw) if "step-2" not in e["name"]],
    )
    assert place.folders() == ["step-1"]
    assert committed_steps(place) == [1, 2]
    assert newest_step(place) == 2


@pytest.mark.parametrize("said", [b"step-1", b"../x\n", b"\xff\n", b"", b"step-7\n" * 99])
def test_latest_is_only_a_hint(said: bytes, place: Location) -> None:
    make_chain(place, {1: None, 2: 1})
    place.replace_file(LATEST, said)
    assert committed_steps(place) == [1, 2]


def test_a_link_to_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    make_step(tmp_path / "elsewhere", 1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "step-1").symlink_to(tmp_path / "elsewhere" / "step-1")
    (run / LATEST).write_text("step-1\n")
    assert committed_steps(run) == []
    assert uncommitted_steps(run) == []


def test_what_is_not_there_is_said(place: Location) -> None:
    assert committed_steps(place) == []
    with pytest.raises(CheckpointNotFoundError, match="run"):
        newest_step(place)
    make_step(place, 3)
    with pytest.raises(CheckpointNotFoundError, match=r"step 4 .* \[3\]"):
        require_committed(place, 4)


def test_a_committed_checkpoint_is_never_claimed(place: Location) -> None:
    make_step(place, 3)
    with pytest.raises(ConfigError, match="never overwritten"):
        claim_step_folder(place / "step-3")
    assert committed_steps(place) == [3]


def test_claiming_removes_what_was_left_half_done(place: Location) -> None:
    left, other = place / "step-3", (place / "step-4").staging(SAVE)
    for folder in (left, left.staging(SAVE), other):
        folder.make()
        folder.replace_file(WEIGHTS, b"half")
    claim_step_folder(left)
    assert left.files() == {}
    assert place.folders() == [other.name], "what is of another step stays"


def test_a_save_is_unfinished_until_it_is_published(place: Location) -> None:
    """Two jobs put the same step together, each in a folder of its own."""
    own, twin = location(place) / "step-3", (place / "step-3").staging("f" * 32)
    staging = own.staging(SAVE)
    staging.make()
    staging.replace_file(WEIGHTS, b"whole")
    assert unfinished_steps(place) == [3]
    staging.replace_file(MANIFEST, b"{}")
    staging.publish(own)
    assert (committed_steps(place), unfinished_steps(place)) == ([3], [])
    if place.has_rename:
        twin.make()
        twin.replace_file(MANIFEST, b"{}")
        with pytest.raises(FileExistsError, match="another job has just put"):
            twin.publish(own)
    assert own.read_file(WEIGHTS, 9) == b"whole"


def test_what_may_not_last_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = location(tmp_path / "step-3").staging(SAVE)
    staging.make()
    staging.replace_file(MANIFEST, b"{}")
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", _fail)
        with pytest.raises(OSError, match="lost power"):
            staging.publish(location(tmp_path / "step-3"))
    assert committed_steps(tmp_path) == []
    assert staging.has_file(MANIFEST)


@pytest.mark.parametrize("clear", [claim_step_folder, lambda step: remove_leftovers(step.parent)])
@pytest.mark.parametrize("moment", ["move", "remove"])
def test_a_save_that_is_removed_is_published_whole_or_never(
    moment: str, clear: Callable[[Location], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job commits just before a removal's first look at its folder, or before its first
    deletion."""
    step = location(tmp_path / "step-3")
    staging = step.staging(SAVE)
    staging.make()
    staging.replace_file(MANIFEST, b"{}")
    real = getattr(type(step), moment)
    outcomes: list[OSError | None] = []

    def publish_first(self: Location, *args: Any) -> None:
        try:
            staging.publish(step)
            outcomes.append(None)
        except OSError as error:
            outcomes.append(error)
        real(self, *args)

    monkeypatch.setattr(type(step), moment, publish_first)
    clear(step)
    [outcome] = outcomes
    assert (outcome is None) == (moment == "move")
    assert committed_steps(tmp_path) == ([3] if outcome is None else [])
    assert [path.name for path in tmp_path.iterdir()] == (["step-3"] if outcome is None else [])


def test_a_claim_that_meets_a_commit_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job's manifest appears between the look and the removal."""
    left = location(tmp_path / "step-3")
    left.make()
    real = type(left).move

    def move(self: Location, to: Location, last: str) -> None:
        if self == left:
            left.replace_file(MANIFEST, b"{}")
        real(self, to, last)

    monkeypatch.setattr(type(left), "move", move)
    with pytest.raises(ConfigError, match="another job has just committed"):
        claim_step_folder(left)
    assert committed_steps(tmp_path) == [3]


def test_a_step_that_is_being_removed_never_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_step(tmp_path, 3)
    with monkeypatch.context() as crash:
        crash.setattr(shutil, "rmtree", _fail)
        with pytest.raises(OSError, match="lost power"):
            remove_step(tmp_path, 3)
    assert committed_steps(tmp_path) == uncommitted_steps(tmp_path) == []
    assert [path.name.startswith(REMOVING) for path in tmp_path.iterdir()] == [True]


def test_a_stores_step_loses_its_manifest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    place = location(f"memory://{uuid.uuid4().hex}/run")
    make_step(place, 3)
    with monkeypatch.context() as crash:
        crash.setattr(MemoryFileSystem, "rm", _fail)
        with pytest.raises(OSError, match="lost power"):
            remove_step(place, 3)
    assert committed_steps(place) == []
    assert uncommitted_steps(place) == [3]


def _fail(*_: object, **__: object) -> None:
    raise OSError("lost power")
