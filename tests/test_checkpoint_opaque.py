"""Pickles and other bytes of planners that are not ours: refused, or kept unread where that is asked for."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, WriteItem
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from effx_dist.checkpoint import (
    ExcpLoadPlanner,
    ExcpReader,
    ExcpSavePlanner,
    ExcpWriter,
    inspect_folder,
    verify_folder,
)
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.state.tree import MAX_OPAQUE_BYTES, parse_value, payload_of
from effx_dist.config import ExcpConfig
from effx_dist.errors import CorruptCheckpointError
from tests.ranks import spawn

no_group = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized"
)


def never(name: str, value: Any) -> bytes:
    raise AssertionError("opaque bytes are not pickled once more")


class Unpickled:
    """Leaves a file behind where somebody unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def state_of(seed: int, **others: Any) -> dict[str, Any]:
    """A weight with the moments that belong to it, and whatever else."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 30, generator=random)
    moments = {"exp_avg": weight / 100, "exp_avg_sq": weight.square() / 1e4}
    return {"model": {"w": weight}, "optim": {"w": moments}, **others}


def zeroed() -> dict[str, Any]:
    moments = {"exp_avg": torch.zeros(40, 30), "exp_avg_sq": torch.zeros(40, 30)}
    return {"model": {"w": torch.zeros(40, 30)}, "optim": {"w": moments}}


def lossless() -> ExcpConfig:
    return ExcpConfig(profile="lossless")


@no_group
class TestOneRank:
    def test_the_stock_planners_bring_their_pickles_back(self, tmp_path: Path) -> None:
        others = {"epoch": 3, "when": (1, 2.5), "kinds": {torch.float32, torch.int64}}
        writer = ExcpWriter(tmp_path / "step-1", lossless(), allow_opaque_bytes=True)
        dcp.save(state_of(1, **others), storage_writer=writer)
        found = {**zeroed(), "epoch": 0, "when": (0, 0.0), "kinds": None}
        reader = ExcpReader(tmp_path / "step-1", allow_opaque_bytes=True)
        dcp.load(found, storage_reader=reader)
        assert torch.equal(found["model"]["w"], state_of(1)["model"]["w"])
        assert {name: found[name] for name in others} == others

    def test_they_are_marked_and_whoever_looks_in_copes(self, tmp_path: Path) -> None:
        writer = ExcpWriter(tmp_path / "step-1", lossless(), allow_opaque_bytes=True)
        dcp.save(state_of(1, epoch=3), storage_writer=writer)
        manifest, _ = read_manifest(tmp_path / "step-1")  # type: ignore[arg-type]
        assert manifest.values.keys() == {"epoch"}
        assert manifest.values["epoch"].keys() == {"$opaque"}
        assert verify_folder(tmp_path).findings == []
        assert [step.step for step in inspect_folder(tmp_path)] == [1]

    def test_nothing_of_ours_unpickles_them(self, tmp_path: Path) -> None:
        trace = tmp_path / "unpickled"
        writer = ExcpWriter(tmp_path / "step-1", lossless(), allow_opaque_bytes=True)
        dcp.save(state_of(1, trap=Unpickled(trace)), storage_writer=writer)
        assert verify_folder(tmp_path).findings == []
        for allow, planner, message in (
            (False, DefaultLoadPlanner(), "trap: is stored as bytes .*allow_opaque_bytes=True"),
            (False, ExcpLoadPlanner(), "trap: is stored as bytes .*allow_opaque_bytes=True"),
            (True, ExcpLoadPlanner(), "trap: is no JSON but the bytes of another planner"),
        ):
            reader = ExcpReader(tmp_path / "step-1", allow_opaque_bytes=allow)
            with pytest.raises(CheckpointException, match=message) as caught:
                dcp.load({"trap": None}, storage_reader=reader, planner=planner)
            assert isinstance(caught.value.failures[0][0], TypeError)
        dcp.load(zeroed(), storage_reader=ExcpReader(tmp_path / "step-1"))
        assert not trace.exists()
        reader = ExcpReader(tmp_path / "step-1", allow_opaque_bytes=True)
        dcp.load({"trap": None}, storage_reader=reader)
        assert trace.exists(), "else the checks above would have found nothing"

    @pytest.mark.parametrize("planner", [None, ExcpLoadPlanner()], ids=["torch's", "ours"])
    def test_json_is_read_by_either_planner(self, planner: Any, tmp_path: Path) -> None:
        """The stock one unpickles: what it gets is pickled here, of plain values."""
        notes = {"names": ["a", (1, None)], "rate": float("inf"), "raw": b"bytes"}
        writer = ExcpWriter(tmp_path / "step-1", lossless())
        saved = state_of(1, epoch=3, **notes)
        dcp.save(saved, storage_writer=writer, planner=ExcpSavePlanner())
        found = {**zeroed(), "epoch": 0, **dict.fromkeys(notes)}
        dcp.load(found, storage_reader=ExcpReader(tmp_path / "step-1"), planner=planner)
        assert {key: found[key] for key in ("epoch", *notes)} == {"epoch": 3, **notes}

    @pytest.mark.parametrize("allow", [False, True])
    def test_a_value_that_looks_like_the_mark_stays_a_value(
        self, allow: bool, tmp_path: Path
    ) -> None:
        tricky = {"$opaque": "aGk="}
        writer = ExcpWriter(tmp_path / "step-1", allow_opaque_bytes=allow)
        state = {"notes": [tricky], **tricky}
        dcp.save(state, storage_writer=writer, planner=ExcpSavePlanner(flatten_state_dict=False))
        found = dict.fromkeys(state)
        dcp.load(
            found,
            storage_reader=ExcpReader(tmp_path / "step-1"),
            planner=ExcpLoadPlanner(flatten_state_dict=False),
        )
        assert found == state


def test_json_that_is_the_mark_is_taken_for_bytes_or_not_at_all() -> None:
    payload = b'{"$opaque": "aGk="}'
    with pytest.raises(TypeError, match="marks opaque bytes"):
        parse_value("a", payload)
    kept = parse_value("a", payload, allow_opaque_bytes=True)
    assert payload_of("a", kept, True, False, never) == payload


@pytest.mark.parametrize("payload", [b"", b"\x80\x04K\x01.", bytes(range(256)), b"[1, 2"])
def test_any_bytes_come_back(payload: bytes) -> None:
    kept = parse_value("a", payload, allow_opaque_bytes=True)
    assert payload_of("a", kept, True, True, never) == payload


def test_too_many_bytes_are_refused() -> None:
    parse_value("a", b"\0" * 1000, allow_opaque_bytes=True)
    with pytest.raises(ValueError, match=f"{MAX_OPAQUE_BYTES + 1} opaque bytes"):
        parse_value("a", b"\0" * (MAX_OPAQUE_BYTES + 1), allow_opaque_bytes=True)


@pytest.mark.parametrize("content", ["not base64!", "YQ", 7, None, ["YQ=="], "é"])
def test_a_hostile_mark_is_refused(content: Any) -> None:
    with pytest.raises(CorruptCheckpointError, match="a: its opaque bytes are not base64"):
        payload_of("a", {"$opaque": content}, True, False, never)


class Breaks(ExcpWriter):
    """Cannot commit while it is told so."""

    is_broken = False

    def finish(self, metadata: Any, results: Any) -> None:
        if self.is_broken:
            raise OSError(28, "No space left on device")
        super().finish(metadata, results)


@no_group
@pytest.mark.parametrize("change", ["new", "gone", "reshaped"])
def test_a_tensor_that_a_failed_save_changed_hinders_no_later_one(
    change: str, tmp_path: Path
) -> None:
    """torch.distributed.checkpoint does not tell a writer that its save failed."""
    first, failing = {"a": torch.ones(9, 9)}, {"a": torch.ones(9, 9), "b": torch.ones(8, 8)}
    if change == "gone":
        first, failing = failing, first
    if change == "reshaped":
        first, failing = failing, {**failing, "b": torch.ones(8, 9)}
    third = {"a": torch.full((9, 9), 2.0), "b": torch.full((8, 8), 3.0)}
    writer = Breaks(tmp_path / "step-1", lossless())
    dcp.save(first, storage_writer=writer)
    writer.is_broken = True
    with pytest.raises(CheckpointException, match="No space left") as caught:
        dcp.save(failing, storage_writer=writer, checkpoint_id=tmp_path / "step-2")
    assert isinstance(caught.value.failures[0][0], OSError)
    writer.is_broken = False
    dcp.save(third, storage_writer=writer, checkpoint_id=tmp_path / "step-3")
    assert writer.manifest is not None
    assert writer.manifest.kind == "link"
    assert writer.manifest.tensors["a"].coding.kind == "delta"
    found = {name: torch.zeros_like(tensor) for name, tensor in third.items()}
    dcp.load(found, storage_reader=ExcpReader(tmp_path / "step-3"))
    assert all(torch.equal(found[name], third[name]) for name in third)


class OnRankZero(ExcpSavePlanner):
    """A planner of somebody else, whose bytes are not JSON."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return io.BytesIO(pickle.dumps(object))
        return object


def refused_on_two_ranks(folder: str) -> list[str]:
    """A link whose statistics are merged over the ranks, with a pickle on one of them."""
    writer = ExcpWriter(Path(folder) / "step-1", ExcpConfig(profile="balanced"))
    dcp.save(state_of(1), storage_writer=writer, planner=OnRankZero())
    failures = []
    try:
        dcp.save(
            state_of(2, epoch=3),
            storage_writer=writer,
            checkpoint_id=Path(folder) / "step-2",
            planner=OnRankZero(),
        )
    except CheckpointException as error:
        failures = [f"{type(e).__name__}: {e}" for e, _ in error.failures.values()]
    dcp.save(
        state_of(3),
        storage_writer=writer,
        checkpoint_id=Path(folder) / "step-3",
        planner=OnRankZero(),
    )
    return failures


@pytest.mark.ranks
def test_a_refusal_is_told_to_all_ranks_and_holds_up_none(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for failures in spawn(2, refused_on_two_ranks, tmp_path / "ranks", str(folder)):
        assert any("TypeError: epoch: the planner" in failure for failure in failures), failures
        assert any("RankFailedError" in failure for failure in failures), failures
    chain = ExcpReader(folder / "step-3").chain
    assert chain.top.manifest.kind == "link"
    assert chain.top.manifest.tensors["model.w"].coding.kind == "joint_weight"
    assert not (folder / "step-2" / "manifest.json").exists()


def save_in_the_background(folder: str, kind: str) -> list[bool]:
    """Three saves of two ranks while the tensors change; the kind of every one."""
    os.environ["MASTER_ADDR"] = "localhost"
    group = dist.new_group(backend="gloo")
    writer = ExcpWriter(Path(folder) / "step-1", lossless(), allow_opaque_bytes=True)
    for step in (1, 2, 3):
        state = state_of(step, epoch=step)
        saving = dcp.async_save(
            state,
            storage_writer=writer,
            checkpoint_id=Path(folder) / f"step-{step}",
            process_group=group,
            async_checkpointer_type=AsyncCheckpointerType(kind),
        )
        state["model"]["w"].zero_()
        saving.result()
    found = {**zeroed(), "epoch": 0}
    dcp.load(found, storage_reader=ExcpReader(Path(folder) / "step-3", allow_opaque_bytes=True))
    expected = state_of(3)
    return [
        torch.equal(found["model"]["w"], expected["model"]["w"]),
        torch.equal(found["optim"]["w"]["exp_avg"], expected["optim"]["w"]["exp_avg"]),
        found["epoch"] == 3,
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_stock_planners_in_the_background_of_two_ranks(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for came_back in spawn(2, save_in_the_background, tmp_path / "ranks", str(folder), kind):
        assert came_back == [True, True, True]
    assert verify_folder(folder).findings == []
    kinds = [read_manifest(folder / f"step-{step}")[0].kind for step in (1, 2, 3)]  # type: ignore[arg-type]
    assert kinds == ["base", "link", "link"]


@pytest.fixture
def gloo() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_background_refusal_keeps_its_type(tmp_path: Path, gloo: None) -> None:
    saving = dcp.async_save(
        state_of(1, epoch=3), storage_writer=ExcpWriter(tmp_path / "step-1", lossless())
    )
    with pytest.raises(CheckpointException, match="ExcpSavePlanner"):
        saving.result()
