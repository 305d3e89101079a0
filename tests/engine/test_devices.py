"""The programs on a GPU; each test also runs on the CPU, so that it is known to work itself."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_same, load, read_jsonl, run_command, run_program, write_config

from engine.predictor import Predictor
from utils.photos import read_photo

pytestmark = pytest.mark.slow
PIXELS = 0.005  # of a photo's, may differ between devices
HALVES = ("fp16", "bf16")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param


def run(device: str, program: str, config: Path, *opts: object, switches: tuple = ()) -> None:
    if device == "cpu" and not torch.cuda.is_available():
        return run_program(program, config, *opts, switches=[str(word) for word in switches])
    command = (sys.executable, program, "--config", config, *switches, "--opts", *opts)
    ending = run_command(*command, CUDA_VISIBLE_DEVICES="" if device == "cpu" else "0")
    assert ending.returncode == 0, ending.stderr


def losses_of(folder: Path) -> list[float]:
    lines = read_jsonl(folder / "metrics.jsonl")
    return [record["loss"] for record in lines if record["kind"] == "step"]


@pytest.mark.parametrize("precision", ["fp32", *HALVES])
def test_a_deterministic_training_is_resumed_to_the_bit(tmp_path, data, device, precision):
    if (device, precision) == ("cpu", "fp16"):
        pytest.skip("slow on a CPU, and like bf16")
    options = {"precision": precision, "deterministic": True, "dropout": 0.1, "epochs": 2}
    config = write_config(tmp_path, data, print_freq=1, **options)
    folder = tmp_path / "exp/tiny"
    run(device, "train.py", config, "TRAIN.save_every", 3, "TRAIN.keep_checkpoints", 9)
    whole, losses = load(folder / "last_model.pth"), losses_of(folder)
    assert np.isfinite(losses).all()
    for name in ("last_model.pth", "best_model.pth"):
        (folder / name).unlink()
    for path in sorted(folder.glob("step_*.pth"))[1:]:
        path.unlink()
    run(device, "train.py", config, "TRAIN.resume", "auto")
    assert_same(dict(load(folder / "last_model.pth")["state_dict"]), dict(whole["state_dict"]))
    assert losses_of(folder) == losses


@pytest.mark.parametrize(
    "switch",
    [("recompute_backbone", "recompute_decoder"), ("compile",)],
    ids=["recompute", "compile"],
)
def test_switches_train_like_without_them(tmp_path, data, device, switch):
    if (device, switch) == ("cpu", ("compile",)):
        pytest.skip("test_compile.py compiles on the CPU")
    config = write_config(tmp_path, data, print_freq=1, precision="fp32", dropout=0.0)
    losses = {}
    for name, value in (("with", True), ("without", False)):
        options = [word for key in switch for word in (f"TRAIN.{key}", value)]
        run(device, "train.py", config, "TRAIN.exp_name", name, *options)
        losses[name] = losses_of(tmp_path / "exp" / name)
    assert losses["with"] == pytest.approx(losses["without"], rel=1e-3)


def test_scores_and_predictions_are_those_of_the_cpu(tmp_path, data, device):
    config = write_config(tmp_path, data, threshold=0.15)
    run("cpu", "train.py", config)
    weights, counts = tmp_path / "exp/tiny/best_model.pth", {}
    for where in ("cpu", device):
        run(where, "test.py", config, "TRAIN.exp_name", where, "TEST.weights", weights)
        (table,) = (tmp_path / "exp" / where).glob("test_*.jsonl")
        counts[where] = read_jsonl(table)
    for one, other in zip(counts["cpu"], counts[device], strict=True):
        allowed = PIXELS * one["height"] * one["width"]
        assert abs(one["intersection"] - other["intersection"]) <= allowed
        assert abs(one["union"] - other["union"]) <= allowed
    photo = read_photo(next((data / "images/train2014").glob("*.jpg")))
    masks = []
    for where in ("cpu", device):
        (found,) = Predictor(str(config), weights, device=where)(photo, ["the red star"])
        masks.append(found.mask)
    assert np.mean(masks[0] != masks[1]) <= PIXELS


def test_latency_is_measured(config, tmp_path, device):
    where = ("--device", device, "--rounds", 2, "--json", tmp_path / "cost.json")
    run(device, "tools/latency.py", config, "TRAIN.num_layers", 1, switches=where)
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["device"].startswith(device)
    assert min(times["median"] for times in found["seconds"].values()) > 0
