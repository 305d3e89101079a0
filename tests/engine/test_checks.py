"""Config, records and checkpoint that do not belong together are refused, unless asked for."""

from pathlib import Path

import pytest
from helpers import error_of, load, run_program, write_config

from engine.checks import check_records
from utils.config import load_config
from utils.errors import UserError

ALLOW = ("DATA.allow_mismatch", True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data) -> Path:
    """The folder of a run of one epoch."""
    folder = tmp_path_factory.mktemp("checked")
    run_program("train.py", write_config(folder, data))
    return folder


def test_records_of_another_data_set_are_refused_before_anything_is_written(data, tmp_path):
    config = write_config(tmp_path, data)
    line = error_of("train.py", config, "DATA.dataset", "refcoco")
    assert "train.lmdb holds shapes train, the config says refcoco train" in line
    assert line.endswith("if that is meant, add DATA.allow_mismatch True")
    assert not (tmp_path / "exp").exists()


@pytest.mark.parametrize("key", ["train", "val"])
def test_records_of_another_split_are_refused(key, data, tmp_path):
    lmdb = data / "lmdb/shapes/testB.lmdb"
    line = error_of("train.py", write_config(tmp_path, data), f"DATA.{key}_lmdb", lmdb)
    assert f"holds shapes testB, the config says shapes {key}" in line


def test_a_split_under_another_name_is_not_scored(trained, data):
    opts = ("TEST.test_split", "testA", "TEST.test_lmdb", data / "lmdb/shapes/testB.lmdb")
    line = error_of("test.py", trained / "tiny.yaml", *opts)
    assert "holds shapes testB, the config says shapes testA" in line


def test_the_flag_lets_another_data_set_pass(data, tmp_path):
    cfg = load_config(write_config(tmp_path, data), ["DATA.dataset", "other"])
    with pytest.raises(UserError):
        check_records(cfg, cfg.DATA.val_lmdb, "val")
    cfg = load_config(tmp_path / "tiny.yaml", ["dataset", "other", "allow_mismatch", "True"])
    check_records(cfg, cfg.DATA.val_lmdb, "val")


@pytest.mark.parametrize(
    ("opts", "fault"),
    [
        (("TRAIN.word_len", 12), "TRAIN.word_len 17, the config says 12"),
        (("TRAIN.input_size", 96), "TRAIN.input_size 64, the config says 96"),
    ],
)
def test_a_checkpoint_of_other_inputs_is_neither_scored_nor_resumed(trained, opts, fault):
    weights = trained / "exp/tiny/last_model.pth"
    for program, key in (("test.py", "TEST.weights"), ("train.py", "TRAIN.resume")):
        line = error_of(program, trained / "tiny.yaml", *opts, key, weights)
        assert f"{weights} was trained with {fault}" in line


def test_a_checkpoint_of_another_data_set_is_scored_with_the_flag(trained, data, tmp_path):
    opts = ("DATA.dataset", "other", "TRAIN.output_folder", tmp_path)
    weights = ("TEST.weights", trained / "exp/tiny/last_model.pth")
    line = error_of("test.py", trained / "tiny.yaml", *opts, *weights)
    assert "was trained with DATA.dataset shapes, the config says other" in line
    run_program("test.py", trained / "tiny.yaml", *opts, *weights, *ALLOW)
    assert (tmp_path / "tiny/test_shapes_val.json").is_file()


def test_a_training_may_start_from_the_weights_of_another_data_set(trained, data, tmp_path):
    config = write_config(tmp_path, data, word_len=12)
    run_program("train.py", config, "TRAIN.weight", trained / "exp/tiny/last_model.pth")
    state = load(tmp_path / "exp/tiny/last_model.pth")
    assert state["config"]["TRAIN"]["word_len"] == 12


def test_a_frozen_token_embedding_keeps_its_values_and_the_rest_trains(trained, data, tmp_path):
    start = ("TRAIN.weight", trained / "exp/tiny/last_model.pth")
    before = load(start[1])["state_dict"]
    run_program(
        "train.py", write_config(tmp_path, data), *start, "TRAIN.freeze_token_embedding", True
    )
    after = load(tmp_path / "exp/tiny/last_model.pth")["state_dict"]
    name = "backbone.token_embedding.weight"
    assert (after[name] == before[name]).all()
    for other in ("backbone.positional_embedding", "proj.txt.weight"):
        assert (after[other] != before[other]).any()
