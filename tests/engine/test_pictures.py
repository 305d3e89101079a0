"""The sentences that are watched: the same ones always, in the folder and at the tracker."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ALONE, build_run, load, run_program, spawn, write_config
from PIL import Image

from engine.pictures import show_sentences, watched_sentences
from engine.trainer import validate
from utils.dataset import EvaluationDataset
from utils.distributed import Ranks
from utils.logger import Tracker
from utils.records import RecordReader


@pytest.fixture
def config(tmp_path, data) -> Path:
    return write_config(tmp_path, data, epochs=2, val_pictures=3)


class Shown(Tracker):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__(None)
        self.epochs: dict[int, list[tuple[str, Image.Image]]] = {}

    def show(self, epoch: int, pictures: list) -> None:
        self.epochs[epoch] = pictures


def test_each_watched_sentence_is_on_another_image_and_there_are_no_more_than_images(data):
    reader = RecordReader(data / "lmdb/shapes/val.lmdb")
    dataset, of_first = (EvaluationDataset(reader, 64, 17, which) for which in ("all", "first"))
    image_of = {p: number for number, group in enumerate(dataset.groups) for p in group}
    for count in (0, 1, 3, len(dataset), 100):
        keys = watched_sentences(dataset, count)
        assert len(keys) == min(count, len(dataset))
        assert len({image_of[position] for position, _ in keys}) == len(keys)
        assert keys <= dataset.keys()
        assert keys <= of_first.keys()


def test_the_same_sentences_are_shown_after_each_epoch(config, data):
    run = build_run(config)
    run.tracker = Shown()
    show_sentences(run, [])
    assert not (run.folder / "pictures").exists()
    for run.epoch in (0, 1):
        validate(run)
    first, second = (run.tracker.epochs[epoch] for epoch in (1, 2))
    keys = sorted(watched_sentences(run.val_loader.dataset, 3))
    reader = RecordReader(data / "lmdb/shapes/val.lmdb")
    sentences = [reader.ref(position).sentences[place] for position, place in keys]
    for pictures in (first, second):
        assert [caption.rpartition(" (IoU ")[0] for caption, _ in pictures] == sentences
    folder = run.folder / "pictures"
    assert sorted(p.name for p in folder.iterdir()) == ["epoch_0001.jpg", "epoch_0002.jpg"]
    with Image.open(folder / "epoch_0001.jpg") as sheet:
        assert sheet.height == sum(picture.height for _, picture in first)


def test_watching_changes_neither_scores_nor_weights(config, tmp_path):
    for name, count in (("none", 0), ("some", 3)):
        run_program("train.py", config, "TRAIN.exp_name", name, "TRAIN.val_pictures", count)
    none, some = (load(tmp_path / f"exp/{name}/last_model.pth") for name in ("none", "some"))
    assert none["scores"] == some["scores"]
    assert all(w.equal(some["state_dict"][name]) for name, w in none["state_dict"].items())
    assert not (tmp_path / "exp/none/pictures").exists()
    assert len(list((tmp_path / "exp/some/pictures").iterdir())) == 2


def shown_by(ranks: Ranks, config: Path, out: Path) -> list[str]:
    """Validate as one of these ranks, and return the captions that it shows."""
    run = build_run(config, "TRAIN.output_folder", out, ranks=ranks)
    run.tracker = Shown()
    validate(run)
    assert bool(run.tracker.epochs) is ranks.is_main
    return [caption for caption, _ in run.tracker.epochs.get(1, ())]


@pytest.mark.slow
def test_two_ranks_show_what_one_process_shows_once(config, tmp_path):
    one, two = (tmp_path / name for name in ("one", "two"))
    assert spawn(2, shown_by, config, two) == [shown_by(ALONE, config, one), []]
    sheets = [np.array(Image.open(f / "tiny/pictures/epoch_0001.jpg")) for f in (one, two)]
    assert sheets[0].shape == sheets[1].shape
    assert np.abs(sheets[0].astype(int) - sheets[1]).mean() < 0.5
