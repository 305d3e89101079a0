"""tools/benchmark.py: the ways of reading are the same and are told apart; an epoch is timed."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import pack, run_command, write_config, write_records

from tools import reading
from utils.errors import UserError


@pytest.fixture(scope="module")
def lmdb(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("benchmark") / "shapes/val.lmdb", [2, 3, 1, 12])


@pytest.fixture
def ways(lmdb, tmp_path) -> dict:
    return reading.ways_of_reading([lmdb, lmdb], tmp_path / "cache", side=64, word_len=9)


def test_every_way_visits_every_ref_once(ways):
    for name, loader in ways.items():
        key = "position" if name == reading.BASELINE else "positions"
        positions = [p for batch in loader for p in batch[key].tolist()]
        assert sorted(positions) == list(range(36)), name


def test_sameness_states_what_it_compared(ways):
    assert re.fullmatch(
        r"uint8 images and masks: identical in all ways; normalised: at most [01] unit\(s\) in the "
        "last place from the straightforward ones",
        reading.sameness(ways),
    )


@pytest.mark.parametrize("name", ["this, batch_by images", "this, DATA.cache, batch_by refs"])
@pytest.mark.parametrize("key", ["images", "masks"])
def test_one_other_pixel_in_one_way_is_an_error(ways, name, key):
    batches = list(ways[name])
    batches[1][key][0, 5, 5] ^= 1
    with pytest.raises(UserError, match=f"{name}: pixels of the ref at"):
        reading.sameness({**ways, name: batches})


def test_other_normalised_values_are_an_error(ways, monkeypatch):
    monkeypatch.setattr(
        "utils.transforms.normalize_images",
        lambda images: images.permute(0, 3, 1, 2).float() / 255,
    )
    with pytest.raises(UserError, match="units in the last place"):
        reading.sameness(ways)


def test_units_in_the_last_place():
    a = np.array([1.0, -2.5, 0.0], np.float32)
    assert reading.units_in_the_last_place(a, a) == 0
    assert reading.units_in_the_last_place(a, np.nextafter(a, np.float32(9))) == 1
    assert reading.units_in_the_last_place(a[:1], a[:1] + np.float32(2**-20)) == 8


def test_the_straightforward_way_hands_over_what_the_network_takes(ways):
    batch = next(iter(ways[reading.BASELINE]))
    assert batch["image"].shape == (16, 3, 64, 64)
    assert batch["image"].dtype == batch["mask"].dtype == torch.float32
    assert 0 <= batch["mask"].min() < batch["mask"].max() <= 1


def test_rates_are_measured_in_turn(ways):
    rates = reading.measure({name: ways[name] for name in list(ways)[:2]}, rounds=3)
    assert [len(values) for values in rates.values()] == [3, 3]
    assert all(value > 0 for values in rates.values() for value in values)


def test_reading_real_photos_from_the_cache_is_at_least_five_times_as_fast(
    mini_root, tmp_path, capsys
):
    pack(mini_root, tmp_path, "refcoco", "unc", "refcoco")
    capsys.readouterr()
    path = tmp_path / "lmdb/refcoco/val.lmdb"
    command = [sys.executable, "tools/benchmark.py", "data", path, "--rounds", "2"]
    ending = run_command(*command)
    assert ending.returncode == 0, ending.stderr
    assert "uint8 images and masks: identical in all ways" in ending.stdout
    ratios = {
        line[:44].strip(): float(line[44:].split()[1])
        for line in ending.stdout.splitlines()
        if re.search(r"\([\d.]+-[\d.]+\)$", line)
    }
    assert ratios[reading.BASELINE] == 1
    assert ratios["this, DATA.cache, batch_by refs"] >= 5
    assert ratios["this, DATA.cache, batch_by images"] >= 5


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_of_a_config_is_timed_with_its_memory(data, tmp_path, workers):
    config = write_config(tmp_path, data, workers=workers)
    words, written = ["--config", config], tmp_path / "epoch.json"
    ending = run_command(sys.executable, "tools/benchmark.py", "data", *words, "--json", written)
    assert ending.returncode == 0, ending.stderr
    result = json.loads(written.read_text())
    assert (result["command"], result["refs"], result["workers"]) == ("data", 40, workers)
    assert result["machine"]["threads"] == 1
    assert re.search(
        rf"40 refs with 40 images in [\d.]+ s: [\d.]+ refs/s; {workers} workers; [\d.]+ s to beg",
        ending.stdout,
    )
    worker = r"\d+ MB" if workers else "none"
    found = re.search(rf"peak memory: (\d+) MB, the largest worker {worker}", ending.stdout)
    assert 50 < int(found[1]) < 4000


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["data", "no.lmdb"], 1, "error: no.lmdb does not exist: make it with"),
        (["data", "x", "--rounds", "0"], 2, "--rounds 0: give a number from 1"),
        (["data"], 2, "give LMDB files, or --config with one"),
        (["data", "x", "--config", "y"], 2, "give LMDB files, or --config with one"),
        (["data", "--config", "no.yaml"], 1, "error: config file no.yaml"),
        (["eval", "no.lmdb"], 1, "error: no.lmdb does not exist: give an LMDB or a folder"),
        (["train", "--batch", "1"], 2, "--batch 1: give a number from 2"),
        (["train", "tests", "--device", "gpu"], 1, "error: --device gpu: it cannot be used here"),
        ([], 2, "the following arguments are required: command"),
    ],
    ids=[
        "no file",
        "no rounds",
        "no argument",
        "both",
        "no config",
        "no photos",
        "one",
        "no device",
        "no command",
    ],
)
def test_mistakes_end_with_one_line(words, code, message):
    ending = run_command(sys.executable, "tools/benchmark.py", *words)
    assert ending.returncode == code
    assert message in ending.stderr
    assert "Traceback" not in ending.stderr
