"""A series of plain checkpoints becomes the chain that a Checkpointer would have written."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from effx_dist.checkpoint import Checkpointer, inspect_folder, verify_folder
from effx_dist.checkpoint.format.reader import read_manifest
from effx_dist.checkpoint.saving.writer import ExcpWriter
from effx_dist.checkpoint.storage.places import location
from effx_dist.checkpoint.storage.steps import committed_steps, step_name
from effx_dist.checkpoint.tools.compress import CompressReport, ReadOptions, compress_series
from effx_dist.checkpoint.tools.compress.content import PlainContent
from effx_dist.checkpoint.tools.compress.share import Division
from effx_dist.checkpoint.tools.compress.torch_file import open_torch_file
from effx_dist.checkpoint.tools.convert import convert_checkpoint
from effx_dist.config import ExcpConfig
from effx_dist.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    LayoutMismatchError,
    RankFailedError,
)
from effx_dist.shard import Group, SoloGroup
from tests import plain_series as plain
from tests.plain_series import BALANCED, LOSSLESS, STEPS, assert_same
from tests.thread_ranks import run_ranks


@pytest.fixture(scope="module")
def torch_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain.write_series(tmp_path_factory.mktemp("torch"), plain.write_torch)


@pytest.fixture(scope="module")
def dcp_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain.write_series(tmp_path_factory.mktemp("dcp"), plain.write_dcp)


@pytest.fixture(scope="module")
def balanced_chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plain.write_chain(tmp_path_factory.mktemp("chain"), BALANCED)


@pytest.fixture(params=["torch_files", "dcp_folders"])
def series(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


def compress_at(ranks: int, series: Path, output: Path, config: ExcpConfig) -> CompressReport:
    def body(group: Group) -> CompressReport:
        return compress_series([series], output, config, group=group)

    reports = run_ranks(ranks, body)
    assert all(report == reports[0] for report in reports)
    return reports[0]


def manifest_of(chain: Path, step: int) -> Any:
    return read_manifest(location(chain) / step_name(step))[0]


class TestRoundTrip:
    @pytest.mark.parametrize("ranks", [1, 2])
    def test_lossless_loads_bit_for_bit(self, series: Path, ranks: int, tmp_path: Path) -> None:
        before = plain.digests(series)
        report = compress_at(ranks, series, tmp_path / "out", LOSSLESS)
        assert (report.num_steps, report.num_there, report.error) == (len(STEPS), 0, 0)
        sizes = [step.stored_bytes for step in inspect_folder(tmp_path / "out")]
        assert report.stored_bytes == sum(sizes)
        assert report.read_bytes == sum(p.stat().st_size for p in series.rglob("*") if p.is_file())
        for step in STEPS:
            model, optimizer = plain.loaded(tmp_path / "out", step)
            expected_model, expected_optimizer = plain.live_at(step)
            assert_same(model.state_dict(), expected_model.state_dict())
            assert_same(optimizer.state_dict(), expected_optimizer.state_dict())
        assert plain.digests(series) == before

    def test_the_chain_is_that_of_a_checkpointer(
        self, series: Path, balanced_chain: Path, tmp_path: Path
    ) -> None:
        """Tensors, codings, groups, names of tied tensors and extra; only random states are no run's."""
        compress_series([series], tmp_path / "out", BALANCED)
        assert verify_folder(tmp_path / "out", decode=True).findings == []
        assert (tmp_path / "out/latest").read_text().strip() == step_name(STEPS[-1])
        for step in STEPS:
            found, expected = (manifest_of(p, step) for p in (tmp_path / "out", balanced_chain))
            names = {n for n in expected.tensors if not n.startswith("rng.")}
            assert found.tensors.keys() == names
            for name in names:
                assert found.tensors[name].coding == expected.tensors[name].coding
            assert (found.kind, found.profile) == (expected.kind, expected.profile)
            assert (found.aliases, found.extra) == (expected.aliases, expected.extra)

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_any_number_of_ranks_gives_the_same_values(
        self, series: Path, balanced_chain: Path, ranks: int, tmp_path: Path
    ) -> None:
        report = compress_at(ranks, series, tmp_path / "out", BALANCED)
        errors = [step.error for step in inspect_folder(balanced_chain) if step.error is not None]
        assert report.error == max(errors) > 0
        for step in STEPS:
            found = plain.values_of(tmp_path / "out", step)
            assert_same(found, plain.values_of(balanced_chain, step))

    @pytest.mark.parametrize("target", ["torch", "dcp"])
    def test_convert_compress_convert(
        self, target: str, balanced_chain: Path, tmp_path: Path
    ) -> None:
        """A torch file does not keep the order of the parameters, and DCP stores tied tensors twice."""
        for step in STEPS:
            name = f"step-{step}.pt" if target == "torch" else f"step-{step}"
            path = tmp_path / "plain" / name
            convert_checkpoint(balanced_chain, target, path, step=step)  # type: ignore[arg-type]
        compress_series([tmp_path / "plain"], tmp_path / "out", LOSSLESS)
        for step in STEPS:
            model, optimizer = plain.loaded(tmp_path / "out", step)
            expected_model, expected_optimizer = plain.loaded(balanced_chain, step)
            assert_same(model.state_dict(), expected_model.state_dict())
            assert_same(optimizer.state_dict(), expected_optimizer.state_dict())
        if target == "torch":
            again = tmp_path / "again.pt"
            convert_checkpoint(tmp_path / "out", "torch", again)
            files = [torch.load(p, weights_only=True) for p in (again, path)]
            assert_same(*files)

    def test_weights_only(self, series: Path, tmp_path: Path) -> None:
        options = ReadOptions(weights_only=True)
        compress_series([series], tmp_path / "out", LOSSLESS, options=options)
        found = plain.values_of(tmp_path / "out", STEPS[-1])
        assert not [name for name in found if name.startswith("optimizer.")]
        model, _ = plain.make()
        with Checkpointer(tmp_path / "out", group=SoloGroup()) as checkpoints:
            checkpoints.load(
                model, strict=False
            )  # DCP's tied weight has two names, and no optimizer
        assert_same(model.state_dict(), plain.live_at(STEPS[-1])[0].state_dict())

    def test_formats_may_follow_each_other(
        self, torch_files: Path, dcp_folders: Path, tmp_path: Path
    ) -> None:
        paths = [torch_files / "checkpoint-10.pt", dcp_folders / "checkpoint-20"]
        compress_series(paths, tmp_path / "out", LOSSLESS)
        assert manifest_of(tmp_path / "out", 20).kind == "link"
        assert_same(
            plain.loaded(tmp_path / "out", 20)[0].state_dict(), plain.live_at(20)[0].state_dict()
        )

    def test_no_random_state_is_taken_for_the_runs(self, torch_files: Path, tmp_path: Path) -> None:
        compress_series([torch_files], tmp_path / "out", LOSSLESS)
        names = manifest_of(tmp_path / "out", STEPS[0]).tensors
        assert not [name for name in names if name.startswith("rng.")]

    def test_a_base_comes_as_often_as_is_asked_for(self, torch_files: Path, tmp_path: Path) -> None:
        config = BALANCED.model_copy(update={"base_every": 2, "keep_latest_k": 1})
        compress_series([torch_files], tmp_path / "out", config)
        kinds = [step.kind for step in inspect_folder(tmp_path / "out")]
        assert kinds == ["base", "link", "base"]  # and none is retired


class TestResume:
    def reference(self, series: Path, folder: Path) -> Path:
        compress_series([series], folder / "whole", BALANCED)
        return folder / "whole"

    @pytest.mark.parametrize("ranks", [1, 2])
    def test_a_full_disk_in_the_middle(
        self, series: Path, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        finish = ExcpWriter.finish

        def full(writer: ExcpWriter, *arguments: object) -> None:
            if writer.path.name == step_name(STEPS[1]):
                raise OSError(errno.ENOSPC, "no space left")
            finish(writer, *arguments)  # type: ignore[arg-type]

        out = tmp_path / "out"
        with monkeypatch.context() as patch:
            patch.setattr(ExcpWriter, "finish", full)
            with pytest.raises(RankFailedError, match="no space left"):
                compress_at(ranks, series, out, BALANCED)
        assert committed_steps(out) == [STEPS[0]]
        assert verify_folder(out).findings == []
        committed = plain.digests(out / step_name(STEPS[0]))
        report = compress_at(3 - ranks, series, out, BALANCED)
        assert (report.num_steps, report.num_there) == (2, 1)
        assert plain.digests(out / step_name(STEPS[0])) == committed
        assert [path.name for path in out.iterdir() if path.name.startswith("writing")] == []
        whole = self.reference(series, tmp_path)
        for step in STEPS:
            assert_same(plain.values_of(out, step), plain.values_of(whole, step))
            assert manifest_of(out, step).kind == manifest_of(whole, step).kind

    def test_a_damaged_checkpoint_stops_it_until_it_is_mended(
        self, torch_files: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(torch_files, tmp_path / "series")
        path = tmp_path / "series" / f"checkpoint-{STEPS[2]}.pt"
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(CorruptCheckpointError, match=path.name):
            compress_series([tmp_path / "series"], tmp_path / "out", BALANCED)
        assert committed_steps(tmp_path / "out") == list(STEPS[:2])
        path.write_bytes(content)
        assert compress_series([tmp_path / "series"], tmp_path / "out", BALANCED).num_steps == 1
        whole = self.reference(torch_files, tmp_path)
        found = plain.values_of(tmp_path / "out", STEPS[2])
        assert_same(found, plain.values_of(whole, STEPS[2]))

    def test_damage_that_only_one_rank_reads(self, dcp_folders: Path, tmp_path: Path) -> None:
        shutil.copytree(dcp_folders, tmp_path / "series")
        path = tmp_path / "series" / f"checkpoint-{STEPS[1]}" / "__0_0.distcp"
        content = bytearray(path.read_bytes())
        path.write_bytes(content[: len(content) // 3])
        with pytest.raises(RankFailedError, match="checkpoint-20"):
            compress_at(2, tmp_path / "series", tmp_path / "out", BALANCED)
        assert committed_steps(tmp_path / "out") == [STEPS[0]]

    def test_again_changes_nothing(self, torch_files: Path, tmp_path: Path) -> None:
        compress_series([torch_files], tmp_path / "out", BALANCED)
        before = plain.digests(tmp_path / "out")
        report = compress_series([torch_files], tmp_path / "out", BALANCED)
        assert report == CompressReport(num_there=len(STEPS))
        assert plain.digests(tmp_path / "out") == before

    def test_a_runs_own_chain_goes_on(
        self, torch_files: Path, balanced_chain: Path, tmp_path: Path
    ) -> None:
        out = plain.write_chain(tmp_path / "out", BALANCED, STEPS[:2])
        before = plain.digests(out / step_name(STEPS[1]))
        report = compress_series([torch_files], out, BALANCED)
        assert (report.num_steps, report.num_there) == (1, 2)
        assert plain.digests(out / step_name(STEPS[1])) == before
        assert manifest_of(out, STEPS[2]).parent.name == step_name(STEPS[1])
        found = plain.values_of(out, STEPS[2])
        assert_same(found, plain.values_of(balanced_chain, STEPS[2]))

    def test_a_step_that_would_come_before_the_last_is_refused(
        self, torch_files: Path, tmp_path: Path
    ) -> None:
        late = torch_files / f"checkpoint-{STEPS[2]}.pt"
        compress_series([late], tmp_path / "out", LOSSLESS)
        with pytest.raises(ConfigError, match=r"ends with step 30.*checkpoint-10\.pt"):
            compress_series([torch_files], tmp_path / "out", LOSSLESS)
        assert committed_steps(tmp_path / "out") == [STEPS[2]]


class TestSeries:
    def save(self, path: Path, **changes: torch.Tensor | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"a": torch.ones(4, 3), "b": torch.zeros(4)} | changes
        torch.save({name: value for name, value in state.items() if value is not None}, path)

    @pytest.mark.parametrize(
        "name", ["step-7.pt", "model_v2_7.pt", "iter_0000007.ckpt", "7.pth", "epoch=1-step=7.bin"]
    )
    def test_the_step_is_the_last_number_in_the_name(self, name: str, tmp_path: Path) -> None:
        self.save(tmp_path / "series" / name)
        compress_series([tmp_path / "series"], tmp_path / "out")
        assert committed_steps(tmp_path / "out") == [7]

    def test_steps_are_in_the_order_of_their_numbers(self, tmp_path: Path) -> None:
        for step in (100, 20, 3):
            self.save(tmp_path / f"step-{step}.pt", b=torch.full((4,), float(step)))
        compress_series([tmp_path], tmp_path / "out", LOSSLESS)
        assert committed_steps(tmp_path / "out") == [3, 20, 100]
        parent = manifest_of(tmp_path / "out", 100).parent
        assert parent.name == "step-20"

    def test_two_of_one_step_or_none_are_refused_by_name(self, tmp_path: Path) -> None:
        self.save(tmp_path / "series/step-7.pt")
        self.save(tmp_path / "series/again_0007.pt")
        with pytest.raises(ConfigError, match=r"again_0007\.pt.*step-7\.pt.*step 7"):
            compress_series([tmp_path / "series"], tmp_path / "out")
        self.save(tmp_path / "other/final.pt")
        with pytest.raises(ConfigError, match=r"no number.*final\.pt"):
            compress_series([tmp_path / "other"], tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"a": None}, "model.a: in step 1, and not here"),
            ({"c": torch.ones(2)}, "model.c: not in step 1"),
            (
                {"a": torch.ones(5, 3)},
                r"model.a: \(4, 3\) float32 in step 1, \(5, 3\) float32 here",
            ),
            ({"a": torch.ones(4, 3).bfloat16()}, r"model.a: .* in step 1, \(4, 3\) bfloat16 here"),
        ],
    )
    @pytest.mark.parametrize("at_once", [True, False])
    def test_another_model_is_refused(
        self, changes: dict[str, torch.Tensor], message: str, at_once: bool, tmp_path: Path
    ) -> None:
        self.save(tmp_path / "series/1.pt")
        if not at_once:  # then the chain is what tells
            compress_series([tmp_path / "series"], tmp_path / "out")
        self.save(tmp_path / "series/2.pt", **changes)
        with pytest.raises(LayoutMismatchError, match=rf"2\.pt.*{message}"):
            compress_series([tmp_path / "series"], tmp_path / "out")
        assert committed_steps(tmp_path / "out") == [1]
        assert verify_folder(tmp_path / "out", decode=True).findings == []

    def test_what_is_compressed_already_is_refused(
        self, balanced_chain: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match="compressed already"):
            compress_series([balanced_chain], tmp_path / "out")

    def test_the_output_is_no_part_of_the_series(self, tmp_path: Path) -> None:
        self.save(tmp_path / "1.pt")
        compress_series([tmp_path], tmp_path / "out-5")
        assert compress_series([tmp_path], tmp_path / "out-5").num_there == 1
        with pytest.raises(ConfigError, match="is the output, too"):
            compress_series([tmp_path], tmp_path)

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointNotFoundError, match="no checkpoint was found"):
            compress_series([tmp_path], tmp_path / "out")
        with pytest.raises(CheckpointNotFoundError, match="absent"):
            compress_series([tmp_path / "absent"], tmp_path / "out")

    def test_a_folder_that_is_no_whole_checkpoint_is_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.save(tmp_path / "1.pt")
        (tmp_path / "step-2").mkdir()
        compress_series([tmp_path], tmp_path / "out")
        assert "step-2: is no checkpoint" in caplog.text


class TestDivision:
    @pytest.fixture
    def content(self, torch_files: Path) -> PlainContent:
        return open_torch_file(torch_files / f"checkpoint-{STEPS[0]}.pt", ReadOptions())

    @pytest.mark.parametrize("ranks", [1, 2, 3, 7])
    def test_every_element_is_one_ranks(self, content: PlainContent, ranks: int) -> None:
        division = Division(content, ranks)
        loads = [0] * ranks
        for stored, tensor in content.tensors.items():
            name = stored.removeprefix("model.").removeprefix("optimizer.")
            name = name if name in content.model else name.rpartition(".")[0]
            times = torch.zeros(tensor.facts.shape, dtype=torch.int64)
            for rank in range(ranks):
                for box in division.boxes(name, tensor.facts.shape, rank):
                    times[box.slices] += 1
                    loads[rank] += box.numel * tensor.facts.dtype.itemsize
            assert times.eq(1).all(), stored
        even = sum(loads) / ranks
        assert max(loads) < 2 * even

    def test_moments_lie_where_their_weight_does(self, content: PlainContent) -> None:
        division = Division(content, 3)
        assert content.optimizer is not None
        for name, tensor in content.model.items():
            owners = [rank for rank in range(3) if division.boxes(name, tensor.facts.shape, rank)]
            assert len(owners) == (3 if name == "embed.weight" else 1)
            step_owners = [rank for rank in range(3) if division.boxes(name, (), rank)]
            assert step_owners == owners[:1] or tensor.facts.shape == ()
