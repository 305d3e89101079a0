"""Lines for people, records for programs, and Weights & Biases only where it is asked for."""

import io
import json
import re
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
from helpers import largest_file, read_jsonl, user_error
from loguru import logger
from PIL import Image

from utils.errors import UserError
from utils.logger import Tracker, duration, progress, setup_logging


def test_lines_go_to_the_terminal_and_without_colours_to_the_end_of_the_file(tmp_path, capsys):
    for word in ("first", "näher ✓"):
        setup_logging(tmp_path / "run", is_main=True)
        assert (tmp_path / "run").exists() == (word != "first")  # made with the first line
        logger.info(word)
        assert capsys.readouterr().err.endswith(f" {word}\n")
    text = (tmp_path / "run/train.log").read_text(encoding="utf-8")
    assert re.fullmatch(r"\S+ \S+ INFO    first\n\S+ \S+ INFO    näher ✓\n", text)


def test_a_line_or_a_record_that_cannot_be_written_is_an_error(tmp_path):
    setup_logging(tmp_path, is_main=True)
    with largest_file(50), pytest.raises(OSError, match="File too large"):
        logger.info(60 * "x")
    tracker = Tracker(tmp_path)
    with largest_file(50), pytest.raises(OSError, match="File too large"):
        tracker.log("step", {"name": 60 * "x"})


def test_other_ranks_are_silent_and_without_a_folder_nothing_is_written(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)
    setup_logging("run", is_main=False)
    logger.warning("twice")
    assert capsys.readouterr().err == ""
    setup_logging(None, is_main=True)
    logger.info("scored")
    with Tracker(None, "online") as tracker:
        tracker.log("step", {"step": 1})
    assert list(tmp_path.iterdir()) == []


def test_there_is_a_bar_only_on_a_terminal_and_on_the_first_rank(capsys, monkeypatch):
    assert list(progress([1, 2], 2, "epoch 1")) == [1, 2]
    assert capsys.readouterr().err == ""
    for show in (True, False):
        monkeypatch.setattr(sys, "stderr", terminal := io.StringIO())
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        bar = progress([1, 2], 2, "epoch 1", show=show)
        assert list(bar) == [1, 2]
        bar.set_postfix_str("loss 0.1")
        assert ("epoch 1" in terminal.getvalue()) is show


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
    with Tracker(tmp_path / "run", last={"step": 99, "epoch": 99}) as tracker:
        tracker.log("epoch", {"epoch": 2})
    assert [record["kind"] for record in read_jsonl(path)] == ["step", "epoch"]


def test_a_new_run_starts_its_records_anew_and_what_json_does_not_know_is_null(tmp_path):
    for epoch in (1, 2):
        with Tracker(tmp_path) as tracker:
            tracker.log("epoch", {"loss": float("nan"), "norm": float("inf"), "epoch": epoch})
    (record,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert record == {"kind": "epoch", "loss": None, "norm": None, "epoch": 2}


# ------------------------------------------------------------ Weights & Biases, the real package


@pytest.fixture
def quiet_wandb(tmp_path, monkeypatch) -> None:
    """No account, no settings of the person's, no lines on the terminal."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def offline_runs(folder: Path, starts: int = 1) -> list[list]:
    """The records of each start of a run, oldest first, as `wandb sync` would upload them.

    W&B's own process may still be writing when a run has ended: this waits for the last record.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        files = folder.glob("wandb/offline-run-*/*.wandb")
        runs = [[Record.FromString(data) for data in chunks(path.read_bytes())] for path in files]
        if [bool(of_kind(run, "exit")) for run in runs] == [True] * starts:
            return sorted(runs, key=lambda run: of_kind(run, "run")[0].start_time.ToNanoseconds())
        time.sleep(0.05)
    raise AssertionError(f"{len(runs)} starts, not all of them ended")


def of_kind(records: list, kind: str) -> list:
    """The contents of the records of one kind."""
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]


def chunks(data: bytes) -> Iterator[bytes]:
    """The entries of a .wandb file: a LevelDB log behind a head of seven bytes."""
    position, entry = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + size > len(data):  # being written
            return
        entry += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def test_weights_and_biases_gets_config_records_and_pictures(tmp_path, quiet_wandb):
    run = tmp_path / "run"
    pictures = [("the red star (IoU 0.50)", Image.new("RGB", (30, 20), "red"))]
    pictures += [("“größer” (IoU 0.10)", Image.new("RGB", (30, 50), "blue"))]
    with Tracker(run, "offline", "CRIS_R50", {"TRAIN": {"epochs": 3}}) as tracker:
        tracker.log("step", {"step": 4, "loss": 0.5})
        tracker.show(1, pictures)
        tracker.log("epoch", {"epoch": 1, "step": 4, "mIoU": 0.25})
    (records,) = offline_runs(run)
    (about,) = of_kind(records, "run")
    assert (run / "wandb_run").read_text() == f"{about.run_id}\n"
    assert about.display_name == "CRIS_R50"
    config = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert config["TRAIN"] == {"epochs": 3}
    step, shown = (
        {"/".join([i.key, *i.nested_key]).lstrip("/"): json.loads(i.value_json) for i in row.item}
        for row in of_kind(records, "history")
    )
    assert step.items() >= {"step/step": 4, "step/loss": 0.5}.items()
    assert shown.items() >= {"epoch/epoch": 1, "epoch/step": 4, "epoch/mIoU": 0.25}.items()
    for number, (caption, picture) in enumerate(pictures, start=1):
        part = f"epoch/sentence_{number}"
        assert shown[f"{part}/caption"] == caption
        (files,) = run.glob("wandb/offline-run-*/files")
        with Image.open(files / shown[f"{part}/path"]) as saved:
            assert saved.size == picture.size
            assert saved.getpixel((3, 3)) == picture.getpixel((3, 3))
    axes = of_kind(records, "metric")
    assert {(m.glob_name, m.step_metric) for m in axes if m.glob_name} == {
        *(("step/*", "step/step"), ("epoch/*", "epoch/epoch"))
    }
    assert len(read_jsonl(run / "metrics.jsonl")) == 2


def test_a_resumed_run_is_the_same_run_at_weights_and_biases_and_a_new_one_is_not(
    tmp_path, quiet_wandb
):
    for last in (None, {"step": 2}, None):
        with Tracker(tmp_path, "offline", "x", {"a": 1}, last) as tracker:
            for step in (1, 2, 3):
                tracker.log("step", {"step": step})
    starts = offline_runs(tmp_path, starts=3)
    first, resumed, anew = (of_kind(records, "run")[0].run_id for records in starts)
    assert first == resumed != anew
    # The third step was taken after the checkpoint, and is taken and counted again.
    # W&B's own count tells its server where a row belongs.
    counts = [[row.step.num for row in of_kind(records, "history")] for records in starts]
    assert counts == [[0, 1, 2], [2, 3, 4], [0, 1, 2]]
    assert (tmp_path / "wandb_run").read_text() == f"{anew}\n"


def test_weights_and_biases_knows_whether_a_run_failed(tmp_path, quiet_wandb):
    for name, error in (("good", None), ("bad", RuntimeError("no"))):
        with suppress(RuntimeError), Tracker(tmp_path / name, "offline"):
            if error:
                raise error
        (records,) = offline_runs(tmp_path / name)
        (ending,) = of_kind(records, "exit")
        assert ending.exit_code == (error is not None)


def test_a_run_goes_on_where_weights_and_biases_own_process_was_killed(
    tmp_path, quiet_wandb, log_lines
):
    for killed in ("log", "finish"):
        tracker = Tracker(tmp_path / killed, "offline")
        run, lost = tracker._wandb, ConnectionResetError("Connection lost")
        with mock.patch.object(run, killed, side_effect=lost), tracker:
            for step in (1, 2):
                tracker.log("step", {"step": step})
        run.finish()
        assert len(read_jsonl(tmp_path / killed / "metrics.jsonl")) == 2
    told = "Weights & Biases has failed (Connection lost): the run goes on without it"
    assert log_lines == [told, told]


def test_without_an_account_the_remedy_is_named_and_nothing_is_changed(tmp_path, quiet_wandb):
    with Tracker(tmp_path) as tracker:
        tracker.log("step", {"step": 1})
    with pytest.raises(UserError, match=r"TRAIN.wandb online: No API key .*; offline needs no acc"):
        Tracker(tmp_path, "online", "x", {})
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 1
    assert not (tmp_path / "wandb_run").exists()


def test_lines_that_are_no_records_do_not_stop_a_resumed_run(tmp_path):
    kept = '{"kind": "step", "step": 1}\n'
    strange = '0.5\n[1]\n{"step": 1}\n{"kind": "other"}\n{"kind": "step", "step": "x"}\n{"kind'
    (tmp_path / "metrics.jsonl").write_text(kept + strange)
    Tracker(tmp_path, last={"step": 5, "epoch": 0}).__exit__(None)
    assert (tmp_path / "metrics.jsonl").read_text() == kept


def test_weights_and_biases_is_not_imported_when_disabled(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with Tracker(tmp_path, "disabled") as tracker:
        tracker.log("step", {})
    line = user_error(Tracker, tmp_path, "offline")
    assert "the package wandb is not here; pip install wandb" in line
