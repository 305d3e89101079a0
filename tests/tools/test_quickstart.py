"""tools/quickstart.py: its tables, and that nothing is done twice. Nothing is trained here."""

import os
from pathlib import Path
from unittest import mock

import cv2
import pytest
from helpers import ROOT, write_result

from tools import data_process, folder2lmdb, quickstart, refshapes
from utils.checkpoint import save_checkpoint
from utils.config import load_config, to_dict
from utils.errors import UserError

CONFIG = ROOT / "config/refshapes/cris_tiny.yaml"
COUNTS = {"train": 2, "val": 4, "testA": 2, "testB": 2}


def line(sentence: str, intersection: int, union: int, **more) -> dict:
    """A record of a `.jsonl`, as far as the tables read it."""
    return {"sentence": sentence, "intersection": intersection, "union": union, **more}


def test_scores_by_kind_are_means_over_the_sentences_of_each_kind_that_occurs():
    lines = [
        line("the red star", 50, 100),
        line("red star", 100, 100),
        line("star on the far left", 0, 80),
        line("circle under the blue circle", 30, 40),
    ]
    scores = {"position, 1": 0, "colour, 3": 0.75, "relation, 1": 0.75}
    found = quickstart.scores_by_kind(lines)
    assert found == pytest.approx({f"{kind} sentences": score for kind, score in scores.items()})


def test_examples_are_a_success_of_each_kind_two_on_one_image_and_a_failure():
    sentences = {
        "position": "star on the far left",
        "colour": "the red star",
        "size": "the biggest star",
        "relation": "star under the red star",
    }
    size = {"height": 10, "width": 10}
    lines = []
    for image_id, sentence in enumerate(sentences.values()):
        for ref_id, (iou, area) in enumerate([(0.9, 5), (0.95, 20), (0.5, 1)]):
            place = {"image": str(image_id), "ref_id": 10 * image_id + ref_id}
            lines.append(line(sentence, 1, 1, iou=iou, target_area=area, **place, **size))
    lines.append(line("lowest star", 0, 9, iou=0.0, target_area=9, image="9", ref_id=99, **size))
    chosen = quickstart.choose_examples(lines)
    # The smallest successful referent of each kind, not the hopeless smaller one.
    assert [r["ref_id"] for r in chosen] == [0, 10, 20, 30, 31, 99]


def test_without_success_or_failure_there_are_fewer_examples():
    middling = line("red star", 5, 10, iou=0.5, target_area=9, image="1", ref_id=1)
    middling |= {"height": 10, "width": 10}
    assert quickstart.choose_examples([middling]) == []


def test_a_result_is_fresh_only_if_it_is_there_and_newer_than_everything_it_is_made_from(tmp_path):
    paths = [tmp_path / name for name in ("old", "new")]
    for seconds, path in enumerate(paths):
        path.touch()
        os.utime(path, (seconds, seconds))
    old, new = paths
    assert quickstart.is_fresh([new], [old])
    assert not quickstart.is_fresh([old], [new])
    assert not quickstart.is_fresh([old, new], [new])
    assert not quickstart.is_fresh([new, tmp_path / "absent"], [old])
    assert not quickstart.is_fresh([new], [tmp_path / "absent"])


def test_other_data_than_refshapes_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"cris_r50.yaml .* take config/refshapes/cris_tiny"):
        quickstart.main(["--config", str(CONFIG.parents[1] / "refcoco" / "cris_r50.yaml")])


class Runner:
    """Stands in for the commands: prepares real data, makes up checkpoints and predictions."""

    def __init__(self, epochs: int | None = None) -> None:
        self.cfg = load_config(CONFIG)
        self.epochs = self.cfg.TRAIN.epochs if epochs is None else epochs
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str]) -> int:
        program, *arguments = command[1:]
        self.commands.append([program, *arguments])
        match Path(program).stem:
            case "refshapes":
                refshapes.generate(Path(arguments[1]), COUNTS, seed=0)
            case "data_process":
                data_process.main(arguments)
            case "folder2lmdb":
                folder2lmdb.main(arguments)
            case "train":
                state = {"state_dict": {}, "epoch": self.epochs, "config": to_dict(self.cfg)}
                folder = self.cfg.run_folder
                folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(state, folder, is_best=True)
            case "test":
                swapped = "TEST.swap_sentences" in arguments
                for split in ("val",) if swapped else self.cfg.TEST.splits:
                    lmdb = quickstart.LMDB / f"{split}.lmdb"
                    write_result(self.cfg.run_folder, lmdb, "both", is_swapped=swapped)
        return 0


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """`quick(runner)` runs the quickstart in an empty folder with a made-up runner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "DEFAULT_IMAGES", COUNTS)

    def run(runner) -> None:
        monkeypatch.setattr(quickstart, "execute", runner)
        quickstart.main(["--config", str(CONFIG)])

    return run


def programs(runner: Runner) -> list[str]:
    return [Path(command[0]).stem for command in runner.commands]


EVERYTHING = ["refshapes", "data_process", *["folder2lmdb"] * 4, "train", "test", "test"]


def test_a_second_run_only_evaluates_and_reports_the_same(quick, capsys):
    first, second = Runner(), Runner()
    quick(first)
    output = capsys.readouterr().out
    picture = Path("exp/refshapes/cris_tiny/vis/examples.png")
    assert str(picture) in output
    assert "exp/refshapes/cris_tiny/report/index.html" in output
    assert cv2.imread(str(picture)).std() > 10
    table = output.partition("in per cent")[2].partition("time")[0]
    quick(second)
    output = capsys.readouterr().out
    assert programs(first) == EVERYTHING
    assert programs(second) == ["test", "test"]
    assert output.count("complete, reused") == len(EVERYTHING) - 2
    assert "does it read?" in table
    assert output.partition("in per cent")[2].partition("time")[0] == table


def test_an_interrupted_training_goes_on_from_its_checkpoint(quick):
    quick(Runner(epochs=1))  # of more
    second = Runner()
    quick(second)
    assert programs(second) == ["train", "test", "test"]
    last = "exp/refshapes/cris_tiny/last_model.pth"
    assert second.commands[0][-3:] == ["--opts", "TRAIN.resume", last]


def test_training_starts_anew_when_the_recipe_or_the_data_changed(quick):
    old, other_recipe, newer_data = Runner(), Runner(), Runner()
    old.cfg = load_config(CONFIG, ["TRAIN.base_lr", "0.5"])
    quick(old)
    folder = old.cfg.run_folder
    for name in ("notes.txt", "step_000000001.pth", "test_refshapes_gone.json"):
        (folder / name).touch()
    quick(other_recipe)
    os.utime(quickstart.LMDB / "train.lmdb")
    quick(newer_data)
    for runner in (other_recipe, newer_data):
        assert runner.commands[0] == ["train.py", "--config", str(CONFIG)]
    left = {path.name for path in folder.iterdir()}
    assert "notes.txt" in left
    assert not {"step_000000001.pth", "test_refshapes_gone.json"} & left


def test_data_drawn_with_other_parameters_are_made_again_with_all_that_follows(quick, monkeypatch):
    quick(Runner())
    monkeypatch.setattr(refshapes, "VERSION", refshapes.VERSION + 1)
    second = Runner()
    quick(second)
    assert programs(second) == EVERYTHING


def test_a_step_that_fails_stops_with_its_exit_code(quick, capsys):
    failing = mock.Mock(return_value=3)
    with pytest.raises(SystemExit) as stop:
        quick(failing)
    assert stop.value.code == 3
    failing.assert_called_once()
