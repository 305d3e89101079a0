"""tools/demo.py without a browser: what it keeps, what it refuses, how it starts."""

import socket
from pathlib import Path

import numpy as np
import pytest
from engine_helpers import make_trained, on_cpu
from samples import save_photo

from engine.predictor import Predictor
from tools import demo
from utils.config import load_config
from utils.errors import UserError
from utils.photos import read_photo
from utils.records import RecordReader


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    return make_trained(tmp_path_factory.getbasetemp())


@pytest.fixture
def predictor(config):
    with on_cpu():
        yield Predictor(config)


@pytest.fixture
def answers(predictor) -> demo.Answers:
    return demo.Answers(predictor)


class Counted:
    """Counts the calls of a method of an object, which go through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.count = 0
        method = getattr(owner, name)

        def counting(*args: object) -> object:
            self.count += 1
            return method(*args)

        monkeypatch.setattr(owner, name, counting)


# ------------------------------------------------------------------------------------------ answers


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
    monkeypatch.setattr(demo, "PHOTOS", 2)
    monkeypatch.setattr(demo, "MAPS", 3)
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
    path = str(save_photo(tmp_path / "large.png", size=(1000, 2 * demo.SHOWN_SIDE)))
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


# ----------------------------------------------------------------------------------------- examples


def test_examples_are_of_the_val_split(tmp_path, config):
    found = demo.find_examples(load_config(config), tmp_path / "examples")
    reader = RecordReader(load_config(config).DATA.val_lmdb)
    sentences = {s for i in range(len(reader)) for s in reader.ref(i).sentences}
    assert 2 <= len(found) <= demo.EXAMPLES
    assert {sentence for _, sentence in found} <= sentences
    assert len({Path(path).read_bytes() for path, _ in found}) == len(found)


def test_examples_of_refshapes_are_drawn_where_there_is_no_split(tmp_path, config):
    nowhere = ["DATA.val_lmdb", str(tmp_path / "no.lmdb")]
    opts = [*nowhere, "DATA.dataset", "refshapes"]
    found = demo.find_examples(load_config(config, opts), tmp_path / "examples")
    assert len(found) == demo.EXAMPLES
    assert all(read_photo(path).shape[2] == 3 and sentence for path, sentence in found)
    assert demo.find_examples(load_config(config, nowhere), tmp_path / "none") == []


def test_a_damaged_split_costs_the_examples_only(tmp_path, config):
    (tmp_path / "val.lmdb").write_bytes(b"no database")
    opts = ["DATA.val_lmdb", str(tmp_path / "val.lmdb")]
    assert demo.find_examples(load_config(config, opts), tmp_path / "examples") == []


# ---------------------------------------------------------------------------------------- start


def error_of(*args: object) -> str:
    with pytest.raises(UserError) as caught:
        demo.main([str(arg) for arg in args])
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_without_gradio_the_remedy_is_named(config, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert "pip install -r requirements-demo.txt" in error_of("--config", config)


def test_a_port_in_use_is_one_line_and_comes_before_the_model(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        message = error_of("--config", "no.yaml", "--port", port)
    assert message == f"port {port} of 127.0.0.1 is in use: name another, --port N"


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "::2"])
def test_a_host_that_is_not_this_machine_is_one_line(host, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    assert f"--host {host}" in error_of("--config", "no.yaml", "--host", host)


@pytest.mark.parametrize("words", [["--port", "65536"], ["--max-upload", "0"]])
def test_numbers_out_of_range_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--config", "no.yaml", *words])
    assert f"error: {words[0]} {words[1]}: give" in capsys.readouterr().err


def test_this_machine_alone_is_the_default():
    args = demo._parse_args(["--config", "x.yaml"])
    with demo.listen(args.host, 0) as door:
        assert door.getsockname()[0] == "127.0.0.1"
