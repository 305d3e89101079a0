"""The house's rules about imports, read off the source: they run one way and cost nothing."""

import ast
import json
import sys
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT, run_command

LEAVES = (
    "arguments cache config distributed errors files lock machine metrics photos records seed "
    "signals tokenizer transforms"
)
LAYERS = {"utils": "leaf"} | {f"utils.{name}": "leaf" for name in LEAVES.split()}
SECOND = ("checkpoint", "dataset", "logger", "visualize")
LAYERS |= {f"utils.{name}": "second tier" for name in SECOND} | {"train": "entry", "test": "entry"}
MAY_IMPORT = {
    "leaf": {"leaf"},
    "second tier": {"leaf"},
    "model": {"model"},
    "engine": {"engine", "model", "second tier", "leaf"},
    "tools": {"tools", "engine", "model", "second tier", "leaf"},
    "entry": {"engine", "model", "second tier", "leaf"},
}


def module_trees() -> dict[str, ast.Module]:
    """Every module of the repository outside tests/, by name."""
    paths = [ROOT / "train.py", ROOT / "test.py"]
    for package in ("engine", "model", "tools", "utils"):
        paths += sorted((ROOT / package).rglob("*.py"))
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    trees = [ast.parse(path.read_text("utf-8")) for path in paths]
    return {n.removesuffix(".__init__"): tree for n, tree in zip(names, trees, strict=True)}


TREES = module_trees()


def imports(tree: ast.AST) -> set[str]:
    """The dotted names that a module imports, except for the type checker alone."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.unparse(tree.test):
        return set()
    if isinstance(tree, ast.Import):
        return {alias.name for alias in tree.names}
    if isinstance(tree, ast.ImportFrom):
        assert tree.level == 0, "imports name their package"
        return {f"{tree.module}.{alias.name}" for alias in tree.names}
    return set().union(*map(imports, ast.iter_child_nodes(tree)))


def own_imports(name: str) -> set[str]:
    """The repository's modules that a module imports, wherever in it."""
    found = {n if n in TREES else n.rpartition(".")[0] for n in imports(TREES[name])}
    return found & TREES.keys()


def layer(name: str) -> str:
    """Where a module belongs."""
    return LAYERS.get(name) or name.partition(".")[0]


@pytest.mark.parametrize("name", sorted(TREES))
def test_imports_run_one_way(name):
    assert layer(name) in MAY_IMPORT, f"{name} has no tier"
    wrong = {other for other in own_imports(name) if layer(other) not in MAY_IMPORT[layer(name)]}
    assert not wrong, f"{name} ({layer(name)}) may not import {wrong}"


def test_no_module_imports_itself_in_a_circle():
    graph = {name: own_imports(name) - {name} for name in TREES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(TREES)


DISTRIBUTED = ("torch.distributed", "torch.nn.parallel", "torch.multiprocessing")


@pytest.mark.parametrize(
    ("modules", "user"), [(DISTRIBUTED, "utils.distributed"), (("wandb",), "utils.logger")]
)
def test_only_one_module_uses(modules, user):
    """Imports it, or something in it, or reaches it as an attribute."""
    found = set()
    for name, tree in TREES.items():
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        named = imports(tree) | set(map(ast.unparse, nodes))
        if any(f"{text}.".startswith(f"{module}.") for text in named for module in modules):
            found.add(name)
    assert found == {user}


def test_only_one_module_reads_the_ranks_environment():
    variables = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"}
    readers = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in variables
    }
    assert readers == {"utils.distributed"}


def test_importing_any_module_does_nothing_and_loads_neither_wandb_nor_torchvision(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--nonsense']\n"
        "import importlib, json, random\n"
        "before = random.getstate()\n"
        f"for name in {sorted(TREES)!r}: importlib.import_module(name)\n"
        "assert random.getstate() == before\n"
        "assert sys.argv == ['x', '--nonsense']\n"
        "assert not sys.modules['torch'].distributed.is_initialized()\n"
        "print(json.dumps(sorted({n.partition('.')[0] for n in sys.modules})))"
    )
    result = run_command("env", "-C", tmp_path, sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert not {"wandb", "torchvision"} & set(json.loads(result.stdout))
    assert list(tmp_path.iterdir()) == []
