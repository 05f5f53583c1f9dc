"""Checkpoints on a real S3 server, and what is left when that server goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from effx_dist.checkpoint import Checkpointer, ExcpReader, ExcpWriter
from effx_dist.checkpoint.saving.retention import pin, remove_leftovers
from effx_dist.checkpoint.storage.places import location
from effx_dist.checkpoint.storage.steps import committed_steps, newest_step
from effx_dist.checkpoint.tools.inspect import inspect_folder
from effx_dist.checkpoint.tools.verify import verify_folder
from effx_dist.config import ExcpConfig
from effx_dist.errors import RankFailedError
from effx_dist.shard import Group, SoloGroup
from tests.object_store import (
    BUCKET,
    Answer,
    Request,
    Store,
    cut_off,
    hang,
    lose_the_answer,
    reset,
    serving,
    status,
)
from tests.thread_ranks import run_ranks

SYNC = ExcpConfig(async_mode="sync", keep_latest_k=0, base_every=3)


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    """One server for all tests of this file."""
    with serving() as store:
        yield store


@pytest.fixture
def store(server: Store) -> Iterator[Store]:
    """The server, well before and after the test."""
    server.heal()
    server.released.clear()
    yield server
    server.heal()


@pytest.fixture
def url() -> str:
    """A run's folder that nothing has been saved to."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/run"


def prefix_of(url: str) -> str:
    """What the keys below a URL begin with."""
    return url.removeprefix(f"s3://{BUCKET}/") + "/"


class Training:
    """A small model, trained on noise that depends on the step alone."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.model = torch.nn.Linear(24, 16)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()

    def save(self, checkpointer: Checkpointer, *steps: int) -> None:
        for step in steps:
            self.step(step)
            checkpointer.save(step, self.model, self.optimizer)


def loaded(url: str, step: int | None = None) -> tuple[int, torch.Tensor]:
    """The step that a fresh run goes on from, and its weights."""
    fresh = Training()
    with Checkpointer(url, SYNC, group=SoloGroup()) as checkpointer:
        extra = checkpointer.load(fresh.model, fresh.optimizer, step=step)
    return extra["step"], fresh.model.weight.detach().clone()


def close_to(left: torch.Tensor, right: torch.Tensor) -> bool:
    """As close as the profile promises."""
    return float((left - right).norm() / right.norm()) < 0.1


def check(url: str, *steps: int) -> None:
    """These steps are committed and sound, and the newest loads."""
    assert committed_steps(url) == list(steps)
    assert verify_folder(url).findings == []
    assert loaded(url)[0] == steps[-1]


def object_named(*endings: str) -> Callable[[Request], bool]:
    """Uploads of objects whose keys end so."""
    return lambda request: request.is_upload and request.key.endswith(endings)


class TestSaving:
    def test_data_first_then_the_manifest_then_latest(self, store: Store, url: str) -> None:
        def body(group: Group) -> None:
            training = Training()
            with Checkpointer(url, SYNC, group=group) as checkpointer:
                training.save(checkpointer, 1, 2)

        since = len(store.requests)
        run_ranks(2, body)
        uploads = [key.removeprefix(prefix_of(url)) for key in store.uploads(since)]
        for step in ("step-1", "step-2"):
            own = [key for key in uploads if key.startswith(f"{step}/")]
            data = {f"{step}/rank-0000{rank}.effx" for rank in (0, 1)}
            assert own[-1] == f"{step}/manifest.json"
            assert data <= set(own[:-1])
            assert uploads[uploads.index(own[-1]) + 1] == "latest"
        check(url, 1, 2)  # saved by two ranks, loaded by one

    @pytest.mark.parametrize("mode", ["thread", "process"])
    def test_in_the_background(self, mode: Any, store: Store, url: str) -> None:
        training = Training()
        config = ExcpConfig(async_mode=mode, keep_latest_k=2, base_every=2)
        with Checkpointer(url, config) as checkpointer:
            training.save(checkpointer, 1, 2)
            pin(url, 1)
            training.save(checkpointer, 3, 4)
        check(url, 1, 3, 4)
        assert close_to(loaded(url)[1], training.model.weight.detach())

    def test_another_world_size_goes_on_and_newer_steps_are_set_aside(
        self, store: Store, url: str
    ) -> None:
        training = Training()
        with Checkpointer(url, SYNC, group=SoloGroup()) as checkpointer:
            training.save(checkpointer, 1, 2, 3)

        def body(group: Group) -> None:
            fresh = Training()
            with Checkpointer(url, SYNC, group=group) as checkpointer:
                checkpointer.load(fresh.model, fresh.optimizer, step=2)
                fresh.save(checkpointer, 3)

        run_ranks(2, body)
        check(url, 1, 2, 3)
        summaries = {summary.step: summary for summary in inspect_folder(url)}
        assert (summaries[3].kind, summaries[3].world_size) == ("link", 2)
        aside = [name for name in location(url).folders() if name.startswith("superseded-")]
        assert [name.rpartition("-")[2] for name in aside] == ["3"]

    def test_a_new_process_resumes(self, store: Store, url: str) -> None:
        training = Training()
        with Checkpointer(url, SYNC, group=SoloGroup()) as checkpointer:
            training.save(checkpointer, 1)
        program = f"""
            from tests.test_checkpoint_s3 import *
            training = Training()
            with Checkpointer({url!r}, SYNC, group=SoloGroup()) as checkpointer:
                assert checkpointer.load(training.model, training.optimizer)["step"] == 1
                training.save(checkpointer, 2)
            """
        subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
        check(url, 1, 2)
        assert inspect_folder(url)[1].kind == "link"

    @pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
    def test_dcp_saves_and_loads_by_url(self, store: Store, url: str) -> None:
        state = {"w": torch.randn(16, 16), "n": torch.arange(5)}
        dcp.save(state, storage_writer=ExcpWriter(f"{url}/step-7"))
        found = {"w": torch.zeros(16, 16), "n": torch.zeros(5, dtype=torch.int64)}
        dcp.load(found, storage_reader=ExcpReader(url))
        assert torch.equal(found["w"], state["w"])
        assert torch.equal(found["n"], state["n"])


def refusing(store: Store, url: str) -> Checkpointer:
    """A run that has committed step 1."""
    checkpointer = Checkpointer(url, SYNC, group=SoloGroup())
    Training().save(checkpointer, 1)
    return checkpointer


def fail_then_go_on(
    store: Store, url: str, applies: Callable[[Request], bool], answer: Answer
) -> list[str]:
    """Step 2 fails by name and step 3 succeeds; returns the keys that step 2 left."""
    with refusing(store, url) as checkpointer:
        training = Training()
        store.fail(applies, answer)
        with pytest.raises(RankFailedError, match="rank 0"):
            training.save(checkpointer, 2)
        store.heal()
        left = store.keys(f"{prefix_of(url)}step-2/")
        check(url, 1)
        training.save(checkpointer, 3)
    check(url, 1, 3)
    assert store.unfinished_uploads(prefix_of(url)) == []
    return left


ANY_UPLOAD = object_named("")
DATA = object_named("rank-00000.effx")
MOMENTS = object_named("moments.effx")
MANIFESTS = object_named("manifest.json")


class TestFaults:
    @pytest.mark.parametrize(
        ("applies", "answer"),
        [
            pytest.param(ANY_UPLOAD, status(503, "SlowDown"), id="503"),
            pytest.param(ANY_UPLOAD, status(500, "InternalError"), id="500"),
            pytest.param(MOMENTS, status(403, "AccessDenied"), id="403"),
            pytest.param(DATA, reset, id="reset"),
            pytest.param(DATA, cut_off, id="cut-data"),
            pytest.param(MANIFESTS, cut_off, id="cut-manifest"),
            pytest.param(MANIFESTS, reset, id="reset-manifest"),
        ],
    )
    def test_for_ever(
        self, applies: Callable[[Request], bool], answer: Answer, store: Store, url: str
    ) -> None:
        assert fail_then_go_on(store, url, applies, answer) == []

    def test_a_store_that_hangs(
        self, store: Store, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The client's own timeout does not always fire: ours is what ends the wait then."""
        monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
        monkeypatch.setattr("effx_dist.checkpoint.storage.remote_folder.ANSWER_S", 10.0)
        fail_then_go_on(store, url, DATA, hang)

    @pytest.mark.parametrize("answer", [status(503, "SlowDown"), reset, lose_the_answer])
    def test_for_a_while(self, answer: Answer, store: Store, url: str) -> None:
        with refusing(store, url) as checkpointer:
            fault = store.fail(ANY_UPLOAD, answer, times=1)
            Training().save(checkpointer, 2)
        assert fault.num_hits == 1
        check(url, 1, 2)

    def test_a_manifest_whose_answer_is_lost_is_there(self, store: Store, url: str) -> None:
        with refusing(store, url) as checkpointer:
            store.fail(MANIFESTS, lose_the_answer)
            Training().save(checkpointer, 2)
        store.heal()
        check(url, 1, 2)

    def test_a_manifest_whose_fate_is_unknown_is_whole_or_not_there(
        self, store: Store, url: str
    ) -> None:
        """It is written, but from then on the store answers nothing: the save fails, the checkpoint
        stands."""
        with refusing(store, url) as checkpointer:
            is_lost: list[bool] = []

            def lose(store: Store, environ: Any, start_response: Any) -> Any:
                is_lost.append(True)
                return lose_the_answer(store, environ, start_response)

            store.fail(lambda request: bool(is_lost), reset)
            store.fail(MANIFESTS, lose)
            training = Training()
            with pytest.raises(RankFailedError, match="rank 0"):
                training.save(checkpointer, 2)
            store.heal()
            check(url, 1, 2)
            training.save(checkpointer, 3)
        check(url, 1, 2, 3)

    def test_listings_that_lag_behind(self, store: Store, url: str) -> None:
        """They show neither what was written since nor what was removed since."""
        config = ExcpConfig(async_mode="sync", keep_latest_k=2, base_every=2)
        training = Training()
        with Checkpointer(url, config, group=SoloGroup()) as checkpointer:
            training.save(checkpointer, 1, 2)
            store.make_listings_stale()
            training.save(checkpointer, 3, 4, 5)
            assert newest_step(url) == 5
            assert loaded(url)[0] == 5
            store.has_stale_listings = False
            training.save(checkpointer, 6)
        check(url, 5, 6)

    def test_a_failed_upload_in_parts_is_given_up(self, store: Store, url: str) -> None:
        content = os.urandom(2**20) * 33
        place = location(f"{url}/step-1")
        for name in ("rank-00000.effx", "rank-00001.effx"):
            new = place.create_file(name)
            new.write(content)
            assert store.unfinished_uploads(prefix_of(url)) == [f"{prefix_of(url)}step-1/{name}"]
            if name == "rank-00000.effx":
                new.write(content)
                new.discard()
            else:
                store.fail(lambda request: request.method == "POST", status(500, "InternalError"))
                with pytest.raises(OSError, match=rf"{url}/step-1/{name}"):
                    new.commit()
                new.discard()
            del new
            store.heal()
            assert store.unfinished_uploads(prefix_of(url)) == []
        assert store.keys(prefix_of(url)) == []

    def test_the_next_start_removes_what_a_kill_left(self, store: Store, url: str) -> None:
        """SIGKILL after the first object, with an upload in parts under way."""
        with refusing(store, url):
            pass
        program = f"""
            import os, signal
            from tests.test_checkpoint_s3 import *
            place = location({url!r}) / "step-2"
            first = place.create_file("rank-00000.effx")
            first.write(b"first")
            first.commit()
            second = place.create_file("rank-00001.effx")
            second.write(bytes(33 * 2**20))
            os.kill(os.getpid(), signal.SIGKILL)
            """
        killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
        assert killed.returncode == -9
        own = prefix_of(url)
        elsewhere = location(f"{url}-of-another/step-1").create_file("rank-00000.effx")
        elsewhere.write(bytes(33 * 2**20))
        assert store.unfinished_uploads(own) == [f"{own}step-2/rank-00001.effx"]
        check(url, 1)
        remove_leftovers(url)
        assert store.unfinished_uploads(own) == []
        assert store.keys(f"{own}step-2/") == []
        elsewhere.commit()  # another run's upload was left alone
        check(url, 1)
