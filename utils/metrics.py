"""Scores of masks. All of them lie in [0, 1]; multiply by 100 only to print.

mIoU is the mean over sentences of each one's IoU (CRIS prints it as "IoU"), oIoU the sum of
intersections over the sum of unions of the split (LAVT and most later work), Pr@X the share of
sentences whose IoU is strictly above X.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

PRECISION_AT = (0.5, 0.6, 0.7, 0.8, 0.9)
EPSILON = 1e-6


def intersection_and_union(pred_mask: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
    """Count the common and the joint pixels of two boolean (H, W) arrays."""
    intersection = int(np.count_nonzero(pred_mask & mask))
    union = int(np.count_nonzero(pred_mask)) + int(np.count_nonzero(mask)) - intersection
    return intersection, union


def iou(intersection: float | np.ndarray, union: float | np.ndarray) -> float | np.ndarray:
    """Divide intersections by unions as the release does: two empty masks score 0."""
    return intersection / (union + EPSILON)


def _precision(at: float, inter: np.ndarray, union: np.ndarray, ious: np.ndarray) -> float:
    return (ious > at).mean()


# A metric is computed from the intersections, unions and IoUs of sentences, float64 arrays of (N,).
# One that is added here is in the test's tables, files and report, in the log, and in comparisons.
METRICS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], float]] = {
    "mIoU": lambda inter, union, ious: ious.mean(),
    "oIoU": lambda inter, union, ious: iou(inter.sum(), union.sum()),
} | {f"Pr@{at}": partial(_precision, at) for at in PRECISION_AT}
METRIC_NAMES = tuple(METRICS)
BRIEF_NAMES = tuple(n for n in METRICS if not n.startswith("Pr@") or n == "Pr@0.5")  # in a line


def summarize(intersections: Sequence[int], unions: Sequence[int]) -> dict[str, float]:
    """Return the scores of a split from its sentences' pixel counts, by `METRIC_NAMES`."""
    if not len(intersections):
        raise ValueError("no sentences to score")
    inter, union = np.asarray(intersections, np.float64), np.asarray(unions, np.float64)
    ious = iou(inter, union)
    return {name: float(metric(inter, union, ious)) for name, metric in METRICS.items()}


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
