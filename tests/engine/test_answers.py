"""Questions by several people: what is computed once, what is kept, and what it costs."""

from collections.abc import Iterator

import numpy as np
import pytest
from helpers import make_trained, on_cpu, save_photo

from engine import answers as kept
from engine.answers import SHOWN_SIDE, Answers
from engine.predictor import Predictor
from utils.errors import UserError


@pytest.fixture
def predictor(tmp_path_factory) -> Iterator[Predictor]:
    with on_cpu():
        yield Predictor(make_trained(tmp_path_factory.getbasetemp()))


@pytest.fixture
def answers(predictor) -> Answers:
    return Answers(predictor)


class Counted:
    """Counts the calls of a method of an object, which go through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.count = 0
        method = getattr(owner, name)

        def counting(*args: object) -> object:
            self.count += 1
            return method(*args)

        monkeypatch.setattr(owner, name, counting)


def test_a_photo_is_encoded_once_for_all_its_sentences(tmp_path, answers, predictor, monkeypatch):
    encodings = Counted(monkeypatch, predictor, "encode")
    path = str(save_photo(tmp_path / "a.png"))
    first, second = answers.ask(path, "red circle"), answers.ask(path, "blue square")
    assert first.encoding > 0
    assert second.encoding is None
    assert second.answering > 0
    assert encodings.count == 1
    for answer in (first, second):
        (expected,) = predictor(path, answer.found.sentence)
        assert np.array_equal(answer.found.probability, expected.probability)


def test_a_known_answer_comes_without_the_network(tmp_path, answers, predictor, monkeypatch):
    path = str(save_photo(tmp_path / "a.png"))
    asked = answers.ask(path, "red circle")
    monkeypatch.setattr(predictor.model, "forward", None)
    monkeypatch.setattr(predictor, "predict", None)
    again = answers.ask(path, "red circle")
    assert again.answering is None
    assert again.found is asked.found


def test_what_is_kept_is_bounded_and_the_last_used_stays(tmp_path, answers, predictor, monkeypatch):
    monkeypatch.setattr(kept, "PHOTOS", 2)
    monkeypatch.setattr(kept, "MAPS", 3)
    a, b, c = (str(save_photo(tmp_path / f"{name}.png", i)) for i, name in enumerate("abc"))
    for path in (a, b, a, c):
        answers.look(path)
    encodings = Counted(monkeypatch, predictor, "encode")
    assert answers.look(a)[1] is None
    assert answers.look(c)[1] is None
    assert answers.look(b)[1] is not None
    assert encodings.count == 1
    for number in range(5):
        answers.ask(a, f"circle {number}")
    assert len(answers._seen) == 2
    assert [sentence for _, sentence in answers._found] == ["circle 2", "circle 3", "circle 4"]


def test_a_large_photo_is_read_whole_and_shown_small(tmp_path, answers, predictor):
    path = str(save_photo(tmp_path / "large.png", size=(1000, 2 * SHOWN_SIDE)))
    seen, _ = answers.look(path)
    assert seen.size == (1000, 2560)
    assert seen.pixels.shape == (500, 1280, 3)
    answer = answers.ask(path, "red circle")
    assert answer.found.probability.shape == (500, 1280)
    whole = predictor(path, "red circle")[0].probability
    half = whole.reshape(500, 2, 1280, 2).mean((1, 3))
    assert np.abs(half - answer.found.probability).max() < 0.02
    assert half.max() - half.min() > 0.05


def test_a_photo_that_cannot_be_read_leaves_nothing_behind(tmp_path, answers):
    path = tmp_path / "a.png"
    path.write_text("no photo")
    with pytest.raises(UserError, match="cannot be read"):
        answers.ask(str(path), "red circle")
    save_photo(path)
    assert answers.ask(str(path), "red circle").encoding > 0


def test_a_sentence_without_words_does_not_touch_the_photo(answers):
    with pytest.raises(UserError, match="has no words"):
        answers.ask("nowhere.png", "\n")
