"""Lines for people, records for programs, and Weights & Biases only where it is asked for."""

import io
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from engine_helpers import largest_file, read_jsonl
from loguru import logger
from samples import ROOT

from utils.logger import Tracker, duration, progress, setup_logging


@pytest.fixture(autouse=True)
def no_handlers_left() -> Iterator[None]:
    yield
    logger.remove()


def test_lines_go_to_the_terminal_and_to_the_file_without_colours(tmp_path, capsys):
    setup_logging(tmp_path / "run", is_main=True)
    logger.info("epoch 1/2: näher ✓")
    assert capsys.readouterr().err.endswith(" epoch 1/2: näher ✓\n")
    line = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert line.endswith(" INFO    epoch 1/2: näher ✓\n")
    assert "\x1b" not in line


def test_the_file_of_an_earlier_run_is_continued(tmp_path):
    for line in ("first", "second"):
        setup_logging(tmp_path, is_main=True)
        logger.info(line)
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]


def test_nothing_is_made_before_there_is_something_to_say(tmp_path):
    setup_logging(tmp_path / "run", is_main=True)
    assert not (tmp_path / "run").exists()


def test_other_ranks_are_silent(tmp_path, capsys):
    setup_logging(tmp_path / "run", is_main=False)
    logger.warning("twice")
    assert capsys.readouterr().err == ""
    assert not (tmp_path / "run").exists()


def test_testing_writes_no_log_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    setup_logging(None, is_main=True)
    logger.info("scored")
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_bar_only_on_a_terminal_and_on_the_first_rank(capsys, monkeypatch):
    assert list(progress([1, 2], 2, "epoch 1")) == [1, 2]
    assert capsys.readouterr().err == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for show in (True, False):
        monkeypatch.setattr(sys, "stderr", Terminal())
        bar = progress([1, 2], 2, "epoch 1", show=show)
        assert list(bar) == [1, 2]
        bar.set_postfix_str("loss 0.1")
        assert ("epoch 1" in sys.stderr.getvalue()) is show


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(0, "0 s"), (47.4, "47 s"), (99.4, "99 s"), (120, "2 min"), (3000, "50 min")],
        *[(3600, "1 h 00 min"), (3 * 3600 + 299, "3 h 05 min"), (30 * 3600, "30 h 00 min")],
    ],
)
def test_durations_are_told_as_people_do(seconds, text):
    assert duration(seconds) == text


def test_records_are_appended_one_json_object_a_line_at_once(tmp_path):
    with Tracker(tmp_path / "run") as tracker:
        tracker.log("step", {"step": 1, "loss": 0.5})
        path = tmp_path / "run/metrics.jsonl"
        assert read_jsonl(path) == [{"kind": "step", "step": 1, "loss": 0.5}]  # not when closed
    with Tracker(tmp_path / "run", keep=lambda record: True) as tracker:
        tracker.log("epoch", {"epoch": 2})
    assert [record["kind"] for record in read_jsonl(path)] == ["step", "epoch"]


def test_a_new_run_in_the_same_folder_starts_its_records_anew(tmp_path):
    for epoch in (1, 2):
        with Tracker(tmp_path / "run") as tracker:
            tracker.log("epoch", {"epoch": epoch})
    assert read_jsonl(tmp_path / "run/metrics.jsonl") == [{"kind": "epoch", "epoch": 2}]


def test_records_wait_for_room_on_a_full_disk(tmp_path, capsys):
    setup_logging(None, is_main=True)
    with Tracker(tmp_path) as tracker:
        with largest_file(50):
            for step in range(5):
                tracker.log("step", {"step": step})
        err = capsys.readouterr().err
        assert f"{tmp_path}/metrics.jsonl: File too large; its records wait for room" in err
        tracker.log("step", {"step": 5})
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [*range(6)]


def test_a_number_that_json_does_not_know_is_null(tmp_path):
    with Tracker(tmp_path) as tracker:
        tracker.log("step", {"loss": float("nan"), "norm": float("inf"), "step": 1})
    (record,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert record == {"kind": "step", "loss": None, "norm": None, "step": 1}


def test_a_tracker_without_a_folder_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(None, "online") as tracker:
        tracker.log("step", {"step": 1})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_weights_and_biases_gets_the_same_records(tmp_path, monkeypatch, mode):
    calls = []
    run = SimpleNamespace(
        log=lambda record: calls.append(("log", record)), finish=lambda: calls.append("finish")
    )
    fake = SimpleNamespace(init=lambda **options: calls.append(("init", options)) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with Tracker(tmp_path, mode, "CRIS_R50", {"TRAIN": {}}) as tracker:
        tracker.log("step", {"loss": 0.5})
    options = {"name": "CRIS_R50", "mode": mode, "dir": tmp_path, "config": {"TRAIN": {}}}
    assert calls == [
        ("init", {"project": "CRIS", **options}),
        ("log", {"step/loss": 0.5}),
        "finish",
    ]
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"kind": "step", "loss": 0.5}]


def test_weights_and_biases_is_not_imported_when_disabled(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(tmp_path, "disabled") as tracker:
        tracker.log("step", {})
    with pytest.raises(ImportError):
        Tracker(tmp_path, "offline")


def test_importing_the_module_changes_nothing():
    code = "import sys, utils.logger; print(sorted({'wandb', 'torch'} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    ending = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ending.stdout == "[]\n"
