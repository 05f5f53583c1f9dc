"""`effx compact`, `pin` and `unpin` as a user types them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.storage.steps import committed_steps
from effx_dist.cli import app
from effx_dist.shard import SoloGroup
from tests import small_chain as chain
from tests.small_chain import BASE, LINK, TOP


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    chain.build(tmp_path)
    return tmp_path


def effx(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def save_more(folder: Path, steps: range) -> None:
    """A run that keeps its newest checkpoint only."""
    model, optimizer = chain.make()
    config = chain.CONFIG.model_copy(update={"keep_latest_k": 1})
    with Checkpointer(folder, config, group=SoloGroup()) as checkpointer:
        checkpointer.load(model, optimizer)
        for step in steps:
            chain.train(model, optimizer, step)
            checkpointer.save(step, model, optimizer)


def test_compact_lets_a_run_go_on_without_what_lies_below(folder: Path) -> None:
    code, output = effx("compact", folder)
    assert code == 0
    assert f"step {TOP}: 2 links merged into a base" in output
    save_more(folder, range(TOP + 1, TOP + 3))
    assert committed_steps(folder) == [TOP, TOP + 1, TOP + 2]
    assert verify_folder(folder).findings == []


def test_compact_says_when_there_is_nothing_to_do(folder: Path) -> None:
    for words in (("compact", folder, "--step", BASE), ("compact", folder / f"step-{BASE}")):
        code, output = effx(*words)
        assert (code, "nothing to do" in output) == (0, True)


def test_a_pinned_checkpoint_stays_until_it_is_unpinned(folder: Path) -> None:
    assert effx("pin", folder, "--step", LINK) == (0, f"step {LINK}: pinned\n")
    effx("compact", folder)
    save_more(folder, range(TOP + 1, TOP + 2))
    assert committed_steps(folder) == [BASE, LINK, TOP, TOP + 1]
    chain.load(folder, LINK)
    assert effx("unpin", folder / f"step-{LINK}") == (0, f"step {LINK}: no longer pinned\n")
    save_more(folder, range(TOP + 2, TOP + 3))
    assert committed_steps(folder) == [TOP, TOP + 1, TOP + 2]


@pytest.mark.parametrize("command", ["pin", "unpin", "compact"])
def test_a_step_that_is_not_there_is_named(folder: Path, command: str) -> None:
    code, output = effx(command, folder, "--step", 77)
    assert code == 1
    assert "step 77" in output


def test_pin_asks_which(folder: Path) -> None:
    code, output = effx("pin", folder)
    assert code == 1
    assert "--step" in output
