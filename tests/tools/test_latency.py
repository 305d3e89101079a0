"""tools/latency.py: parameters and operations are those known, times are of what they say."""

import json
import time
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT, usage_error

from engine.build import build_model
from tools import latency
from utils.config import load_config
from utils.errors import UserError

ARCHIVE = "TRAIN.clip_pretrain"


def report(trained: Path, tmp_path: Path, *args: object) -> dict:
    path = tmp_path / "cost.json"
    latency.main(["--config", str(trained), "--json", str(path), *map(str, args)])
    return json.loads(path.read_text())


def test_a_report_holds_what_it_prints(tmp_path, trained, capsys):
    found = report(trained, tmp_path, "--rounds", 3, "--sentences", 4)
    table = capsys.readouterr().out
    assert (found["input_size"], found["word_len"], found["device"]) == (64, 17, "cpu")
    assert found["machine"]["threads"] == 1
    for part, count in found["parameters"].items():
        (row,) = [line for line in table.splitlines() if line.startswith(f"{part} ")]
        assert row.split()[-2:] == [f"{count:,}", f"{found['flops'][part] / 1e9:.3f}"]
    sentences = {"photo and sentence": 1, "photo alone": 0, "sentence on an encoded photo": 1}
    sentences |= {"4 sentences on an encoded photo": 4}
    assert list(found["seconds"]) == list(sentences)
    for name, times in found["seconds"].items():
        assert 0 < times["p10"] <= times["median"] <= times["p90"]
        row = next(line for line in table.splitlines() if line.startswith(f"{name} "))
        assert row.endswith(f"{sentences[name] / times['median']:.1f}" if sentences[name] else "")
        assert f"{1000 * times['median']:.2f}" in row
    assert found["memory_gib"] > 0.05
    assert f"peak memory {found['memory_gib']:.2f} GiB" in table


def test_parts_add_up_to_the_model(trained):
    cfg = load_config(trained)
    model = build_model(cfg, CPU).eval()
    counts = latency.parameters_by_part(model)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    image, tokens = latency.inputs(cfg, CPU, 1)
    with torch.inference_mode():
        parts = latency.operations_by_part(model, image, tokens)
        assert sum(parts.values()) == latency.count_flops(model, image, tokens)[1]
    assert all(parts.values())


@pytest.mark.parity
@pytest.mark.parametrize(("name", "parameters"), [("RN50", 146_849_122), ("RN101", 161_251_682)])
def test_without_the_archive_the_published_sizes_are_built(name, parameters):
    config = ROOT / f"config/refcoco/cris_{name.lower().replace('n', '')}.yaml"
    sized = latency.without_archive(load_config(config))
    with torch.device("meta"):
        model = build_model(sized, torch.device("meta"))
    assert sum(latency.parameters_by_part(model).values()) == parameters  # as the paper prints
    assert sized.TRAIN.clip_pretrain is None
    other = load_config(config, [ARCHIVE, "ViT.pt"])
    assert latency.without_archive(other) == other


def test_ways_take_turns_after_the_warmup():
    calls = []

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.01)

    ways = {"slow": slow, "quick": lambda: calls.append("quick")}
    found = latency.take_turns(ways, 5, CPU, 2)
    assert calls == ["slow", "quick"] * 7
    assert [len(seconds) for seconds in found.values()] == [5, 5]
    assert min(found["slow"]) >= 0.01 > min(found["quick"])


def test_bad_options(tmp_path, trained, capsys):
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UserError, match=f"--device {name}: it cannot be used here"):
            report(trained, tmp_path, "--device", name)
    with pytest.raises(UserError, match=r"ViT\.pt: there is no such CLIP archive"):
        report(trained, tmp_path, "--opts", *f"{ARCHIVE} ViT.pt TRAIN.clip_arch null".split())
    for option in ("--rounds", "--sentences"):
        told = usage_error(capsys, report, trained, tmp_path, option, "0")
        assert f"{option} 0: give a number from 1" in told
