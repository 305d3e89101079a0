"""The house's rules about imports, read off the source: they run one way and cost nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from typing import NamedTuple

import pytest
from helpers import ROOT

LEAVES = {
    "utils.arguments",
    "utils.cache",
    "utils.config",
    "utils.distributed",
    "utils.errors",
    "utils.files",
    "utils.lock",
    "utils.machine",
    "utils.metrics",
    "utils.photos",
    "utils.records",
    "utils.seed",
    "utils.signals",
    "utils.tokenizer",
    "utils.transforms",
}
SECOND_TIER = {"utils.checkpoint", "utils.dataset", "utils.logger", "utils.visualize"}
ENTRIES = {"train", "test"}


def module_files() -> dict[str, str]:
    """Every module of the repository outside tests/, by name."""
    paths = [ROOT / f"{name}.py" for name in ENTRIES]
    for package in ("engine", "model", "tools", "utils"):
        paths += sorted((ROOT / package).rglob("*.py"))
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in paths}
    return {name.removesuffix(".__init__"): p.read_text("utf-8") for p, name in names.items()}


SOURCES = module_files()
TREES = {name: ast.parse(source) for name, source in SOURCES.items()}


class Import(NamedTuple):
    """One imported name, dotted; `at_import` unless it lies in a function."""

    name: str
    at_import: bool


def imports(node: ast.AST, at_import: bool = True) -> Iterator[Import]:
    """What a module imports, except for the type checker alone."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, at_import) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports name their package"
        yield from (Import(f"{node.module}.{alias.name}", at_import) for alias in node.names)
    in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for child in ast.iter_child_nodes(node):
        yield from imports(child, at_import and not in_function)


def own_imports(name: str) -> set[str]:
    """The repository's modules that a module imports, wherever in it."""
    found = set()
    for imported, _ in imports(TREES[name]):
        owner = imported if imported in SOURCES else imported.rpartition(".")[0]
        if owner in SOURCES:
            found.add(owner)
    return found


def layer(name: str) -> str:
    """Where a module belongs."""
    if name in LEAVES:
        return "leaf"
    if name in SECOND_TIER:
        return "second tier"
    return "entry" if name in ENTRIES else name.partition(".")[0]


MAY_IMPORT = {
    "leaf": {"leaf"},
    "second tier": {"leaf"},
    "model": {"model"},
    "engine": {"engine", "model", "second tier", "leaf"},
    "tools": {"tools", "engine", "model", "second tier", "leaf"},
    "entry": {"engine", "model", "second tier", "leaf"},
}


# --------------------------------------------------------------------------------------- directions


def test_the_reader_of_imports_sees_every_form_of_them():
    source = (
        "import a.b\nfrom c import d as e, f\nif TYPE_CHECKING:\n    import g\n"
        "class A:\n    import h\n    def m(self):\n        import i\n"
        "try:\n    import j\nexcept ImportError:\n    pass\n"
    )
    assert list(imports(ast.parse(source))) == [
        ("a.b", True), ("c.d", True), ("c.f", True), ("h", True), ("i", False), ("j", True),
    ]  # fmt: skip


def test_every_module_of_utils_has_its_tier():
    in_utils = {name for name in SOURCES if name.startswith("utils.")}
    assert in_utils == LEAVES | SECOND_TIER


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_run_one_way(name):
    wrong = {other for other in own_imports(name) if layer(other) not in MAY_IMPORT[layer(name)]}
    assert not wrong, f"{name} ({layer(name)}) may not import {wrong}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: own_imports(name) - {name} for name in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)


# ---------------------------------------------------------------------------------------- one place


def users_of(*modules: str) -> set[str]:
    """Modules that import one of these (or something in it), or reach it as an attribute."""
    found = set()
    for name, tree in TREES.items():
        named = [imported for imported, _ in imports(tree)]
        named += [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        if any(f"{text}.".startswith(f"{module}.") for text in named for module in modules):
            found.add(name)
    return found


def test_only_one_module_touches_torch_distributed():
    modules = ("torch.distributed", "torch.nn.parallel", "torch.multiprocessing")
    assert users_of(*modules) == {"utils.distributed"}


def test_only_one_module_reads_the_ranks_environment():
    variables = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    readers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in variables
    }
    assert readers == {"utils.distributed"}


def test_only_the_logger_imports_wandb_and_only_when_asked():
    found = {
        (name, at_import)
        for name, tree in TREES.items()
        for imported, at_import in imports(tree)
        if imported.partition(".")[0] == "wandb"
    }
    assert found == {("utils.logger", False)}


# -------------------------------------------------------------------------------- importing is free


def test_importing_any_module_does_nothing_and_loads_neither_wandb_nor_torchvision(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
        "import importlib, json, random\n"
        "before = random.getstate()\n"
        f"for name in {sorted(SOURCES)!r}: importlib.import_module(name)\n"
        "assert random.getstate() == before\n"
        "assert sys.argv == ['x', '--nonsense']\n"
        "assert not sys.modules['torch'].distributed.is_initialized()\n"
        "print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert not {"wandb", "torchvision"} & set(json.loads(result.stdout))
    assert list(tmp_path.iterdir()) == []
