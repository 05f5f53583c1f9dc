"""A crash between any two deletions, or a store that falls silent, leaves all that is to stay readable."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from effx_dist.checkpoint.saving.retention import remove_leftovers, retire, set_aside_newer
from effx_dist.checkpoint.storage.places import Location, location
from effx_dist.checkpoint.storage.steps import committed_steps, uncommitted_steps
from effx_dist.checkpoint.tools.verify import verify_folder
from effx_dist.config import ExcpConfig
from tests.chain_runs import State, Training, read_whole, same_bits, save_all
from tests.made_up_steps import make_chain

RETIRING = ExcpConfig(keep_latest_k=1)


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    """Two chains of three real checkpoints, and what they hold."""
    folder = tmp_path_factory.mktemp("real") / "run"
    training = Training({"w": (8, 16), "b": (5,)})
    states = [training.advance(1) for _ in range(6)]
    save_all(folder, states, ExcpConfig(base_every=3, async_mode="sync"))
    with_whole = [read_whole(folder, step) for step in range(6)]
    return folder, with_whole


@contextmanager
def crash_at(number: int, operations: Mapping[Any, list[str]]) -> Iterator[list[int]]:
    """Let the ``number``-th of these file-system operations, and all after it, fail; counts them."""
    count = [0]

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] > number:
                raise OSError("lost power")
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, names in operations.items():
            for name in names:
                patch.setattr(owner, name, guarded(getattr(owner, name)))
        yield count


LOCAL = {os: ["unlink", "rmdir", "rename", "replace", "fsync"]}
REMOTE = {MemoryFileSystem: ["rm_file", "pipe_file", "cp_file"]}


def copy_of(folder: Path, kind: str, tmp_path: Path) -> Location:
    """The run once more, in a new place."""
    if kind == "local":
        return location(shutil.copytree(folder, tmp_path / uuid.uuid4().hex))
    url = f"memory://{uuid.uuid4().hex}/run"
    MemoryFileSystem().put(f"{folder}/", url, recursive=True)
    return location(url)


def contents(place: Location) -> set[str]:
    """All files below a folder."""
    below = {f"{name}/{file}" for name in place.folders() for file in contents(place / name)}
    return below | set(place.files())


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_crash_at_any_operation_leaves_what_is_kept_readable(
    kind: str, real_run: tuple[Path, list[State]], tmp_path: Path
) -> None:
    folder, states = real_run
    operations = LOCAL if kind == "local" else REMOTE
    undisturbed = copy_of(folder, kind, tmp_path)
    with crash_at(10**6, operations) as count:
        retire(undisturbed, RETIRING)
    assert committed_steps(undisturbed) == [3, 4, 5]
    num_operations = count[0]
    assert num_operations > 10
    for number in range(num_operations):
        run = copy_of(folder, kind, tmp_path)
        with crash_at(number, operations), pytest.raises(OSError, match="lost power"):
            retire(run, RETIRING)
        assert {3, 4, 5} <= set(committed_steps(run)), number
        assert verify_folder(run).findings == [], number
        same_bits(read_whole(run, 5), states[5])
        retire(run, RETIRING)
        assert contents(run) == contents(undisturbed), number
        assert run.folders() == undisturbed.folders(), number
        same_bits(read_whole(run, 5), states[5])


@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_crash_while_newer_steps_are_set_aside_loses_none(
    kind: str, real_run: tuple[Path, list[State]], tmp_path: Path
) -> None:
    folder, _ = real_run
    operations = LOCAL if kind == "local" else REMOTE
    with crash_at(10**6, operations) as count:
        set_aside_newer(copy_of(folder, kind, tmp_path), 3)
    for number in range(count[0]):
        run = copy_of(folder, kind, tmp_path)
        with crash_at(number, operations), pytest.raises(OSError, match="lost power"):
            set_aside_newer(run, 3)
        remove_leftovers(run)
        assert verify_folder(run).findings == [], number
        set_aside_newer(run, 3)
        aside = [name for name in run.folders() if name.startswith("superseded-")]
        assert {name.rpartition("-")[2] for name in aside} == {"4", "5"}, number
        whole = {"manifest.json", "rank-00000.effx", "rank-00000.moments.effx"}
        assert all(set((run / name).files()) == whole for name in aside), number
        assert committed_steps(run) == [0, 1, 2, 3], number


def test_a_store_that_does_not_answer_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error is no sign that a manifest is missing."""
    place = location(f"memory://{uuid.uuid4().hex}/run")
    make_chain(place, {1: None, 2: None})
    before = contents(place)

    def info(*_: object, **__: object) -> None:
        raise ConnectionError("no answer")

    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "info", info)
        for call in (remove_leftovers, uncommitted_steps, committed_steps):
            with pytest.raises(OSError, match="no answer"):
                call(place)
        with pytest.raises(OSError, match="no answer"):
            retire(place, RETIRING)
    assert contents(place) == before
