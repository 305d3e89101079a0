"""Scores on cases small enough to count by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from utils.metrics import (
    CRIS,
    GRES,
    LAVT,
    METRIC_NAMES,
    Convention,
    Counts,
    count_lines,
    intersection_and_union,
    iou,
    percent,
    training_scores,
)

Pairs = list[tuple[np.ndarray, np.ndarray]]  # of truth and prediction


def square(top: int, left: int, side: int = 4) -> np.ndarray:
    mask = np.zeros((10, 12), bool)
    mask[top : top + side, left : left + side] = True
    return mask


EMPTY = np.zeros((10, 12), bool)


CASES = {
    "identical": (square(2, 2), square(2, 2), (16, 16), 1.0),
    "disjoint": (square(0, 0), square(5, 5), (0, 32), 0.0),
    "half shifted": (square(0, 0), square(0, 2), (8, 24), 1 / 3),
    "inside": (square(0, 0, 2), square(0, 0, 4), (4, 16), 0.25),
    "empty prediction": (EMPTY, square(2, 2), (0, 16), 0.0),
    "empty truth": (square(2, 2), EMPTY, (0, 16), 0.0),
    "both empty": (EMPTY, EMPTY, (0, 0), 0.0),
    "both full": (~EMPTY, ~EMPTY, (120, 120), 1.0),
}


@pytest.mark.parametrize(
    ("pred_mask", "mask", "counts", "expected"), CASES.values(), ids=CASES.keys()
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


def scores_of(
    intersections: object, unions: object, convention: Convention = CRIS
) -> dict[str, float]:
    return Counts(np.array(intersections), np.array(unions), convention=convention).scores()


def test_miou_averages_sentences_and_oiou_adds_up_pixels():
    # A small object found whole and a big one half found: 1 and 300/600.
    scores = scores_of([10, 300], [10, 600])
    assert (scores["mIoU"], scores["oIoU"]) == pytest.approx((0.75, 310 / 610))
    assert tuple(scores) == METRIC_NAMES


def test_precision_is_the_share_strictly_above_the_threshold():
    scores = scores_of([50, 51, 60, 75, 90, 100], [100] * 6)
    shares = {"Pr@0.5": 5, "Pr@0.6": 3, "Pr@0.7": 3, "Pr@0.8": 2, "Pr@0.9": 1}
    assert {name: round(6 * scores[name]) for name in shares} == shares
    # The released 1e-6 in the denominator keeps a half just below it even for large unions.
    for union in (2, 100, 5_000_000):
        assert scores_of([union // 2], [union])["Pr@0.5"] == 0
        assert scores_of([union // 2 + 1], [union])["Pr@0.5"] == 1


def test_lavt_counts_from_the_threshold_on_and_divides_by_the_union_alone():
    scores = scores_of([5, 9, 0], [10, 10, 0], LAVT)
    assert (scores["mIoU"], scores["oIoU"]) == pytest.approx((1.4 / 3, 14 / 20), abs=1e-12)
    assert [scores[f"Pr@{x}"] for x in (0.5, 0.6, 0.9)] == pytest.approx([2 / 3, 1 / 3, 1 / 3])


def test_all_scores_are_numbers_between_0_and_1():
    rng = np.random.default_rng(0)
    unions = rng.integers(0, 1000, 200)
    scores = scores_of((unions * rng.random(200)).astype(int), unions)
    assert all(type(value) is float and 0 <= value <= 1 for value in scores.values())
    assert all(scores[f"Pr@{a}"] >= scores[f"Pr@{b}"] for a, b in [(0.5, 0.6), (0.8, 0.9)])


def test_a_split_of_empty_masks_scores_0_and_no_sentences_is_an_error():
    assert set(scores_of([0, 0], [0, 0]).values()) == {0.0}
    with pytest.raises(ValueError, match="no sentences"):
        scores_of([], [])


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


# ---------------------------------------------------------------------------- any number of targets


def plain_gres(pairs: Pairs, pixels: int) -> dict[str, float | None]:
    """Score as ReLA's evaluation does, one sentence at a time."""
    ious, inter, union, told, found, with_target = [], 0, 0, [], [], []
    for truth, pred in pairs:
        p = pred if pred.sum() >= pixels else np.zeros_like(pred)
        inter += (p & truth).sum()
        union += (p | truth).sum()
        if not truth.any():
            told.append(not p.any())
            ious.append(1.0 if told[-1] else 0.0)
        else:
            found.append(bool(p.any()))
            ious.append((p & truth).sum() / (p | truth).sum())
            with_target.append(ious[-1])
    shares = {"gIoU": ious, "N-acc": told, "T-acc": found}
    shares |= {f"Pr@{at}": [value >= at for value in with_target] for at in (0.7, 0.8, 0.9)}
    scores = {name: np.mean(values) if values else None for name, values in shares.items()}
    return scores | {"cIoU": inter / union if union else None}


def line_of(truth: np.ndarray, pred: np.ndarray, pixels: int) -> dict:
    """Make a sentence's record as an evaluation does."""
    counts, area = intersection_and_union(pred, truth), int(truth.sum())
    if pred.sum() < pixels:
        counts = 0, area
    names = ("intersection", "union", "target_area", "num_targets")
    return dict(zip(names, (*counts, area, int(area > 0)), strict=True))


def any_scores(pairs: Pairs, pixels: int) -> dict[str, float | None]:
    return count_lines(line_of(*pair, pixels) for pair in pairs).scores()


SMALL = square(0, 0, 5)  # 25 pixels: none by one rule, something by the other


@pytest.mark.parametrize(
    ("truth", "pred", "expected"),  # of the sentence: IoU, pixels of ΣI and ΣU, N-acc, T-acc
    [
        (EMPTY, EMPTY, (1, 0, 0, 1, None)),
        (EMPTY, square(0, 0, 8), (0, 0, 64, 0, None)),
        (EMPTY, SMALL, {1: (0, 0, 25, 0, None), 50: (1, 0, 0, 1, None)}),
        (square(2, 2), EMPTY, (0, 0, 16, None, 0)),
        (square(0, 0, 8), SMALL, {1: (25 / 64, 25, 64, None, 1), 50: (0, 0, 64, None, 0)}),
        (square(0, 0, 8), square(2, 0, 8), (48 / 80, 48, 80, None, 1)),
        (square(0, 0, 1), square(2, 2, 8), (0, 0, 65, None, 1)),
    ],
)
@pytest.mark.parametrize("pixels", [1, 50])
def test_each_row_of_the_table_adds_what_it_says(truth, pred, expected, pixels):
    value, inter, union, n_acc, t_acc = expected[pixels] if isinstance(expected, dict) else expected
    # Beside it: nothing told of nothing, which adds no pixel, and one of 100 pixels found whole.
    full = np.zeros_like(EMPTY)
    full[:, :10] = True
    beside = [(EMPTY, EMPTY), (full, full)]
    scores = any_scores([*beside, (truth, pred)], pixels)
    assert scores["gIoU"] == pytest.approx((2 + value) / 3)
    assert scores["cIoU"] == pytest.approx((100 + inter) / (100 + union))
    assert scores["N-acc"] == (1 if n_acc is None else (1 + n_acc) / 2)
    assert scores["T-acc"] == (1 if t_acc is None else (1 + t_acc) / 2)


@pytest.mark.parametrize("pixels", [1, 50])
@pytest.mark.parametrize("seed", range(10))
def test_scores_of_random_predictions_equal_a_plain_loop(seed, pixels):
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(100):
        empty = rng.random(2) < 0.3
        truth, pred = rng.random((2, 15, 20)) < rng.choice([0.02, 0.16, 0.2, 0.9], (2, 1, 1))
        kind = rng.integers(4)
        pred = truth.copy() if kind == 0 else pred
        pairs.append((truth & ~empty[0], pred & ~empty[1]))
    pairs.append((np.zeros_like(truth), pred))
    expected = plain_gres(pairs, pixels)
    assert any_scores(pairs, pixels) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["N-acc"] < 1
    assert 0 < expected["T-acc"] < 1


@pytest.mark.parametrize("seed", range(5))
def test_where_every_sentence_has_a_target_giou_is_miou_and_ciou_is_oiou(seed):
    rng = np.random.default_rng(seed)
    masks = rng.random((200, 2, 15, 20)) < rng.random((200, 2, 1, 1))
    masks[:, :, 0, 0] = True  # none is empty
    lines = [line_of(truth, pred, 1) for truth, pred in masks]
    scores = count_lines(lines).scores()
    assert tuple(scores) == METRIC_NAMES
    general = replace(count_lines(lines), convention=GRES).scores()
    assert general["gIoU"] == pytest.approx(scores["mIoU"], abs=1e-6)
    assert general["cIoU"] == pytest.approx(scores["oIoU"], abs=1e-6)
    assert (general["N-acc"], general["T-acc"]) == (None, 1)


def test_precision_counts_from_the_threshold_on_where_some_have_no_target():
    union = {"target_area": 100, "num_targets": 2}
    lines = [{"intersection": i, "union": 100} | union for i in (69, 70, 80, 89, 90)]
    nothing = {"intersection": 0, "union": 0, "target_area": 0, "num_targets": 0}
    scores = count_lines([*lines, nothing]).scores()
    assert [scores[f"Pr@{x}"] for x in (0.7, 0.8, 0.9)] == [0.8, 0.6, 0.2]
    assert "Pr@0.5" not in scores


def test_a_metric_without_a_sentence_of_its_kind_has_no_value():
    scores = any_scores([(EMPTY, EMPTY)], 50)
    assert scores == {"gIoU": 1, "N-acc": 1} | dict.fromkeys(
        ("cIoU", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9")
    )
    assert percent(scores["T-acc"]) == "–"
