"""The whole chain by its real programs: REFER files → JSON and masks → LMDB → training → scores."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    all_refs,
    load,
    pack,
    read_jsonl,
    run_command,
    run_program,
    tracked,
    write_config,
)
from PIL import Image

from tools import inspect_lmdb, refshapes
from tools.refer import Refer
from utils.metrics import CRIS, GRES, Convention
from utils.records import RecordReader
from utils.transforms import load_mask

PICTURES = 2
PROGRAMS = [path for path in tracked("tools/*.py") if "(main)" in path.read_text()]


def score(config: Path, lmdb: Path, *opts: object, convention: Convention = CRIS) -> None:
    """Run test.py by both protocols, and check all that a training and this test leave behind."""
    choice = ("TEST.protocol", "both", "TEST.report", True, "TEST.visualize", True)
    run_program("test.py", config, *choice, "TEST.visualize_limit", PICTURES, *opts)
    meta, folder = RecordReader(lmdb).meta, config.parent / "exp/tiny"
    split = f"{meta['dataset']}_{meta['split']}"
    assert {"config.yaml", "train.log", "metrics.jsonl"} <= {p.name for p in folder.iterdir()}
    for name in ("last_model.pth", "best_model.pth"):
        assert all(torch.isfinite(w).all() for w in load(folder / name)["state_dict"].values())
    losses = [row["loss"] for row in read_jsonl(folder / "metrics.jsonl") if "loss" in row]
    assert losses
    assert np.isfinite(losses).all()
    for suffix in (".threshold0.15", ".aligned.threshold0.15"):
        stem = f"test_{split}{suffix}"
        result = json.loads((folder / f"{stem}.json").read_text())
        lines = read_jsonl(folder / f"{stem}.jsonl")
        assert result["sentences"] == meta["sentences"] == len(lines)
        assert all(0 <= result[name] <= result["ceiling"][name] <= 1 for name in convention.metrics)
        page = folder / "report" / stem
        assert {"index.html", "data.js", "masks.js"} <= {path.name for path in page.iterdir()}
    assert (folder / "report/index.html").is_file()
    paths = list((folder / "vis" / split).iterdir())
    assert len(paths) == PICTURES
    for path in paths:
        with Image.open(path) as picture:
            picture.verify()
    assert not list(folder.rglob("*.partial"))


def test_shapes_from_nothing_to_scores(data, tmp_path):
    recipe = {"epochs": 2, "batch_by": "images", "workers": 1, "workers_val": 1}
    config = write_config(tmp_path, data, threshold=0.15, **recipe)
    run_program("train.py", config)
    score(config, data / "lmdb/shapes/val.lmdb")


def test_shapes_of_any_number_from_nothing_to_scores(tmp_path):
    counts = "--train 8 --val 4 --testA 0 --testB 0"
    refshapes.main(["-o", str(tmp_path), *counts.split(), "--any-number"])
    pack(tmp_path, tmp_path, "refshapes", "unc", "any")
    lmdb = tmp_path / "lmdb/any/val.lmdb"
    drawn = Refer(tmp_path, "refshapes", "unc").split_refs("val")
    numbers = [len(ref["ann_id"]) if ref["ann_id"] != [-1] else 0 for ref in drawn]
    assert [ref.num_targets for ref in all_refs(lmdb)] == numbers
    assert {min(number, 2) for number in numbers} == {0, 1, 2}
    config = write_config(tmp_path, tmp_path, "any", threshold=0.15, batch_by="images")
    run_program("train.py", config)
    score(config, lmdb, convention=GRES)


@pytest.mark.parametrize(
    ("dataset", "split_by", "train", "val"),
    [
        ("refcoco", "unc", "train", "testB"),
        ("refcoco+", "unc", "val", "testA"),
        ("refcocog", "umd", "train", "test"),
    ],
)
def test_real_photos_from_refer_files_to_scores(mini_root, tmp_path, dataset, split_by, train, val):
    pack(mini_root, tmp_path, dataset, split_by, dataset)
    config = write_config(tmp_path, tmp_path, dataset, threshold=0.15, print_freq=100)
    train_lmdb, lmdb = (tmp_path / f"lmdb/{dataset}/{split}.lmdb" for split in (train, val))
    lmdbs = ("DATA.train_lmdb", train_lmdb, "DATA.val_lmdb", lmdb)
    run_program("train.py", config, *lmdbs, "DATA.train_split", train, "DATA.val_split", val)
    score(config, lmdb, "TEST.test_split", val, "TEST.test_lmdb", lmdb)


def write_grefcoco(mini: Path, root: Path) -> None:
    """Some of the photos as gRefCOCO: each ref, two refs of a photo in one, and one of nothing."""
    plain, refs = Refer(mini, "refcoco", "unc"), []
    for split, name in (("testB", "train"), ("val", "val")):
        of_split = plain.split_refs(split)
        for image_id in dict.fromkeys(ref["image_id"] for ref in of_split):
            found = [ref for ref in of_split if ref["image_id"] == image_id]
            meant = {(r["ann_id"],): [s["sent"] for s in r["sentences"]] for r in found}
            meant[tuple(r["ann_id"] for r in found[:2])] = ["both of them"]
            for ids, texts in (meant | {(-1,): ["the submarine"]}).items():
                first = 100 * len(refs)
                sentences = [{"sent": text, "sent_id": first + i} for i, text in enumerate(texts)]
                ref = {"ref_id": len(refs), "ann_id": list(ids), "category_id": [1] * len(ids)}
                refs.append(ref | {"image_id": image_id, "split": name, "sentences": sentences})
    folder = root / "grefcoco"
    folder.mkdir()
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    (folder / "instances.json").symlink_to(mini / "refcoco/instances.json")
    (root / "images").symlink_to(mini / "images")


def test_real_photos_with_sentences_about_several_objects_and_about_none(mini_root, tmp_path):
    write_grefcoco(mini_root, tmp_path)
    pack(tmp_path, tmp_path, "grefcoco", "unc", "grefcoco")
    photos = 4
    for split in ("train", "val"):
        path = tmp_path / f"lmdb/grefcoco/{split}.lmdb"
        refs = all_refs(path)
        found = Counter(min(ref.num_targets, 2) for ref in refs)
        assert found == {0: photos, 1: len(refs) - 2 * photos, 2: photos}
        for ref in refs:
            parts = [r for r in refs if r.image_key == ref.image_key and r.num_targets == 1][:2]
            masks = {0: [], 1: [ref], 2: parts}[ref.num_targets]
            union = np.any([np.zeros((ref.height, ref.width)), *map(load_mask, masks)], axis=0)
            assert np.array_equal(load_mask(ref) > 0, union)
        inspect_lmdb.main([str(path)])
    config = write_config(tmp_path, tmp_path, "grefcoco", threshold=0.15, print_freq=1)
    run_program("train.py", config)
    score(config, path, convention=GRES)


def test_the_training_command_of_the_release_runs_with_keys_that_do_nothing_here(config):
    tree = yaml.safe_load(config.read_text())
    tree["DATA"]["mask_root"] = "datasets/masks/refcoco"
    tree["TRAIN"] |= {"evaluate": True, "save_freq": 1, "intermediate": False}
    tree["Distributed"] = {"dist_url": "tcp://localhost:3681", "dist_backend": "nccl"}
    tree["Distributed"] |= {"multiprocessing_distributed": True, "world_size": 1, "rank": 0}
    config.write_text(yaml.safe_dump(tree))
    ending = run_command(sys.executable, "-u", "train.py", "--config", config)
    assert ending.returncode == 0, ending.stderr
    assert ending.stderr.count("no effect here: ") == 5
    assert "Warning" not in ending.stderr
    assert ending.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_a_tool_runs_from_any_folder(tmp_path, path):
    ending = run_command("env", "-C", tmp_path, sys.executable, path, "--help")
    assert ending.returncode == 0, ending.stderr
    assert ending.stdout.startswith("usage: ")
