"""tools/demo.py without a browser: its answers, its examples, what it refuses."""

import socket
from pathlib import Path

import numpy as np
import pytest
from helpers import all_refs, save_photo

from engine.predictor import Predictor
from tools import demo
from utils.config import load_config
from utils.errors import UserError
from utils.visualize import PRED_COLOR, fade, heat_map, overlay


@pytest.fixture
def predictor(trained) -> Predictor:
    return Predictor(trained, device="cpu")


# ------------------------------------------------------------------------------------------ answers


def test_an_answer_is_the_predictors_and_the_network_runs_once(tmp_path, predictor, monkeypatch):
    path, answer = str(save_photo(tmp_path / "a.png")), demo.answerer(predictor)
    (found,) = predictor(path, "red circle")
    shown, heat, text = answer(path, "red circle", 0.15)
    photo = fade(demo.read_photo(path))
    assert np.array_equal(shown, overlay(photo, found.mask, PRED_COLOR))
    assert np.array_equal(heat, heat_map(found.probability))
    assert text.startswith(f"“red circle”: {found.area / found.mask.size:.1%} of")
    monkeypatch.setattr(predictor, "encode", None)
    answer(path, "blue square", 0.15)  # another sentence encodes no photo
    monkeypatch.setattr(predictor, "model", None)
    assert "nothing is above 0.99" in answer(path, "red circle", 0.99)[2]


def test_a_large_photo_is_read_whole_and_shown_small(tmp_path, predictor):
    path = str(save_photo(tmp_path / "large.png", size=(1000, 2 * demo.SHOWN_SIDE)))
    shown, heat, _ = demo.answerer(predictor)(path, "red circle", 0.99)
    assert shown.shape == heat.shape == (500, 1280, 3)


def test_what_cannot_be_answered_is_told_and_not_kept(tmp_path, predictor):
    answer, path = demo.answerer(predictor), tmp_path / "a.png"
    path.write_text("no photo")
    for photo, sentence, told in [
        (None, "circle", "there is no photo yet"),
        (str(path), "\n", "cannot be read: say in words"),
        (str(path), "circle", "cannot be decoded"),
    ]:
        with pytest.raises(UserError, match=told):
            answer(photo, sentence, 0.5)
    save_photo(path)
    assert "its end was not read" in answer(str(path), "red " * 20, 0.5)[2]


# ----------------------------------------------------------------------------------------- examples


def test_examples_are_of_the_val_split(tmp_path, trained):
    found = demo.find_examples(load_config(trained), tmp_path / "examples")
    sentences = {s for ref in all_refs(load_config(trained).DATA.val_lmdb) for s in ref.sentences}
    assert 2 <= len(found) <= demo.EXAMPLES
    assert {sentence for _, sentence in found} <= sentences
    assert len({Path(path).read_bytes() for path, _ in found}) == len(found)


def test_what_the_model_was_trained_on_is_said_in_plain_words():
    assert demo.describe_data("refcoco+")[0] == "everyday photos (RefCOCO+)"
    assert demo.describe_data("refshapes")[1] == "the red star"
    assert demo.describe_data("mugs") == ("the data set mugs", "what to look for")


def test_a_damaged_split_costs_the_examples_only(tmp_path, trained):
    (tmp_path / "val.lmdb").write_bytes(b"no database")
    opts = ["DATA.val_lmdb", str(tmp_path / "val.lmdb")]
    assert demo.find_examples(load_config(trained, opts), tmp_path / "examples") == []


# ---------------------------------------------------------------------------------------- start


def test_without_gradio_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -r requirements-demo\.txt"):
        demo.main(["--config", "no.yaml"])


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_of_either_protocol_is_found(host):
    assert demo.find_port(host, 0) > 0


def test_an_address_that_cannot_be_used_is_one_line_before_the_model(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [("127.0.0.1", taken.getsockname()[1]), ("127.0.0.1", 65536)]
        for host, port in [*ports, ("192.0.2.1", 0), ("no such host", 0), ("::2", 0)]:
            told = rf"^--host {host} --port {port} cannot be used: [^\n]+$"
            with pytest.raises(UserError, match=told):
                demo.main(["--config", "no.yaml", "--host", host, "--port", str(port)])
