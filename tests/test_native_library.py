"""Libraries of C++ sources: built once, kept, mended. Without a compiler, or with one that relaxes
arithmetic, the checkpoint's bytes stay the same.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from effx_dist.native.library import BuildError, Source, load
from tests import fresh_interpreter
from tests.fresh_interpreter import compiler_in, needs_compiler, relaxed_compiler_in

ENCODE_TWICE = """
import hashlib, logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
from effx_dist.checkpoint.format import coding
from effx_dist.core.excp import JointArrays
from effx_dist.native.kernels import kernels
from tests.excp_pieces import must_build, whole_tensor
for _ in range(2):
    arrays = whole_tensor(0, 5000)
    payloads, residual = coding.quantise(must_build("safe", [arrays]), arrays)
    planes = coding.encode_planes(arrays.m.view("u4"))
content = payloads.weight + payloads.exp_avg + payloads.exp_avg_sq + residual.tobytes() + planes
print("compiled" if kernels() else "numpy", hashlib.sha256(content).hexdigest())
"""


run = partial(fresh_interpreter.run, ENCODE_TWICE)


class TestTheBuilder:
    """On a source so small that it compiles at once; the cache is the test's own."""

    @pytest.fixture
    def kept(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        return tmp_path / "torch" / "effx_dist"

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        files = tmp_path / "answer.cpp", tmp_path / "part.cpp"
        files[0].write_text('int part(); extern "C" int answer() { return 40 + part(); }\n')
        files[1].write_text("int part() { return 2; }\n")
        return Source(files)

    @needs_compiler
    def test_it_is_built_once_and_a_damaged_one_anew(
        self, source: Source, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert load(source).answer() == 42
        (library,) = kept.rglob("*")
        whole = library.read_bytes()
        with monkeypatch.context() as without_compiler:
            without_compiler.setenv("PATH", "")
            assert load(source).answer() == 42
        library.unlink()  # the one that is mapped stays whole
        library.write_bytes(whole[: len(whole) // 2])
        assert load(source).answer() == 42
        assert list(kept.rglob("*")) == [library], "and nothing half-built is left"
        assert library.read_bytes() == whole

    @needs_compiler
    def test_a_changed_source_is_another_library(self, source: Source, kept: Path) -> None:
        assert load(source).answer() == 42
        source.files[1].write_text("int part() { return 3; }\n")
        assert load(source).answer() == 43
        assert len(list(kept.rglob("*"))) == 2

    @needs_compiler
    def test_a_cache_that_cannot_be_written_is_done_without(
        self, source: Source, kept: Path
    ) -> None:
        kept.parent.mkdir()
        kept.write_text("a file where the folder should be")
        assert load(source).answer() == 42

    def test_without_a_compiler_it_says_what_it_looked_for(
        self, source: Source, kept: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(BuildError, match=r"none of c\+\+, g\+\+, clang\+\+ is on the PATH"):
            load(source)
        assert list(kept.rglob("*")) == []

    def test_a_compiler_that_fails_is_quoted(
        self, source: Source, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        failing = compiler_in(tmp_path / "bin", "echo 'fatal: no omp.h here' >&2\nexit 3")
        monkeypatch.setenv("PATH", failing)
        with pytest.raises(BuildError, match=r"status 3.*fatal: no omp.h here"):
            load(source)
        assert list(kept.rglob("*")) == []


@needs_compiler
def test_all_ways_give_the_same_bytes_and_say_once_which(tmp_path: Path) -> None:
    (compiled,) = run(tmp_path / "a")
    warning, plain = run(tmp_path / "b", path="")
    relaxed = relaxed_compiler_in(tmp_path / "bin")
    found_out, guarded = run(tmp_path / "c", path=relaxed)
    assert warning.startswith("WARNING")
    assert "c++, g++, clang++ is on the PATH" in warning
    assert "does not round as numpy does" in found_out
    assert compiled.split()[0] == "compiled"
    assert {line.split()[0] for line in (plain, guarded)} == {"numpy"}
    assert len({line.split()[1] for line in (compiled, plain, guarded)}) == 1
