"""Scores on cases small enough to count by hand."""

import numpy as np
import pytest
import torch

from utils.metrics import (
    METRIC_NAMES,
    PRECISION_AT,
    intersection_and_union,
    iou,
    summarize,
    training_scores,
)


def square(top: int, left: int, side: int = 4) -> np.ndarray:
    mask = np.zeros((10, 12), bool)
    mask[top : top + side, left : left + side] = True
    return mask


EMPTY = np.zeros((10, 12), bool)


@pytest.mark.parametrize(
    ("pred_mask", "mask", "counts", "expected"),
    [
        (square(2, 2), square(2, 2), (16, 16), 1.0),
        (square(0, 0), square(5, 5), (0, 32), 0.0),
        (square(0, 0), square(0, 2), (8, 24), 1 / 3),
        (square(0, 0, 2), square(0, 0, 4), (4, 16), 0.25),
        (EMPTY, square(2, 2), (0, 16), 0.0),
        (square(2, 2), EMPTY, (0, 16), 0.0),
        (EMPTY, EMPTY, (0, 0), 0.0),
        (~EMPTY, ~EMPTY, (120, 120), 1.0),
    ],
    ids=[
        "identical",
        "disjoint",
        "half shifted",
        "inside",
        "empty prediction",
        "empty truth",
        "both empty",
        "both full",
    ],
)
def test_counts_and_iou_of_cases_counted_by_hand(pred_mask, mask, counts, expected):
    assert intersection_and_union(pred_mask, mask) == counts
    assert iou(*counts) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_iou_is_symmetric_and_within_0_and_1(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.random((2, 20, 30)) < rng.random((2, 1, 1))
    counts = intersection_and_union(a, b)
    assert counts == intersection_and_union(b, a)
    assert counts == ((a & b).sum(), (a | b).sum())
    assert 0 <= iou(*counts) <= 1


def test_miou_averages_sentences_and_oiou_adds_up_pixels():
    # A small object found whole and a big one half found: 1 and 300/600.
    scores = summarize([10, 300], [10, 600])
    assert scores["mIoU"] == pytest.approx((1 + 0.5) / 2)
    assert scores["oIoU"] == pytest.approx(310 / 610)
    assert tuple(scores) == METRIC_NAMES


def test_precision_is_the_share_strictly_above_the_threshold():
    unions = [100] * 6
    scores = summarize([50, 51, 60, 75, 90, 100], unions)
    shares = {0.5: 5, 0.6: 3, 0.7: 3, 0.8: 2, 0.9: 1}
    assert {x: round(6 * scores[f"Pr@{x}"]) for x in PRECISION_AT} == shares


def test_exact_half_does_not_count_as_above_half():
    # The released 1e-6 in the denominator keeps it just below even for unions of billions.
    for union in (2, 100, 5_000_000):
        assert summarize([union // 2], [union])["Pr@0.5"] == 0
        assert summarize([union // 2 + 1], [union])["Pr@0.5"] == 1


def test_all_scores_are_numbers_between_0_and_1():
    rng = np.random.default_rng(0)
    unions = rng.integers(0, 1000, 200)
    intersections = (unions * rng.random(200)).astype(int)
    scores = summarize(intersections.tolist(), unions.tolist())
    assert all(type(value) is float and 0 <= value <= 1 for value in scores.values())
    assert all(scores[f"Pr@{a}"] >= scores[f"Pr@{b}"] for a, b in [(0.5, 0.6), (0.8, 0.9)])


def test_a_split_of_empty_masks_scores_0_and_no_sentences_is_an_error():
    assert set(summarize([0, 0], [0, 0]).values()) == {0.0}
    with pytest.raises(ValueError, match="no sentences"):
        summarize([], [])


def test_training_scores_equal_a_plain_loop():
    draw = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 1, 9, 7, generator=draw)
    target = torch.rand(6, 1, 9, 7, generator=draw) * (torch.rand(6, 1, 9, 7, generator=draw) > 0.6)
    ious = []
    for sample, truth in zip(logits.numpy(), target.numpy(), strict=True):
        pred = 1 / (1 + np.exp(-sample)) >= 0.35
        inter, union = intersection_and_union(pred, truth > 0)
        ious.append(iou(inter, union))
    found = training_scores(logits, target)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([np.mean(ious), np.mean(np.array(ious) > 0.5)], rel=1e-6)


def test_training_scores_take_any_soft_target_for_foreground_and_need_no_gradient():
    logits = torch.tensor([0.0, 20.0, -20.0, -20.0]).view(1, 1, 2, 2)
    target = torch.tensor([1e-3, 1.0, 0.0, 1e-3]).view(1, 1, 2, 2)
    assert training_scores(logits, target)[0].item() == pytest.approx(2 / 3)
    assert training_scores(logits, torch.zeros(1, 1, 2, 2)).tolist() == [0, 0]
    assert training_scores(logits.requires_grad_(), target).requires_grad is False
