"""tools/gpu.py: what it prints and writes where there is no GPU, and where a part fails."""

import json
import os
import re

import pytest
import torch
from helpers import write_config

from tools import benchmark, gpu
from tools.gpu import measure_product, profile_step


@pytest.mark.slow
def test_without_a_gpu_each_part_that_needs_one_is_named_and_the_others_run(
    tmp_path, data, monkeypatch, capsys
):
    measure, words = gpu.PARTS[gpu.LOADER]
    lmdb, config = data / "lmdb/shapes/val.lmdb", write_config(tmp_path, data)
    small = [*words, str(lmdb), "--config", str(config)]
    monkeypatch.setitem(gpu.PARTS, gpu.LOADER, (measure, small))
    gpu.main(["-o", str(tmp_path)])
    results = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {name: part["outcome"] for name, part in results["parts"].items()}
    assert outcomes.pop(gpu.LOADER) == "ok"
    assert set(outcomes.values()) == {"not run: no CUDA device"}
    assert {"tests", "step of 64, fp16", "evaluation", "learning"} <= set(outcomes)
    assert results["machine"]["torch"] == torch.__version__
    table = (tmp_path / "gpu.md").read_text()
    assert table in capsys.readouterr().out
    assert f"| {gpu.LOADER} | ok" in table
    assert "refs/s" in table


def test_a_part_that_fails_leaves_the_results_of_the_others(tmp_path, monkeypatch, capsys):
    # Not sys.exit itself: wandb replaces it, if another test has started that.
    parts = {"fails": (exec, "raise SystemExit('the reason')"), "dies": (os._exit, 3)}
    parts |= {"works": (dict, {"rate": 2.5})}
    monkeypatch.setattr(gpu, "ON_CPU", set(parts))
    monkeypatch.setattr(gpu, "PARTS", parts)
    (tmp_path / "full/gpu.json").mkdir(parents=True)  # cannot be written in the end
    with pytest.raises(IsADirectoryError):
        gpu.main(["-o", str(tmp_path / "full")])
    assert "| works | ok, " in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: failed: fails, dies; .*gpu\.json has their err"):
        gpu.main(["-o", str(tmp_path)])
    table = re.sub(r"\d+ s ", "_ s ", capsys.readouterr().out)
    assert [line for line in table.splitlines() if re.match(r"\| [fdw]", line)] == [
        "| fails | failed, _ s | SystemExit: the reason |",
        "| dies | failed, _ s | its process ended with code 3 |",
        "| works | ok, _ s | rate 2.50 |",
    ]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/gpu"):
        gpu.main(["-o", str(tmp_path / "file/gpu")])
    assert capsys.readouterr().out == ""


def test_commands_are_those_of_the_benchmark():
    for name in gpu.BENCHMARKS:
        measure, words = gpu.PARTS[name]
        assert measure is benchmark.main
        assert (benchmark.parse_args(words).device == "cuda") == (name not in gpu.ON_CPU)


def test_a_step_is_profiled_and_a_product_timed(tmp_path, data):
    found = profile_step("cpu", f"--batch 4 --config {write_config(tmp_path, data)}")
    assert found["ms"] > 0
    assert 0 <= found["idle share"] < 1
    assert found["waits of the host"] == "none"
    assert len(found["kernels, ms"]) == gpu.TOP
    assert measure_product("cpu", side=64)["TFLOP/s"] > 0
