"""House rules that a type checker does not see: who imports whom, file sizes, a light import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import effx_dist
from effx_dist.errors import MissingEngineError

ROOT = Path(__file__).parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_PUBLIC_NAMES = 12

# Each unit may import itself and what stands above it here; units in one line are peers.
LAYERS = [
    ["version", "forwarded", "former_paths"],
    ["errors", "launchers"],
    ["config_files"],
    ["config"],
    ["native"],
    ["core", "codecs"],
    ["shard"],
    ["data", "optim", "checkpoint"],
    ["engines"],
    ["deepspeed", "megatron"],
    ["report"],
    ["cli", "launch"],
]
LEVEL = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# The same within checkpoint/, whose own __init__.py hands on what all of them have.
FLOORS = ["storage", "format", "state", "saving", "loading", "checkpointer", "tools"]
FLOOR = {name: level for level, name in enumerate(FLOORS)}

# Only engines/<key>.py, or the files of engines/<key>/, may import these; launch/ holds user's
# scripts, which call their engine.
# Where one root lies in another, as FSDP1 in the package of FSDP2, the longer one decides.
ENGINES = {
    "fsdp1": (
        "torch.distributed.fsdp.FullyShardedDataParallel",
        "torch.distributed.fsdp._common_utils",
        "torch.distributed.fsdp._flat_param",
        "torch.distributed.fsdp.fully_sharded_data_parallel",
    ),
    "fsdp2": ("torch.distributed.fsdp", "torch.distributed._composable.fsdp"),
    "deepspeed": ("deepspeed",),
    "megatron": ("megatron",),
}

PACKAGE = sorted((ROOT / "effx_dist").rglob("*.py"))
LAUNCH = sorted((ROOT / "launch").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MODULES: dict[str, Path] = {}
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*PACKAGE, *LAUNCH]}


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def unit_of(path: Path) -> str:
    """Name the entry of LAYERS that a file belongs to; effx_dist/__init__.py is "effx_dist"."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "launch":
        return "launch"
    return "effx_dist" if parts[1] == "__init__" else parts[1]


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import anywhere; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def used_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield what `imported_names` does, and attribute chains such as torch.distributed.fsdp."""
    yield from imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)


def imported_unit(name: str) -> str | None:
    """Name the unit that an import reaches, None if it is not ours."""
    top, *rest = name.split(".")
    if top == "launch":
        return "launch"
    if top != "effx_dist" or rest == ["_import_engine"]:
        return None
    return rest[0] if rest and rest[0] in LEVEL else "effx_dist"


def may_import(importer: str, imported: str) -> bool:
    if importer == imported or importer == "effx_dist":
        return True
    if imported == "effx_dist":  # the public names, which are for users
        return importer == "launch"
    return LEVEL[imported] < LEVEL[importer]


def floor_of(name: str) -> str | None:
    """Name the floor of checkpoint/ that a dotted name lies on, None if it lies on none."""
    parts = name.split(".")
    is_on_one = parts[:2] == ["effx_dist", "checkpoint"] and len(parts) > 2
    return parts[2] if is_on_one and parts[2] in FLOOR else None


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES.update({module_of(path): path for path in PACKAGE})


def only_for_types(tree: ast.AST) -> set[ast.AST]:
    """All nodes below an `if TYPE_CHECKING:`, which no running program imports."""
    blocks = (
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {node for block in blocks for child in block.body for node in ast.walk(child)}


def imported_modules(tree: ast.AST) -> set[str]:
    """Our modules that one imports when it runs, wherever in it the import stands."""
    skipped = only_for_types(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node not in skipped:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & MODULES.keys()
            found |= submodules | ({str(node.module)} if names - submodules else set())
        elif isinstance(node, ast.Import) and node not in skipped:
            found |= {alias.name for alias in node.names}
    return found & MODULES.keys()


def circles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, by taking away again and again what imports nothing that is
    left, and what nothing that is left imports."""
    left = {module: set(names) - {module} for module, names in imports.items()}
    while True:
        wanted = {name for names in left.values() for name in names}
        kept = {m: n & left.keys() for m, n in left.items() if n & left.keys() and m in wanted}
        if kept == left:
            return [sorted(left)] if left else []
        left = kept


def engine_of(name: str) -> str | None:
    """Name the engine that a dotted name belongs to, None if it is no engine's."""
    roots = {
        root: engine
        for engine, roots in ENGINES.items()
        for root in roots
        if name == root or name.startswith(f"{root}.")
    }
    return roots[max(roots, key=len)] if roots else None


def test_every_file_has_its_place() -> None:
    assert len(PACKAGE) > 3
    strays = {shown(path) for path in TREES if unit_of(path) not in {*LEVEL, "effx_dist"}}
    assert not strays, f"not in a layer: {strays}"


def test_imports_run_downwards() -> None:
    wrong = [
        f"{shown(path)}:{line} imports {name}"
        for path, tree in TREES.items()
        for line, name in imported_names(tree)
        if (unit := imported_unit(name)) is not None and not may_import(unit_of(path), unit)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_floors_of_checkpoint_import_downwards() -> None:
    on_floors = {path: floor for path in PACKAGE if (floor := floor_of(module_of(path)))}
    assert set(on_floors.values()) == set(FLOORS)
    top = {"effx_dist.checkpoint", *(f"effx_dist.checkpoint.{name}" for name in FLOORS)}
    strays = [
        module
        for path in PACKAGE
        if (module := module_of(path)).startswith("effx_dist.checkpoint")
        and module not in top
        and floor_of(module) is None
    ]
    assert not strays, f"on no floor: {strays}"
    wrong = [
        f"{shown(path)}:{line} imports {name}"
        for path, floor in on_floors.items()
        for line, name in imported_names(TREES[path])
        if ((other := floor_of(name)) is not None and FLOOR[other] > FLOOR[floor])
        or (name.startswith("effx_dist.checkpoint.") and other is None)
    ]
    assert not wrong, "\n".join(wrong)


# docs/glossary.md has other words for these. LocalRows is public, and there a word of its own.
UNUSED_WORDS = {"segment", "region", "part", "portion", "walk", "row", "member"}
ALLOWED_NAMES = {"LocalRows"}


def words_of(name: str) -> set[str]:
    """The words of a class's or module's name, in the singular: LocalRows is of local and row."""
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)
    return {word.lower().removesuffix("s") for word in words}


def test_names_are_made_of_the_words_of_the_glossary() -> None:
    classes = {
        node.name: shown(path)
        for path in PACKAGE
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.ClassDef) and node.name not in ALLOWED_NAMES
    }
    names = classes | {path.stem: shown(path) for path in PACKAGE}
    assert len(names) > 300
    wrong = {name: where for name, where in names.items() if words_of(name) & UNUSED_WORDS}
    assert not wrong, f"see the last table of docs/glossary.md: {wrong}"
    assert words_of("LocalRows") & words_of("_TwoRowWalks") == {"row"}
    glossary = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    unused = glossary.rpartition("| not used here |")[2]
    assert all(word in unused for word in UNUSED_WORDS), "the page and this test say the same"


def test_no_module_imports_itself_by_others() -> None:
    imports = {module: imported_modules(TREES[path]) for module, path in MODULES.items()}
    assert len(imports) > 100
    assert not circles(imports)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


FORMER_PATHS = {
    "effx_dist.checkpoint.drive": "drive_save",
    "effx_dist.checkpoint.folder": "committed_steps",
    "effx_dist.checkpoint.live": "LiveState",
    "effx_dist.checkpoint.manifest": "Manifest",
    "effx_dist.checkpoint.writer": "ExcpWriter",
    "effx_dist.shard.mesh": "group_of_axes",
}


@pytest.mark.parametrize("path", FORMER_PATHS)
def test_a_path_that_the_docs_have_named_still_works(path: str) -> None:
    name = FORMER_PATHS[path]
    run_python(
        f"from {path} import {name}; import {path} as module; assert module.{name} is {name}"
    )


def test_names_that_the_docs_have_given_still_work() -> None:
    source = (
        "from effx_dist.shard import Part, PlacedBox, pieces_of_boxes, pieces_of_parts\n"
        "from effx_dist.checkpoint import Fragment\n"
        "print(Part is PlacedBox, pieces_of_parts is pieces_of_boxes, Fragment((), None, []).parts)"
    )
    assert run_python(source).strip() == "True True []"


@pytest.mark.parametrize("page", ["architecture", "engines", "glossary"])
def test_a_page_names_files_and_classes_that_are_there(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = re.findall(r"`(?:[^`]* )?([\w/]+\.(?:py|cpp))(?:`|: (\w+))", text)
    assert len(named) >= 10
    known = [path for top in ("effx_dist", "tests") for path in (ROOT / top).rglob("*.*")]
    for name, content in named:
        found = [path for path in known if f"/{path.as_posix()}".endswith(f"/{name}")]
        assert found, f"docs/{page}.md names {name}, which is not there"
        texts = [path.read_text(encoding="utf-8") for path in found]
        assert any(content in text for text in texts), f"docs/{page}.md: no {content} in {name}"


def test_only_its_adapter_uses_an_engine() -> None:
    wrong = [
        f"{shown(path)}:{line} uses {name}"
        for path in PACKAGE
        for line, name in used_names(TREES[path])
        if (engine := engine_of(name))
        and not shown(path).startswith(
            (f"effx_dist/engines/{engine}.py", f"effx_dist/engines/{engine}/")
        )
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_find_what_they_forbid() -> None:
    """The two tests above pass on an empty list; make sure that they could fail."""
    source = (
        "from effx_dist.data import x\nif 1:\n    import torch\n    torch.distributed.fsdp.f()\n"
    )
    names = [name for _, name in used_names(ast.parse(source))]
    assert not may_import("optim", imported_unit(names[0]) or "")
    assert "fsdp2" in {engine_of(name) for name in names}
    assert engine_of("torch.distributed.fsdp.FullyShardedDataParallel.fsdp_modules") == "fsdp1"
    assert engine_of("torch.distributed.fsdp.FullyShardedDataParallelism") == "fsdp2"
    assert engine_of("deepspeed_extra") is None
    assert may_import("data", "shard")
    assert not may_import("shard", "data")
    assert not may_import("optim", "effx_dist")


def test_files_are_short() -> None:
    lengths = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in [*PACKAGE, *LAUNCH, *TESTS]
    }
    too_long = {shown(path): n for path, n in lengths.items() if n > MAX_FILE_LINES}
    assert not too_long, f"over {MAX_FILE_LINES} lines: {too_long}"


def test_functions_are_short() -> None:
    too_long = [
        f"{shown(path)}:{node.lineno} {node.name} has {length} lines"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES  # type: ignore[operator]
    ]
    assert not too_long, "\n".join(too_long)


def test_the_library_reads_no_environment_variables() -> None:
    wrong = [
        f"{shown(path)}:{line} uses {name}"
        for path in PACKAGE
        for line, name in used_names(TREES[path])
        if name.startswith(("os.environ", "os.getenv"))
    ]
    assert not wrong, "\n".join(wrong)


def run_python(source: str) -> str:
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light_and_a_public_name_resolves() -> None:
    heavy = ("torch", "numpy", "pydantic", "deepspeed", "megatron")
    loaded = f"[name for name in {heavy} if name in sys.modules]"
    assert run_python(f"import sys, effx_dist; print({loaded})").strip() == "[]"
    source = f"import sys; from effx_dist import EffxConfig; print(EffxConfig.__name__, {loaded})"
    assert run_python(source).strip() == "EffxConfig ['pydantic']"


@pytest.mark.parametrize("name", effx_dist.__all__)
def test_a_public_name_resolves_and_is_listed(name: str) -> None:
    value = getattr(effx_dist, name)
    assert value.__name__.rpartition(".")[2] == name
    assert name in dir(effx_dist)


def test_the_public_names_are_few() -> None:
    public = {*effx_dist.__all__, *effx_dist._OPTIONAL_ENGINES}
    assert public == {*effx_dist._HOMES, *effx_dist._SUBMODULES, *effx_dist._OPTIONAL_ENGINES}
    assert len(effx_dist.__all__) <= MAX_PUBLIC_NAMES, "what `import *` gives"


@pytest.mark.parametrize("engine", effx_dist._OPTIONAL_ENGINES)
def test_an_engine_that_is_absent_says_so(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine, None)  # as if it were not installed
    adapter = effx_dist._OPTIONAL_ENGINES[engine]
    for name in [name for name in sys.modules if f"{name}.".startswith(f"{adapter}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(vars(effx_dist), engine, raising=False)
    with pytest.raises(MissingEngineError, match=rf"effx_dist\.{engine}: "):
        getattr(effx_dist, engine)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(effx_dist, "no_such_name")
