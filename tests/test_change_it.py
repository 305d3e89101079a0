"""docs/change_it.md: each recipe is applied as it stands to a copy of the tree, and trains."""

import json
import re
import runpy
import shutil
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    ROOT,
    TINY_MODEL,
    TINY_RECIPE,
    load,
    read_metrics,
    run_command,
    run_program,
    save_photo,
    train_opts,
    write_config,
)

PAGE = (ROOT / "docs/change_it.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
PACKAGES = ("engine", "model", "tools", "utils")
MODELS = ("A loss", "A decoder", "A backbone", "An optimiser", "An augmentation")
CODE = ("A metric", "A config key", *MODELS)  # recipes that change some


@pytest.fixture
def tree(tmp_path) -> Path:
    """A copy of the repository: its code, tests and documents."""
    for name in ("train.py", "test.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for name in (*PACKAGES, "config", "docs", "tests"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def follow(recipe: str, tree: Path) -> None:
    """Change the copy as a recipe's block says: lines with - go, lines with + come."""
    (block,) = re.findall(r"^```diff\n(.*?)^```", RECIPES[recipe], re.M | re.S)
    for part in block.strip().split("\n\n"):
        name, _, hunks = part.partition("\n")
        text = (tree / name).read_text()
        for hunk in hunks.split("\n@@\n"):
            rows = hunk.splitlines()
            old, new = ("".join(f"{r[1:]}\n" for r in rows if r[0] != mark) for mark in "+-")
            assert f"\n{text}".count(f"\n{old}") == 1, f"{name} has not once: {old}"
            text = text.replace(old, new)
        (tree / name).write_text(text)


def run(tree: Path, module: str, *args: object) -> None:
    """Do `python -m <module> <args>` in the copy, but in this process: torch is there already."""
    own = {name for name in sys.modules if name.partition(".")[0] in (*PACKAGES, "train")}
    others = {name: sys.modules[name] for name in sys.modules.keys() - own}
    with (
        chdir(tree),
        mock.patch.dict(sys.modules, others, clear=True),
        mock.patch.object(sys, "path", [str(tree), *sys.path]),
        mock.patch.object(sys, "argv", [module, *map(str, args)]),
    ):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def train(tree: Path, config: Path, *opts: object) -> list[dict]:
    """Train with the copy, and return the records of the run."""
    out = ("TRAIN.output_folder", tree / "exp")
    run(tree, "train", "--config", config, "--opts", *out, *opts)
    return read_metrics(tree / "exp/tiny")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, data) -> Path:
    """The config of a run of the code as it is."""
    config = write_config(tmp_path_factory.mktemp("plain"), data, weight_decay=0.1)
    run_program("train.py", config)
    return config


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_tried_and_names_tests_or_commands_that_tell(recipe):
    assert recipe in (*CODE, "A data set")
    assert re.search(r"\(\.\./tests/|`--dry-run`", RECIPES[recipe])


@pytest.mark.parametrize("recipe", MODELS)
def test_a_changed_model_or_training_learns_something_else(recipe, plain, tree):
    follow(recipe, tree)
    opts = []
    if recipe == "A backbone":  # from CLIP's weights, of which its text is taken
        state = load(plain.parent / "exp/tiny/best_model.pth")["state_dict"]
        prefix = "backbone."
        clip = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        torch.save(clip, tree / "clip.pt")
        opts = ["TRAIN.clip_pretrain", tree / "clip.pt", "TRAIN.clip_arch", None]
    losses = [record["loss"] for record in train(tree, plain, *opts)]
    assert np.isfinite(losses).all()
    expected = [record["loss"] for record in read_metrics(plain.parent / "exp/tiny")]
    assert len(losses) == len(expected)
    assert losses[-1] != pytest.approx(expected[-1], rel=1e-4)


def test_a_metric_is_in_the_log_and_in_the_records(plain, tree):
    follow("A metric", tree)
    *_, epoch = train(tree, plain)
    assert 0 <= epoch["hit"] <= 1
    assert f", hit {100 * epoch['hit']:.2f}" in (tree / "exp/tiny/train.log").read_text()


def test_a_config_key_is_in_base_yaml_and_does_something_when_it_is_set(plain, tree):
    follow("A config key", tree)
    run(tree, "utils.config")
    assert "  smoothing: 0.0  # how far" in (tree / "config/base.yaml").read_text()
    *_, epoch = train(tree, plain, "TRAIN.smoothing", 0.2)
    assert epoch["loss"] != read_metrics(plain.parent / "exp/tiny")[-1]["loss"]


def test_a_data_set_needs_no_code(tree):
    lines = []
    for number in range(12):
        save_photo(tree / f"photos/{number}.png", number)
        line = {"image": f"photos/{number}.png", "sentences": ["the mug"]}
        line |= {"mask": [[9, 9, 60, 9, 60, 50]], "split": "val" if number > 7 else "train"}
        lines.append(json.dumps(line) + "\n")
    (tree / "mugs.jsonl").write_text("".join(lines))
    (arguments,) = re.findall(r"`python tools/own_data.py (.*?)`", RECIPES["A data set"])
    run(tree, "tools.own_data", *arguments.split())
    (text,) = re.findall(r"^```yaml\n(.*?)^```", RECIPES["A data set"], re.M | re.S)
    config = tree / "config/mine/mugs.yaml"
    config.parent.mkdir()
    config.write_text(text)
    opts = train_opts(**TINY_MODEL, **TINY_RECIPE, exp_name="tiny")
    run(tree, "train", "--config", config, "--opts", *opts)
    assert yaml.safe_load(text)["TRAIN"]["output_folder"] == "exp/mugs"
    *_, epoch = read_metrics(tree / "exp/mugs/tiny")
    assert epoch["sentences"] == 4


@pytest.mark.slow
def test_the_tests_that_recipes_name_hold_but_for_parity(tree):
    """With all recipes at once: no two of them change the same line."""
    for recipe in CODE:
        follow(recipe, tree)
    run(tree, "utils.config")
    text = "".join(RECIPES[recipe] for recipe in CODE)
    names = sorted(set(re.findall(r"\(\.\./(tests/[\w/]+\.py)\)", text)))
    pytest_of_copy = ("env", "-C", tree, sys.executable, "-m", "pytest", "-q", "-x", *names)
    ending = run_command(*pytest_of_copy, "-m", "not parity and not slow")
    assert ending.returncode == 0, ending.stdout
