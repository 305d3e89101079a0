"""tools/export.py: what is written loads and computes the same, or is not written."""

import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import CPU, ROOT, assert_same, load, run_program, smooth_photo
from PIL import Image
from safetensors.torch import save_file

from engine.build import restore_trained
from engine.predictor import Predictor
from tools import export
from tools.export import IMAGE_ENCODER, NAMES, TEXT_HEAD, compare, make_cases
from tools.refshapes import draw_example
from utils.checkpoint import BEST, read_checkpoint
from utils.config import Config, load_config
from utils.errors import UserError


@pytest.fixture(scope="module")
def cfg(trained) -> Config:
    return load_config(trained)


def export_as(kind: str, trained: Path, *args: object) -> None:
    export.main(["--config", str(trained), "--format", kind, *map(str, args)])


# -------------------------------------------------------------------------------------- safetensors


@pytest.fixture
def saved(tmp_path, trained) -> Path:
    export_as("safetensors", trained, "-o", tmp_path / "out")
    return tmp_path / "out/model.safetensors"


def test_safetensors_hold_the_weights_to_the_bit_and_the_config(saved, cfg):
    assert {path.name for path in saved.parent.iterdir()} == {"model.safetensors", "config.yaml"}
    state = read_checkpoint(saved, "TEST.weights")
    assert_same(state.pop("state_dict"), dict(load(cfg.run_folder / BEST)["state_dict"]))
    assert state.pop("config")["TRAIN"]["word_len"] == cfg.model_dump()["TRAIN"]["word_len"]
    assert state == {"no_target": False}
    assert load_config(saved.with_name("config.yaml")) == cfg


def test_safetensors_predict_and_are_scored_like_the_checkpoint(saved, cfg, tmp_path, capsys):
    photo, config = smooth_photo(np.random.default_rng(0), 70, 100), saved.with_name("config.yaml")
    (expected,) = Predictor(cfg)(photo, "the red star")
    (found,) = Predictor(config, saved)(photo, "the red star")
    assert np.array_equal(found.probability, expected.probability)
    opts = ["TEST.weights", saved, "TRAIN.output_folder", tmp_path / "scored"]
    run_program("test.py", config, *opts)
    assert (tmp_path / "scored/tiny/test_shapes_val.threshold0.15.json").is_file()
    Predictor(load_config(config, ["TRAIN.word_len", "9"]), saved)
    assert "was trained with TRAIN.word_len 17, the config says 9" in capsys.readouterr().err


def test_foreign_safetensors_without_a_config_are_read(tmp_path, cfg):
    weights = load(cfg.run_folder / BEST)["state_dict"]
    path = tmp_path / "other.safetensors"
    save_file({f"module.{k}": v.contiguous() for k, v in weights.items()}, path, {"format": "pt"})
    assert_same(read_checkpoint(path, "x"), {"state_dict": dict(weights)})


@pytest.mark.parametrize("size", [5, 9, 500, -1])
def test_torn_safetensors_are_one_line(saved, size):
    saved.write_bytes(saved.read_bytes()[:size])
    with pytest.raises(UserError, match=r"is cut off, damaged or no checkpoint[^\n]*$"):
        read_checkpoint(saved, "TEST.weights")


def test_weights_that_cannot_be_used_leave_no_folder(tmp_path, trained):
    for kind in ("safetensors", "onnx"):
        with pytest.raises(UserError, match="there is no checkpoint"):
            export_as(kind, trained, "--weights", tmp_path / "none.pth", "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------- onnx


@pytest.fixture(scope="module")
def graphs(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "export"
    export_as("onnx", trained, "-o", folder)
    return folder


@pytest.mark.slow
def test_graphs_take_any_number_of_images_and_sentences(graphs, cfg):
    assert {path.name for path in graphs.iterdir()} == {IMAGE_ENCODER, TEXT_HEAD, "config.yaml"}
    shapes = {}
    for kind, (inputs, outputs) in NAMES.items():
        graph = onnx.load(graphs / kind)
        onnx.checker.check_model(graph)
        shapes[kind] = {
            end.name: [d.dim_param or d.dim_value for d in end.type.tensor_type.shape.dim]
            for end in (*graph.graph.input, *graph.graph.output)
        }
        assert list(shapes[kind]) == [*inputs, *outputs]
        about = {entry.key: entry.value for entry in graph.metadata_props}
        assert about == {
            "input_size": "64", "word_len": "17", "protocol": "published", "threshold": "0.15",
        }  # fmt: skip
    maps = {"v3": ["images", 32, 4, 4], "v4": ["images", 64, 4, 4], "v5": ["images", 64, 2, 2]}
    assert shapes[IMAGE_ENCODER] == {"images": ["images", 64, 64, 3]} | maps
    assert shapes[TEXT_HEAD] == maps | {
        "image_index": ["sentences"], "tokens": ["sentences", 17],
        "logits": ["sentences", 1, 16, 16], "probability": ["sentences", 64, 64],
    }  # fmt: skip


@pytest.mark.slow
def test_graphs_compute_what_the_model_does_and_the_check_sees_when_not(
    graphs, cfg, record_property
):
    paths = {kind: graphs / kind for kind in NAMES}
    model, *_ = restore_trained(cfg, CPU, None, "weights")
    model.eval()
    found = list(compare(model, cfg, paths, make_cases(cfg, seed=7)))
    assert len(found) == 4 * 5
    worst = max(off for *_, off in found)
    record_property("difference", ("tiny", "ONNX from PyTorch, relative", worst, 1e-5))
    assert 0 < worst < 1e-5
    with torch.no_grad():
        model.proj.txt.bias[-1] += 0.1  # the kernel's bias
    changed = {output: off for _, output, off in compare(model, cfg, paths, make_cases(cfg))}
    assert changed["v5"] < 1e-5
    assert changed["logits"] > 1e-3


@pytest.mark.slow
def test_graphs_that_differ_are_not_left_and_those_before_stay(
    tmp_path, trained, graphs, monkeypatch, capsys
):
    def copy_graphs(model, cfg, paths):  # as exporting anew would make them
        for kind, path in paths.items():
            shutil.copyfile(graphs / kind, path)

    monkeypatch.setattr(export, "export_graphs", copy_graphs)
    kept = shutil.copytree(graphs, tmp_path / "kept")
    for out in (tmp_path / "new", kept):
        with pytest.raises(UserError, match="more than --tolerance 1e-12: nothing was written"):
            export_as("onnx", trained, "-o", out, "--tolerance", 1e-12)
    row = r"a picture of RefShapes, sentences \d+ +(?:v3|v4|v5|logits|probability) "
    assert len(re.findall(row, capsys.readouterr().out)) == 2 * 5
    assert not (tmp_path / "new").exists()
    for path in graphs.iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_the_example_of_the_documentation_gives_the_predictors_masks(
    tmp_path, trained, graphs, monkeypatch
):
    text = (ROOT / "docs/predict.md").read_text("utf-8")
    (example,) = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "onnxruntime" in b]
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    shutil.copytree(graphs, tmp_path / "export")
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(draw_example(seed=0)[0]).save("photo.jpg")
    expected = Predictor(trained)("photo.jpg", ["the red star", "biggest square"])
    assert any(found.area for found in expected)
    runpy.run_path("example.py", run_name="__main__")
    for found in expected:
        mask = np.asarray(Image.open(f"{found.sentence}.png"))
        assert mask.shape == found.mask.shape
        assert (mask != found.mask).sum() <= 2


def test_what_differs_too_much_is_named_with_its_case(capsys):
    fine = ("noise", "logits", 1e-6)
    export.check([fine, ("photo", "v3", 1e-4)], 1e-4)
    for bad in (1e-3, float("inf"), float("nan")):
        with pytest.raises(UserError, match=r"v4 differs .* \(photo\)"):
            export.check([fine, ("photo", "v4", bad)], 1e-4)
    assert "noise" in capsys.readouterr().out


def test_a_missing_package_is_named_before_anything_is_computed(trained, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UserError, match="needs the package onnxscript: pip install -r"):
        export_as("onnx", trained, "--weights", "none.pth")
