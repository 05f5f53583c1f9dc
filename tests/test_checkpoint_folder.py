"""Names in a checkpoint folder, what counts as committed, and what retention may remove."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effx_dist.checkpoint import folder as folder_module
from effx_dist.checkpoint.folder import (
    MANIFEST,
    checked_rank_file_name,
    checked_sibling_name,
    claim_step_folder,
    committed_steps,
    local_folder,
    newest_step,
    rank_file_name,
    remove_step,
    replace_file,
    require_committed,
    step_name,
    step_of,
    uncommitted_steps,
)
from effx_dist.checkpoint.manifest import (
    Figures,
    Manifest,
    ParentRecord,
    manifest_checksum,
    manifest_to_bytes,
    write_manifest,
)
from effx_dist.checkpoint.retention import (
    remove_leftovers,
    retire,
    set_aside_newer,
    steps_to_keep,
)
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError


def make_step(folder: Path, step: int, parent: int | None = None) -> None:
    """A committed checkpoint without tensors."""
    above = None
    if parent is not None:
        path = folder / step_name(parent) / MANIFEST
        above = ParentRecord(
            name=step_name(parent), xxh3=manifest_checksum(path.read_bytes(), path)
        )
    figures = Figures(
        raw_bytes=0,
        stored_bytes=0,
        run_raw_bytes=0,
        run_stored_bytes=0,
        saves_since_base=0,
        error=0,
    )
    manifest = Manifest(
        step=step,
        kind="base" if parent is None else "link",
        parent=above,
        profile="balanced",
        world_size=1,
        saved_at="2026-01-01T00:00:00+00:00",
        writer="a test",
        files=[],
        figures=figures,
        tensors={},
    )
    path = folder / step_name(step)
    path.mkdir(parents=True)
    write_manifest(path, manifest_to_bytes(manifest))


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
    name = rank_file_name(rank)
    assert checked_rank_file_name(name, "here") == name


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


@pytest.mark.parametrize("url", ["s3://bucket/x", "memory://x"])
def test_urls_are_refused_by_name(url: str) -> None:
    with pytest.raises(ConfigError, match=url):
        local_folder(url)


def test_a_checkpoint_exists_when_its_manifest_does(tmp_path: Path) -> None:
    make_step(tmp_path, 9)
    make_step(tmp_path, 10)
    (tmp_path / "step-11").mkdir()
    (tmp_path / "step-12").mkdir()
    (tmp_path / "step-12" / (MANIFEST + ".tmp")).write_bytes(b"{")
    (tmp_path / "step-13").mkdir()
    (tmp_path / "step-13" / MANIFEST).mkdir()
    (tmp_path / "step-14").write_bytes(b"a file")
    (tmp_path / "latest").write_text("step-11\n")
    assert committed_steps(tmp_path) == [9, 10]
    assert uncommitted_steps(tmp_path) == [11, 12, 13]
    assert newest_step(tmp_path) == 10
    assert require_committed(tmp_path, 9) == 9


def test_a_link_to_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    make_step(tmp_path / "elsewhere", 1)
    run = tmp_path / "run"
    run.mkdir()
    (run / "step-1").symlink_to(tmp_path / "elsewhere" / "step-1")
    assert committed_steps(run) == []
    assert uncommitted_steps(run) == []


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert committed_steps(missing) == []
    with pytest.raises(CheckpointNotFoundError, match="missing"):
        newest_step(missing)
    make_step(tmp_path, 3)
    with pytest.raises(CheckpointNotFoundError, match=r"step 4 .* \[3\]"):
        require_committed(tmp_path, 4)


def test_a_committed_checkpoint_is_never_claimed(tmp_path: Path) -> None:
    make_step(tmp_path, 3)
    with pytest.raises(ConfigError, match="never overwritten"):
        claim_step_folder(tmp_path / "step-3")
    assert committed_steps(tmp_path) == [3]


def test_claiming_removes_what_was_left_half_done(tmp_path: Path) -> None:
    left = tmp_path / "step-3"
    left.mkdir()
    (left / "rank-00000.effx").write_bytes(b"half")
    claim_step_folder(left)
    assert list(left.iterdir()) == []


def test_removing_a_step_takes_its_manifest_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_step(tmp_path, 3)
    (tmp_path / "step-3" / "rank-00000.effx").write_bytes(b"data")
    with monkeypatch.context() as crash:
        crash.setattr(folder_module.shutil, "rmtree", _fail)
        with pytest.raises(OSError, match="lost power"):
            remove_step(tmp_path, 3)
    assert committed_steps(tmp_path) == []
    assert uncommitted_steps(tmp_path) == [3]
    remove_step(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def _fail(*_: object, **__: object) -> None:
    raise OSError("lost power")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_an_existing_file_survives_a_write_that_fails(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "latest"
    replace_file(path, b"old")
    with monkeypatch.context() as crash:
        crash.setattr(os, call, _fail)
        with pytest.raises(OSError, match="lost power"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    replace_file(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert [p.name for p in tmp_path.iterdir()] == ["latest"]


def test_a_file_is_durable_before_it_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, _real=real, _name=name: (calls.append(_name), _real(*args))[1]
        )
    replace_file(tmp_path / MANIFEST, b"{}")
    assert calls == ["fsync", "replace", "fsync"]


# Retention


@st.composite
def chains(draw: st.DrawFn) -> dict[int, int | None]:
    """Steps and their parents, each an older step or none."""
    steps = sorted(draw(st.sets(st.integers(0, 40), min_size=1, max_size=12)))
    return {step: draw(st.sampled_from([None, *steps[:index]])) for index, step in enumerate(steps)}


RULES = st.builds(
    ExcpConfig, keep_latest_k=st.integers(0, 4), keep_every_n=st.sampled_from([0, 1, 3, 10])
)


@given(chains(), RULES)
def test_what_is_kept_has_its_parents_and_the_newest(
    parent_of: dict[int, int | None], config: ExcpConfig
) -> None:
    kept = steps_to_keep(parent_of, parent_of, config)
    assert kept <= parent_of.keys()
    assert all(parent_of[step] is None or parent_of[step] in kept for step in kept)
    assert max(parent_of) in kept


@given(chains(), RULES)
def test_nothing_is_kept_without_a_reason(
    parent_of: dict[int, int | None], config: ExcpConfig
) -> None:
    kept = steps_to_keep(parent_of, parent_of, config)
    num_latest = config.keep_latest_k or len(parent_of)
    wanted = set(sorted(parent_of)[-num_latest:])
    wanted |= {s for s in parent_of if config.keep_every_n and s % config.keep_every_n == 0}
    assert wanted <= kept
    assert all(any(parent_of[child] == step for child in kept) for step in kept - wanted)


def test_retire_removes_the_rest_and_no_base_that_is_needed(tmp_path: Path) -> None:
    for step, parent in {0: None, 1: 0, 2: 1, 3: None, 4: 3, 5: 4}.items():
        make_step(tmp_path, step, parent)
    assert retire(tmp_path, ExcpConfig(keep_latest_k=1)) == [2, 1, 0]
    assert committed_steps(tmp_path) == [3, 4, 5]
    assert retire(tmp_path, ExcpConfig(keep_latest_k=1)) == []


def test_retire_keeps_everything_when_told_to(tmp_path: Path) -> None:
    for step in range(4):
        make_step(tmp_path, step)
    assert retire(tmp_path, ExcpConfig(keep_latest_k=0)) == []
    assert committed_steps(tmp_path) == [0, 1, 2, 3]


def test_a_crash_while_retiring_leaves_no_orphan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step, parent in {0: None, 1: 0, 2: 1, 3: None}.items():
        make_step(tmp_path, step, parent)
    with monkeypatch.context() as crash:
        crash.setattr(folder_module.shutil, "rmtree", _fail)
        with pytest.raises(OSError, match="lost power"):
            retire(tmp_path, ExcpConfig(keep_latest_k=1))
    assert committed_steps(tmp_path) == [0, 1, 3]  # the newest went first: 1 still has its parent


def test_a_damaged_old_manifest_makes_retention_remove_nothing_that_is_needed(
    tmp_path: Path,
) -> None:
    for step, parent in {0: None, 1: 0, 2: 1, 3: 2}.items():
        make_step(tmp_path, step, parent)
    (tmp_path / "step-1" / MANIFEST).write_bytes(b"{damaged")
    with contextlib.suppress(CorruptCheckpointError):
        retire(tmp_path, ExcpConfig(keep_latest_k=1))
    assert {0, 1, 2, 3} <= set(committed_steps(tmp_path))


def test_leftovers_go_and_committed_steps_stay(tmp_path: Path) -> None:
    make_step(tmp_path, 1)
    (tmp_path / "step-2").mkdir()
    (tmp_path / "notes").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes", "step-1"]


def test_newer_checkpoints_are_set_aside_and_not_lost(tmp_path: Path) -> None:
    for step, parent in {1: None, 2: 1, 3: 2}.items():
        make_step(tmp_path, step, parent)
    names = set_aside_newer(tmp_path, 1)
    assert [name.rpartition("-step-")[2] for name in names] == ["3", "2"]
    assert committed_steps(tmp_path) == [1]
    assert all((tmp_path / name / MANIFEST).is_file() for name in names)
    make_step(tmp_path, 2, 1)
    assert len(set(set_aside_newer(tmp_path, 1)) | set(names)) == 3
    assert set_aside_newer(tmp_path, 1) == []
