"""Config, records and checkpoint that do not belong together: trained no further, but scored."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import (
    ROOT,
    build_run,
    error_of,
    largest_file,
    load,
    pack,
    run_command,
    run_program,
    write_records,
)

from utils.records import RecordReader


@pytest.fixture
def score(checkpoint, config, tmp_path) -> tuple:
    """How that checkpoint is scored: program, config, and options that write to `tmp_path`/tiny."""
    return ("test.py", config, "TRAIN.output_folder", tmp_path, "TEST.weights", checkpoint)


@pytest.mark.parametrize(
    ("key", "held", "fault"),
    [
        ("dataset", None, "train.lmdb holds shapes train, the config says refcoco train"),
        ("train_lmdb", "testB", "holds shapes testB, the config says shapes train"),
        ("val_lmdb", "testB", "holds shapes testB, the config says shapes val"),
    ],
)
def test_other_records_are_refused_before_anything_is_written_unless_they_are_meant(
    key, held, fault, config, data, tmp_path
):
    opts = (f"DATA.{key}", data / f"lmdb/shapes/{held}.lmdb" if held else "refcoco")
    line = error_of("train.py", config, *opts)
    assert line.endswith(f"{fault}; if that is meant, add DATA.allow_mismatch True")
    assert not (tmp_path / "exp").exists()
    build_run(config, *opts, "DATA.allow_mismatch", True)


def test_a_split_under_another_name_is_scored_as_what_it_is(score, data, tmp_path, capsys):
    opts = ("TEST.test_split", "testA", "TEST.test_lmdb", data / "lmdb/shapes/testB.lmdb")
    run_program(*score, *opts)
    told = "holds shapes testB, the config says shapes testA: shapes testB is scored with "
    assert capsys.readouterr().err.count(told) == 1
    assert json.loads((tmp_path / "tiny/test_shapes_testB.json").read_text())["split"] == "testB"


def test_two_files_of_one_split_do_not_overwrite_each_others_scores(score, data, tmp_path):
    for split in ("val", "testA"):
        (tmp_path / f"{split}.lmdb").symlink_to(data / "lmdb/shapes/testB.lmdb")
    opts = ("TEST.splits", "[val, testA]", "TEST.test_lmdb", tmp_path / "val.lmdb")
    assert error_of(*score, *opts).endswith(f"{tmp_path}/testA.lmdb both hold shapes testB")


def test_scores_of_other_records_of_the_same_name_are_not_replaced(score, data, tmp_path):
    lmdb = shutil.copy(data / "lmdb/shapes/val.lmdb", tmp_path / "val.lmdb")
    score += ("TEST.test_lmdb", lmdb)
    for _ in range(2):  # the same records are scored again
        run_program(*score)
    result = tmp_path / "tiny/test_shapes_val.json"
    before = result.read_text()
    write_records(Path(lmdb), [2])
    fault = f"{result} has the scores of other records than {lmdb} holds: "
    assert error_of(*score).startswith(fault)
    assert result.read_text() == before
    run_program(*score, "TRAIN.force", True)
    assert json.loads(result.read_text())["records"] == RecordReader(lmdb).digest()


@pytest.mark.parametrize("name", ["report", "vis"])
def test_the_next_split_is_scored_and_printed_though_pictures_cannot_be_written(
    score, tmp_path, capsys, name
):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / name).touch()
    opts = ("TEST.splits", "[val, testA]", "TEST.report", True, "TEST.visualize", True)
    assert f"{tmp_path}/tiny/{name}" in error_of(*score, *opts)
    printed = capsys.readouterr().out
    assert all(f"shapes   {split} " in printed for split in ("val", "testA"))
    assert (tmp_path / "tiny/test_shapes_testA.json").is_file()


@pytest.mark.parametrize(
    ("opts", "fault"),
    [
        (("TRAIN.word_len", 12), "TRAIN.word_len 17, the config says 12"),
        (("TRAIN.input_size", 96), "TRAIN.input_size 64, the config says 96"),
    ],
)
def test_a_checkpoint_of_other_inputs_is_scored_and_told_but_not_resumed(
    checkpoint, score, capsys, opts, fault
):
    told = f"{checkpoint} was trained with {fault}"
    assert told in error_of("train.py", score[1], *opts, "TRAIN.resume", checkpoint)
    run_program(*score, *opts)
    assert capsys.readouterr().err.count(told) == 1


def test_the_evaluation_example_of_the_release_runs(checkpoint, config, data, tmp_path):
    """Its model is refcoco's, its records are refcocog's; here the model is a small one."""
    pack(data, tmp_path / "datasets", "refshapes", "unc", "refcocog_g")
    path, run = tmp_path / "config/refcoco/cris_r50.yaml", tmp_path / "exp/refcoco/CRIS_R50"
    for folder in (path.parent, run):
        folder.mkdir(parents=True)
    shutil.copy(checkpoint, run / "best_model.pth")
    names = {"output_folder": "exp/refcoco", "exp_name": "CRIS_R50"}
    tree = {"_base_": str(config), "DATA": {"dataset": "refcoco"}, "TRAIN": names}
    path.write_text(json.dumps(tree))
    line = (
        f"{sys.executable} -u {ROOT}/test.py --config config/refcoco/cris_r50.yaml --opts "
        "TEST.test_split val-test TEST.test_lmdb datasets/lmdb/refcocog_g/val.lmdb"
    )
    ending = run_command("env", "-C", tmp_path, *line.split(), CUDA_VISIBLE_DEVICES="0")
    assert ending.returncode == 0, ending.stderr
    assert "holds refcocog_g val, the config says refcoco val" in ending.stderr
    assert "Warning" not in ending.stderr
    head, row, *_ = map(str.split, ending.stdout.splitlines())
    assert head[:4] == ["dataset", "split", "protocol", "sentences"]
    assert row[:3] == ["refcocog_g", "val", "published"]
    assert (run / "test_refcocog_g_val.json").is_file()


@pytest.mark.skipif(not Path("/sys").is_dir(), reason="no /sys, where not even root may write")
def test_what_cannot_be_written_is_told_before_an_hour_of_scoring(score):
    assert error_of(*score, "TRAIN.output_folder", "/sys/nobody").startswith("/sys/nobody")


def test_scores_are_printed_though_they_cannot_be_written(score, tmp_path, capsys):
    with largest_file(2_000):
        assert "File too large" in error_of(*score)
    assert "perfect model" in capsys.readouterr().out
    assert not list((tmp_path / "tiny").iterdir())


def test_a_training_may_start_from_weights_of_other_inputs_and_keep_the_embedding_frozen(
    checkpoint, config, tmp_path
):
    before = load(checkpoint)["state_dict"]
    opts = ("TRAIN.weight", checkpoint, "TRAIN.freeze_token_embedding", True)
    run_program("train.py", config, *opts, "TRAIN.word_len", 12)
    state = load(tmp_path / "exp/tiny/last_model.pth")
    assert state["config"]["TRAIN"]["word_len"] == 12
    after = state["state_dict"]
    name = "backbone.token_embedding.weight"
    assert (after[name] == before[name]).all()
    for other in ("backbone.positional_embedding", "proj.txt.weight"):
        assert (after[other] != before[other]).any()
