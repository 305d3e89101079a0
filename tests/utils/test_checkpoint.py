"""Checkpoints: whole or not there, read without running anything, ours and official ones."""

import io
import os
import pickle
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    assert_same,
    build_run,
    error_of,
    files,
    load,
    read_jsonl,
    run_program,
    user_error,
)
from torch import nn

from utils.checkpoint import load_weights, read_checkpoint, save_checkpoint


class Hostile:
    """Pickles as a call of `os.system`."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def saved(content: object, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def state(epoch: int = 1, value: float = 1.0) -> dict:
    return {
        "epoch": epoch,
        "best_iou": 0.25,
        "state_dict": {"weight": torch.full((2, 3), value), "count": torch.tensor(7)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]},
        "rng": [{"torch": torch.get_rng_state()}],
        "config": {"TRAIN": {"resume": None, "milestones": (35,)}},
    }


def refusal(path: Path) -> str:
    """The one line with which the file is refused."""
    line = user_error(read_checkpoint, path, "TEST.weights")
    assert line.startswith("TEST.weights: ")
    assert str(path) in line
    return line


# ---------------------------------------------------------------------------------- the files


def test_what_is_saved_is_read(tmp_path):
    save_checkpoint(state(), tmp_path, is_best=False)
    assert_same(read_checkpoint(tmp_path / "last_model.pth", "TRAIN.resume"), state())
    assert [path.name for path in tmp_path.iterdir()] == ["last_model.pth"]


@pytest.mark.parametrize("has_links", [True, False])
def test_the_best_one_stays_when_later_ones_are_written(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", mock.Mock(side_effect=OSError("no hard links here")))
    for epoch, is_best in ((1, True), (2, True), (3, False), (4, False)):
        save_checkpoint(state(epoch, float(epoch)), tmp_path, is_best)
    assert_same(load(tmp_path / "best_model.pth"), state(2, 2.0))
    assert_same(load(tmp_path / "last_model.pth"), state(4, 4.0))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98, 0.999])
def test_a_torn_file_is_refused(tmp_path, share, zipped):
    content = saved(state(), _use_new_zipfile_serialization=zipped)
    path = tmp_path / "torn.pth"
    path.write_bytes(content[: int(share * len(content))])
    assert "cut off, damaged or no checkpoint" in refusal(path)


ASKING = {  # by what a pickle of it asks for
    "posix.system": Hostile(),
    "numpy._core.multiarray._reconstruct": np.arange(3),
    "numpy.dtype.M8": np.datetime64("2020-01-01"),
    "numpy.dtype.V1": np.void(b"x"),
}
REFUSED = {
    "nothing": (None, "there is no checkpoint"),
    "page": (b"<!doctype html><html>not found</html>", "cut off, damaged or no checkpoint"),
    "yaml": (b"TRAIN:\n  epochs: 3\n", "cut off, damaged or no checkpoint"),
    "pickle 2": (pickle.dumps(Hostile(), protocol=2), "asks for posix.system"),
    "pickle 4": (pickle.dumps(Hostile(), protocol=4), "no checkpoint"),
    "protocol": (saved(state(), pickle_protocol=4), "asks for another pickle protocol"),
    "text": (saved({"state_dict": {"weight": "heavy"}}), "has no state_dict"),
    "number": (saved({"state_dict": {5: torch.ones(2)}}), "has no state_dict"),
    "tensor": (saved(torch.ones(2)), "has no state_dict"),
} | {
    f"{asked}, {'zip' if zipped else 'old'}": (
        saved(state() | {"extra": value}, _use_new_zipfile_serialization=zipped),
        f"asks for {asked}, which weights do not need: refused",
    )
    for asked, value in ASKING.items()
    for zipped in (True, False)
}


@pytest.mark.parametrize(("content", "problem"), REFUSED.values(), ids=REFUSED)
def test_something_else_is_refused_and_nothing_of_it_is_run(
    tmp_path, monkeypatch, content, problem
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    if content is not None:
        path.write_bytes(content)
    assert problem in refusal(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_pointed_to_its_key(tmp_path):
    path = tmp_path / "RN50.pt"
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), path)
    assert "TRAIN.clip_pretrain" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_scalars_are_read_as_plain_values(tmp_path, zipped):
    numbers = {"f8": 0.1, "f4": 0.5, "f2": 2.0, "i8": -3, "i4": 7, "u1": 255, ">f8": 0.1, "?": True}
    numbers |= {"c8": 1 + 2j, "U": "résumé 😀", "S": b"x\xff", ">U6": "", "S4": b""}
    content = state() | {"best_iou": {k: np.dtype(k).type(v) for k, v in numbers.items()}}
    path = tmp_path / "x.pth"
    path.write_bytes(saved(content, _use_new_zipfile_serialization=zipped))
    assert_same(read_checkpoint(path, "x"), state() | {"best_iou": numbers})


# ------------------------------------------------------------------------------- the weights


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("place", ["state_dict", "model", "model_state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_loaded_from_where_other_projects_keep_them(prefix, place, tmp_path):
    source, target = small_model(), small_model()
    path = tmp_path / "x.pth"
    weights = {prefix + k: v for k, v in source.state_dict().items()}
    torch.save({place: weights, "epoch": 3} if place else weights, path)
    load_weights(target, read_checkpoint(path, "TEST.weights")["state_dict"], path)
    assert_same(dict(target.state_dict()), dict(source.state_dict()))


def test_weights_that_do_not_fit_are_named_in_one_line():
    weights = small_model().state_dict()
    weights["0.weight"] = torch.ones(4, 3)
    weights["head.bias"] = weights.pop("1.bias")
    line = user_error(load_weights, small_model(), weights, "x.pth")
    assert line.startswith("x.pth does not fit")
    for part in (
        'Missing key(s) in state_dict: "1.bias"',
        'Unexpected key(s) in state_dict: "he',
        "size mismatch for 0.weight: copying a param with shape torch.Size([4, 3])",
    ):
        assert part in line
    many = {f"k{i}": torch.ones(1) for i in range(99)}
    line = user_error(load_weights, small_model(), many, "x.pth")
    assert "… Use the config and the code" in line
    assert len(line) < 800


# ------------------------------------------------------------------------ through the programs


@pytest.fixture(scope="module")
def official(checkpoint, tmp_path_factory) -> Path:
    """Its weights as the official release would have saved them."""
    ours = load(checkpoint)
    module = nn.Linear(2, 2)
    optimizer = torch.optim.Adam([{"params": module.parameters(), "initial_lr": 1e-5}], lr=1e-4)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[35], gamma=0.1)
    content = {
        "epoch": 17,
        "cur_iou": 0.61,
        "best_iou": 0.62,
        "prec": {"Pr@50": 0.7, "Pr@60": 0.6},
        "state_dict": {f"module.{key}": value for key, value in ours["state_dict"].items()},
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
    }
    path = tmp_path_factory.mktemp("official") / "official.pth"
    torch.save(content, path)
    return path


def test_our_checkpoint_holds_what_resuming_needs_in_plain_containers(checkpoint):
    content = load(checkpoint)
    assert set(content) == {
        *("epoch", "step", "best_iou", "scores", "state_dict", "optimizer", "scaler", "rng"),
        *("config", "position", "sums", "faults", "version", "threads"),
        *("length", "progress", "best_on", "records", "no_target"),
    }
    assert not any(key.startswith("module.") for key in content["state_dict"])
    assert content["config"]["TRAIN"]["vis_dim"] == 64


def test_an_official_checkpoint_is_scored_like_ours(trained, checkpoint, official, tmp_path):
    results = []
    # The release's configs have no clip_arch: sizes come from the weights.
    no_arch = ("TRAIN.clip_arch", None, "TRAIN.clip_pretrain", "pretrain/none.pt")
    for weights, *opts in ((checkpoint,), (official, *no_arch)):
        out = ("TRAIN.output_folder", tmp_path / weights.stem, "TEST.weights", weights)
        run_program("test.py", trained, *out, *opts)
        results.append(read_jsonl(out[1] / "tiny/test_shapes_val.threshold0.15.jsonl"))
    assert results[0] == results[1]
    assert any(line["union"] > line["target_area"] for line in results[0])


def test_training_starts_from_an_official_checkpoint(trained, checkpoint, official, tmp_path):
    opts = ("TRAIN.weight", official, "TRAIN.output_folder", tmp_path)
    run = build_run(trained, *opts)
    weights = load(checkpoint)["state_dict"]
    assert_same(dict(run.model.state_dict()), dict(weights))
    assert (run.epoch, run.step, run.best) == (0, 0, -1.0)
    assert not run.optimizer.state


def test_a_checkpoint_of_another_model_is_refused_with_its_keys(trained, checkpoint, tmp_path):
    opts = ("TRAIN.fpn_out", "[16, 64, 64]", "TRAIN.output_folder", tmp_path / "out")
    for program, key in (("test.py", "TEST.weights"), ("train.py", "TRAIN.resume")):
        line = error_of(program, trained, *opts, key, checkpoint)
        assert "size mismatch for neck.f3_v_proj.0.weight: copying a param with shape" in line
        assert "([32, 64, 3, 3]) from checkpoint, the shape in current model is" in line
    assert not (tmp_path / "out").exists()


def test_a_run_with_other_parameters_is_refused_and_leaves_the_first_as_it_was(trained, checkpoint):
    opts = ("TRAIN.freeze_token_embedding", True, "TRAIN.resume", checkpoint)
    before = files(checkpoint.parent)
    line = error_of("train.py", trained, *opts)
    assert "does not fit" in line
    assert "TRAIN.weight" in line
    assert files(checkpoint.parent) == before
