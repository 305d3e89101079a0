"""Predictions on anybody's photos: the same masks as test.py's, however they are asked for."""

import numpy as np
import pytest
import torch
from helpers import load, read_jsonl, run_program, smooth_photo, user_error
from PIL import Image
from pycocotools import mask as coco_mask

from engine.predictor import MAX_CHARACTERS, Predictor
from utils.checkpoint import BEST, LAST
from utils.config import load_config
from utils.errors import UserError
from utils.records import RecordReader

SENTENCES = ["the red circle", "biggest square", "star on the left"]


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    return Predictor(trained, device="cpu")


@pytest.fixture
def photo() -> np.ndarray:
    return smooth_photo(np.random.default_rng(1), 70, 100)


def same(a, b) -> bool:
    return np.array_equal(a.probability, b.probability) and np.array_equal(a.mask, b.mask)


# ------------------------------------------------------------------------------- as test.py does it


@pytest.mark.parametrize("protocol", ["published", "aligned"])
def test_a_photo_file_gives_the_masks_of_test_py_pixel_for_pixel(tmp_path, trained, data, protocol):
    reader = RecordReader(data / "lmdb/shapes/val.lmdb")
    opts = ["TEST.protocol", protocol, "TEST.weights", load_config(trained).run_folder / BEST]
    run_program("test.py", trained, *opts, "TRAIN.output_folder", tmp_path)
    stem = "test_shapes_val" + (".aligned" if protocol == "aligned" else "")
    lines = read_jsonl(tmp_path / f"tiny/{stem}.threshold0.15.jsonl")
    predictor, areas = Predictor(load_config(trained, [str(opt) for opt in opts])), []
    for line in lines:
        path = tmp_path / line["image"]
        path.write_bytes(reader.image(line["image"]))
        (found,) = predictor(path, line["sentence"])
        mask = coco_mask.decode(line["pred_rle"]) > 0
        is_clear = np.abs(found.probability - 0.15) > 1e-5  # rounding decides the rest
        assert is_clear.mean() > 0.99
        assert np.array_equal(found.mask[is_clear], mask[is_clear])
        areas.append(found.area)
    assert len(areas) == len(lines) > 20
    assert np.mean([0 < area < mask.size / 2 for area in areas]) > 0.4  # there is something to err


def test_of_two_protocols_the_first_counts_as_in_validation(trained):
    cfg = load_config(trained, ["TEST.protocol", "both", "TEST.threshold", "null"])
    predictor = Predictor(cfg, device="cpu")
    assert (predictor.protocol, predictor.threshold) == ("aligned", 0.5)


@pytest.mark.parametrize("has_seen", [False, True])
def test_a_small_mask_is_none_for_a_model_trained_with_sentences_about_nothing(
    trained, photo, tmp_path, has_seen
):
    state = load(load_config(trained).run_folder / BEST)
    assert state["no_target"] is False
    torch.save(state | {"no_target": has_seen}, tmp_path / "best.pth")
    cfg = load_config(trained, ["TEST.no_target_pixels", "9"])
    (found,) = Predictor(cfg, tmp_path / "best.pth", device="cpu")(photo, "a")
    highest = np.sort(found.probability, axis=None)
    few, many = (found.at(float(highest[-n - 1])) for n in (8, 9))
    assert (few.area, many.area) == (0 if has_seen else 8, 9)
    assert (few.box is None) == has_seen


# ---------------------------------------------------------------------------------- what comes back


def test_a_prediction_measures_its_own_mask_by_any_threshold(predictor, photo):
    predictions = predictor(photo, SENTENCES)
    assert [found.sentence for found in predictions] == SENTENCES
    assert all(np.array_equal(found.mask, found.probability > 0.15) for found in predictions)
    for found in predictions:
        threshold = float(np.quantile(found.probability, 0.9))
        found = found.at(threshold)
        assert found.threshold == threshold
        assert found.probability.shape == found.mask.shape == (70, 100)
        assert (found.probability.dtype, found.mask.dtype) == (np.float32, bool)
        assert 0 <= found.probability.min() <= found.probability.max() <= 1
        assert np.array_equal(found.mask, found.probability > threshold)
        assert found.area == found.mask.sum() > 0
        ys, xs = np.nonzero(found.mask)
        assert found.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert found.mean_probability == pytest.approx(found.probability[found.mask].mean())
        empty = found.at(float(found.probability.max()))
        assert (empty.area, empty.box, empty.mean_probability) == (0, None, None)
        assert not empty.mask.any()


def test_a_sentence_that_does_not_fit_says_so(predictor, photo):
    fits, cut, emoji = predictor(photo, ["red " * 15, "red " * 16, "the 🐕"])
    assert (fits.is_cut, cut.is_cut, emoji.is_cut) == (False, True, False)
    assert same(fits, cut)
    assert predictor(photo, "word " * (MAX_CHARACTERS // 5))[0].is_cut


# ----------------------------------------------------------------------------- however it is asked


def test_path_array_and_pillow_image_give_the_same(tmp_path, predictor, photo):
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    expected = predictor(photo, SENTENCES)
    for source in (path, str(path), Image.fromarray(photo), Image.open(path)):
        assert all(map(same, predictor(source, SENTENCES), expected))


def test_an_encoded_image_serves_any_number_of_sentences(predictor, photo):
    expected = predictor(photo, SENTENCES)
    assert predictor(photo, []) == []
    with torch.no_grad():
        encoded = predictor.encode(photo)
    assert encoded.size == (70, 100)
    calls = []
    handle = predictor.model.neck.f1_v_proj.register_forward_hook(lambda *_: calls.append(1))
    assert all(map(same, predictor(encoded, SENTENCES), expected))
    assert calls == []
    predictor(photo, SENTENCES * 4)
    assert calls == [1]
    handle.remove()
    assert not predictor.model.training


@pytest.mark.parametrize("size", [2, 16])
def test_photos_in_batches_of_any_size_give_what_each_gives_alone(trained, predictor, size):
    cfg = load_config(trained, ["TRAIN.batch_size_val", str(size)])
    photos = [smooth_photo(np.random.default_rng(n), 60 + 9 * n, 80 - 7 * n) for n in range(4)]
    asked = [SENTENCES, SENTENCES[:1], [], SENTENCES[1:]]
    mixed = [photos[0], predictor.encode(photos[1]), *photos[2:]]
    found = Predictor(cfg, device="cpu").predict(mixed, asked)
    assert [[p.sentence for p in row] for row in found] == asked
    for photo, sentences, row in zip(photos, asked, found, strict=True):
        for alone, together in zip(predictor(photo, sentences), row, strict=True):
            assert alone.mask.shape == together.mask.shape
            assert np.abs(alone.probability - together.probability).max() < 1e-5


def test_lists_that_do_not_fit_are_a_mistake_of_the_program(predictor, photo):
    with pytest.raises(ValueError, match="2 images with 1 lists"):
        predictor.predict([photo, photo], [SENTENCES])


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize("sentence", ["", " \t\n ", "a" * (MAX_CHARACTERS + 1), "caf\udce9"])
def test_a_sentence_that_cannot_be_read_is_named(predictor, photo, sentence):
    line = user_error(predictor, photo, ["fine", sentence])
    assert f"the sentence {sentence[:80]!a} cannot be read: say in words what to" in line


def test_a_device_that_is_not_there_is_named(trained):
    for device in ("cuda:99", torch.device("cuda", 99), "gpu"):
        with pytest.raises(UserError) as caught:
            Predictor(trained, device=device)
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"device {device}: it cannot be used here (")
        assert line.endswith("; cpu always can")


def test_weights_that_do_not_belong_to_the_config_are_named(trained, tmp_path, log_lines):
    best = load_config(trained).run_folder / BEST
    none, no_config = tmp_path / "none.pth", tmp_path / "none.yaml"
    assert f"weights: there is no checkpoint {none}" in user_error(Predictor, trained, none)
    Predictor(load_config(trained, ["TRAIN.word_len", "12"]), best)
    assert any("with TRAIN.word_len 17, the config says 12" in line for line in log_lines)
    line = user_error(Predictor, load_config(trained, ["TRAIN.fpn_out", "[64, 64, 64]"]), best)
    assert "does not fit the config's model: size mismatch for neck" in line
    assert f"config file {no_config}: No such file" in user_error(Predictor, no_config, best)


def test_weights_default_to_those_of_the_config_then_of_the_run(trained):
    best, last = (str(load_config(trained).run_folder / name) for name in (BEST, LAST))
    assert Predictor(trained).weights == best
    assert Predictor(load_config(trained, ["TEST.weights", last])).weights == last
