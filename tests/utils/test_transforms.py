"""From photo to network and back: geometry, colours, decoding, and what geometry alone costs."""

import numpy as np
import pytest
import torch
from helpers import blob, encoded

from engine.evaluator import perfect_prediction
from utils.metrics import Counts, intersection_and_union, iou
from utils.transforms import (
    BORDER,
    CLIP_MEAN,
    CLIP_STD,
    PROTOCOLS,
    decode_mask,
    letterbox_image,
    letterbox_mask,
    normalize_images,
    normalize_masks,
    restore_size,
    upsample_probability,
)

SIZES = [(480, 640), (640, 480), (333, 500), (416, 416), (64, 48), (90, 640), (640, 90)]


def restored_mask(mask: np.ndarray, side: int) -> np.ndarray:
    square = letterbox_mask(mask, side).astype(np.float32) / 255
    return restore_size(square, mask.shape) > 0.5


# ---------------------------------------------------------------------------------------- letterbox


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_letterbox_and_its_inverse_return_the_mask(size):
    for seed in range(3):
        mask = blob(*size, seed=seed)
        assert iou(*intersection_and_union(restored_mask(mask, 416), mask > 0)) > 0.97


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (700, 1), (2, 3), (3000, 7)], ids=str)
def test_degenerate_sizes_pass_through_both_ways(size):
    full = np.full(size, 255, np.uint8)
    image = letterbox_image(np.repeat(full[..., None], 3, axis=2), 96)
    assert image.shape == (96, 96, 3)
    assert letterbox_mask(full, 96).shape == (96, 96)
    restored = restore_size(np.ones((96, 96), np.float32), size)
    assert restored.shape == size
    assert (restored > 0.5).mean() > 0.98


def test_one_pixel_survives_the_round_trip():
    assert restored_mask(np.full((1, 1), 255, np.uint8), 416).all()
    assert not restored_mask(np.zeros((1, 1), np.uint8), 416).any()


def test_border_is_clips_mean_colour_for_photos_and_background_for_masks():
    image = letterbox_image(np.zeros((50, 100, 3), np.uint8), 64)
    assert image.dtype == np.uint8
    assert np.abs(image[0, 0] - np.array(BORDER)).max() < 1
    assert (image[20:44, 4:60] == 0).all()
    assert normalize_images(torch.from_numpy(image)[None])[0, :, 0, 0].abs().max() < 0.01
    mask = letterbox_mask(np.full((50, 100), 255, np.uint8), 64)
    assert (mask[:10] == 0).all()
    assert (mask[20:44, 4:60] == 255).all()


def test_mask_edges_are_soft_and_overlaps_marked_254_stay_foreground():
    mask = np.zeros((300, 300), np.uint8)
    mask[100:200, 100:200] = 254
    square = normalize_masks(torch.from_numpy(letterbox_mask(mask, 128))[None])
    assert square.max() == pytest.approx(254 / 255)
    assert ((square > 0.1) & (square < 0.9)).any()
    assert (restored_mask(mask, 128) == (mask > 0)).mean() > 0.99


# ------------------------------------------------------------------------------------ normalisation


def test_normalised_images_equal_the_formula_within_one_ulp_and_are_channels_last():
    every_value = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    mean, std = np.array(CLIP_MEAN, np.float32), np.array(CLIP_STD, np.float32)
    expected = (every_value.astype(np.float32) / np.float32(255) - mean) / std
    photos = torch.from_numpy(every_value.copy())
    found = normalize_images(photos)
    assert found.shape == (1, 3, 16, 16)
    assert found.dtype == torch.float32
    np.testing.assert_array_max_ulp(found.permute(0, 2, 3, 1).numpy(), expected, maxulp=1)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(photos, every_value)


def test_normalised_masks_are_between_0_and_1():
    masks = torch.tensor([[[0, 51], [128, 255]]], dtype=torch.uint8)
    expected = torch.tensor([0, 51 / 255, 128 / 255, 1]).view(1, 1, 2, 2)
    assert torch.equal(normalize_masks(masks), expected)


# ----------------------------------------------------------------------------------------- decoding


def test_masks_are_one_channel_with_their_values_untouched():
    mask = np.array([[0, 253, 254, 255]], np.uint8)
    assert np.array_equal(decode_mask(encoded(mask), "x"), mask)


# ----------------------------------------------------------------------------------- way back, cost


def test_upsampling_follows_the_protocols_corners():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) / 7
    published = upsample_probability(ramp, 32, PROTOCOLS["published"])
    aligned = upsample_probability(ramp, 32, PROTOCOLS["aligned"])
    assert published.shape == aligned.shape == (1, 32, 32)
    centre = (torch.arange(32) + 0.5) / 4 - 0.5  # of each pixel, in cells
    assert torch.allclose(published[0, 16, 8:24], torch.arange(8, 24) / 31, atol=1e-2)
    assert torch.allclose(aligned[0, 16, 8:24], centre[8:24] / 7, atol=1e-2)


def ceiling(masks: list[np.ndarray], side: int, protocol: str) -> float:
    """The mIoU of perfect predictions."""
    found = [perfect_prediction(mask, side, PROTOCOLS[protocol]) for mask in masks]
    counts = [intersection_and_union(a, b > 0) for a, b in zip(found, masks, strict=True)]
    return Counts(*np.array(counts).T).scores()["mIoU"]


@pytest.mark.parametrize(
    ("share", "published", "aligned"),
    [
        (0.005, (0.74, 0.84), (0.95, 1)),
        (0.02, (0.85, 0.92), (0.97, 1)),
        (0.06, (0.90, 0.955), (0.98, 1)),
        (0.15, (0.93, 0.975), (0.99, 1)),
    ],
)
def test_ceiling_of_the_aligned_protocol_is_higher_for_objects_of_all_sizes(
    share, published, aligned, record_property
):
    masks = [blob(480, 640, share, seed) for seed in range(12)]
    for name, (low, high) in (("published", published), ("aligned", aligned)):
        found, what = ceiling(masks, 416, name), f"mIoU lost by perfection, {name}"
        record_property("difference", (f"blobs, {100 * share:g} %", what, 1 - found, 1 - low))
        assert low < found < high, name


def test_smaller_input_costs_the_published_protocol_most():
    masks = [blob(400, 500, 0.05, seed) for seed in range(6)]
    small = ceiling(masks, 96, "published")
    assert ceiling(masks, 96, "aligned") > small + 0.1
    assert ceiling(masks, 416, "published") > small + 0.1
