"""Draw RefShapes, a small data set for referring segmentation in REFER format, from a seed.

Images of 3-7 coloured shapes with sentences of four forms (`WORDINGS`). A sentence is kept only if
it is true of exactly one object, by a clear margin, and if a distractor shares the referent's
shape or colour, so that a model has to see *and* read. Image n of a split depends on the seed,
the split and n alone, never on how many images are asked for.

Coordinates are pixels as in COCO: x to the right, y down, pixel i covers [i, i + 1).
"""

import argparse
import json
import pickle
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.refer import load_refs
from utils.errors import UserError, run_entry_point
from utils.machine import available_cores

EPILOG = """examples:
  python tools/refshapes.py -o datasets/refshapes
  python tools/refshapes.py -o /tmp/shapes --train 200 --val 50 --testA 0 --testB 0 --seed 7
  python tools/refshapes.py -o /tmp/rehearsal --like refcoco
then, as for COCO:
  python tools/data_process.py --data_root datasets/refshapes --output_dir datasets \\
      --dataset refshapes --split unc --generate_mask"""

VERSION = 5  # raise it whenever the same parameters give other files
# How many corners, and the share of the radius at which every second one lies.
CORNERS = {"circle": (40, 1), "square": (4, 1), "triangle": (3, 1), "star": (10, 0.45)}
SHAPES = tuple(CORNERS)
COLOURS = {  # RGB; the backgrounds are muted middle tones, so that each of these stands out
    "red": (205, 35, 40),
    "green": (35, 150, 55),
    "blue": (40, 75, 215),
    "yellow": (235, 210, 45),
    "purple": (150, 40, 165),
    "white": (242, 242, 242),
}
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
WORDINGS = {  # form -> word -> the sentences that mean it
    "attribute": {"": "the {colour} {shape} | {colour} {shape} | {shape} that is {colour}"},
    "position": {
        "left": "leftmost {shape} | {shape} on the far left | the {shape} on the left",
        "right": "rightmost {shape} | {shape} on the far right | the {shape} on the right",
        "above": "the top {shape} | {shape} at the top | topmost {shape}",
        "below": "the bottom {shape} | {shape} at the bottom | lowest {shape}",
    },
    "size": {
        "big": "biggest {shape} | the largest {shape} | the biggest {shape}",
        "small": "smallest {shape} | the smallest {shape} | the tiniest {shape}",
    },
    "relation": {  # the anchor with its colour
        "left": "{shape} left of the {anchor} | {shape} to the left of the {anchor}",
        "right": "{shape} right of the {anchor} | {shape} to the right of the {anchor}",
        "above": "{shape} above the {anchor} | the {shape} above the {anchor}",
        "below": "{shape} under the {anchor} | {shape} below the {anchor}",
    },
}
FORMS = tuple(WORDINGS)
# How often a form is drawn where an object offers several: rarer ones more, to even them out.
FORM_WEIGHTS = {"attribute": 2.1, "position": 0.6, "size": 0.9, "relation": 5.0}
SPLITS = {"train": FORMS, "val": FORMS, "testA": FORMS[:1], "testB": FORMS[1:]}
LIKE = {  # images, refs, and sentences where they are known, by split
    "refcoco": {
        "train": (16994, 42404, None),
        "val": (1500, 3811, 10834),
        "testA": (750, 1975, 5657),
        "testB": (750, 1810, 5095),
    }
}
DEFAULT_IMAGES = {"train": 6000, "val": 200, "testA": 100, "testB": 100}
IMAGES, REFER = Path("images/train2014"), Path("refshapes")  # folders within the output
IDS_PER_SPLIT = 1_000_000  # image ids of split s start at s times this
MAX_REFS, MIN_REFS = 4, 2  # an image; two or more, so that sentences can be swapped between refs
MAX_SENTENCES = 4  # a ref

IMAGE_SIDE = (160, 224)
AREA_SHARE = (0.028, 0.14)  # of the image, log-uniform; the upper end gives way in a crowd
THINGS = {3: 0.28, 4: 0.28, 5: 0.22, 6: 0.13, 7: 0.09}  # how many, and how often
MAX_TILT = 15  # degrees: a square must not turn into a diamond
LAYOUTS = 5000  # tries before a crowd is given up: seven stars may never fit
GAP = 3  # pixels between two objects' boxes and to the border
SUPERSAMPLING = 4
WORTH_A_POOL = 500  # images: from so many on, starting processes pays

# Margins within which a sentence would be arguable; such sentences are never used.
POSITION_MARGIN = 0.08  # of the image's side, to the next object of the shape
POSITION_ZONE = 0.42  # "on the left" also has to lie in this part of the image
SIZE_MARGIN = 1.35  # ratio of areas
INSIDE_CONE, OUTSIDE_CONE = 0.6, 2.0  # |across| / along: clearly under; clearly not under


@dataclass(frozen=True, eq=False)
class Thing:
    """Holds an object: its look, its centroid, its area in square pixels, its (N, 2) corners."""

    shape: str
    colour: str
    x: float
    y: float
    area: float
    outline: np.ndarray

    @property
    def look(self) -> str:
        """Return colour and shape, as in "red star"."""
        return f"{self.colour} {self.shape}"


class Scene(NamedTuple):
    """Holds the content of an image; sides in pixels."""

    width: int
    height: int
    things: tuple[Thing, ...]


class Phrase(NamedTuple):
    """Holds the meaning of a sentence.

    `word` is a direction, "big", "small" or, for attributes, empty. `anchor` is the look of what
    a relation starts from.
    """

    form: str
    shape: str
    word: str = ""
    colour: str = ""
    anchor: str = ""

    def sentences(self) -> list[str]:
        """Return all wordings of this meaning."""
        return WORDINGS[self.form][self.word].format(**self._asdict()).split(" | ")


def clearly_outermost(scene: Scene, rivals: Sequence[Thing], word: str) -> Thing | None:
    """Return the thing furthest in a direction, if in the outer zone and well ahead."""
    dx, dy = DIRECTIONS[word]

    def reach(thing: Thing) -> float:
        share = thing.x / scene.width if dx else thing.y / scene.height
        return share if dx + dy > 0 else 1 - share

    first, second, *_ = sorted(rivals, key=reach, reverse=True)
    is_ahead = reach(first) - reach(second) >= POSITION_MARGIN
    return first if is_ahead and reach(first) >= 1 - POSITION_ZONE else None


def clearly_extreme_in_size(rivals: Sequence[Thing], word: str) -> Thing | None:
    """Return the biggest or smallest thing, if the next differs by `SIZE_MARGIN`."""
    sign = 1 if word == "big" else -1
    first, second, *_ = sorted(rivals, key=lambda thing: -sign * thing.area)
    return first if (first.area / second.area) ** sign >= SIZE_MARGIN else None


def clearly_beside(anchor: Thing, rivals: Sequence[Thing], word: str) -> Thing | None:
    """Return the only thing in a narrow cone from the anchor, if the wide one has no other."""
    dx, dy = DIRECTIONS[word]

    def slope(thing: Thing) -> float:
        along = dx * (thing.x - anchor.x) + dy * (thing.y - anchor.y)
        across = abs(dy * (thing.x - anchor.x)) + abs(dx * (thing.y - anchor.y))
        return across / along if along > 0 else float("inf")

    first, second, *_ = sorted(rivals, key=slope)
    return first if slope(first) <= INSIDE_CONE and slope(second) >= OUTSIDE_CONE else None


def referent(scene: Scene, phrase: Phrase) -> Thing | None:
    """Return the one thing that the phrase is clearly true of.

    None where it is true of nothing or several things, where it is arguable, and where the
    shape alone (for attributes: shape and colour alike) already gives the referent away.
    """
    rivals = [t for t in scene.things if t.shape == phrase.shape]
    if phrase.form == "attribute":
        named = [t for t in rivals if t.colour == phrase.colour]
        akin = [t for t in scene.things if t.shape == phrase.shape or t.colour == phrase.colour]
        return named[0] if len(named) == 1 and len(akin) > 1 else None
    anchors = [t for t in scene.things if t.look == phrase.anchor]
    rivals = [t for t in rivals if t not in anchors]
    if len(rivals) < 2:
        return None
    if phrase.form == "position":
        return clearly_outermost(scene, rivals, phrase.word)
    if phrase.form == "size":
        return clearly_extreme_in_size(rivals, phrase.word)
    return clearly_beside(anchors[0], rivals, phrase.word) if len(anchors) == 1 else None


def phrases_about(scene: Scene, forms: Sequence[str]) -> Iterator[Phrase]:
    """Yield each phrase of these forms that names only shapes and colours of the scene."""
    looks = sorted({(t.colour, t.shape) for t in scene.things})
    shapes = sorted({t.shape for t in scene.things})
    for form in forms:
        for word in WORDINGS[form]:
            if form == "attribute":
                yield from (Phrase(form, shape, colour=colour) for colour, shape in looks)
            else:
                anchors = [" ".join(look) for look in looks] if form == "relation" else [""]
                yield from (Phrase(form, s, word, anchor=a) for s in shapes for a in anchors)


@cache
def _unit_outline(shape: str) -> np.ndarray:
    """Return (N, 2) corners of a shape of area 1 with its centroid at the origin."""
    count, inner = CORNERS[shape]
    turn = np.pi / 4 if shape == "square" else 0
    angles = 2 * np.pi * np.arange(count) / count - np.pi / 2 + turn
    radii = np.where(np.arange(count) % 2, inner, 1)
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    return points / np.sqrt(cv2.contourArea(points.astype(np.float32)))


def _place(
    rng: np.random.Generator, outline: np.ndarray, others: Sequence[np.ndarray], size: np.ndarray
) -> np.ndarray | None:
    """Find a centre where the outline's box is inside the image and off all others', or None."""
    low, high = outline.min(0), outline.max(0)
    first, last = GAP - low, size - GAP - high
    if (first >= last).any():
        return None
    centres = rng.uniform(first, last, (60, 2))[:, None]
    starts = np.array([other.min(0) for other in others]).reshape(-1, 2)
    ends = np.array([other.max(0) for other in others]).reshape(-1, 2)
    apart = (centres + low > ends + GAP) | (centres + high < starts - GAP)
    free = np.flatnonzero(apart.any(axis=2).all(axis=1))
    return centres[free[0], 0] if len(free) else None


def _lay_out(
    rng: np.random.Generator, shapes: Sequence[str], size: np.ndarray, largest: float
) -> list[np.ndarray] | None:
    """Draw areas, tilts and places for these shapes: their outlines, or None if they do not fit."""
    shares = np.exp(rng.uniform(np.log(AREA_SHARE[0]), np.log(largest), len(shapes)))
    areas = shares * size.prod()
    outlines: dict[int, np.ndarray] = {}
    for index in np.argsort(-areas):  # the big ones first, while there is room
        tilt = np.radians(rng.uniform(-MAX_TILT, MAX_TILT))
        turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        outline = _unit_outline(shapes[index]) @ turn.T * np.sqrt(areas[index])
        centre = _place(rng, outline, list(outlines.values()), size)
        if centre is None:
            return None
        outlines[index] = np.round(outline + centre, 2)
    return [outlines[index] for index in range(len(shapes))]


def _draw_scene(rng: np.random.Generator) -> Scene:
    """Draw the content of one image."""
    width, height = size = rng.integers(*IMAGE_SIDE, 2, endpoint=True)
    count = int(rng.choice(list(THINGS), p=list(THINGS.values())))
    # Few shapes and colours, so that distractors are the rule.
    shapes = rng.choice(SHAPES, 2 if count < 5 else rng.integers(2, 4), replace=False)
    shapes = [str(shape) for shape in rng.choice(shapes, count)]
    palette = rng.choice(list(COLOURS), rng.integers(2, 5), replace=False)
    largest = AREA_SHARE[1]
    for _ in range(LAYOUTS):
        outlines = _lay_out(rng, shapes, size, largest)
        if outlines is not None:
            break
        largest = max(largest * 0.9, 1.1 * AREA_SHARE[0])
    else:
        return _draw_scene(rng)
    things = []
    for shape, outline in zip(shapes, outlines, strict=True):
        moments = cv2.moments(outline.astype(np.float32))
        x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
        things.append(Thing(shape, str(rng.choice(palette)), x, y, moments["m00"], outline))
    return Scene(int(width), int(height), tuple(things))


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Draw (H, W, 3) float32 of about 60-190: a tint, gradient, clouds, stripes, checker."""
    tint = (rng.uniform(90, 160) + rng.uniform(-16, 16, 3)).astype(np.float32)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    period = rng.uniform(12, 40)
    match rng.integers(5):
        case 0:
            pattern = np.zeros_like(x)
        case 1:
            pattern = 2 * (u - u.min()) / np.ptp(u) - 1
        case 2:
            coarse = rng.standard_normal((height // 16, width // 16), dtype=np.float32)
            pattern = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * 0.7
        case 3:
            pattern = np.sign(np.sin(2 * np.pi * u / period)) * 0.4
        case _:
            pattern = np.sign(np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period)) * 0.4
    grain = rng.standard_normal((height, width), dtype=np.float32) * 2
    return tint + pattern[..., None] * rng.uniform(8, 26, 3).astype(np.float32) + grain[..., None]


def _paint(image: np.ndarray, outline: np.ndarray, rgb: np.ndarray) -> None:
    """Fill an outline, anti-aliased, in place."""
    x0, y0 = np.floor(outline.min(0)).astype(int)
    x1, y1 = np.ceil(outline.max(0)).astype(int)
    fine = np.zeros(((y1 - y0) * SUPERSAMPLING, (x1 - x0) * SUPERSAMPLING), np.uint8)
    # OpenCV counts from pixel centres, the outline from pixel corners; 4 bits of sub-pixels.
    corners = ((outline - (x0, y0)) * SUPERSAMPLING - 0.5) * 16
    cv2.fillPoly(fine, [np.round(corners).astype(np.int32)], 255, shift=4)
    alpha = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
    alpha = (alpha.astype(np.float32) / 255)[..., None]
    image[y0:y1, x0:x1] += alpha * (rgb - image[y0:y1, x0:x1])


def _render(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """Paint a scene as (H, W, 3) uint8 RGB."""
    image = _background(rng, scene.width, scene.height)
    for thing in scene.things:
        brightness = rng.uniform(0.85, 1.1)
        rgb = np.array(COLOURS[thing.colour]) * brightness + rng.uniform(-10, 10, 3)
        _paint(image, thing.outline, rgb.astype(np.float32))
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def quota(number: int, images: int, refs: int, sentences: int | None) -> list[int | None]:
    """Share out a split's refs and sentences over its images.

    Args:
        number: which of the images, from 1.
        images, refs, sentences: how many the split has; None: as they come.
    Returns:
        The number of sentences of each ref of the image.
    """
    own = range((number - 1) * refs // images, number * refs // images)
    if sentences is None:
        return [None] * len(own)
    return [(n + 1) * sentences // refs - n * sentences // refs for n in own]


def _choose_sentences(
    rng: np.random.Generator, phrases: Sequence[Phrase], number: int | None
) -> list[str]:
    """Draw `number`, or 1-4, of the sentences that the phrases about one thing can be put in."""
    in_form = Counter(phrase.form for phrase in phrases)
    weights: dict[str, float] = {}
    for phrase in phrases:
        sentences = phrase.sentences()
        weight = FORM_WEIGHTS[phrase.form] / in_form[phrase.form] / len(sentences)
        weights |= dict.fromkeys(sentences, weight)
    if number is None:
        number = min(len(weights), rng.integers(1, MAX_SENTENCES, endpoint=True))
    chance = np.array(list(weights.values())) / sum(weights.values())
    chosen = rng.choice(len(weights), number, replace=False, p=chance)
    return [list(weights)[index] for index in chosen]


def _refer(
    rng: np.random.Generator, scene: Scene, forms: Sequence[str], wanted: list[int | None] | None
) -> dict[int, list[str]]:
    """Choose the things of a scene to refer to, by their place in it, and the sentences.

    Args:
        wanted: the sentences of each ref (see `quota`); None: as many as there are, up to
            `MAX_REFS` refs.
    Returns:
        Nothing where the scene does not have what is wanted.
    """
    phrases: dict[int, list[Phrase]] = defaultdict(list)
    for phrase in phrases_about(scene, forms):
        if thing := referent(scene, phrase):
            phrases[scene.things.index(thing)].append(phrase)
    order = rng.permutation(sorted(phrases)).tolist()
    if wanted is None:
        wanted = [None] * min(MAX_REFS, len(order))
    needed = max((number or 1 for number in wanted), default=0)
    able = [i for i in order if sum(len(p.sentences()) for p in phrases[i]) >= needed]
    if len(able) < len(wanted):
        return {}
    pairs = zip(sorted(able[: len(wanted)]), wanted, strict=True)
    return {index: _choose_sentences(rng, phrases[index], number) for index, number in pairs}


def _make_image(
    seed: int, split: str, number: int, wanted: list[int | None] | None = None
) -> tuple[np.ndarray, dict, list[dict], list[dict]]:
    """Make image `number` (from 1) of a split: RGB pixels, image entry, annotations, refs."""
    split_number = list(SPLITS).index(split)
    rng = np.random.Generator(np.random.PCG64([seed, split_number, number]))
    fewest = MIN_REFS if wanted is None else len(wanted)
    referred: dict[int, list[str]] = {}
    while len(referred) < fewest:
        scene = _draw_scene(rng)
        referred = _refer(rng, scene, SPLITS[split], wanted)
    image_id = split_number * IDS_PER_SPLIT + number
    stem = f"REFSHAPES_train2014_{image_id:012d}"
    image = {
        "id": image_id,
        "file_name": f"{stem}.jpg",
        "width": scene.width,
        "height": scene.height,
        "license": 1,
    }
    annotations = [_annotation(image_id, index, t) for index, t in enumerate(scene.things)]
    refs = [
        _ref(image_id * 10 + rank, split, stem, annotations[index], sentences)
        for rank, (index, sentences) in enumerate(referred.items())
    ]
    return _render(rng, scene), image, annotations, refs


def draw_example(seed: int) -> tuple[np.ndarray, list[str]]:
    """Draw a picture that is in no split, (H, W, 3) uint8 RGB, and sentences true of it."""
    pixels, _, _, refs = _make_image(seed, "val", IDS_PER_SPLIT)
    return pixels, [sentence["sent"] for ref in refs for sentence in ref["sentences"]]


def _annotation(image_id: int, index: int, thing: Thing) -> dict:
    x0, y0 = thing.outline.min(0).tolist()
    x1, y1 = thing.outline.max(0).tolist()
    return {
        "id": image_id * 10 + index,
        "image_id": image_id,
        "category_id": SHAPES.index(thing.shape) + 1,
        "colour": thing.colour,
        "segmentation": [thing.outline.ravel().tolist()],
        "area": round(thing.area, 2),
        "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
        "iscrowd": 0,
    }


def _ref(ref_id: int, split: str, stem: str, annotation: dict, texts: Sequence[str]) -> dict:
    sentences = [
        {"sent_id": ref_id * 10 + i, "sent": text, "raw": text, "tokens": text.split()}
        for i, text in enumerate(texts)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": annotation["id"],
        "image_id": annotation["image_id"],
        "category_id": annotation["category_id"],
        "split": split,
        "sentences": sentences,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": f"{stem}_{annotation['id']}.jpg",
    }


def _marker(counts: Mapping[str, int], seed: int, like: str | None) -> str:
    """Return the text of generator.json, which says what a complete folder was made with."""
    images = {split: counts.get(split, 0) for split in SPLITS}
    made = {"generator": "refshapes", "version": VERSION, "seed": seed, "images": images}
    return json.dumps(made if like is None else made | {"like": like}, indent=2) + "\n"


def is_complete(out: Path, counts: Mapping[str, int], seed: int, like: str | None = None) -> bool:
    """Return whether `out` holds everything that `generate` would write there."""
    marker, *others = (out / REFER / n for n in ("generator.json", "instances.json", "refs(unc).p"))
    if not all(path.is_file() for path in (marker, *others)):
        return False
    num_images = len(list((out / IMAGES).glob("REFSHAPES_*.jpg")))
    return marker.read_text() == _marker(counts, seed, like) and num_images == sum(counts.values())


def _write_image(
    out: Path, seed: int, job: tuple[str, int, list[int | None] | None]
) -> tuple[dict, list[dict], list[dict]]:
    """Draw and write one image; `job` is what `_make_image` takes but for the seed."""
    pixels, image, annotations, refs = _make_image(seed, *job)
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    (out / IMAGES / image["file_name"]).write_bytes(jpeg.tobytes())
    return image, annotations, refs


def _write_files(out: Path, counts: Mapping[str, int], seed: int, like: str | None) -> None:
    """Write images, instances.json and refs(unc).p under `out`."""
    jobs = [
        (split, number, quota(number, *LIKE[like][split]) if like else None)
        for split in SPLITS
        for number in range(1, counts.get(split, 0) + 1)
    ]
    draw = partial(_write_image, out, seed)
    with ExitStack() as stack:
        if len(jobs) < WORTH_A_POOL:
            made = map(draw, jobs)
        else:
            # Spawned, since a fork would take over threads of OpenCV's that are not there.
            pool = stack.enter_context(get_context("spawn").Pool(available_cores()))
            made = pool.imap(draw, jobs, chunksize=20)
        bar = tqdm(made, total=len(jobs), desc="RefShapes", unit="image", disable=None)
        images, annotations, refs = zip(*bar, strict=True)
    instances = {
        "info": {"description": "RefShapes", "version": str(VERSION), "seed": seed},
        "licenses": [{"id": 1, "name": "MIT", "url": "https://opensource.org/license/mit"}],
        "images": images,
        "annotations": list(chain.from_iterable(annotations)),
        "categories": [
            {"id": i, "name": shape, "supercategory": "shape"} for i, shape in enumerate(SHAPES, 1)
        ],
    }
    (out / REFER / "instances.json").write_text(json.dumps(instances))
    # A pickle tells equal strings from the same one, and what came from another process has its
    # own: through JSON first, so that the bytes are the same either way.
    plain = json.loads(json.dumps(list(chain.from_iterable(refs))))
    (out / REFER / "refs(unc).p").write_bytes(pickle.dumps(plain, protocol=2))


def generate(out: Path, counts: Mapping[str, int], seed: int, like: str | None = None) -> None:
    """Write the data set in REFER format; files of an earlier run in the same place go.

    generator.json comes last, so that an interrupted run is not taken for a complete one.

    Args:
        out: gets `images/train2014/*.jpg` and `refshapes/{instances.json,refs(unc).p}`.
        counts: images by split.
        like: a key of `LIKE`, whose numbers of images these must be; refs and sentences follow.
    Raises:
        UserError: a count or seed out of range, no image at all; `out` is a file.
    """
    for split, count in counts.items():
        if not 0 <= count < IDS_PER_SPLIT:
            raise UserError(f"--{split} {count}: give a number from 0 to {IDS_PER_SPLIT - 1}")
    if sum(counts.values()) == 0:
        raise UserError("no images asked for: give --train, --val, --testA or --testB a number")
    if seed < 0:
        raise UserError(f"--seed {seed}: give a number that is not negative")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder")
    marker = out / REFER / "generator.json"
    marker.unlink(missing_ok=True)
    for old in (out / IMAGES).glob("REFSHAPES_*.jpg"):
        old.unlink()
    for folder in (IMAGES, REFER):
        (out / folder).mkdir(parents=True, exist_ok=True)
    _write_files(out, counts, seed, like)
    marker.write_text(_marker(counts, seed, like))


def blind_baselines(root: Path, split: str) -> dict[str, float]:
    """Score three ways of choosing a ground-truth object without reading the sentence.

    Returns:
        mIoU over a split's sentences in [0, 1] of choosing the largest object, the one nearest the
        centre of the image, and any object at random (the exact expectation, not a draw).
    """
    instances = json.loads((root / REFER / "instances.json").read_text())
    images = {image["id"]: image | {"objects": []} for image in instances["images"]}
    for annotation in instances["annotations"]:
        images[annotation["image_id"]]["objects"].append(annotation)
    scores = defaultdict(list)
    for ref in load_refs(root / REFER / "refs(unc).p"):
        if ref["split"] != split:
            continue
        image = images[ref["image_id"]]
        objects, height, width = image["objects"], image["height"], image["width"]
        masks = [coco_mask.frPyObjects(o["segmentation"], height, width)[0] for o in objects]
        truth = [o["id"] for o in objects].index(ref["ann_id"])
        ious = coco_mask.iou(masks, [masks[truth]], [0])[:, 0]
        boxes = np.array([o["bbox"] for o in objects])
        offsets = boxes[:, :2] + boxes[:, 2:] / 2 - (width / 2, height / 2)
        chosen = {
            "largest": ious[np.argmax(coco_mask.area(masks))],
            "central": ious[np.argmin(np.hypot(*offsets.T))],
            "random": ious.mean(),
        }
        for name, score in chosen.items():
            scores[name] += [score] * len(ref["sentences"])
    return {name: float(np.mean(values)) for name, values in scores.items()}


def print_counts(root: Path) -> None:
    """Print how much a generated folder holds."""
    refs = load_refs(root / REFER / "refs(unc).p")
    for split in SPLITS:
        of_split = [ref for ref in refs if ref["split"] == split]
        num_images = len({ref["image_id"] for ref in of_split})
        num_sentences = sum(len(ref["sentences"]) for ref in of_split)
        print(f"{split}: {num_images} images, {len(of_split)} refs, {num_sentences} sentences")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Generate RefShapes, a small data set in REFER format, from a seed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    for split, count in DEFAULT_IMAGES.items():
        parser.add_argument(f"--{split}", type=int, metavar="N", help=f"images (default {count})")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument(
        "--like",
        choices=LIKE,
        help="as many images and refs a split as this data set, and sentences but for train",
    )
    args = parser.parse_args(argv)
    given = {split: getattr(args, split) for split in SPLITS}
    if args.like is None:
        counts = {s: DEFAULT_IMAGES[s] if n is None else n for s, n in given.items()}
    elif any(count is not None for count in given.values()):
        parser.error("--like gives the numbers of images: leave out --train and the others")
    else:
        counts = {split: images for split, (images, _, _) in LIKE[args.like].items()}
    if is_complete(args.output, counts, args.seed, args.like):
        print(f"{args.output} is complete and was made with these parameters: reused")
    else:
        generate(args.output, counts, args.seed, args.like)
        print(f"wrote {args.output}")
    print_counts(args.output)


if __name__ == "__main__":
    run_entry_point(main)
