"""tools/gpu.py: what it prints and writes where there is no GPU, and where a part fails."""

import json
import sys

import pytest
import torch
from helpers import run_command, write_config

from tools import gpu
from tools.benchmark import parse_args
from tools.gpu import measure_product, profile_step

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make gpu takes minutes")
def test_without_a_gpu_each_part_that_needs_one_is_named_and_the_others_run(tmp_path):
    ending = run_command(sys.executable, "tools/gpu.py", "-o", tmp_path)
    assert ending.returncode == 0, ending.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {name: part["outcome"] for name, part in results["parts"].items()}
    assert outcomes.pop(gpu.LOADER) == "ok"
    assert set(outcomes.values()) == {"not run: no CUDA device"}
    assert {"tests", "step of 64, fp16", "evaluation", "learning"} <= set(outcomes)
    assert results["machine"]["torch"] == torch.__version__
    table = (tmp_path / "gpu.md").read_text()
    assert table in ending.stdout
    assert f"| {gpu.LOADER} | ok" in table
    assert "refs/s" in table


def test_a_part_that_fails_leaves_the_results_of_the_others(tmp_path, monkeypatch, capsys):
    lines = {
        "fails": ["-c", "print('the reason'); raise SystemExit(3)"],
        "works": ["-c", "print('{\"rate\": 2.5}')"],
    }
    monkeypatch.setattr(gpu, "ON_CPU", set(lines))
    monkeypatch.setattr(gpu, "commands", lambda folder: lines)
    with pytest.raises(SystemExit, match=r"error: failed: fails; .*gpu\.json has their output"):
        gpu.main(["-o", str(tmp_path)])
    table = capsys.readouterr().out
    assert "| fails | failed, 0 s | the reason |" in table
    assert "| works | ok, 0 s | rate 2.50 |" in table


def test_commands_are_those_of_the_benchmark(tmp_path):
    for name, (program, *words) in gpu.commands(tmp_path).items():
        if program == "tools/benchmark.py":
            args = parse_args([str(word) for word in words])
            assert args.json == tmp_path / f"{name}.json"
            assert (args.device == "cuda") == (name not in gpu.ON_CPU)


def test_a_step_is_profiled_and_a_product_timed(tmp_path, data):
    config = write_config(tmp_path, data)
    found = profile_step(CPU, f"--batch 4 --config {config}")
    assert found["ms"] > 0
    assert 0 <= found["idle share"] < 1
    assert found["waits of the host"] == "none"
    assert len(found["kernels, ms"]) == gpu.TOP
    assert measure_product(CPU, side=64)["TFLOP/s"] > 0
