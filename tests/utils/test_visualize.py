"""Pictures that a person judges at a glance: what is tinted, what is written, what is saved."""

import cv2
import numpy as np
import pytest
from helpers import blob
from PIL import Image

from utils.visualize import (
    MARGIN,
    PANEL_WIDTH,
    PRED_COLOR,
    TRUTH_COLOR,
    comparison,
    fade,
    file_stem,
    grid,
    heat_map,
    overlay,
    save_picture,
)

GREY = np.full((120, 160, 3), 100, np.uint8)
MASK = blob(120, 160, share=0.05) > 0
NOTHING = np.zeros_like(MASK)
NEAR = cv2.dilate(MASK.astype(np.uint8), np.ones((7, 7))) > 0  # the outline has a width
INSIDE = cv2.erode(MASK.astype(np.uint8), np.ones((7, 7))) > 0


def picture(
    mask: np.ndarray = MASK, pred_mask: np.ndarray = MASK, sentence: str = "a"
) -> np.ndarray:
    return np.asarray(comparison(GREY, mask, pred_mask, sentence, 0.5))


def differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Columns in which two pictures differ."""
    return np.flatnonzero((a != b).any(axis=(0, 2)))


def test_a_sentence_without_a_target_is_told_over_both_masks():
    right, wrong, missed = picture(NOTHING, NOTHING), picture(NOTHING), picture(MASK, NOTHING)
    panel = PANEL_WIDTH + MARGIN
    assert set(differs(right, missed) // panel) == {1, 2}  # both titles, and the truth
    assert set(differs(right, wrong) // panel) == {2}


def test_heat_map_brightens_with_the_probability():
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None]
    heat = heat_map(ramp)
    assert (heat.shape, heat.dtype) == ((1, 256, 3), np.uint8)
    light = heat @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(light) > -1).all()
    assert light[0, 0] < 40 < 200 < light[0, -1]
    assert heat[0, 0, 2] > heat[0, 0, 1]  # dark blue, in the order RGB
    assert heat[0, -1, 0] > 2 * heat[0, -1, 2]  # yellow


def test_overlay_tints_the_mask_and_leaves_the_rest_and_the_source():
    shown = overlay(GREY, MASK, TRUTH_COLOR)
    assert (GREY == 100).all()
    assert (shown[INSIDE] == (73, 152, 106)).all()
    assert (shown[~NEAR] == 100).all()
    assert (shown[NEAR & ~INSIDE] == TRUTH_COLOR).all(-1).any()
    assert np.array_equal(overlay(GREY, NOTHING, PRED_COLOR), GREY)
    assert (overlay(GREY, ~NOTHING, PRED_COLOR) != GREY).any(-1).all()


def test_a_mask_stands_out_on_a_faded_photo_of_any_colour():
    levels = np.linspace(0, 255, 18, dtype=np.uint8)
    photo = fade(np.stack(np.meshgrid(levels, levels, levels), -1).reshape(54, 108, 3))
    shown = overlay(photo, np.ones(photo.shape[:2], bool), PRED_COLOR)
    distance = np.linalg.norm(shown.astype(float) - photo, axis=2)
    assert distance[3:-3, 3:-3].min() > 40


def test_photo_truth_and_prediction_stand_side_by_side():
    base = picture()
    assert base.shape[1] == 3 * PANEL_WIDTH + 4 * MARGIN
    second, third = MARGIN * 2 + PANEL_WIDTH, MARGIN * 3 + 2 * PANEL_WIDTH
    truth = differs(base, picture(mask=NOTHING))
    assert second <= truth.min()
    assert truth.max() < third
    assert differs(base, picture(pred_mask=NOTHING)).min() >= third


def test_pictures_are_set_in_rows():
    cells = [Image.new("RGB", (20, 10), (0, 0, 50 * i)) for i in range(1, 4)]
    sheet = np.asarray(grid(cells, columns=2, gap=3))
    assert sheet.shape == (3 + 2 * (10 + 3), 3 + 2 * (20 + 3), 3)
    for i, (x, y) in enumerate([(3, 3), (26, 3), (3, 16)], 1):
        assert (sheet[y : y + 10, x : x + 20] == (0, 0, 50 * i)).all()
    assert (sheet == 255).all(-1).sum() == sheet[..., 0].size - 3 * 200


def test_sentence_and_iou_are_written_and_long_ones_wrap():
    assert len(differs(picture(sentence="left dog"), picture(sentence="right dog")))
    heights = [picture(sentence="word " * count).shape[0] for count in (1, 15, 60)]
    assert heights[0] == heights[1] < heights[2]


@pytest.mark.parametrize(
    "sentence", ["", " \n", "日本語 🐕 “café”", "x" * 500, "犬" * 500, "a/b\\c\x00"]
)
def test_any_sentence_can_be_drawn_and_be_part_of_a_file_name(sentence):
    picture(sentence=sentence)
    stem = file_stem(sentence)
    assert 0 < len(stem.encode()) <= 80
    assert not set(stem) & set("/\\\x00 \n.")


def test_file_stem_keeps_words_readable():
    assert file_stem("man w/ red hat?") == "man_w__red_hat"
    assert file_stem("犬 left") == "犬_left"
    assert file_stem("///") == "empty"


@pytest.mark.parametrize("size", [(1, 1), (20, 700), (700, 20)], ids=str)
def test_photos_of_odd_sizes_can_be_drawn(size):
    photo = np.zeros((*size, 3), np.uint8)
    mask = np.ones(size, bool)
    assert comparison(photo, mask, ~mask, "thing", 0.0).width == 3 * PANEL_WIDTH + 4 * MARGIN


@pytest.mark.parametrize(("suffix", "kind"), [(".png", "PNG"), (".jpg", "JPEG")])
def test_pictures_are_written_whole_in_the_format_of_their_suffix(tmp_path, suffix, kind):
    path = tmp_path / "vis" / f"a{suffix}"
    save_picture(comparison(GREY, MASK, MASK, "a", 1.0), path)
    with Image.open(path) as image:
        assert image.format == kind
        image.load()
    assert [p.name for p in path.parent.iterdir()] == [path.name]
