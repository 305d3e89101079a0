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
    on_cpu,
    read_metrics,
    run_command,
    run_program,
    save_photo,
    write_config,
)

PAGE = (ROOT / "docs/change_it.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))
PACKAGES = ("engine", "model", "tools", "utils")
CODE = ("train.py", "test.py", *PACKAGES, "config")


def copy_code(tree: Path, *names: str) -> None:
    """Copy the code, and these files and folders, of the repository."""
    for name in (*CODE, *names):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree / name)
        else:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=ignore)


def follow(recipe: str, tree: Path, *names: str) -> None:
    """Change a copy as a recipe's block says: lines with - go, lines with + come."""
    copy_code(tree, *names)
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
        on_cpu(),
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
    assert recipe in {"A metric", "A config key", "A data set", *MODELS}
    assert re.search(r"\(\.\./tests/|`--dry-run`", RECIPES[recipe])


MODELS = ("A loss", "A decoder", "A backbone", "An optimiser", "An augmentation")


@pytest.mark.parametrize("recipe", MODELS)
def test_a_changed_model_or_training_learns_something_else(recipe, plain, tmp_path):
    follow(recipe, tmp_path)
    opts = []
    if recipe == "A backbone":  # from CLIP's weights, of which its text is taken
        state = load(plain.parent / "exp/tiny/best_model.pth")["state_dict"]
        prefix = "backbone."
        clip = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        torch.save(clip, tmp_path / "clip.pt")
        opts = ["TRAIN.clip_pretrain", tmp_path / "clip.pt", "TRAIN.clip_arch", None]
    losses = [record["loss"] for record in train(tmp_path, plain, *opts)]
    assert np.isfinite(losses).all()
    expected = [record["loss"] for record in read_metrics(plain.parent / "exp/tiny")]
    assert len(losses) == len(expected)
    assert losses[-1] != pytest.approx(expected[-1], rel=1e-4)


def test_a_metric_is_in_the_log_and_in_the_records(plain, tmp_path):
    follow("A metric", tmp_path)
    *_, epoch = train(tmp_path, plain)
    assert 0 <= epoch["hit"] <= 1
    assert f", hit {100 * epoch['hit']:.2f}" in (tmp_path / "exp/tiny/train.log").read_text()


def test_a_config_key_is_in_base_yaml_and_does_something_when_it_is_set(plain, tmp_path):
    follow("A config key", tmp_path)
    run(tmp_path, "utils.config")
    assert "  smoothing: 0.0  # how far" in (tmp_path / "config/base.yaml").read_text()
    *_, epoch = train(tmp_path, plain, "TRAIN.smoothing", 0.2)
    assert epoch["loss"] != read_metrics(plain.parent / "exp/tiny")[-1]["loss"]


def test_a_data_set_needs_no_code(tmp_path):
    copy_code(tmp_path)
    with (tmp_path / "mugs.jsonl").open("w") as file:
        for number in range(12):
            photo = save_photo(tmp_path / f"photos/{number}.png", number)
            line = {"image": f"photos/{photo.name}", "sentences": ["the mug"]}
            line |= {"mask": [[9, 9, 60, 9, 60, 50]], "split": "val" if number > 7 else "train"}
            file.write(json.dumps(line) + "\n")
    (arguments,) = re.findall(r"`python tools/own_data.py (.*?)`", RECIPES["A data set"])
    run(tmp_path, "tools.own_data", *arguments.split())
    (text,) = re.findall(r"^```yaml\n(.*?)^```", RECIPES["A data set"], re.M | re.S)
    config = tmp_path / "config/mine/mugs.yaml"
    config.parent.mkdir()
    config.write_text(text)
    opts = [w for k, v in (TINY_MODEL | TINY_RECIPE).items() for w in (f"TRAIN.{k}", v)]
    run(tmp_path, "train", "--config", config, "--opts", *opts, "TRAIN.exp_name", "tiny")
    assert yaml.safe_load(text)["TRAIN"]["output_folder"] == "exp/mugs"
    *_, epoch = read_metrics(tmp_path / "exp/mugs/tiny")
    assert epoch["sentences"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["A metric", "A config key", *MODELS])
def test_the_tests_that_a_recipe_names_hold_but_for_parity(recipe, tmp_path):
    follow(recipe, tmp_path, "tests", "docs", "pyproject.toml", "README.md")
    run(tmp_path, "utils.config")
    names = re.findall(r"\(\.\./(tests/[\w/]+\.py)\)", RECIPES[recipe])
    pytest_of_copy = ("env", "-C", tmp_path, sys.executable, "-m", "pytest", "-q", "-x", *names)
    ending = run_command(*pytest_of_copy, "-m", "not parity and not slow")
    assert ending.returncode == 0, ending.stdout
