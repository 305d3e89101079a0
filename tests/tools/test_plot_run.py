"""tools/plot_run.py: what it reads of a run, and that the picture is there and says it."""

import json
import math
import re
from pathlib import Path

import pytest
from helpers import ROOT, user_error
from PIL import Image

from tools import plot_run
from utils.config import load_config, save_config


def step(number: int, loss: float | None) -> dict:
    values = {"loss": loss, "lr_head": 1e-3, "lr_backbone": 1e-4, "refs_per_second": 50.0}
    return {"kind": "step", "epoch": 1, "step": number, **values, "data_wait_share": 0.2}


def epoch(number: int, at: int, **scores: float | None) -> dict:
    record = {"kind": "epoch", "epoch": number, "step": at, "loss": 0.3, "train_mIoU": 0.2}
    return record | ({"sentences": 1683, **scores} if scores else {})


def write_run(folder: Path, *records: dict) -> Path:
    folder.mkdir(parents=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def drawn(*folders: Path) -> "plot_run.Figure":
    return plot_run.plot(plot_run.read_runs(folders))


def curves(figure: "plot_run.Figure", title: str) -> list[tuple[list, list]]:
    """x and y of the lines in a panel that have points."""
    (panel,) = [p for p in figure.axes if p.get_title().startswith(title)]
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines]
    return [line for line in lines if line[0]]


def key(figure: "plot_run.Figure") -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


SCORES = {"mIoU": 0.25, "Pr@0.5": 0.125, "Pr@0.9": 0.0625}
RECORDS = [step(10, 0.1), step(20, 0.05), epoch(1, 20, **SCORES), step(30, 0.02)]


def test_one_run_and_several_are_drawn_to_a_png(tmp_path, capsys):
    one = write_run(tmp_path / "exp/one", *RECORDS, epoch(2, 30, mIoU=0.5))
    two = write_run(tmp_path / "exp/two", *(step(n, 1 / n) for n in range(1, 200)))
    plot_run.main([str(one)])
    plot_run.main([str(one), str(two), "-o", str(tmp_path / "new/both.png")])
    said = capsys.readouterr()
    assert said.out == f"{one / 'curves.png'}\n{tmp_path / 'new/both.png'}\n"
    assert said.err == ""
    for path in (one / "curves.png", tmp_path / "new/both.png"):
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert picture.width > 1200
            assert len(picture.convert("RGB").getcolors(2**20)) > 50  # curves, not a blank page


def test_every_panel_shows_its_numbers_in_its_unit(tmp_path):
    figure = drawn(write_run(tmp_path / "a", *RECORDS))
    assert curves(figure, "Training loss") == [([10, 20, 30], [0.1, 0.05, 0.02])]
    assert curves(figure, "Scores") == [([20], [25.0]), ([20], [20.0])]
    assert curves(figure, "Pr@X") == [([20], [12.5]), ([20], [6.25])]
    assert ([10, 20, 30], [1e-4] * 3) in curves(figure, "Learning rates")
    assert curves(figure, "Speed") == [([10, 20, 30], [50.0] * 3)]
    assert curves(figure, "Waiting") == [([10, 20, 30], [20.0] * 3)]
    assert all(panel.get_ylabel() for panel in figure.axes)
    assert [panel.get_xlabel() for panel in figure.axes[3:]] == ["optimiser step"] * 3


def test_a_run_scored_on_sentences_about_nothing_is_drawn_by_giou(tmp_path):
    scores = {"gIoU": 0.25, "N-acc": None, "Pr@0.7": 0.1}
    figure = drawn(write_run(tmp_path / "any", step(10, 1), epoch(1, 20, **scores)))
    assert key(figure) == ["any: best gIoU 25.00 % after epoch 1 (1,683 sentences)"]
    assert curves(figure, "Scores")[0] == ([20], [25])


def test_the_key_names_each_run_its_best_score_and_what_it_was_scored_on(tmp_path):
    records = [*RECORDS, epoch(2, 30, mIoU=0.5), epoch(3, 40, mIoU=0.4)]
    one, two = write_run(tmp_path / "a", *records), write_run(tmp_path / "b", *RECORDS[:1])
    save_config(load_config(ROOT / "config/refshapes/cris_tiny.yaml"), one / "config.yaml")
    assert key(drawn(one, two)) == [
        "a: best mIoU 50.00 % after epoch 2 (refshapes val, 1,683 sentences, aligned)",
        "b: not validated yet",
    ]
    other = write_run(tmp_path / "more/b", *RECORDS[:1])
    assert key(drawn(two, other)) == [f"{folder}: not validated yet" for folder in (two, other)]


def test_what_is_broken_or_being_written_is_left_out_and_told(tmp_path, capsys):
    ends = b'[1]\n5\n\0\xff\n{"a": 1}\n{"kind": "step"}\n{"kind": "st'
    folder = write_run(tmp_path / "a", *RECORDS)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(ends)
    assert plot_run.read_run(folder, "a").records == RECORDS
    told = f"{folder}/metrics.jsonl: 6 line(s) cut off or damaged, left out\n"
    assert capsys.readouterr().err == told


def test_a_loss_that_is_not_finite_leaves_a_gap_and_numbers_of_newer_runs_may_be_missing(tmp_path):
    records = [step(1, 0.5), step(2, None), step(3, 0.4)]
    old = [{k: v for k, v in record.items() if k != "data_wait_share"} for record in records]
    figure = drawn(write_run(tmp_path / "a", *old))
    assert curves(figure, "Waiting") == []
    ((x, y),) = curves(figure, "Training loss")
    assert x == [1, 2, 3]
    assert [y[0], y[2]] == [0.5, 0.4]
    assert math.isnan(y[1])


def test_many_points_get_a_running_mean(tmp_path):
    run = write_run(tmp_path / "a", *(step(n, 2.0 + n % 2) for n in range(80)))
    (x, y), (middles, means) = curves(drawn(run), "Training loss")
    assert x == list(range(80))
    assert set(y) == {2.0, 3.0}
    assert middles == x[2:-2]
    assert means == pytest.approx([2.4, 2.6] * 38)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent"], "absent/metrics.jsonl is not there: name the folder of a run"),
        (["empty"], "empty/metrics.jsonl: nothing is logged yet"),
        (["run", "-o", "x.svg"], r"-o x.svg: .* its name ends in .png"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_one_line(tmp_path, monkeypatch, words, message):
    write_run(tmp_path / "run", *RECORDS)
    write_run(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    assert re.search(message, user_error(plot_run.main, words))
    assert not list(tmp_path.rglob("*.png"))
