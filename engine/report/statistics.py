"""What a report says about scored sentences in numbers: no files and no pages.

All scores lie in [0, 1]. N is the number of sentences, M that of models scored on them.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from engine.report.categories import category_name
from utils.metrics import GRES, Counts, brief_names

HISTOGRAM_BINS = 20
CURVE_STEPS = 50  # of the Pr@X curve, from X = 0 to 1

# Bins by their lower ends. Size is the share of the photo that the object covers, length in words.
SIZES = {
    0: "under 1 %", 0.01: "1–2 %", 0.02: "2–5 %", 0.05: "5–10 %", 0.1: "10–20 %",
    0.2: "20–40 %", 0.4: "from 40 %",
}  # fmt: skip
LENGTHS = {0: "1", 2: "2", 3: "3", 4: "4", 5: "5–6", 7: "7–9", 10: "10–14", 15: "from 15"}

# Which words make a sentence one of a kind. English, and by the words alone: "orange" is a colour
# even where the fruit is meant. A sentence may be of several kinds.
KIND_PATTERNS = {
    "position": "left|right|leftmost|rightmost|top|topmost|bottom|upper|lower|middle|center|centre|"
    "central|front|back|background|foreground|corner|edge|side|far|furthest|farthest|highest|"
    "lowest|nearest|closest|first|second|third|fourth|last|end",
    "colour": "red|green|blue|yellow|white|black|brown|gray|grey|orange|pink|purple|violet|silver|"
    "gold|golden|tan|beige|blond|blonde|maroon|navy|teal|turquoise|cyan|magenta",
    "size": "(?:small|tall|short|long|thick)(?:er|est)?|(?:large|wide|little)(?:r|st)?|"
    "big|bigger|biggest|thin|thinner|thinnest|fat|fatter|fattest|tiny|tinier|tiniest|huge|skinny",
    "relation": "next to|in front of|on top of|left of|right of|(?:close|closer|closest) to|near|"
    "nearest to|behind|beside|besides|between|under|underneath|beneath|above|below|over|inside|"
    "against|around|with|without|wearing|holding|riding|carrying|touching|facing",
}
OTHER_KIND = "other"
NO_TARGET, SEVERAL = "no target", "several targets"  # of a sentence of any kind
_KINDS = {kind: re.compile(rf"\b(?:{words})\b") for kind, words in KIND_PATTERNS.items()}


class Grouping(NamedTuple):
    """A way to divide the sentences; `members` are the groups (places in `labels`) of each.

    Every label has at least one sentence. `is_scale`: the labels have an order.
    """

    key: str
    title: str
    labels: list[str]
    members: list[tuple[int, ...]]
    is_scale: bool = False


class Interval(NamedTuple):
    """A difference of two scores, and where it lies when other images are drawn."""

    difference: float
    low: float
    high: float


def histogram(ious: np.ndarray) -> list[int]:
    """Sentences by IoU in `HISTOGRAM_BINS` bins of one width; the last one includes 1."""
    return np.histogram(ious, HISTOGRAM_BINS, (0, 1))[0].tolist()


def precision_curve(counts: Counts) -> list[float]:
    """Share of sentences with an IoU strictly above X, for X = 0, 1 / `CURVE_STEPS` ... 1.

    Where some have no target: of those that have one, from X on, as their Pr@X.
    """
    steps, ious = [step / CURVE_STEPS for step in range(CURVE_STEPS + 1)], counts.ious
    if counts.convention is not GRES:
        return [float((ious > step).mean()) for step in steps]
    ious = ious[counts.has_target]
    return [float((ious >= step).sum() / max(len(ious), 1)) for step in steps]


def sentence_kinds(sentence: str) -> list[str]:
    """Return the kinds of `KIND_PATTERNS` whose words the sentence has, else `OTHER_KIND`."""
    text = " ".join(sentence.lower().split())
    return [kind for kind, pattern in _KINDS.items() if pattern.search(text)] or [OTHER_KIND]


def object_share(line: Mapping) -> float:
    """Share of the photo that the object covers."""
    return line["target_area"] / (line["height"] * line["width"])


def group_sentences(lines: Sequence[Mapping], dataset: str) -> list[Grouping]:
    """Divide records of a `.jsonl` by kind, category (the commonest first), size and length.

    Args:
        dataset: gives the categories their names.
    """
    categories = Counter(line["category"] for line in lines if line["category"] is not None)
    known = {
        "kind": ("kind of sentence", [*_KINDS, OTHER_KIND, NO_TARGET, SEVERAL]),
        "category": ("category", [category_name(dataset, c) for c, _ in categories.most_common()]),
        "size": ("object size, % of the photo", SIZES.values()),
        "length": ("words in the sentence", LENGTHS.values()),
    }
    labels, found = [_labels(line, dataset) for line in lines], []
    for key, (title, order) in known.items():
        given = [own[key] for own in labels]
        used = set().union(*given)
        if kept := [label for label in order if label in used]:
            members = [tuple(kept.index(label) for label in own) for own in given]
            found.append(Grouping(key, title, kept, members, key in ("size", "length")))
    return found


def _labels(line: Mapping, dataset: str) -> dict[str, list[str]]:
    """Return the groups that a record is in, by the keys of the groupings."""
    number, category = line.get("num_targets", 1), line["category"]
    targets = [] if number == 1 else [SEVERAL if number else NO_TARGET]
    return {
        "kind": sentence_kinds(line["sentence"]) + targets,
        "category": [] if category is None else [category_name(dataset, category)],
        "size": [_bin(SIZES, object_share(line))] if number else [],
        "length": [_bin(LENGTHS, len(line["sentence"].split()))],
    }


def _bin(bins: Mapping[float, str], value: float) -> str:
    return list(bins.values())[np.digitize(value, list(bins)) - 1]


def group_scores(grouping: Grouping, models: Sequence[Counts]) -> list[dict]:
    """Score each label: {"sentences": its number, "models": brief metrics by each model}."""
    rows = []
    for place in range(len(grouping.labels)):
        chosen = np.array([place in places for places in grouping.members])
        scores = [model.of(chosen).scores() for model in models]
        kept = [{name: score[name] for name in brief_names(score)} for score in scores]
        rows.append({"sentences": int(chosen.sum()), "models": kept})
    return rows


def outcomes(first: Counts, second: Counts, margin: float) -> np.ndarray:
    """(N,) int: 1 where the second's IoU is higher by more than `margin`, -1 lower, 0 tied."""
    difference = second.ious - first.ious
    return (difference > margin).astype(int) - (difference < -margin).astype(int)


def paired_bootstrap(
    first: Counts,
    second: Counts,
    clusters: Sequence,
    draws: int = 10_000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, Interval]:
    """Return how the second model's scores differ from the first's, with percentile intervals.

    Sentences of one photo are not independent of each other: they share their objects, and both
    models see the same picture. So whole photos are drawn, with replacement, and both models are
    scored on the same draw.

    Args:
        clusters: (N,) what tells the photo of each sentence.
        level: share of the draws within an interval.
    Returns:
        By metric that has a value, second minus first. A draw without one, as of N-acc if all its
        sentences have a target, does not count for it.
    """
    photos, owner = np.unique(np.asarray(clusters), return_inverse=True)
    generator = np.random.default_rng(seed)
    rows, shares = np.arange(len(owner)), np.full(len(photos), 1 / len(photos))
    drawn = []
    for _ in range(draws):
        chosen = np.repeat(rows, generator.multinomial(len(photos), shares)[owner])
        drawn.append(_differences(first, second, chosen))
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {
        name: Interval(value, *map(float, np.nanquantile([d[name] for d in drawn], ends)))
        for name, value in _differences(first, second, rows).items()
        if not np.isnan(value)
    }


def _differences(first: Counts, second: Counts, chosen: np.ndarray) -> dict[str, float]:
    """Return by metric the second model's score less the first's, on the sentences chosen."""
    a, b = (model.of(chosen).scores() for model in (first, second))
    return {name: np.nan if a[name] is None else b[name] - a[name] for name in a}
