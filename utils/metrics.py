"""Scores of masks. All of them lie in [0, 1]; multiply by 100 only to print.

mIoU is the mean over sentences of each one's IoU (CRIS prints it as "IoU"), oIoU the sum of
intersections over the sum of unions of the split (LAVT and most later work), Pr@X the share of
sentences whose IoU is strictly above X.

A split with sentences that are true of nothing is scored as ReLA does (`GRES`). gIoU is then the
mean IoU and cIoU the ratio of the sums. N-acc is the share of sentences without a target that are
answered with nothing, T-acc that of sentences with a target that are answered with something, and
Pr@X that of sentences with a target whose IoU is X or more.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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


def describe_rule(no_target_pixels: int) -> str:
    """Say which predictions count as none; this belongs wherever N-acc stands."""
    return "no pixel" if no_target_pixels == 1 else f"under {no_target_pixels} pixels"


class Convention(NamedTuple):
    """Define scores of some counts: the sentences' IoUs, (N,), and the metrics by name.

    A metric without a value, such as N-acc where all sentences have a target, is not-a-number.
    """

    ious: Callable[["Counts"], np.ndarray]
    metrics: dict[str, Callable[["Counts"], float]]


def _share(hits: np.ndarray) -> float:
    return hits.mean() if hits.size else np.nan


def _overall_iou(counts: "Counts") -> float:
    union = counts.unions.sum()
    return counts.intersections.sum() / union if union else np.nan


def _exact_ious(counts: "Counts") -> np.ndarray:
    return counts.intersections / np.maximum(counts.unions, 1)  # 0 of 0 pixels are 0


# A metric that is added to CRIS is in the test's tables, files and report, in the log, and in
# comparisons, wherever every sentence has a target; one of GRES wherever some have none.
CRIS = Convention(
    lambda c: iou(c.intersections, c.unions),
    {"mIoU": lambda c: c.ious.mean()}
    | {"oIoU": lambda c: iou(c.intersections.sum(), c.unions.sum())}
    | {f"Pr@{at}": lambda c, at=at: (c.ious > at).mean() for at in PRECISION_AT},
)
LAVT = Convention(
    _exact_ious,
    {"mIoU": lambda c: c.ious.mean(), "oIoU": _overall_iou}
    | {f"Pr@{at}": lambda c, at=at: (c.ious >= at).mean() for at in PRECISION_AT},
)
GRES = Convention(
    lambda c: np.where(c.has_target, _exact_ious(c), c.areas == 0),
    {
        "gIoU": lambda c: c.ious.mean(),
        "cIoU": _overall_iou,
        "N-acc": lambda c: _share(c.areas[~c.has_target] == 0),
        "T-acc": lambda c: _share(c.areas[c.has_target] > 0),
    }
    | {f"Pr@{at}": lambda c, at=at: _share(c.ious[c.has_target] >= at) for at in PRECISION_AT[2:]},
)
METRIC_NAMES = tuple(CRIS.metrics)


@dataclass(frozen=True)
class Counts:
    """Hold pixel counts of N sentences, arrays of (N,), and how they are scored.

    intersections, unions: of prediction and truth.
    areas: of the predictions; where one counts as none, it is 0 and the prediction empty.
    has_target: (N,) bool. It and areas are for `GRES` alone.
    """

    intersections: np.ndarray
    unions: np.ndarray
    areas: np.ndarray | None = None
    has_target: np.ndarray | None = None
    convention: Convention = CRIS

    @cached_property
    def ious(self) -> np.ndarray:
        """(N,) float64."""
        return self.convention.ious(self)

    def of(self, chosen: np.ndarray) -> "Counts":
        """Return the counts of some of the sentences."""
        arrays = self.intersections, self.unions, self.areas, self.has_target
        return Counts(*(None if a is None else a[chosen] for a in arrays), self.convention)

    def scores(self) -> dict[str, float | None]:
        """Return all metrics of the convention, None for one without a value."""
        if not len(self.unions):
            raise ValueError("no sentences to score")
        values = {name: float(metric(self)) for name, metric in self.convention.metrics.items()}
        return {name: None if np.isnan(value) else value for name, value in values.items()}


def count_lines(lines: Iterable[Mapping], prefix: str = "") -> Counts:
    """Collect the counts of sentences' records, to be scored as `GRES` where one has no target.

    Args:
        lines: with intersection, union and target_area, and num_targets unless that is 1.
        prefix: of the names of intersection and union.
    """
    names = (f"{prefix}intersection", f"{prefix}union", "target_area")
    rows = [(*(line[name] for name in names), line.get("num_targets", 1)) for line in lines]
    inter, union, truth, number = np.array(rows, np.float64).reshape(-1, 4).T
    has_target = number > 0
    convention = CRIS if has_target.all() else GRES
    return Counts(inter, union, union - truth + inter, has_target, convention)


def main_metric(scores: Mapping[str, object]) -> str:
    """Return the name of the metric that chooses checkpoints, of those in some scores."""
    return "gIoU" if "gIoU" in scores else "mIoU"


def brief_names(scores: Mapping[str, object]) -> list[str]:
    """Return the metrics that a line has room for, of those in some scores, the main one first."""
    known = (*GRES.metrics, *METRIC_NAMES)
    return [n for n in known if n in scores and (not n.startswith("Pr@") or n == "Pr@0.5")]


def percent(score: float | None) -> str:
    """Print a score in per cent, and a dash where there is none."""
    return "–" if score is None else f"{100 * score:.2f}"


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
