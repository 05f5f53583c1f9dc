"""Places for checkpoints: what a local folder and an fsspec URL promise alike, and each on its own."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import sys
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from effx_dist.checkpoint.storage import local_folder as local_module
from effx_dist.checkpoint.storage.local_folder import STAGED
from effx_dist.checkpoint.storage.places import LocalFolder, Location, RemoteFolder, location
from effx_dist.errors import ConfigError, CorruptCheckpointError

Fail = Callable[..., None]


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """An empty folder that has been made."""
    remote = f"memory://run-{uuid.uuid4().hex}/a"
    made = location(remote if request.param == "remote" else tmp_path / "a")
    made.make()
    return made


def write(place: Location, name: str, content: bytes) -> None:
    """A new file."""
    new = place.create_file(name)
    new.write(content)
    new.commit()
    new.discard()  # does nothing any more


class TestEveryPlace:
    def test_what_was_committed_is_there(self, place: Location) -> None:
        new = place.create_file("data")
        new.write(b"012")
        new.write(b"345")
        new.commit()
        new.discard()
        file, num_bytes = place.open_file("data")
        with file:
            assert (num_bytes, file.read()) == (6, b"012345")
            assert (file.seek(2), file.read(2), file.seek(1), file.read(9)) == (
                2,
                b"23",
                1,
                b"12345",
            )
        assert place.files() == {"data": 6}
        assert (place.size_of("data"), place.has_file("data")) == (6, True)
        assert place.read_file("data", 6) == b"012345"
        assert place.read_start("data", 4) == b"0123"

    def test_what_is_missing_is_said_to_be(self, place: Location) -> None:
        nowhere = place / "nowhere"
        assert (nowhere.folders(), nowhere.files()) == ([], {})
        assert (nowhere.is_folder(), nowhere.has_file("x"), place.size_of("x")) == (
            False,
            False,
            None,
        )
        for read in (place.open_file, lambda name: place.read_start(name, 3)):
            with pytest.raises(CorruptCheckpointError, match=r"a/x.*incomplete"):
                read("x")
        place.remove_file("x")

    def test_a_small_file_has_a_bound(self, place: Location) -> None:
        place.replace_file("small", b"1234567")
        with pytest.raises(CorruptCheckpointError, match="7 bytes, more than the 6"):
            place.read_file("small", 6)

    def test_a_file_is_replaced_as_a_whole(self, place: Location) -> None:
        place.replace_file("latest", b"a longer text")
        place.replace_file("latest", b"new")
        assert place.read_file("latest", 64) == b"new"
        assert place.files() == {"latest": 3}

    def test_a_folder_moves_with_all_that_is_in_it(self, place: Location) -> None:
        (place / "step-1" / "merged").make()
        write(place / "step-1", "data", b"1")
        write(place / "step-1" / "merged", "last", b"22")
        write(place / "step-1", "last", b"333")
        (place / "step-1").move(place / "aside", "last")
        assert place.folders() == ["aside"]
        assert (place / "aside").files() == {"data": 1, "last": 3}
        assert (place / "aside" / "merged").files() == {"last": 2}
        (place / "aside").remove()
        assert place.folders() == []

    def test_a_folder_is_no_file(self, place: Location) -> None:
        (place / "sub").make()
        write(place / "sub", "data", b"1")
        assert place.files() == {}
        assert place.folders() == ["sub"]
        assert not place.has_file("sub")
        with pytest.raises(CorruptCheckpointError, match="sub"):
            place.open_file("sub")

    def test_it_goes_to_other_threads_and_through_pickle(self, place: Location) -> None:
        write(place, "data", b"1")
        again = pickle.loads(pickle.dumps(place))
        assert (again, again.files()) == (place, {"data": 1})
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(again.read_file, "data", 9).result() == b"1"

    def test_its_parts_have_names(self, place: Location) -> None:
        sub = place / "step-3"
        assert (sub.name, sub.parent, str(sub)) == ("step-3", place, f"{place}/step-3")
        assert os.fspath(sub) == str(sub)
        assert location(str(sub)) == sub


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nosuchthing://x/y", r"nosuchthing.*install.*or give a local path"),
        ("simplecache::s3://bucket/run", r"chain of file systems"),
        (Path("s3://bucket/run"), r"'s3:/bucket/run'.*as strings"),
    ],
)
def test_what_cannot_hold_checkpoints_is_refused_with_a_remedy(
    text: str | Path, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        location(text)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(ConfigError, match=r"s3fs.*effx-dist\[s3\]"):
        location("s3://bucket/run")


def test_file_urls_are_local(tmp_path: Path) -> None:
    assert location(f"file://{tmp_path}/run/") == LocalFolder(tmp_path / "run")
    assert location(str(tmp_path)) == location(tmp_path)


@pytest.mark.parametrize("url", ["memory://a/b", "memory://a/b/", "memory://a/b//"])
def test_trailing_slashes_do_not_matter(url: str) -> None:
    place = location(url)
    assert isinstance(place, RemoteFolder)
    assert (place, place.name) == (location("memory://a/b"), "b")
    assert str(place.parent / "c") == "memory://a/c"


class TestLocalFolder:
    def test_links_are_not_followed_for_a_file_or_a_listing(self, tmp_path: Path) -> None:
        secret = tmp_path / "secret"
        secret.write_bytes(b"secret")
        run = tmp_path / "run"
        run.mkdir()
        (run / "data").symlink_to(secret)
        (run / "step-1").symlink_to(tmp_path)
        place = location(run)
        assert (place.files(), place.folders(), place.has_file("data")) == ({}, [], False)
        with pytest.raises(CorruptCheckpointError, match="cannot be opened"):
            place.open_file("data")
        assert ((place / "step-1").is_folder(), (place / "step-1").is_link()) == (False, True)
        assert (place / "step-1").files() == {}

    def test_a_run_folder_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "scratch").mkdir()
        (tmp_path / "run").symlink_to(tmp_path / "scratch")
        place = location(tmp_path / "run")
        (place / "step-1").make()
        write(place / "step-1", "data", b"1")
        (tmp_path / "scratch" / f"latest.0a{STAGED}").write_bytes(b"cut off")
        place.remove_unfinished()
        assert (place.folders(), (place / "step-1").files()) == (["step-1"], {"data": 1})
        assert [p.name for p in (tmp_path / "scratch").iterdir()] == ["step-1"]

    def test_a_pipe_is_refused_without_waiting_for_it(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "data")
        with pytest.raises(CorruptCheckpointError, match="not a regular file"):
            location(tmp_path).open_file("data")

    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_an_existing_file_survives_a_write_that_fails(
        self, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = location(tmp_path)
        place.replace_file("latest", b"old")
        with monkeypatch.context() as crash:
            crash.setattr(os, call, _fail)
            with pytest.raises(OSError, match="lost power"):
                place.replace_file("latest", b"new")
        assert place.read_file("latest", 9) == b"old"
        place.replace_file("latest", b"newer")
        assert place.read_file("latest", 9) == b"newer"
        assert [p.name for p in tmp_path.iterdir()] == ["latest"]

    def test_a_file_is_durable_before_it_takes_its_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = _recorded(monkeypatch, "fsync", "replace")
        location(tmp_path).replace_file("manifest.json", b"{}")
        assert calls == ["fsync", "replace", "fsync"]

    def test_every_new_folder_is_made_durable_in_the_one_above(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = _recorded(monkeypatch, "mkdir", "fsync")
        location(tmp_path / "a" / "b" / "c").make()
        assert calls == ["mkdir", "fsync"] * 3
        with pytest.raises(FileExistsError):
            location(tmp_path / "a" / "b").make()

    def test_a_file_system_without_folder_syncs_is_put_up_with(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if os.path.isdir(f"/proc/self/fd/{descriptor}"):
                raise OSError(errno.EINVAL, "Invalid argument")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        location(tmp_path).replace_file("latest", b"new")
        assert (tmp_path / "latest").read_bytes() == b"new"

    def test_a_folder_that_another_node_has_just_made_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        waits: list[float] = []

        def sleep(wait_s: float) -> None:
            waits.append(wait_s)
            if len(waits) == 3:
                (tmp_path / "step-1").mkdir()

        monkeypatch.setattr(local_module.time, "sleep", sleep)
        write(location(tmp_path / "step-1"), "data", b"1")
        assert len(waits) == 3

    def test_a_folder_that_is_gone_is_not_made_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(local_module.time, "sleep", lambda _: None)
        with pytest.raises(FileNotFoundError, match="gone or not visible"):
            location(tmp_path / "step-1").create_file("data")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
    def test_a_stale_answer_of_a_shared_file_system_is_asked_again(
        self, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "data").write_bytes(b"1")
        for name in ("open", "stat"):
            _once_stale(monkeypatch, name, number, tmp_path)
        place = location(tmp_path)
        assert place.has_file("data")
        assert place.read_file("data", 9) == b"1"

    def test_an_error_is_not_taken_for_a_missing_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "stat", _fail)
        with pytest.raises(OSError, match="lost power"):
            location(tmp_path).has_file("manifest.json")


def _once_stale(monkeypatch: pytest.MonkeyPatch, name: str, number: int, folder: Path) -> None:
    """Let the first ``os.<name>`` of a file in a folder fail, until the folder is listed."""
    real, listed = getattr(os, name), threading.Event()
    real_list = os.listdir

    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).parent == folder and not listed.is_set():
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    def listdir(path: Any) -> list[str]:
        listed.set()
        found: list[str] = real_list(path)
        return found

    monkeypatch.setattr(os, name, call)
    monkeypatch.setattr(os, "listdir", listdir)


class TestRemoteFolder:
    def test_what_a_library_raises_comes_as_os_errors_that_name_the_object(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = location("memory://errors/step-1")
        place.replace_file("data", b"1")
        filesystem = MemoryFileSystem
        for name in ("info", "ls", "pipe_file", "rm_file", "rm", "cat_file", "open"):
            monkeypatch.setattr(filesystem, name, _refuse)
        calls: list[Callable[[], Any]] = [
            place.is_folder,
            place.files,
            place.folders,
            place.remove,
            lambda: place.has_file("data"),
            lambda: place.open_file("data"),
            lambda: place.read_start("data", 3),
            lambda: place.create_file("data"),
            lambda: place.replace_file("data", b"2"),
            lambda: place.remove_file("data"),
        ]
        for call in calls:
            with pytest.raises(OSError, match=r"memory://errors/step-1.*Refused: not today"):
                call()

    def test_a_write_that_was_cut_short_is_noticed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        place = location("memory://short")
        filesystem = MemoryFileSystem
        real = filesystem.pipe_file
        monkeypatch.setattr(filesystem, "pipe_file", lambda fs, path, c: real(fs, path, c[:-1]))
        with pytest.raises(OSError, match=r"memory://short/latest: 2 bytes are stored of 3"):
            place.replace_file("latest", b"new")

    def test_a_write_whose_answer_was_lost_has_happened(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = location("memory://lost")
        filesystem = MemoryFileSystem
        real = filesystem.pipe_file

        def pipe_file(fs: Any, path: str, content: bytes) -> None:
            real(fs, path, content)
            raise RuntimeError("no answer")

        monkeypatch.setattr(filesystem, "pipe_file", pipe_file)
        place.replace_file("latest", b"new")
        assert place.read_file("latest", 9) == b"new"

    def test_the_whole_url_is_kept(self) -> None:
        """What stands before the path (an account, a host) is needed to open it again."""
        place = RemoteFolder("abfs://container@account.dfs.core.windows.net/run") / "step-1"
        assert str(place) == "abfs://container@account.dfs.core.windows.net/run/step-1"
        assert str(pickle.loads(pickle.dumps(place.parent))) == str(place.parent)


class Refused(Exception):
    """Of a library that knows no OSError."""


def _refuse(*_: object, **__: object) -> None:
    raise Refused("not today")


def _fail(*_: object, **__: object) -> None:
    raise OSError("lost power")


def _recorded(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The calls of ``os.<name>``, as they come."""
    calls: list[str] = []

    def record(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with contextlib.suppress(FileNotFoundError):
                result = real(*args, **kwargs)
                calls.append(name)
                return result
            raise FileNotFoundError

        return call

    for name in names:
        monkeypatch.setattr(os, name, record(name, getattr(os, name)))
    return calls
