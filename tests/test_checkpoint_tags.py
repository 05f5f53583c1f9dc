"""Tags, and the two names that a step's folder may have."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from effx_dist.checkpoint import Checkpointer, inspect_folder, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.saving.retention import remove_leftovers, retire, set_aside_newer
from effx_dist.checkpoint.storage.places import Location, location
from effx_dist.checkpoint.storage.steps import (
    LATEST,
    MANIFEST,
    STEP_PREFIXES,
    TAG,
    StepPrefix,
    claim_step_folder,
    committed_steps,
    newest_step,
    step_folder,
    step_name,
    step_of,
    tagged_step,
    uncommitted_steps,
    unfinished_steps,
)
from effx_dist.checkpoint.storage.tags import checked_tag, folder_of_tag, point_to, tags_of
from effx_dist.cli import app
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from tests.made_up_steps import WEIGHTS, make_chain, make_step
from tests.runs import Run, lossless

OTHER: StepPrefix = "global_step"


@pytest.fixture(params=["local", "remote"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    """A run's folder, not made yet."""
    return location(
        tmp_path / "run" if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"
    )


def latest(place: Location) -> str:
    return place.read_file(LATEST, 256).decode()


def save(checkpoints: Checkpointer, step: int, **options: object) -> Run:
    run = Run(lr=0.1)
    run.train(step)
    checkpoints.save(step, run.model, run.optimizer, **options)  # type: ignore[arg-type]
    return run


class TestTags:
    def test_a_tag_stands_for_a_step_and_moves(self, place: Location) -> None:
        with Checkpointer(place, lossless()) as checkpoints:
            first = save(checkpoints, 1, tag="best", extra={"loss": 2.0})
            assert (tags_of(place), latest(place)) == ({"best": 1}, "best\n")
            save(checkpoints, 2)
            assert (tags_of(place), latest(place)) == ({"best": 1}, "step-2\n")
            save(checkpoints, 3, tag="last.1", moves_latest=False)
            assert (tags_of(place), latest(place)) == ({"best": 1, "last.1": 3}, "step-2\n")
            other = Run(seed=8)
            extra = checkpoints.load(other.model, other.optimizer, tag="best")
            assert extra == {"loss": 2.0, "step": 1}
            assert all(t.equal(first.state()[name]) for name, t in other.state().items())
        with Checkpointer(place, lossless()) as checkpoints:
            save(checkpoints, 4, tag="best")
            assert tags_of(place) == {"best": 4, "last.1": 3}

    @pytest.mark.slow
    def test_the_saving_process_names_a_step_after_its_commit(self, tmp_path: Path) -> None:
        config = ExcpConfig(profile="lossless", async_mode="process")
        run = Run(lr=0.1)
        run.train(1)
        with Checkpointer(tmp_path, config, step_prefix=OTHER) as checkpoints:
            checkpoints.async_save(1, run.model, run.optimizer, tag="best").wait()
        assert tags_of(tmp_path) == {"best": 1}
        assert folder_of_tag(tmp_path, "best").name == "global_step1"

    def test_a_save_that_fails_names_nothing(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, lossless()) as checkpoints:
            save(checkpoints, 1, tag="best")
            (tmp_path / step_name(2)).mkdir()
            (tmp_path / step_name(2) / "mine.txt").write_text("x")
            with pytest.raises(Exception, match="does not write"):
                save(checkpoints, 2, tag="best")
        assert (tags_of(tmp_path), latest(location(tmp_path))) == ({"best": 1}, "best\n")

    @pytest.mark.parametrize(
        "tag",
        ["", "a/b", "..", "-x", "x" * 129, "latest", "writing-0", "removing-1", "superseded-2-x"],
    )
    def test_names_that_a_folder_cannot_have_are_refused(self, tag: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="must be a name of at most 128"):
            checked_tag(tag)
        with Checkpointer(tmp_path, lossless()) as checkpoints:
            with pytest.raises(ConfigError, match="must be a name of at most 128"):
                save(checkpoints, 1, tag=tag)
            with pytest.raises(CheckpointNotFoundError):
                checkpoints.load(Run().model, tag=tag)

    @pytest.mark.parametrize("name", ["step-3", "global_step3"])
    def test_a_steps_own_name_is_no_tag_but_loads(self, name: str, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, lossless()) as checkpoints:
            with pytest.raises(ConfigError, match="is the name of a step"):
                save(checkpoints, 4, tag=name)
            save(checkpoints, 3)
            assert checkpoints.load(Run().model, tag=name)["step"] == 3

    def test_one_that_does_not_exist_names_those_that_do(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, lossless()) as checkpoints:
            save(checkpoints, 1, tag="best")
            with pytest.raises(CheckpointNotFoundError, match=r"'bset'; there are .*best.*step-1"):
                checkpoints.load(Run().model, tag="bset")
            with pytest.raises(ConfigError, match="two names for one checkpoint"):
                checkpoints.load(Run().model, tag="best", step=1)
        make_step(tmp_path, 2)
        point_to(location(tmp_path) / "step-2", "gone", moves_latest=False)
        step_folder(tmp_path, 2).remove()
        with pytest.raises(CheckpointNotFoundError, match="stands for step 2, which is gone"):
            folder_of_tag(tmp_path, "gone")

    @pytest.mark.parametrize(
        "content", [b"", b"[]", b"{}", b'{"step": -1}', b'{"step": "1"}', b"[" * 4000, b" " * 5000]
    )
    def test_a_damaged_one_is_said_and_left_out(
        self, content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        make_step(tmp_path, 1)
        (tmp_path / "best").mkdir()
        (tmp_path / "best" / TAG).write_bytes(content)
        with pytest.raises(CorruptCheckpointError, match=TAG):
            tagged_step(tmp_path, "best")
        with caplog.at_level(logging.WARNING):
            assert tags_of(tmp_path) == {}
        assert TAG in caplog.text

    def test_people_see_them(self, tmp_path: Path) -> None:
        with Checkpointer(tmp_path, lossless(), step_prefix=OTHER) as checkpoints:
            save(checkpoints, 1, tag="best")
            save(checkpoints, 2)
        assert [(s.name, s.tags) for s in inspect_folder(tmp_path)] == [
            ("global_step1", ("best",)),
            ("global_step2", ()),
        ]
        shown = CliRunner().invoke(app, ["inspect", str(tmp_path)])
        assert "tag best" in shown.output
        of_tag = CliRunner().invoke(app, ["inspect", str(tmp_path / "best"), "--json"])
        assert json.loads(of_tag.output)["step"] == 1


class TestRetention:
    def test_what_a_tag_names_stays_whole_with_what_it_builds_upon(self, place: Location) -> None:
        make_chain(place, {1: None, 2: 1, 3: 2, 4: None, 5: 4})
        point_to(step_folder(place, 2), "best", moves_latest=False)
        assert retire(place, ExcpConfig(keep_latest_k=1)) == [3]
        assert committed_steps(place) == [1, 2, 4, 5]
        assert len(step_folder(place, 2).files()) == 3
        point_to(step_folder(place, 5), "best", moves_latest=False)
        assert retire(place, ExcpConfig(keep_latest_k=1)) == [2, 1]

    def test_going_back_leaves_tagged_steps_in_place(
        self, place: Location, caplog: pytest.LogCaptureFixture
    ) -> None:
        make_chain(place, {1: None, 2: 1, 3: 2, 4: 2})
        point_to(step_folder(place, 3), "best", moves_latest=False)
        with caplog.at_level(logging.WARNING):
            [name] = set_aside_newer(place, 1)
        assert name.endswith("-step-4")
        assert committed_steps(place) == [1, 2, 3]
        assert "newer steps with a tag stay, and what they build upon: [2, 3]" in caplog.text


class TestTwoNames:
    @pytest.mark.parametrize("step", [0, 7, 10**17])
    def test_both_read_back(self, step: int) -> None:
        names = [step_name(step, prefix) for prefix in STEP_PREFIXES]
        assert len(set(names)) == 2
        assert {step_of(name) for name in names} == {step}

    def test_another_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="step_prefix='epoch'"):
            Checkpointer(tmp_path, lossless(), step_prefix="epoch")  # type: ignore[arg-type]

    def test_a_chain_goes_on_from_one_to_the_other(self, place: Location) -> None:
        for step, prefix in enumerate([*STEP_PREFIXES, *STEP_PREFIXES], start=1):
            run = Run(lr=0.1)
            with Checkpointer(place, lossless(base_every=9), step_prefix=prefix) as checkpoints:
                if step > 1:
                    assert checkpoints.load(run.model, run.optimizer)["step"] == step - 1
                run.train(1)
                checkpoints.save(step, run.model, run.optimizer)
            assert step_folder(place, step).name == step_name(step, prefix)
        assert committed_steps(place) == [1, 2, 3, 4]
        assert newest_step(place) == 4
        manifest, _ = read_manifest(step_folder(place, 4))
        assert manifest.parent is not None
        assert (manifest.kind, manifest.parent.name) == ("link", "step-3")
        assert [s.base for s in inspect_folder(place)] == ["step-1"] * 4
        assert not verify_folder(place).findings
        assert retire(place, ExcpConfig(keep_latest_k=1)) == []
        assert set_aside_newer(place, 2)[0].endswith(f"-{step_name(4, OTHER)}")
        assert committed_steps(place) == [1, 2]

    @pytest.mark.parametrize("prefixes", [STEP_PREFIXES, STEP_PREFIXES[::-1]])
    def test_one_step_has_one_of_them(
        self, prefixes: tuple[StepPrefix, StepPrefix], place: Location
    ) -> None:
        make_step(place, 1, at=step_name(1, prefixes[0]))
        with pytest.raises(ConfigError, match="never overwritten"):
            claim_step_folder(place / step_name(1, prefixes[1]))

    def test_a_save_that_was_cut_off_is_seen_and_removed(self, place: Location) -> None:
        staging = (place / step_name(2, OTHER)).staging("0123456789")
        staging.make()
        staging.replace_file(WEIGHTS, b"1")
        assert unfinished_steps(place) == [2]
        remove_leftovers(place)
        assert unfinished_steps(place) == []
        assert place.folders() == []


@pytest.mark.parametrize(
    "touch",
    [
        remove_leftovers,
        lambda place: retire(place, ExcpConfig(keep_latest_k=1)),
        lambda place: set_aside_newer(place, 0),
    ],
    ids=["start", "retention", "going back"],
)
def test_checkpoints_of_deepspeeds_own_are_left_alone(
    touch: Callable[[Location], object], place: Location
) -> None:
    """They have the same names, and no manifest."""
    own = place / step_name(3, OTHER)
    own.make()
    own.replace_file("mp_rank_00_model_states.pt", b"weights")
    make_chain(place, {1: None, 2: None, 5: None})
    touch(place)
    assert own.has_file("mp_rank_00_model_states.pt")
    assert uncommitted_steps(place) == []
    assert not own.has_file(MANIFEST)
    with pytest.raises(ConfigError, match="DeepSpeed's own checkpoint of that step, which stays"):
        claim_step_folder(own)
