"""A base made from a chain: the same values, without what lies below."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from effx_dist.checkpoint import verify_folder
from effx_dist.checkpoint.format.block_files import BlockWriter
from effx_dist.checkpoint.format.manifest import BlockRecord
from effx_dist.checkpoint.saving.retention import retire
from effx_dist.checkpoint.storage.steps import MANIFEST, MERGED, committed_steps, step_name
from effx_dist.checkpoint.tools import compact as compact_module
from effx_dist.checkpoint.tools.compact import compact
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError
from tests.chain_runs import (
    State,
    Training,
    flat,
    go_on,
    read_whole,
    rows,
    same_bits,
    save_all,
    uneven_rows,
)

CONFIG = ExcpConfig(profile="balanced", keep_latest_k=0)
LOSSLESS = ExcpConfig(profile="lossless", keep_latest_k=0)
NUM_STEPS = 6
MIDDLE = 3


def states(count: int = NUM_STEPS) -> list[State]:
    training = Training()
    return [training.advance() for _ in range(count)]


def all_steps(folder: Path) -> dict[int, State]:
    return {step: read_whole(folder, step) for step in committed_steps(folder)}


def same_steps(left: dict[int, State], right: dict[int, State]) -> None:
    for step, state in left.items():
        same_bits(state, right[step])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A base and five links, cut over two ranks."""
    save_all(tmp_path / "run", states(), CONFIG, 2, uneven_rows)
    return tmp_path / "run"


@pytest.mark.parametrize("config", [CONFIG, LOSSLESS], ids=["balanced", "lossless"])
@pytest.mark.parametrize("cut", [rows, flat])
def test_all_later_steps_read_the_same_without_what_lies_below(
    config: ExcpConfig, cut: object, tmp_path: Path
) -> None:
    save_all(tmp_path / "run", states(), config, 3, cut)  # type: ignore[arg-type]
    before = all_steps(tmp_path / "run")
    done = compact(tmp_path / "run", MIDDLE)
    assert done is not None
    assert (done.step, done.num_links) == (MIDDLE, MIDDLE)
    for step in range(MIDDLE):
        shutil.rmtree(tmp_path / "run" / step_name(step))
    after = all_steps(tmp_path / "run")
    assert sorted(after) == list(range(MIDDLE, NUM_STEPS))
    same_steps(after, before)
    assert not verify_folder(tmp_path / "run").findings


def test_what_was_merged_once_is_left_alone(folder: Path) -> None:
    assert compact(folder) is not None
    assert compact(folder) is None
    assert compact(folder, 0) is None  # a base


def test_a_step_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="step 77"):
        compact(folder, 77)


def test_a_run_goes_on_above_it_at_another_world_size(folder: Path) -> None:
    compact(folder)
    for step in range(NUM_STEPS - 1):
        shutil.rmtree(folder / step_name(step))
    more = states(NUM_STEPS + 2)[NUM_STEPS:]
    go_on(folder, {NUM_STEPS + i: state for i, state in enumerate(more)}, CONFIG, 1, rows)
    assert not verify_folder(folder).findings
    kept = all_steps(folder)
    assert compact(folder) is not None
    same_steps(all_steps(folder), kept)


def test_retention_lets_go_of_what_lies_below(folder: Path) -> None:
    before = all_steps(folder)
    config = ExcpConfig(keep_latest_k=2)
    assert retire(folder, config) == []  # every step is needed by the next
    compact(folder, MIDDLE)
    assert sorted(retire(folder, config)) == list(range(MIDDLE))
    for step in (NUM_STEPS - 2, NUM_STEPS - 1):
        same_bits(read_whole(folder, step), before[step])
    assert not verify_folder(folder).findings


class FailsInTheMiddle(BlockWriter):
    """A disk that is full after some blocks."""

    left = 1

    def append(self, payload: bytes) -> BlockRecord:
        FailsInTheMiddle.left -= 1
        if FailsInTheMiddle.left < 0:
            raise OSError(28, "No space left on device")
        return super().append(payload)


def test_a_full_disk_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = all_steps(folder)
    monkeypatch.setattr("effx_dist.checkpoint.format.block_files.BlockWriter", FailsInTheMiddle)
    with pytest.raises(OSError, match="No space left"):
        compact(folder)
    monkeypatch.undo()
    assert not (folder / step_name(NUM_STEPS - 1) / MERGED).exists()
    same_steps(all_steps(folder), before)
    assert compact(folder) is not None


def test_what_a_crash_left_is_made_anew(folder: Path) -> None:
    before = all_steps(folder)
    left = folder / step_name(MIDDLE) / MERGED
    left.mkdir()
    (left / "rank-00000.effx").write_bytes(b"half")
    same_steps(all_steps(folder), before)
    assert compact(folder, MIDDLE) is not None
    same_steps(all_steps(folder), before)


def test_a_base_of_another_chain_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    save_all(other, states()[1:], CONFIG, 2, uneven_rows)
    compact(other, MIDDLE)
    shutil.copytree(other / step_name(MIDDLE) / MERGED, folder / step_name(MIDDLE) / MERGED)
    with pytest.raises(CorruptCheckpointError, match="made from another checkpoint"):
        read_whole(folder, NUM_STEPS - 1)
    assert verify_folder(folder).findings


def test_what_does_not_read_back_is_not_committed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = all_steps(folder)
    real = compact_module.ChunkEncoder.planes

    def forgetful(self: object, box: object, part: object, *rest: object) -> object:
        return real(self, box, part * 2, *rest)  # type: ignore[arg-type, operator]

    monkeypatch.setattr(compact_module.ChunkEncoder, "planes", forgetful)
    with pytest.raises(CorruptCheckpointError, match="does not read back"):
        compact(folder)
    assert not (folder / step_name(NUM_STEPS - 1) / MERGED / MANIFEST).exists()
    same_steps(all_steps(folder), before)


def test_a_flipped_bit_in_it_is_noticed(folder: Path) -> None:
    compact(folder)
    path = folder / step_name(NUM_STEPS - 1) / MERGED / "rank-00000.effx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptCheckpointError, match=MERGED):
        read_whole(folder, NUM_STEPS - 1)
    assert any(MERGED in finding for finding in verify_folder(folder).findings)
