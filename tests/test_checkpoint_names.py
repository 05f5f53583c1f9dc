"""Names as torch gives them, whatever stands around a model; and nothing is published that a reader refuses."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim.swa_utils import AveragedModel

from effx_dist.checkpoint import Checkpointer, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.state.names import tied_names, torch_name
from effx_dist.checkpoint.storage.steps import committed_steps, step_name
from effx_dist.config import ExcpConfig
from effx_dist.errors import UnreadableSaveError
from tests.runs import lossless

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*DataParallel.*deprecated"),
    pytest.mark.filterwarnings(
        "ignore:.*torch.jit.*deprecated"
    ),  # torch's compiler, as it is imported
]
CHILDREN = ("module", "inner", "model", "_orig", "0")


class Wrapper(nn.Module):
    """A user's own, with a child of any name."""

    def __init__(self, name: str, child: nn.Module) -> None:
        super().__init__()
        self.add_module(name, child)


class Tied(nn.Module):
    """An embedding and a head that are one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.emb = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.norm = nn.BatchNorm1d(4)
        with torch.no_grad():
            self.emb.weight.copy_(torch.randn(6, 4, generator=torch.Generator().manual_seed(seed)))
        self.head.weight = self.emb.weight


def compiled(module: nn.Module) -> nn.Module:
    """torch.compile's wrapper; nothing is compiled before it is called."""
    if hasattr(module, "get_compiler_config"):
        return module  # torch refuses to do it twice
    found = torch.compile(module)
    return found if isinstance(found, nn.Module) else module  # once is enough


WRAPPERS: dict[str, Any] = {
    "averaged": AveragedModel,
    "data parallel": nn.DataParallel,
    "checkpointed": checkpoint_wrapper,
    "compiled": compiled,
    "sequential": nn.Sequential,
    **{f"child {name!r}": (lambda module, name=name: Wrapper(name, module)) for name in CHILDREN},
}
TREES = st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=4)


def tree_of(kinds: list[str], seed: int) -> nn.Module:
    module: nn.Module = Tied(seed)
    for kind in kinds:
        module = WRAPPERS[kind](module)
    return module


@settings(max_examples=40)
@given(TREES)
def test_what_is_saved_verifies_and_loads(tmp_path_factory: Any, kinds: list[str]) -> None:
    folder = tmp_path_factory.mktemp("run")
    model, other = tree_of(kinds, 1), tree_of(kinds, 2)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other)]
    with Checkpointer(folder, lossless()) as checkpointer:
        for step in (1, 2):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, step)
            optimizers[0].step()
            checkpointer.save(step, model, optimizers[0])
        assert verify_folder(folder, decode=True).findings == []
        checkpointer.load(other, optimizers[1])
    for new, old in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(new, old)
    states = [list(optimizer.state.values()) for optimizer in optimizers]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*states, strict=True))


@given(TREES)
def test_names_are_those_of_torch(kinds: list[str]) -> None:
    model = tree_of(kinds, 1)
    known = get_model_state_dict(model)
    names = {torch_name(model, raw) for raw, _ in model.named_parameters(remove_duplicate=False)}
    assert names <= known.keys()
    tied = tied_names(model)
    assert len(tied) == 1
    assert {*tied, *tied.values()} <= known.keys()


def test_a_childs_name_is_kept(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, Wrapper("module", Tied(1)))
    manifest, _ = read_manifest(tmp_path / step_name(1))
    assert manifest.aliases == {"model.module.head.weight": "model.module.emb.weight"}


def test_names_that_a_release_before_has_left_out_are_found(tmp_path: Path) -> None:
    """Under DeepSpeed it dropped every "module"."""
    saved, wanted = Wrapper("inner", Tied(1)), Wrapper("module", Wrapper("inner", Tied(2)))
    with Checkpointer(tmp_path, lossless()) as checkpointer:
        checkpointer.save(1, saved)
        checkpointer.load(wanted)
    for new, old in zip(wanted.parameters(), saved.parameters(), strict=True):
        assert torch.equal(new, old)


class TestWhatNoReaderAccepts:
    """It is found before it is published: by the rank that wrote it, or by the first from the manifest."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        with Checkpointer(tmp_path, lossless()) as checkpointer:
            checkpointer.save(1, Tied(1))
        return tmp_path

    def fails(self, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
        """The message of a save that is refused, of which nothing stays, and that training survives."""
        model = Tied(2)
        with Checkpointer(folder, ExcpConfig(profile="lossless", async_mode="thread")) as saving:
            with pytest.raises(Exception, match="every load would refuse it") as caught:
                saving.save(2, model)
            assert committed_steps(folder) == [1]
            assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == [step_name(1)]
            assert verify_folder(folder).findings == []
            assert saving.load(model)["step"] == 1
        assert not [r for r in caplog.records if r.levelno > logging.ERROR]
        return str(caught.value)

    def test_names_that_do_not_resolve(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from effx_dist.checkpoint.state import torch_state

        monkeypatch.setattr(torch_state, "tied_names", lambda model: {"head.weight": "lost.weight"})
        message = self.fails(folder, caplog)
        assert "model.head.weight" in message
        assert UnreadableSaveError.__name__ in message

    def test_chunks_that_do_not_fit(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The rank that wrote them says so."""
        from effx_dist.checkpoint.format import coding

        monkeypatch.setattr(coding, "repeated", lambda bits, words: b"\0")
        assert "a fill is not one element of int64" in self.fails(folder, caplog)

    def test_a_file_that_is_not_as_long_as_it_is_said_to_be(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from effx_dist.checkpoint.format import block_files as blockfile

        own = blockfile.RankFiles.records

        def records(self: Any) -> Any:
            return {
                key: record.model_copy(update={"bytes": record.bytes + 1})
                for key, record in own(self).items()
            }

        monkeypatch.setattr(blockfile.RankFiles, "records", records)
        assert "rank-00000.effx" in self.fails(folder, caplog)


def test_a_file_that_failed_its_checks_fails_them_again(tmp_path: Path) -> None:
    from effx_dist.checkpoint.format.block_files import BlockReader
    from effx_dist.checkpoint.format.manifest import FileRecord
    from effx_dist.checkpoint.storage.places import location
    from effx_dist.errors import CorruptCheckpointError

    (tmp_path / "rank-00000.effx").write_bytes(b"EFFXBLK1" + bytes(8))
    reader = BlockReader(location(tmp_path), FileRecord(name="rank-00000.effx", bytes=17))
    for _ in range(2):
        with pytest.raises(CorruptCheckpointError, match="has 16 bytes, the manifest says 17"):
            reader.open()
