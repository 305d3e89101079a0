"""tools/predict.py: what it writes, what it says, and what it does with bad input."""

import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from helpers import ROOT, run_command, save_photo, usage_error, user_error
from PIL import Image

from engine.predictor import MAX_CHARACTERS, Predictor
from tools import predict
from utils.config import load_config
from utils.errors import UserError
from utils.visualize import PRED_COLOR

TEXTS = ["the red circle", "biggest square"]


@pytest.fixture
def photo(tmp_path) -> Path:
    return save_photo(tmp_path / "photos" / "street.png")


def ask(trained: Path, *args: object) -> None:
    predict.main(["--config", str(trained), *map(str, args)])


def texts(*sentences: str) -> list[str]:
    return [word for sentence in sentences for word in ("--text", sentence)]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---------------------------------------------------------------------------------- what is written


def test_each_sentence_gets_a_mask_an_overlay_and_its_measures(tmp_path, trained, photo, capsys):
    out = tmp_path / "answers"
    ask(trained, "--image", photo, *texts(*TEXTS), "-o", out, "--opts", "TEST.threshold", "0.01")
    stems = ["street-the_red_circle", "street-biggest_square"]
    suffixes = ("mask.png", "overlay.png", "json")
    assert names(out) == {f"{stem}.{suffix}" for stem in stems for suffix in suffixes}
    predictor = Predictor(load_config(trained, ["TEST.threshold", "0.01"]))
    expected = [predictor(photo, text)[0] for text in TEXTS]
    weights = str(load_config(trained).run_folder / "best_model.pth")
    pixels = np.asarray(Image.open(photo))
    lines = capsys.readouterr().out.splitlines()
    assert sum(found.area > 0 for found in expected) > 0
    for stem, found, line in zip(stems, expected, lines, strict=False):
        mask, shown = (np.asarray(Image.open(out / f"{stem}.{n}.png")) for n in ("mask", "overlay"))
        assert mask.dtype == np.uint8
        assert np.array_equal(mask, 255 * found.mask)
        changed = (shown != pixels).any(axis=2)
        assert changed[found.mask].mean() > 0.9 or found.area == 0
        assert found.area == 0 or (shown == PRED_COLOR).all(axis=2).any()
        measures = ("sentence", "area", "box", "mean_probability", "threshold", "is_cut")
        record = json.loads(json.dumps({name: getattr(found, name) for name in measures}))
        assert json.loads((out / f"{stem}.json").read_text()) == record | {
            "image": str(photo), "height": 70, "width": 100, "protocol": "published",
            "mask": f"{stem}.mask.png", "overlay": f"{stem}.overlay.png", "weights": weights,
        }  # fmt: skip
        assert line.startswith(f"'street.png' '{found.sentence}': ")
        assert f" {found.area} pixels" in line or found.area == 0


def test_a_folder_gives_every_photo_of_it(tmp_path, trained, photo):
    save_photo(photo.with_name("PARK.JPG"), seed=2)
    photo.with_name("notes.txt").write_text("no photo")
    out = tmp_path / "answers"
    ask(trained, "--image", photo.parent, *texts("thing"), "-o", out)
    found = {name.removesuffix(".json") for name in names(out) if name.endswith(".json")}
    assert found == {"street-thing", "PARK-thing"}


def test_json_lines_name_photos_beside_them_and_each_photo_is_encoded_once(
    tmp_path, trained, photo
):
    save_photo(tmp_path / "street.png", seed=2)
    lines = [("photos/street.png", "A!"), ("street.png", "a?"), ("photos/street.png", "A!")]
    asked = tmp_path / "asked.jsonl"
    text = "\n\n".join(json.dumps({"image": i, "sentence": s, "more": 1}) for i, s in lines)
    asked.write_text(text, "utf-8")
    with mock.patch.object(
        Predictor, "encode", autospec=True, side_effect=Predictor.encode
    ) as encode:
        ask(trained, "--jsonl", asked, "-o", tmp_path / "out")
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert sorted((r["image"], r["sentence"]) for r in records) == [
        (str(photo), "A!"), (str(photo), "A!"), (str(tmp_path / "street.png"), "a?"),
    ]  # fmt: skip
    assert len(names(tmp_path / "out")) == 9  # no answer overwrote another
    assert encode.call_count == 2


def test_a_line_says_what_was_found_and_obeys_no_text():
    record = {"image": "a.jpg", "sentence": "x\x1b[2J" * 50, "area": 5, "height": 9, "width": 9}
    found = {"box": (1, 2, 3, 4), "mean_probability": 0.5, "is_cut": False}
    line = predict.describe_answer(record | found)
    assert line.isprintable()
    assert line.endswith("': 5 pixels, 6.2% of the photo, box (1, 2, 3, 4), mean probability 0.50")
    line = predict.describe_answer(record | {"box": None, "is_cut": True})
    assert line.endswith("': nothing found; the sentence is too long, its end was not read")


# ---------------------------------------------------------------------------------------- bad input


def test_sentences_of_any_kind_are_answered_and_cut_ones_told(tmp_path, trained, photo, capsys):
    save_photo(photo.with_name("park.png"), seed=2)
    long = "word " * (MAX_CHARACTERS // 5)
    asked = texts("🐕", "日本語", "a/b\\c", long)
    ask(trained, "--image", photo.parent, *asked, "-o", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert sum("its end was not read" in line for line in lines) == 2
    assert max(map(len, lines)) < 300
    records = [json.loads(p.read_text("utf-8")) for p in (tmp_path / "out").glob("*.json")]
    assert len(records) == 2 * 4
    assert {r["sentence"]: r["is_cut"] for r in records} == {
        "🐕": False, "日本語": False, "a/b\\c": False, long: True,
    }  # fmt: skip


def fault(trained: Path, out: Path, *args: object) -> str:
    """The line with which the program refuses; it has written nothing."""
    told = user_error(ask, trained, *args, "-o", out)
    assert not out.exists()
    return told


def test_what_cannot_be_asked_is_one_line(tmp_path, trained, photo):
    out = tmp_path / "out"
    image = ["--image", photo]
    not_utf8 = b"caf\xe9".decode("utf-8", "surrogateescape")
    for sentence in ("", "a" * (MAX_CHARACTERS + 1), not_utf8):
        assert "cannot be read: say in words" in fault(trained, out, *image, *texts("a", sentence))
    missing = fault(trained, out, "--image", tmp_path / "none", *texts("a"))
    assert missing == f"{tmp_path / 'none'}: there is no such image file"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"<html>")
    assert "cannot be decoded" in fault(trained, out, "--image", broken, *texts("a"))
    (tmp_path / "empty").mkdir()
    assert "holds no photos" in fault(trained, out, "--image", tmp_path / "empty", *texts("a"))
    fit = fault(trained, out, "--weights", broken, *image, *texts("a"))
    assert fit.startswith(f"weights: {broken} is cut off, damaged or no checkpoint")
    assert fault(tmp_path / "none.yaml", out, *image, *texts("a")).startswith("config file")
    out.write_text("")
    with pytest.raises(FileExistsError, match=re.escape(str(out))):
        ask(trained, *image, *texts("a"), "-o", out)


def test_options_that_do_not_go_together_are_named(trained, photo, capsys):
    for options, message in (
        (["--image", photo], "--image needs a sentence: --text"),
        (["--jsonl", photo, "--text", "a"], "--jsonl holds the sentences: leave --text out"),
        (["--text", "a"], "one of the arguments --image --jsonl is required"),
    ):
        assert message in usage_error(capsys, ask, trained, *options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no lines"),
        (b"\xff\xfe", "line 1 is not"),
        (b'{"image": "a.jpg", "sentence": "x"}\n{"image": ', "line 2 is not"),
        (b"[" * 100_000, "line 1 is not"),
        (b'{"image": "a.jpg"}', 'line 1 is not {"image": "path", "sentence": "text"}'),
        (b'{"image": "a.jpg", "sentence": 3}', "line 1 is not"),
        (b'{"image": "a.jpg", "sentence": "\\ud800"}', "line 1 is not"),
    ],
)
def test_malformed_lines_are_named_before_anything_runs(tmp_path, trained, content, message):
    path = tmp_path / "asked.jsonl"
    path.write_bytes(content)
    assert message in fault(trained, tmp_path / "out", "--jsonl", path)


def test_one_photo_of_many_that_cannot_be_read_does_not_stop_the_others(
    tmp_path, trained, photo, capsys
):
    photo.with_name("broken.jpg").write_bytes(b"<html>")
    with pytest.raises(UserError, match="1 of 2 photos could not be read, see above"):
        ask(trained, "--image", photo.parent, *texts("a"), "-o", tmp_path / "out")
    assert "broken.jpg cannot be decoded" in capsys.readouterr().err
    assert len(names(tmp_path / "out")) == 3


def test_a_photo_whose_name_is_no_utf_8_is_answered(tmp_path, trained, photo):
    photo = photo.rename(photo.with_name(os.fsdecode(b"caf\xe9.png")))
    ask(trained, "--image", photo, *texts("a"), "-o", tmp_path / "out")
    (record,) = (tmp_path / "out").glob("*.json")
    assert json.loads(record.read_text("utf-8"))["image"] == str(photo)


def test_the_program_runs_from_anywhere(tmp_path, trained, photo):
    program = [sys.executable, ROOT / "tools/predict.py", "--config", trained]
    ending = run_command(*program, "--image", photo, *texts("a"), "-o", tmp_path / "out")
    assert (ending.returncode, ending.stderr) == (0, "")
    assert ending.stdout.startswith("'street.png' 'a': ")
