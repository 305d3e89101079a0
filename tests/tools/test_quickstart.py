"""tools/quickstart.py: its tables, and that nothing is done twice. Nothing is trained here."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import cv2
import pytest
from helpers import ROOT, write_result

from tools import data_process, folder2lmdb, quickstart, refshapes
from utils.checkpoint import save_checkpoint
from utils.config import load_config
from utils.errors import UserError

CONFIG = ROOT / "config/refshapes/cris_tiny.yaml"
COUNTS = {"train": 2, "val": 4, "testA": 2, "testB": 2}
SIZE = {"height": 10, "width": 10}
SENTENCES = "star on the far left", "the red star", "the biggest star", "star under the red star"


def test_scores_by_kind_are_means_over_the_sentences_of_each_kind_that_occurs():
    ious = {"the red star": 0.5, "red star": 1, "star on the far left": 0, "star under this": 0.75}
    lines = [{"sentence": sentence, "iou": iou} for sentence, iou in ious.items()]
    scores = {"position, 1": 0, "colour, 2": 0.75, "relation, 1": 0.75}
    found = quickstart.scores_by_kind(lines)
    assert found == {f"{kind} sentences": score for kind, score in scores.items()}


def test_examples_are_a_success_of_each_kind_two_on_one_image_and_a_failure():
    lines = []
    for image_id, sentence in enumerate(SENTENCES):
        for ref_id, (iou, area) in enumerate([(0.9, 5), (0.95, 20), (0.5, 1)]):
            place = {"image": str(image_id), "ref_id": 10 * image_id + ref_id}
            lines.append({"sentence": sentence, "iou": iou, "target_area": area} | place | SIZE)
    assert [r["ref_id"] for r in quickstart.choose_examples(lines[2:3])] == []
    failure = {"sentence": "lowest star", "iou": 0.0, "target_area": 9, "image": "9", "ref_id": 99}
    chosen = quickstart.choose_examples([*lines, failure | SIZE])
    # The smallest successful referent of each kind, not the hopeless smaller one.
    assert [r["ref_id"] for r in chosen] == [0, 10, 20, 30, 31, 99]


def test_a_result_is_fresh_only_if_it_is_there_and_newer_than_everything_it_is_made_from(tmp_path):
    for seconds, path in enumerate([old := tmp_path / "old", new := tmp_path / "new"]):
        path.touch()
        os.utime(path, (seconds, seconds))
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

    def __init__(self, *opts: str, epochs: int | None = None) -> None:
        self.cfg = load_config(CONFIG, opts)
        self.epochs = self.cfg.TRAIN.epochs if epochs is None else epochs
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], env: dict[str, str]) -> mock.Mock:
        self.commands.append(command[1:])
        arguments, folder = command[2:], self.cfg.run_folder
        match self.programs[-1]:
            case "refshapes":
                refshapes.generate(Path(arguments[1]), COUNTS, seed=0)
            case "data_process":
                data_process.main(arguments)
            case "folder2lmdb":
                folder2lmdb.main(arguments)
            case "train":
                state = {"state_dict": {}, "epoch": self.epochs, "config": self.cfg.model_dump()}
                folder.mkdir(parents=True, exist_ok=True)
                save_checkpoint(state, folder, is_best=True)
            case "test":
                swapped = "TEST.swap_sentences" in arguments
                for split in ("val",) if swapped else self.cfg.TEST.splits:
                    lmdb = quickstart.LMDB / f"{split}.lmdb"
                    write_result(folder, lmdb, "both", is_swapped=swapped)
        return mock.Mock(returncode=0)

    @property
    def programs(self) -> list[str]:
        return [Path(program).stem for program, *_ in self.commands]


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """`quick(Runner())` runs the quickstart in an empty folder with a made-up runner."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "DEFAULT_IMAGES", COUNTS)

    def run(runner: Callable) -> Callable:
        monkeypatch.setattr(subprocess, "run", runner)
        quickstart.main(["--config", str(CONFIG)])
        return runner

    return run


EVERYTHING = ["refshapes", "data_process", *["folder2lmdb"] * 4, "train", "test", "test"]


def test_a_second_run_only_evaluates_and_other_data_are_made_again_with_all_that_follows(
    quick, capsys, monkeypatch
):
    runs, outputs, tables, version = [], [], [], refshapes.VERSION
    for drawn_by in (version, version, version + 1):
        monkeypatch.setattr(refshapes, "VERSION", drawn_by)
        runs.append(quick(Runner()).programs)
        outputs.append(capsys.readouterr().out)
        tables.append(outputs[-1].partition("in per cent")[2].partition("where to look")[0])
    assert runs == [EVERYTHING, ["test", "test"], EVERYTHING]
    assert [output.count("complete, reused") for output in outputs] == [0, len(EVERYTHING) - 2, 0]
    assert "does it read?" in tables[0] == tables[1]
    picture = Path("exp/refshapes/cris_tiny/vis/examples.png")
    assert str(picture) in outputs[0]
    assert "exp/refshapes/cris_tiny/report/index.html" in outputs[0]
    assert cv2.imread(str(picture)).std() > 10


def test_training_goes_on_from_its_checkpoint_or_anew_if_the_recipe_or_the_data_changed(quick):
    old = quick(Runner("TRAIN.base_lr", "0.5"))
    folder = old.cfg.run_folder
    for name in ("notes.txt", "step_000000001.pth", "test_refshapes_gone.json"):
        (folder / name).touch()
    interrupted = quick(Runner(epochs=1))  # of more
    resumed = quick(Runner())
    os.utime(quickstart.LMDB / "train.lmdb")
    newer_data = quick(Runner())
    for runner in (interrupted, resumed, newer_data):
        assert runner.programs == ["train", "test", "test"]
    for runner in (interrupted, newer_data):
        assert runner.commands[0] == ["train.py", "--config", str(CONFIG)]
    last = "exp/refshapes/cris_tiny/last_model.pth"
    assert resumed.commands[0][-3:] == ["--opts", "TRAIN.resume", last]
    left = {path.name for path in folder.iterdir()}
    assert "notes.txt" in left
    assert not {"step_000000001.pth", "test_refshapes_gone.json"} & left


def test_a_step_that_fails_stops_with_its_exit_code(quick):
    failing = mock.Mock(**{"return_value.returncode": 3})
    with pytest.raises(SystemExit) as stop:
        quick(failing)
    assert stop.value.code == 3
    failing.assert_called_once()
