"""`effx inspect --tensor`, `diff`, `convert`: what they print, their exit codes, what they import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from effx_dist.cli import app
from effx_dist.cli.show import bar, progress
from tests import small_chain

ROOT = Path(__file__).parents[1]
HEAVY = ("transformers", "deepspeed", "megatron", "s3fs", "mpi4py")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two links."""
    folder = tmp_path_factory.mktemp("chain")
    small_chain.build(folder)
    return folder


def effx(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def effx_json(*arguments: object) -> Any:
    return json.loads(effx(*arguments, "--json")[1])


class TestInspect:
    def test_says_which_base_and_who(self, chain: Path) -> None:
        steps = effx_json("inspect", chain)["steps"]
        assert [step["base"] for step in steps] == ["step-1"] * 3
        assert {step["writer"] for step in steps} == {small_chain.document_of(chain, 1)["writer"]}

    def test_a_step_lists_its_tensors(self, chain: Path) -> None:
        records = small_chain.document_of(chain, 2)["tensors"]
        code, out, _ = effx("inspect", chain / "step-2")
        assert code == 0
        assert [line.split()[0] for line in out.splitlines()[1:]] == sorted(records)
        listed = effx_json("inspect", chain, "--step", 2)["tensors"]
        stored = {t["name"]: t["stored_bytes"] for t in listed}
        for name, record in records.items():
            blocks = [block for chunk in record["chunks"] for block in chunk.get("blocks", [])]
            if blocks:
                assert stored[name] == sum(block["length"] for block in blocks)

    def test_a_tensor_of_two_blocks(self, chain: Path) -> None:
        found = effx_json("inspect", chain, "--step", 1, "--tensor", "model.table")
        model, _ = small_chain.load(chain, 1)
        assert (found["dtype"], found["shape"]) == ("int16", list(model.table.shape))
        assert [piece["num_blocks"] for piece in found["pieces"]] == [2]
        histogram = found["histogram"]
        assert histogram["num_zeros"] == int((model.table == 0).sum())
        assert sum(histogram["counts"]) == int((model.table != 0).sum())
        assert (histogram["edges"][0], histogram["edges"][-1]) == (1, 6)

    def test_a_joint_shows_its_quantiser_and_the_differences(self, chain: Path) -> None:
        found = effx_json("inspect", chain, "--tensor", "model.weight")
        record = small_chain.document_of(chain, 3)["tensors"]["model.weight"]
        assert found["quantiser"]["step"] == record["coding"]["quantiser"]["weight"]["step"]
        assert found["quantiser"]["error"] == record["coding"]["error"]
        change = small_chain.load(chain, 3)[0].weight - small_chain.load(chain, 2)[0].weight
        histogram = found["histogram"]
        assert histogram["of"] == "differences to step-2"
        assert histogram["num_zeros"] == int((change == 0).sum())
        assert sum(histogram["counts"]) == int((change != 0).sum())
        code, out, _ = effx("inspect", chain, "--tensor", "model.weight")
        assert code == 0
        assert "quantiser step" in out
        assert "####" in out

    @pytest.mark.parametrize("name", ["model.scalar", "model.ids", "extra.mean", "rng.0.torch"])
    def test_every_kind_of_tensor_has_a_histogram(self, chain: Path, name: str) -> None:
        histogram = effx_json("inspect", chain, "--tensor", name)["histogram"]
        shape = effx_json("inspect", chain, "--tensor", name)["shape"]
        numel = int(torch.Size(shape).numel())
        total = sum(histogram["counts"]) + histogram["num_zeros"] + histogram["num_not_finite"]
        assert total == numel

    def test_a_name_that_is_not_there_names_the_nearest(self, chain: Path) -> None:
        code, out, error = effx("inspect", chain, "--tensor", "model.wieght")
        assert (code, out, len(error.splitlines())) == (1, "", 1)
        assert "model.weight" in error

    def test_two_different_steps_are_refused(self, chain: Path) -> None:
        code, _, error = effx("inspect", chain / "step-2", "--step", 1)
        assert (code, len(error.splitlines())) == (1, 1)


class TestDiff:
    def test_the_same_is_0(self, chain: Path) -> None:
        code, out, _ = effx("diff", chain, chain / "step-3")
        assert (code, len(out.splitlines())) == (0, 1)
        assert out.startswith("0 tensors of ")

    def test_what_differs_is_1_and_listed_by_size(self, chain: Path) -> None:
        code, out, _ = effx("diff", chain, "--step-a", 1, "--step-b", 3, "--top", 4)
        assert code == 1
        assert len(out.splitlines()) >= 6
        found = effx_json("diff", chain / "step-1", chain / "step-3", "--top", 0)
        changes = [t["relative"] for t in found["tensors"]]
        assert changes == sorted(changes, reverse=True)
        assert not found["identical"]
        by_name = {t["name"]: t for t in found["tensors"]}
        old, new = (small_chain.load(chain, step)[0].weight.detach().double() for step in (1, 3))
        relative = float((new - old).norm() / old.norm())
        assert by_name["model.weight"]["relative"] == pytest.approx(relative)
        assert "model.ids" not in by_name

    def test_what_cannot_be_read_is_2(self, chain: Path, tmp_path: Path) -> None:
        code, _, error = effx("diff", chain, tmp_path)
        assert (code, len(error.splitlines())) == (2, 1)
        assert effx("diff", chain, "--step-b", 9)[0] == 2


class TestConvert:
    def test_says_what_it_wrote(self, chain: Path, tmp_path: Path) -> None:
        arguments = ["--to", "torch", "--step", 2, "--weights-only"]
        code, out, error = effx("convert", chain, tmp_path / "out.pt", *arguments)
        assert (code, out, error) == (0, f"step 2 as torch: {tmp_path / 'out.pt'}\n", "")
        file = torch.load(tmp_path / "out.pt", weights_only=True)
        expected = small_chain.load(chain, 2)[0].state_dict()
        assert file["model"].keys() == expected.keys()
        assert all(torch.equal(file["model"][name], expected[name]) for name in expected)

    def test_a_configuration_from_a_file(self, chain: Path, tmp_path: Path) -> None:
        config = tmp_path / "config.json"
        config.write_text('{"model_type": "llama"}')
        arguments = ["--to", "safetensors", "--config", config]
        assert effx("convert", chain, tmp_path / "out", *arguments)[0] == 0
        assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
        config.write_text("[")
        code, _, error = effx("convert", chain, tmp_path / "other", *arguments)
        assert (code, len(error.splitlines())) == (1, 1)

    def test_an_output_that_is_there_is_refused(self, chain: Path, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        for target in ("dcp", "torch", "universal"):
            code, _, error = effx("convert", chain, tmp_path / "out", "--to", target)
            assert (code, len(error.splitlines())) == (1, 1)
        assert (tmp_path / "out").read_text() == "mine"

    def test_an_unknown_target_is_wrong_usage(self, chain: Path, tmp_path: Path) -> None:
        assert effx("convert", chain, tmp_path / "out", "--to", "onnx")[0] == 2
        assert effx("convert", chain, tmp_path / "out")[0] == 2


def test_the_commands_need_the_core_install_only(chain: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from effx_dist.cli import app\n"
        "for arguments in {commands!r}:\n"
        "    try: app(arguments)\n"
        "    except SystemExit as end: assert end.code in (0, None), (arguments, end.code)\n"
        "loaded = {heavy!r} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    folder, out, config = str(chain), str(tmp_path / "out"), str(tmp_path / "config.json")
    commands = [
        ["inspect", folder],
        ["inspect", folder, "--tensor", "model.low"],
        ["verify", folder, "--decode"],
        ["diff", folder, folder],
        ["convert", folder, f"{out}1", "--to", "dcp", "--weights-only"],
        ["convert", folder, f"{out}2", "--to", "torch", "--weights-only"],
        ["convert", folder, f"{out}3", "--to", "safetensors", "--config", config],
        ["convert", folder, f"{out}4", "--to", "universal"],
    ]
    source = program.format(commands=commands, heavy=set(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where there is no terminal


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress("reading") as on_progress:
        assert on_progress is None
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("reading") as on_progress:
        assert on_progress is not None
        on_progress(1, 2)


def test_bars() -> None:
    assert [len(bar(count, 80)) for count in (0, 1, 40, 80)] == [0, 1, 20, 40]
    assert bar(0, 0) == ""
