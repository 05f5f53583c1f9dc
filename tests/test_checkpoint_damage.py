"""Damaged, cut, missing and replaced files: each is noticed and named, by a load and by a check."""

from __future__ import annotations

import ast
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import effx_dist
from effx_dist.checkpoint import Checkpointer, ExcpReader, inspect_folder, verify_folder
from effx_dist.checkpoint.format.block_files import MAGIC
from effx_dist.checkpoint.storage.steps import MANIFEST, step_name
from effx_dist.config import ExcpConfig
from effx_dist.errors import CheckpointNotFoundError, CorruptCheckpointError
from effx_dist.shard import SoloGroup, whole_box
from tests import small_chain as chain
from tests.small_chain import BASE, LINK, TOP
from tests.thread_ranks import run_ranks

RANK_FILES = ("rank-00000.effx", "rank-00000.moments.effx")


def read_everything(folder: Path, step: int = TOP) -> dict[str, torch.Tensor]:
    """All tensors of one step, as a load reads them."""
    reader = ExcpReader(folder / step_name(step))
    try:
        tensors = reader.chain.top.manifest.tensors
        return {n: reader.chain.read(n, whole_box(r.shape)) for n, r in tensors.items()}
    finally:
        reader.close()


def data_path(folder: Path, step: int = TOP, name: str = RANK_FILES[0]) -> Path:
    return folder / step_name(step) / name


def blocks_of(folder: Path, step: int, name: str) -> list[tuple[str, int, dict[str, Any]]]:
    """Tensor, index and record of every block in one data file."""
    document = chain.document_of(folder, step)
    return [
        (tensor, index, block)
        for tensor, record in document["tensors"].items()
        for chunk in record["chunks"]
        if document["files"][chunk.get("file", 0)]["name"] == name
        for index, block in enumerate(chunk.get("blocks", []))
    ]


def flipped(path: Path, positions: list[int], seed: int) -> Iterator[int]:
    """Each of ``positions`` with one bit of that byte flipped; the file is mended after each."""
    whole = path.read_bytes()
    bits = random.Random(seed)
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        yield position
    path.write_bytes(whole)


def expect_refused(folder: Path, *words: str) -> None:
    """A load raises CorruptCheckpointError with all ``words``, a check has findings and no error."""
    with pytest.raises(CorruptCheckpointError) as caught:
        chain.load(folder)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert verify_folder(folder).findings


def test_the_undamaged_chain_loads_and_verifies(folder: Path) -> None:
    model, extra = chain.load(folder)
    mean = extra.pop("mean")
    assert repr(extra) == repr({"note": "kept", "nan": float("nan"), "step": TOP})
    assert torch.equal(mean, torch.arange(300.0))
    trained, optimizer = chain.make()
    for step in (BASE, LINK, TOP):
        chain.train(trained, optimizer, step)
    for name in ("norm", "bias", "scalar", "ids", "table", "low"):  # stored losslessly
        assert torch.equal(getattr(model, name), getattr(trained, name)), name
    distance = (model.weight - trained.weight).norm() / trained.weight.norm()
    assert 0 < distance < 0.02
    report = verify_folder(folder)
    assert not report.findings
    assert report.num_steps == 3


def test_the_chain_has_a_tensor_of_every_coding(folder: Path) -> None:
    codings = {t["coding"]["kind"] for t in chain.document_of(folder, TOP)["tensors"].values()}
    assert codings == {"planes", "delta", "joint_weight", "joint_exp_avg", "joint_exp_avg_sq"}


@pytest.mark.parametrize("step", [BASE, LINK, TOP])
@pytest.mark.parametrize("name", RANK_FILES)
def test_every_byte_of_a_data_file_is_under_a_checksum(folder: Path, step: int, name: str) -> None:
    covered = bytearray(data_path(folder, step, name).stat().st_size)
    covered[: len(MAGIC)] = b"\1" * len(MAGIC)
    for _, _, block in blocks_of(folder, step, name):
        assert not any(covered[block["offset"] : block["offset"] + block["length"]])
        covered[block["offset"] : block["offset"] + block["length"]] = b"\1" * block["length"]
    assert all(covered)


# Bytes of the manifest and of the data files


def test_a_flipped_bit_anywhere_in_the_manifest_is_noticed(folder: Path) -> None:
    path = chain.manifest_path(folder, TOP)
    size = path.stat().st_size
    positions = [*range(200), *random.Random(1).sample(range(200, size), 100)]
    for position in flipped(path, positions, seed=2):
        with pytest.raises(CorruptCheckpointError, match=MANIFEST):
            _ = ExcpReader(folder).chain
        findings = verify_folder(folder).findings
        assert any(str(path) in finding for finding in findings), position
    read_everything(folder)


@pytest.mark.parametrize("position", [2, 30, 50, 100, 2000])
def test_a_load_refuses_a_manifest_with_a_flipped_bit(folder: Path, position: int) -> None:
    for _ in flipped(chain.manifest_path(folder, TOP), [position], seed=3):
        expect_refused(folder, str(chain.manifest_path(folder, TOP)))


def test_a_flipped_bit_in_a_parents_manifest_is_noticed(folder: Path) -> None:
    path = chain.manifest_path(folder, BASE)
    positions = random.Random(4).sample(range(path.stat().st_size), 30)
    for position in flipped(path, positions, seed=5):
        with pytest.raises(CorruptCheckpointError, match=r"step-1.*manifest\.json"):
            read_everything(folder)
        assert verify_folder(folder, TOP).findings, position


def _block_at(folder: Path, step: int, file: str, position: int) -> tuple[str, int]:
    for name, index, block in blocks_of(folder, step, file):
        if block["offset"] <= position < block["offset"] + block["length"]:
            return name, index
    raise AssertionError(f"byte {position} is in no block")


def _positions(folder: Path, step: int, file: str) -> list[int]:
    """A few bytes of every block, the first and the last of each among them."""
    chooser = random.Random(6)
    found = []
    for _, _, block in blocks_of(folder, step, file):
        first, last = block["offset"], block["offset"] + block["length"] - 1
        found += [first, last, chooser.randint(first, last)]
    return found


@pytest.mark.parametrize("file", RANK_FILES)
def test_a_flipped_bit_in_a_block_names_file_tensor_and_block(folder: Path, file: str) -> None:
    path = data_path(folder, TOP, file)
    for position in flipped(path, _positions(folder, TOP, file), seed=7):
        name, index = _block_at(folder, TOP, file, position)
        with pytest.raises(CorruptCheckpointError) as caught:
            read_everything(folder)
        named = f"{path}: block {index} of {name} "
        assert named in str(caught.value)
        assert any(named in finding for finding in verify_folder(folder).findings)
    read_everything(folder)


@pytest.mark.parametrize("step", [BASE, LINK])
def test_a_flipped_bit_below_in_the_chain_is_noticed(folder: Path, step: int) -> None:
    path = data_path(folder, step)
    for position in flipped(path, _positions(folder, step, RANK_FILES[0]), seed=8):
        name, index = _block_at(folder, step, RANK_FILES[0], position)
        named = f"{path}: block {index} of {name} "
        assert any(named in finding for finding in verify_folder(folder).findings)
        if name in ("model.weight", "model.low"):  # all that links refer to
            with pytest.raises(CorruptCheckpointError, match=named):
                read_everything(folder)


@pytest.mark.parametrize("file", RANK_FILES)
def test_a_load_names_a_damaged_block(folder: Path, file: str) -> None:
    path = data_path(folder, TOP, file)
    for position in _positions(folder, TOP, file)[::5]:
        for _ in flipped(path, [position], seed=9):
            name, index = _block_at(folder, TOP, file, position)
            expect_refused(folder, str(path), f"block {index} of {name}")


@pytest.mark.parametrize("position", range(len(MAGIC)))
def test_a_damaged_head_of_a_data_file_is_noticed(folder: Path, position: int) -> None:
    for _ in flipped(data_path(folder), [position], seed=10):
        expect_refused(folder, str(data_path(folder)), "EFFXBLK1")


# Files


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _remove(path: Path) -> None:
    path.unlink()


def _link(path: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [_truncate, _empty, _extend, _remove, _link, _dangling, _directory, _fifo]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("step", [BASE, LINK, TOP])
@pytest.mark.parametrize("change", CHANGES)
def test_a_data_file_that_is_not_the_one_written_is_named(
    folder: Path, change: Callable[[Path], None], step: int
) -> None:
    change(data_path(folder, step))
    expect_refused(folder, str(data_path(folder, step)))
    assert any(str(data_path(folder, step)) in f for f in verify_folder(folder).findings)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("change", [_empty, _truncate, _extend])
def test_a_manifest_of_another_length_is_named(
    folder: Path, change: Callable[[Path], None]
) -> None:
    change(chain.manifest_path(folder, TOP))
    expect_refused(folder, str(chain.manifest_path(folder, TOP)))
    with pytest.raises(CorruptCheckpointError, match=MANIFEST):
        inspect_folder(folder)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("change", [_remove, _dangling, _directory, _fifo])
def test_what_is_no_manifest_is_no_checkpoint(folder: Path, change: Callable[[Path], None]) -> None:
    change(chain.manifest_path(folder, TOP))
    _, extra = chain.load(folder)
    assert extra["step"] == LINK
    assert [s.committed for s in inspect_folder(folder)] == [True, True, False]
    with pytest.raises(CheckpointNotFoundError):
        chain.load(folder, TOP)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("change", [_remove, _dangling, _directory, _fifo, _link])
def test_a_parent_without_a_manifest_is_named(folder: Path, change: Callable[[Path], None]) -> None:
    change(chain.manifest_path(folder, LINK))
    expect_refused(folder, "step-2")


def test_a_missing_parent_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "step-1")
    expect_refused(folder, str(folder / "step-1"), "missing")
    assert any("step-1" in finding for finding in verify_folder(folder, TOP).findings)


def test_a_parent_replaced_by_another_valid_checkpoint_is_named(folder: Path) -> None:
    other = folder.parent / "other"
    model, optimizer = chain.make()
    chain.train(model, optimizer, 77)
    with Checkpointer(other, chain.CONFIG, group=SoloGroup()) as checkpointer:
        checkpointer.save(BASE, model, optimizer, extra={"mean": torch.zeros(300)})
    shutil.rmtree(folder / "step-1")
    shutil.copytree(other / "step-1", folder / "step-1")
    expect_refused(folder, str(folder / "step-1"), "replaced")
    chain.load(folder, BASE)  # by itself it is whole


def test_data_files_of_two_steps_exchanged_are_named(folder: Path) -> None:
    swap = folder / "aside"
    data_path(folder, LINK).rename(swap)
    data_path(folder, TOP).rename(data_path(folder, LINK))
    swap.rename(data_path(folder, TOP))
    expect_refused(folder, RANK_FILES[0])


def test_a_damaged_link_leaves_the_steps_below_it_readable(folder: Path) -> None:
    _truncate(data_path(folder, TOP))
    assert chain.load(folder, LINK)[1]["step"] == LINK


@pytest.mark.parametrize("content", [b"", b"../../etc\n", b"step-999999\n", b"\xff" * 9, b"step-1"])
def test_latest_decides_nothing(folder: Path, content: bytes) -> None:
    (folder / "latest").write_bytes(content)
    assert chain.load(folder)[1]["step"] == TOP
    assert not verify_folder(folder).findings


def test_a_damaged_old_step_does_not_fail_the_saves_of_a_run_that_goes_on(folder: Path) -> None:
    config = ExcpConfig(base_every=2, async_mode="sync", keep_latest_k=1)
    model, optimizer = chain.make()
    with Checkpointer(folder, config, group=SoloGroup()) as checkpointer:
        checkpointer.load(model, optimizer)
        _truncate(chain.manifest_path(folder, BASE))
        checkpointer.save(TOP + 1, model, optimizer)
        checkpointer.save(TOP + 2, model, optimizer)
    assert chain.load(folder)[1]["step"] == TOP + 2


# What else the chain must do


def test_replicas_write_links_that_are_differences(tmp_path: Path) -> None:
    """Under DDP each rank writes some of the weights; that must not turn every link into a base."""
    run_ranks(2, lambda group: chain.build(tmp_path, group))
    tensors = chain.document_of(tmp_path, TOP)["tensors"]
    assert tensors["model.weight"]["coding"]["kind"] == "joint_weight"
    assert tensors["model.low"]["coding"]["kind"] == "delta"


def test_a_parameter_without_elements_is_saved_and_loaded(tmp_path: Path) -> None:
    model = torch.nn.ParameterDict(
        {"some": torch.nn.Parameter(torch.ones(2, 3)), "none": torch.nn.Parameter(torch.ones(0, 3))}
    )
    with Checkpointer(tmp_path, group=SoloGroup()) as checkpointer:
        checkpointer.save(1, model)
        torch.nn.init.zeros_(model["some"])
        checkpointer.load(model)
    assert torch.equal(model["some"], torch.ones(2, 3))


@pytest.mark.parametrize("layer", ["checkpoint", "core", "codecs", "shard"])
def test_nothing_that_reads_checkpoints_can_run_a_pickle(layer: str) -> None:
    forbidden_modules = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    root = Path(effx_dist.__file__).parent / layer
    # what the ranks of one job say to each other over the network is no part of any file, and what others
    # have written is pickled
    others = {root / "store_group.py", *(root / "tools" / "compress").glob("*.py")}
    paths = sorted(set(root.rglob("*.py")) - others)
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
                # writes what others read, and what torch's own planner unpickles
                if path.parent.name != "convert" and path.name != "dcp_reader.py":
                    assert (node.value.id, node.attr) != ("torch", "save"), path
                assert (node.value.id, node.attr) != ("np", "load"), path
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec", "compile", "__import__"}, path
            assert not forbidden_modules & {name.partition(".")[0] for name in names}, path
            assert not any(
                name.startswith("effx_dist.checkpoint.tools.compress") for name in names
            ), path
