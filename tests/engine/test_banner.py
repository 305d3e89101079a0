"""What is said before a training starts, of runs that train.py built."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, build_run, run_program, write_config

from engine.banner import banner, options_on
from utils.config import Config, load_config
from utils.records import RecordReader


@pytest.fixture
def config(tmp_path, data) -> Path:
    return write_config(tmp_path, data, accumulation_steps=2, epochs=3)


def lines_of(run, source: str | None = None) -> dict[str, list[str]]:
    """What is said, by subject."""
    found: dict[str, list[str]] = {}
    for label, text in banner(run, source):
        found.setdefault(label, []).append(text)
    return found


def test_everything_that_decides_a_run_is_named(config, data, tmp_path):
    run = build_run(config, "TRAIN.freeze_token_embedding", True)
    said = lines_of(run)
    sizes = [parameter.numel() for parameter in run.model.parameters()]
    frozen = [p.numel() for p in run.model.parameters() if not p.requires_grad]
    assert len(frozen) == 2  # CLIP's logit_scale, and the embedding
    assert said["model"] == [
        "CLIP ResNet 1-1-1-1 of width 8, Decoder of width 64; 64 pixels, 17 tokens"
    ]
    assert said["weights"] == ["random"]
    assert said["parameters"] == [f"{sum(sizes):,}, of them {sum(sizes) - sum(frozen):,} trained"]
    for subject, split, images in (("training", "train", 12), ("validation", "val", 5)):
        reader = RecordReader(data / f"lmdb/shapes/{split}.lmdb")
        counts = f"{len(reader)} refs, {reader.meta['sentences']} sentences, {images} images"
        assert said[subject][0].startswith(f"shapes {split}: {counts} in {reader.path}")
    assert said["validation"][0].endswith("; published protocol, threshold 0.35, all sentences")
    assert said["ranks"] == ["1 on cpu with 1 thread(s), float32"]
    assert said["step"] == ["1 rank(s) x 4 x 2 (accumulation) = batch 8"]
    steps = len(run.train_loader) // 2
    assert said["length"] == [f"3 epochs of {steps} steps: {3 * steps} in all"]
    refs = len(RecordReader(data / "lmdb/shapes/train.lmdb"))
    opts = ("TRAIN.batch_size", refs - 2, "TRAIN.val_sentences", "first", "TEST.threshold", 0.2)
    other = lines_of(build_run(config, *opts))
    idle = f"2 of {refs} refs, others each time, fill no batch"
    assert other["length"] == [f"3 epochs of 1 steps: 3 in all; {idle}"]
    assert other["validation"][0].endswith("; published protocol, threshold 0.2, first sentences")
    assert said["output"] == [str(tmp_path / "exp/tiny")]
    assert "TRAIN.freeze_token_embedding true" in ", ".join(said["options"])


def test_every_file_of_a_joined_training_is_counted_without_what_is_left_out(data, tmp_path):
    config = write_config(tmp_path, data)
    lmdb = data / "lmdb/shapes"
    files = [lmdb / "train.lmdb", lmdb / "val.lmdb"]
    opts = ["DATA.train_lmdb", list(map(str, files)), "DATA.allow_mismatch", True]
    run = build_run(config, *opts, "DATA.exclude_lmdb", f"[{lmdb / 'testA.lmdb'}]")
    parts = run.train_loader.dataset.records.parts
    assert len(parts) == 2
    for line, (reader, kept) in zip(lines_of(run)["training"], parts, strict=True):
        sentences = np.array(reader.index.num_sentences)[kept].sum()
        assert f": {len(kept)} refs, {sentences} sentences, " in line
        assert line.endswith(str(reader.path))


def test_the_banner_is_in_the_log_and_a_resumed_run_says_from_where_it_goes_on(config, tmp_path):
    run_program("train.py", config, "TRAIN.epochs", 1)
    text = (tmp_path / "exp/tiny/train.log").read_text()
    subjects = ("model", "weights", "parameters", "training", "validation", "ranks", "step")
    for subject in (*subjects, "length", "output", "options"):
        assert f"INFO    {subject:<12}" in text, subject
    assert text.index("options ") < text.index("epoch 1 step")
    last = tmp_path / "exp/tiny/last_model.pth"
    run = build_run(config, "TRAIN.resume", last)
    said = lines_of(run, str(last))
    assert said["weights"] == [f"resumed from {last}, after 1 epoch(s)"]
    assert said["length"][0].endswith(f" in all, {run.step} of them done")
    anew = build_run(config, "TRAIN.weight", last, "TRAIN.exp_name", "b")
    assert lines_of(anew)["weights"] == [f"{last} (TRAIN.weight), new optimiser"]


def test_options_are_what_differs_from_the_published_recipe():
    assert options_on(Config()) == []
    assert options_on(load_config(ROOT / "config/refcoco/cris_r50.yaml")) == []
    opts = ["save_every", "10 minutes", "batch_by", "images", "max_norm", "1.0", "DATA.cache", "/c"]
    changed = load_config(ROOT / "config/refcoco/cris_r50.yaml", opts)
    assert options_on(changed) == [
        "DATA.cache /c",
        "TRAIN.batch_by images",
        "TRAIN.max_norm 1.0",
        "TRAIN.save_every '10 minutes'",
    ]
