"""A saving process for models of many tensors: one piece of shared memory, few descriptors, no waiting peers."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.checkpointer import MAX_OPEN, CheckpointersByFolder
from effx_dist.checkpoint.saving.executor import ProcessExecutor
from effx_dist.checkpoint.saving.staging import Bundle, Staging, shared_bytes, view_at
from effx_dist.config import ExcpConfig
from effx_dist.errors import RankFailedError

ROOT = Path(__file__).parents[1]
PROCESS = ExcpConfig(profile="lossless", async_mode="process", base_every=5, keep_latest_k=0)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


def test_three_hundred_tensors_under_256_descriptors(tmp_path: Path) -> None:
    """With AdamW's moments and step counts 1,200 of them, saved thrice, loaded and saved again."""
    command = f"ulimit -n 256 && exec {sys.executable} -m tests.many_tensors {tmp_path} 300"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    most, kind = done.stdout.split()
    assert int(most) < 100
    assert kind == "link"
    assert verify_folder(tmp_path, decode=True).findings == []


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=3), DTYPES), max_size=6), st.booleans()
)
def test_a_bundle_holds_its_tensors(
    shapes: list[tuple[list[int], torch.dtype]], there: bool
) -> None:
    tensors = [
        torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype) for shape, dtype in shapes
    ]
    expected = [tensor.clone() for tensor in tensors]
    if there:
        tensors = Bundle.of(tensors).tensors()
    bundle = Bundle.of(tensors)
    for got, wanted, given_ in zip(bundle.tensors(), expected, tensors, strict=True):
        assert torch.equal(got, wanted)
        assert got.dtype == wanted.dtype
        is_shared = got.numel() > 0 and got.data_ptr() == given_.data_ptr()
        assert is_shared == (there and got.numel() > 0)


def test_tensors_of_two_memories_are_copied_into_one() -> None:
    tensors = [view_at(shared_bytes(64), (0, (4,), torch.float32)).fill_(value) for value in (1, 2)]
    found = Bundle.of(tensors).tensors()
    assert [t.unique().tolist() for t in found] == [[1], [2]]
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()


@pytest.mark.parametrize("shared", [False, True])
def test_staged_values_stay_where_others_come_and_go(shared: bool) -> None:
    staging = Staging(shared)
    for round_ in range(4):
        leaves: dict[str, Any] = {
            f"t{i}": torch.full((3 + round_, 5), 10.0 * i + round_) for i in range(4)
        }
        leaves["ids"] = torch.arange(7) + round_
        del leaves[f"t{round_}"]
        staged = staging.copy(leaves)
        for leaf in leaves.values():
            leaf.zero_()
        for name, fragment in staged.items():
            [(_, part)] = fragment.pieces
            expected = torch.arange(7) + round_ if name == "ids" else 10.0 * int(name[1]) + round_
            assert torch.equal(part, torch.as_tensor(expected).expand_as(part).to(part.dtype))
    staging.clear()
    assert not staging._buffers
    assert staging._memory is None


class TestAChildThatIsGoneAtOnce:
    """Its pipe is broken while it starts: told by name, at once, and mended by the next save."""

    def broken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "executable", "/bin/false")

    def test_at_the_start(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Linear(4, 3)
        with monkeypatch.context() as patch:
            self.broken(patch)
            checkpointer = Checkpointer(tmp_path, PROCESS)
            with pytest.raises(RankFailedError, match=r"rank 0: its saving process ended"):
                checkpointer.save(1, model)
        with checkpointer:
            checkpointer.save(2, model)
        assert verify_folder(tmp_path).num_steps == 1

    def test_at_its_replacement(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = nn.Linear(4, 3)
        with Checkpointer(tmp_path, PROCESS) as checkpointer:
            checkpointer.save(1, model)
            executor = checkpointer._executor
            assert isinstance(executor, ProcessExecutor)
            executor._process.kill()
            executor._process.wait()
            with monkeypatch.context() as patch:
                self.broken(patch)
                with pytest.raises(RankFailedError, match=r"rank 0: its saving process ended"):
                    checkpointer.save(2, model)
            checkpointer.save(3, model)
        assert verify_folder(tmp_path).num_steps == 2


def tensors_alive() -> int:
    """Bytes of host tensors of a kilobyte and more that something still holds."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if (
            isinstance(thing, torch.Tensor)
            and not isinstance(thing, nn.Parameter)
            and thing.device.type == "cpu"
        ):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in found.values() if size >= 1024)


def model_of(size: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(size, size, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:.*torch.distributed")
def test_memory_is_flat_over_twenty_folders(tmp_path: Path) -> None:
    """As Trainer saves: a new folder each time. Two are kept, and no thread of the others."""
    import threading

    model, optimizer = model_of(256)
    config = ExcpConfig(profile="balanced", async_mode="thread", base_every=10, keep_latest_k=0)
    checkpointers = CheckpointersByFolder(config)
    alive, threads = [], []
    for number in range(20):
        pending = checkpointers[tmp_path / f"checkpoint-{number}"].save(number, model, optimizer)
        pending.wait()  # a save at work has threads and tensors of its own
        alive.append(tensors_alive())
        threads.append(threading.active_count())
    assert max(alive[MAX_OPEN:]) <= alive[MAX_OPEN - 1] * 1.05
    assert max(threads[MAX_OPEN:]) <= threads[MAX_OPEN - 1]
    for number in range(20):
        assert verify_folder(tmp_path / f"checkpoint-{number}").num_steps == 1
    before = tensors_alive()
    checkpointers.close()
    assert tensors_alive() < before - 4 * 256 * 256 * 3, "buffers and references are let go"


def test_a_folder_that_comes_back_goes_on(tmp_path: Path) -> None:
    model, optimizer = model_of(32)
    config = ExcpConfig(profile="lossless", async_mode="thread", keep_latest_k=0)
    checkpointers = CheckpointersByFolder(config)
    kinds = [
        checkpointers[tmp_path / name].save(step, model, optimizer).result.kind
        for step, name in enumerate(["a", "b", "a", "b", "c", "a"])
    ]
    checkpointers.close()
    assert kinds == ["base", "base", "link", "link", "base", "base"]
    assert verify_folder(tmp_path / "a", decode=True).num_steps == 3
