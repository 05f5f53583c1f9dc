"""What is frozen, unused or padded: stored in a word, read back by every release from here on, and no bomb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effx_dist.checkpoint import Checkpointer, ExcpReader, set_max_decoded_bytes, verify_folder
from effx_dist.checkpoint.format import whole_tensors as bounds
from effx_dist.checkpoint.format.manifest import BLOCK_NUMEL, Delta
from effx_dist.checkpoint.format.reader import open_checkpoint, read_manifest
from effx_dist.checkpoint.storage.steps import step_name
from effx_dist.checkpoint.tools.convert import convert_checkpoint
from effx_dist.config import ExcpConfig
from effx_dist.errors import ConfigError, CorruptCheckpointError, EffxError
from tests import small_chain as chain
from tests.fixtures.frozen.write import FOLDER, PROFILES, STEPS, Model
from tests.fixtures.frozen.write import write as write_chain
from tests.small_chain import BASE, TOP, edit, set_at

GOLDEN = sorted(FOLDER.glob("version-*"))
MANY = 2 * BLOCK_NUMEL
"""Elements of a layer of two blocks."""


def config_of(profile: str, **settings: Any) -> ExcpConfig:
    usual = {"profile": profile, "async_mode": "sync", "base_every": 10, "keep_latest_k": 0}
    return ExcpConfig.model_validate({**usual, **settings})


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
@pytest.mark.parametrize("profile", PROFILES)
class TestChainsThatPeopleHave:
    """Those of version 2 were refused by the release that wrote them."""

    def test_every_step_is_read(self, golden: Path, profile: str, tmp_path: Path) -> None:
        expected = write_chain(tmp_path / "now", profile)
        for step in STEPS:
            model = Model()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(-1)
            with Checkpointer(golden / profile) as checkpointer:
                assert checkpointer.load(model, step=step)["step"] == step
            assert torch.equal(model.idle, Model().idle)
            assert torch.equal(model.frozen, Model().frozen)
        assert (model.weight - expected.weight).abs().max() < 0.02

    def test_it_verifies(self, golden: Path, profile: str) -> None:
        report = verify_folder(golden / profile, decode=True)
        assert (report.findings, report.num_steps) == ([], len(STEPS))

    def test_a_run_goes_on_from_it(self, golden: Path, profile: str, tmp_path: Path) -> None:
        shutil.copytree(golden / profile, tmp_path / "run")
        model = Model()
        with Checkpointer(tmp_path / "run", config_of(profile)) as checkpointer:
            checkpointer.load(model)
            checkpointer.save(4, model)
        assert verify_folder(tmp_path / "run", decode=True).findings == []
        manifest, _ = read_manifest(tmp_path / "run" / step_name(4))
        [chunk] = manifest.tensors["model.frozen"].chunks
        assert isinstance(manifest.tensors["model.frozen"].coding, Delta)
        assert (chunk.fill, chunk.blocks) == ("00" * 4, [])


class Layers(nn.Module):
    """Fine-tuning as it is done; blocks as long as real layers'."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, trained: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / 50, requires_grad=trained)

        if kind == "90 % frozen":
            self.frozen = nn.ParameterList(weight(1024, 2048, trained=False) for _ in range(3))
            self.head = weight(300, 700)
        elif kind == "LoRA":
            self.base = weight(2048, 1536, trained=False)
            self.a, self.b = weight(8, 1536), nn.Parameter(torch.zeros(2048, 8))
        elif kind == "experts":
            self.experts = weight(64, 128, 512)
        else:  # padded vocabulary, unused rows
            rows = weight(3000, 1024).detach()
            rows[:1024] = 0
            rows[2000:] = 7.5
            self.embedding = nn.Parameter(rows)

    def train_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
                if name == "experts":
                    parameter.grad[8:] = 0
                if name == "embedding":
                    parameter.grad[:1024] = 0
                    parameter.grad[2000:] = 0
        optimizer.step()


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("kind", ["90 % frozen", "LoRA", "experts", "unused rows"])
def test_fine_tuning_is_saved_and_loaded(kind: str, profile: str, tmp_path: Path) -> None:
    def made() -> tuple[Layers, torch.optim.Optimizer]:
        model = Layers(kind)
        trained = [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)

    model, optimizer = made()
    with Checkpointer(tmp_path, config_of(profile)) as checkpointer:
        for step in (1, 2, 3):
            model.train_step(optimizer, step)
            pending = checkpointer.save(step, model, optimizer)
    assert verify_folder(tmp_path, decode=True).findings == []
    if kind in ("90 % frozen", "LoRA"):
        assert pending.ratio > 5, "what does not change costs nothing"
    loaded, its_optimizer = made()
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.load(loaded, its_optimizer)
    for (name, new), old in zip(loaded.named_parameters(), model.parameters(), strict=True):
        if not old.requires_grad or profile == "lossless":
            assert torch.equal(new, old), name
        else:
            assert (new - old).norm() <= 0.3 * old.norm(), name  # B begins at 0, and moved only


def test_a_fill_is_read_in_any_box(tmp_path: Path) -> None:
    """In parts, rows and blocks; under links; of every width."""
    shape = (MANY // 1024 + 3, 1024)
    values = {
        "byte": torch.full(shape, 3, dtype=torch.uint8),
        "low": torch.full(shape, -1.5, dtype=torch.bfloat16),
        "wide": torch.full(shape, 1 + 2j, dtype=torch.complex128),
        "minus": torch.full(shape, -0.0),
        "nan": torch.full(shape, float("nan")),
    }
    module = nn.Module()
    for name, value in values.items():
        module.register_buffer(name, value.clone())
    with Checkpointer(tmp_path, config_of("lossless")) as checkpointer:
        checkpointer.save(1, module)
        module.low[5:7] += 1
        checkpointer.save(2, module)
        checkpointer.save(3, module)
    with ExcpReader(tmp_path).chain as opened:
        for name in values:
            got = opened.read(f"model.{name}", opened.top.boxes(f"model.{name}")[0])
            expected = getattr(module, name)
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8)), name
    manifest, _ = read_manifest(tmp_path / step_name(3))
    fills = {name: manifest.tensors[f"model.{name}"].chunks[0].fill for name in values}
    assert fills["low"] == "0000", "as before"
    assert fills["minus"] == "00000000", "no difference to the base's"
    assert manifest.figures.stored_bytes < 20_000


@given(st.integers(1, 40), st.sampled_from([1, 2, 4, 8, 16]), st.data())
def test_repeated_elements_come_back(numel: int, itemsize: int, data: st.DataObject) -> None:
    from effx_dist.checkpoint.format import coding

    element = data.draw(st.binary(min_size=itemsize, max_size=itemsize))
    bits = coding.repeat(element, numel)
    assert bits.tobytes() == element * numel
    words = bits.size // numel
    assert coding.repeated(bits, words) == element
    spoilt = bits.copy()
    spoilt.view("u1")[data.draw(st.integers(0, bits.nbytes - 1))] ^= 1
    assert coding.repeated(spoilt, words) == (None if numel > 1 else spoilt.tobytes())
    assert coding.is_same(bits, bits.copy())
    assert not coding.is_same(bits, spoilt)


# Bombs: a few bytes that declare any size


def declare(folder: Path, name: str, shape: list[int], **chunk: Any) -> None:
    whole = {"offsets": [0] * len(shape), "sizes": shape, **chunk}
    record = {"dtype": "float32", "shape": shape, "coding": {"kind": "planes"}, "chunks": [whole]}
    edit(folder, TOP, set_at("tensors", name, to=record))


@pytest.mark.parametrize("shape", [[2**40], [2**30, 2**20], [2**60]])
def test_a_declared_size_takes_no_memory_of_a_load(folder: Path, shape: list[int]) -> None:
    """Into the caller's tensors it does not fit; where a manifest alone asks for it, it is refused."""
    declare(folder, "model.weight", shape, fill="00" * 4)
    with pytest.raises(EffxError, match=r"weight"):
        chain.load(folder)
    with chain.bounded_memory():
        assert verify_folder(folder, decode=True).findings


@pytest.mark.parametrize("shape", [[2**40], [2**60]])
@pytest.mark.parametrize("name", ["extra.mean", "rng.0.torch"])
def test_memory_that_only_a_manifest_asks_for_is_bounded(
    folder: Path, name: str, shape: list[int]
) -> None:
    declare(folder, name, shape, fill="00" * 4)
    with pytest.raises(CorruptCheckpointError, match=f"{name}: declares"):
        chain.load(folder)


def test_tools_refuse_declared_totals_above_a_bound_that_can_be_set(
    folder: Path, tmp_path: Path
) -> None:
    declare(folder, "model.more", [2**45], fill="00" * 4)
    with pytest.raises(CorruptCheckpointError, match=r"declares tensors of .* at most .* decoded"):
        convert_checkpoint(folder, "torch", tmp_path / "out")
    assert any("at most" in finding for finding in verify_folder(folder, decode=True).findings)
    edit(folder, TOP, lambda document: document["tensors"].pop("model.more"))
    assert verify_folder(folder, decode=True).findings == []
    try:
        set_max_decoded_bytes(10_000)
        with pytest.raises(CorruptCheckpointError, match=r"--max-decoded-bytes"):
            convert_checkpoint(folder, "torch", tmp_path / "out")
    finally:
        set_max_decoded_bytes(bounds.DEFAULT_MAX_DECODED_BYTES)
    with pytest.raises(ConfigError, match="must be >= 1"):
        set_max_decoded_bytes(0)


@pytest.mark.parametrize(
    "chunk",
    [
        {"fill": "00"},
        {"fill": "00" * 3},
        {"fill": "00" * 17},
        {"fill": "zz" * 4},
        {"fill": ""},
        {"fill": 0},
        {"fill": "00" * 4, "inline": "00" * 400},
        {"fill": "00" * 4, "blocks": [{"offset": 8, "length": 9, "xxh3": "0" * 32}]},
    ],
)
def test_a_fill_that_is_not_one_element_is_refused(folder: Path, chunk: dict[str, Any]) -> None:
    declare(folder, "model.norm", [100], **chunk)
    with pytest.raises(CorruptCheckpointError):
        chain.load(folder)


def test_a_fill_of_a_joint_is_refused(folder: Path) -> None:
    chunks = ("tensors", "model.weight", "chunks", 0)
    edit(folder, TOP, lambda d: d["tensors"]["model.weight"]["chunks"][0].pop("blocks"))
    edit(folder, TOP, set_at(*chunks, "fill", to="00" * 4))
    with pytest.raises(CorruptCheckpointError, match="fill"):
        chain.load(folder)


def test_a_difference_of_a_fill_needs_its_parent(folder: Path) -> None:
    """A base has nothing that could have stayed as it was."""
    edit(folder, BASE, set_at("tensors", "model.low", "coding", to={"kind": "delta"}))
    with pytest.raises(CorruptCheckpointError, match="there is no parent"):
        chain.load(folder)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_no_block_is_shorter_than_its_coder_can_be(folder: Path, length: int) -> None:
    edit(
        folder, TOP, set_at("tensors", "model.norm", "chunks", 0, "blocks", 0, "length", to=length)
    )
    with pytest.raises(CorruptCheckpointError, match=r"no planes block has fewer than 5"):
        chain.load(folder)


def test_a_release_older_refuses_what_it_cannot_read(folder: Path) -> None:
    """By name: it would take a fill for a chunk without blocks."""
    document = json.loads(chain.manifest_path(folder, TOP).read_bytes())
    assert document["version"] == 3
    edit(folder, TOP, set_at("version", to=4))
    with pytest.raises(CorruptCheckpointError, match=r"format version 4.*reads up to 3.*newer"):
        open_checkpoint(folder)
