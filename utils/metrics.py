"""Scores of masks. All of them lie in [0, 1]; multiply by 100 only to print.

mIoU is the mean over sentences of each one's IoU (CRIS prints it as "IoU"), oIoU the sum of
intersections over the sum of unions of the split (LAVT and most later work), Pr@X the share of
sentences whose IoU is strictly above X.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
METRIC_NAMES = ("mIoU", "oIoU", *(f"Pr@{x}" for x in PRECISION_AT))
EPSILON = 1e-6


def intersection_and_union(pred_mask: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
    """Count the common and the joint pixels of two boolean (H, W) arrays."""
    intersection = int(np.count_nonzero(pred_mask & mask))
    union = int(np.count_nonzero(pred_mask)) + int(np.count_nonzero(mask)) - intersection
    return intersection, union


def iou(intersection: float, union: float) -> float:
    """Divide intersection by union as the release does: two empty masks score 0."""
    return intersection / (union + EPSILON)


def summarize(intersections: Sequence[int], unions: Sequence[int]) -> dict[str, float]:
    """Return the scores of a split from its sentences' pixel counts; keys are `METRIC_NAMES`."""
    if not len(intersections):
        raise ValueError("no sentences to score")
    inter, union = np.asarray(intersections, np.float64), np.asarray(unions, np.float64)
    ious = inter / (union + EPSILON)
    scores = {"mIoU": float(ious.mean()), "oIoU": float(inter.sum() / (union.sum() + EPSILON))}
    return scores | {f"Pr@{x}": float((ious > x).mean()) for x in PRECISION_AT}


@torch.no_grad()
def training_scores(logits: Tensor, target: Tensor) -> Tensor:
    """Compute what training prints, on the S/4 map and without a host synchronisation.

    As in the release: predicted where the probability is at least 0.35, foreground where the soft
    target is above 0.

    Args:
        logits, target: (B, 1, H, W); target in [0, 1].
    Returns:
        (2,) float32 on the logits' device: mean IoU and share of samples above 0.5.
    """
    pred = (logits.float().sigmoid() >= 0.35).flatten(1)
    truth = (target > 0).flatten(1)
    inter = (pred & truth).sum(1)
    union = (pred | truth).sum(1)
    ious = inter / (union + EPSILON)
    return torch.stack([ious.mean(), (ious > 0.5).float().mean()])
