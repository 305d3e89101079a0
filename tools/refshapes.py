"""Draw RefShapes, a small data set for referring segmentation in REFER format, from a seed.

Images of 3-7 coloured shapes with sentences of four forms (`WORDINGS`). A sentence is kept only if
it is true of exactly one object, by a clear margin, and if a distractor shares the referent's
shape or colour, so that a model has to see *and* read. With --any-number the same images have a
ref more of several objects (`PLURALS`), and one of sentences that are clearly true of none. Image
n of a split depends on the seed, the split and n alone, never on how many images are asked for.

Coordinates are pixels as in COCO: x to the right, y down, pixel i covers [i, i + 1).
"""

import json
import pickle
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.refer import load_refs
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.machine import available_cores

EPILOG = """examples:
  python tools/refshapes.py -o datasets/refshapes
  python tools/refshapes.py -o /tmp/shapes --train 200 --val 50 --testA 0 --testB 0 --seed 7
  python tools/refshapes.py -o datasets/refshapes_any --any-number
  python tools/refshapes.py -o /tmp/rehearsal --like refcoco
then, as for COCO:
  python tools/data_process.py --data_root datasets/refshapes --output_dir datasets \\
      --dataset refshapes --split unc --generate_mask"""

Random = np.random.Generator
Counts = Mapping[str, int]  # images by split
Wanted = list[int | None] | None  # the sentences of each ref of an image, as far as it is asked

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
PLURALS = {  # the same of several objects
    "attribute": {
        "": "the {colour} {shape}s | {colour} {shape}s | {shape}s that are {colour}",
        "all": "all {shape}s | the {shape}s",
    },
    "position": {
        "left": "all {shape}s on the left | the {shape}s in the left half",
        "right": "all {shape}s on the right | the {shape}s in the right half",
        "above": "all {shape}s at the top | the {shape}s in the upper half",
        "below": "all {shape}s at the bottom | the {shape}s in the lower half",
    },
    "relation": {
        word: text.replace("{shape}", "{shape}s") for word, text in WORDINGS["relation"].items()
    },
}
FORMS = tuple(WORDINGS)
# How often a form is drawn where an object offers several: rarer ones more, to even them out.
FORM_WEIGHTS = {"attribute": 2.1, "position": 0.6, "size": 0.9, "relation": 5.0}
ANY_WEIGHTS = {"attribute": 3, "position": 1, "relation": 1}  # of several objects, and of none
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
POSITION_ZONE = 0.42  # "on the left" also has to lie in this part of the image; off it: opposite
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

    `word` is a direction, "big", "small", "all" (of a shape) or empty. `anchor` is the look of
    what a relation starts from.
    """

    form: str
    shape: str
    word: str = ""
    colour: str = ""
    anchor: str = ""
    is_plural: bool = False

    def sentences(self) -> list[str]:
        """Return all wordings of this meaning."""
        wordings = PLURALS if self.is_plural else WORDINGS
        return wordings[self.form][self.word].format(**self._asdict()).split(" | ")


Phrases = dict[tuple[int, ...], list[Phrase]]  # by the places of their referents in the scene


def _from_edge(scene: Scene, thing: Thing, word: str) -> float:
    """Return how far a thing is from the edge in a direction, as a share of the image's side."""
    dx, dy = DIRECTIONS[word]
    share = thing.x / scene.width if dx else thing.y / scene.height
    return 1 - share if dx + dy > 0 else share


def _slope(anchor: Thing, thing: Thing, word: str) -> float:
    """Return how far a thing is off a direction as seen from the anchor: |across| / along."""
    dx, dy = DIRECTIONS[word]
    along = dx * (thing.x - anchor.x) + dy * (thing.y - anchor.y)
    across = abs(dy * (thing.x - anchor.x)) + abs(dx * (thing.y - anchor.y))
    return across / along if along > 0 else float("inf")


def referents(scene: Scene, phrase: Phrase) -> list[Thing] | None:
    """Return the things that the phrase is clearly true of: one, several of a plural, or none.

    None where that is arguable or of the wrong number, and where the shape alone (for attributes:
    shape and colour alike) already gives the referents away.
    """
    rivals = [t for t in scene.things if t.shape == phrase.shape]
    # Clearly true of a thing whose value is at most `low`, clearly not from `high` on.
    if phrase.form == "attribute":
        looks = {phrase.shape, phrase.colour}
        rivals = [t for t in scene.things if phrase.word or looks & {t.shape, t.colour}]
        values = [{t.shape, phrase.colour and t.colour} != looks for t in rivals]
        low, high = 0, 1
    elif phrase.form == "relation":
        anchors = [t for t in scene.things if t.look == phrase.anchor]
        if len(anchors) != 1:
            return None
        rivals = [t for t in rivals if t not in anchors]
        values = [_slope(anchors[0], t, phrase.word) for t in rivals]
        low, high = INSIDE_CONE, OUTSIDE_CONE
    elif phrase.form == "size":
        values = [t.area if phrase.word == "small" else 1 / t.area for t in rivals]
        low, high = min(values), SIZE_MARGIN * min(values)
    else:
        values = [_from_edge(scene, t, phrase.word) for t in rivals]
        low, high = POSITION_ZONE, 1 - POSITION_ZONE
        if not phrase.is_plural:
            low, high = min(low, *values), min(values) + POSITION_MARGIN
    chosen = [t for t, value in zip(rivals, values, strict=True) if value <= low]
    is_arguable = any(low < value < high for value in values)
    is_given_away = len(chosen) == len(rivals)
    is_of_number = not chosen or phrase.is_plural == (len(chosen) > 1)
    return chosen if is_of_number and not is_arguable and not is_given_away else None


def phrases_about(scene: Scene, forms: Sequence[str], any_number: bool) -> Phrases:
    """Return the phrases that name looks of the scene and have referents in it, or clearly none."""
    things, names = scene.things, ("colour", "shape", "look")
    colours, shapes, looks = (sorted({getattr(t, name) for t in things}) for name in names)
    phrases: Phrases = defaultdict(list)
    for is_plural, wordings in enumerate([WORDINGS, PLURALS] if any_number else [WORDINGS]):
        for form, word in ((f, w) for f in forms for w in wordings.get(f, ())):
            named = colours if form == "attribute" and not word else [""]
            anchors = looks if form == "relation" else [""]
            for colour, shape, anchor in product(named, shapes, anchors):
                phrase = Phrase(form, shape, word, colour, anchor, bool(is_plural))
                if (meant := referents(scene, phrase)) is not None:
                    phrases[tuple(map(things.index, meant))].append(phrase)
    return phrases


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
    rng: Random, outline: np.ndarray, others: Sequence[np.ndarray], size: np.ndarray
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
    rng: Random, shapes: Sequence[str], size: np.ndarray, largest: float
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


def _draw_scene(rng: Random) -> Scene:
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


def _background(rng: Random, width: int, height: int) -> np.ndarray:
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


def _render(rng: Random, scene: Scene) -> np.ndarray:
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
    return [sentences and (n + 1) * sentences // refs - n * sentences // refs for n in own]


def _choose_sentences(
    rng: Random, phrases: Sequence[Phrase], number: int | None, form_weights: Mapping[str, float]
) -> list[str]:
    """Draw `number`, or 1-4, of the sentences that phrases of the same things can be put in."""
    in_form = Counter(phrase.form for phrase in phrases)
    weights: dict[str, float] = {}
    for phrase in phrases:
        sentences = phrase.sentences()
        weight = form_weights[phrase.form] / in_form[phrase.form] / len(sentences)
        weights |= dict.fromkeys(sentences, weight)
    if number is None:
        number = min(len(weights), rng.integers(1, MAX_SENTENCES, endpoint=True))
    chance = np.array(list(weights.values())) / sum(weights.values())
    chosen = rng.choice(len(weights), number, replace=False, p=chance)
    return [list(weights)[index] for index in chosen]


def _refer(rng: Random, phrases: Phrases, wanted: Wanted) -> dict[tuple[int, ...], list[str]]:
    """Choose single things by their place in the scene, and the sentences of each.

    They are those `wanted` (see `quota`), none if the scene has not so many; else up to `MAX_REFS`.
    """
    order = rng.permutation(sorted(key[0] for key in phrases if len(key) == 1)).tolist()
    if wanted is None:
        wanted = [None] * min(MAX_REFS, len(order))
    needed = max((number or 1 for number in wanted), default=0)
    able = [(i,) for i in order if sum(len(p.sentences()) for p in phrases[i,]) >= needed]
    if len(able) < len(wanted):
        return {}
    pairs = zip(sorted(able[: len(wanted)]), wanted, strict=True)
    return {key: _choose_sentences(rng, phrases[key], count, FORM_WEIGHTS) for key, count in pairs}


def _refer_to_any_number(rng: Random, phrases: Phrases) -> dict[tuple[int, ...], list[str]]:
    """Choose several things of a scene to refer to at once, and sentences true of none."""
    several = sorted(key for key in phrases if len(key) > 1)
    chosen = [several[rng.integers(len(several))]] if several else []
    chosen += [key for key in phrases if not key]
    return {key: _choose_sentences(rng, phrases[key], None, ANY_WEIGHTS) for key in chosen}


def _make_image(
    seed: int, split: str, number: int, wanted: Wanted = None, any_number: bool = False
) -> tuple[np.ndarray, dict, list[dict], list[dict]]:
    """Make image `number` (from 1) of a split: RGB pixels, image entry, annotations, refs."""
    split_number = list(SPLITS).index(split)
    rng = Random(np.random.PCG64([seed, split_number, number]))
    fewest = MIN_REFS if wanted is None else len(wanted)
    referred: dict[tuple[int, ...], list[str]] = {}
    while len(referred) < fewest:
        scene = _draw_scene(rng)
        phrases = phrases_about(scene, SPLITS[split], any_number)
        referred = _refer(rng, phrases, wanted)
    if any_number:  # from a source of their own: the image and its other refs stay as they are
        more = Random(np.random.PCG64([seed, split_number, number, 1]))
        referred |= _refer_to_any_number(more, phrases)
    image_id = split_number * IDS_PER_SPLIT + number
    image = {
        "id": image_id,
        "file_name": f"REFSHAPES_train2014_{image_id:012d}.jpg",
        "width": scene.width,
        "height": scene.height,
        "license": 1,
    }
    annotations = [_annotation(image_id, index, t) for index, t in enumerate(scene.things)]
    refs = [
        _ref(rank, split, image, [annotations[i] for i in places], sentences, any_number)
        for rank, (places, sentences) in enumerate(referred.items())
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


def _ref(
    rank: int, split: str, image: dict, meant: list[dict], texts: list[str], any_number: bool
) -> dict:
    """Make the ref at a rank in its image; with `any_number` the annotations are a list."""
    ref_id = image["id"] * 10 + rank
    ann_ids = [annotation["id"] for annotation in meant] or [-1]
    categories = [annotation["category_id"] for annotation in meant] or [-1]
    sentences = [
        {"sent_id": ref_id * 10 + i, "sent": text, "raw": text, "tokens": text.split()}
        for i, text in enumerate(texts)
    ]
    return {
        "ref_id": ref_id,
        "ann_id": ann_ids if any_number else ann_ids[0],
        "image_id": image["id"],
        "category_id": categories if any_number else categories[0],
        "split": split,
        "sentences": sentences,
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": image["file_name"].replace(".jpg", f"_{ann_ids[0]}.jpg"),
    }


def _marker(counts: Counts, seed: int, like: str | None, any_number: bool) -> str:
    """Return the text of generator.json, which says what a complete folder was made with."""
    images = {split: counts.get(split, 0) for split in SPLITS}
    made = {"generator": "refshapes", "version": VERSION, "seed": seed, "images": images}
    made |= {"like": like} if like else {"any_number": True} if any_number else {}
    return json.dumps(made, indent=2) + "\n"


def is_complete(
    out: Path, counts: Counts, seed: int, like: str | None = None, any_number: bool = False
) -> bool:
    """Return whether `out` holds everything that `generate` would write there."""
    marker, *others = (out / REFER / n for n in ("generator.json", "instances.json", "refs(unc).p"))
    num_images = len(list((out / IMAGES).glob("REFSHAPES_*.jpg")))
    is_whole = all(p.is_file() for p in (marker, *others)) and num_images == sum(counts.values())
    return is_whole and marker.read_text() == _marker(counts, seed, like, any_number)


def _write_image(
    out: Path, seed: int, job: tuple[str, int, list[int | None] | None, bool]
) -> tuple[dict, list[dict], list[dict]]:
    """Draw and write one image; `job` is what `_make_image` takes but for the seed."""
    pixels, image, annotations, refs = _make_image(seed, *job)
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    (out / IMAGES / image["file_name"]).write_bytes(jpeg.tobytes())
    return image, annotations, refs


def _write_files(out: Path, counts: Counts, seed: int, like: str | None, any_number: bool) -> None:
    """Write images, instances.json and refs(unc).p under `out`."""
    jobs = [
        (split, number, quota(number, *LIKE[like][split]) if like else None, any_number)
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


def generate(
    out: Path, counts: Counts, seed: int, like: str | None = None, any_number: bool = False
) -> None:
    """Write the data set in REFER format; files of an earlier run in the same place go.

    generator.json comes last, so that an interrupted run is not taken for a complete one.

    Args:
        out: gets `images/train2014/*.jpg` and `refshapes/{instances.json,refs(unc).p}`.
        counts: images by split.
        like: a key of `LIKE`, whose numbers of images these must be; refs and sentences follow.
        any_number: add refs of several objects and of none; `ann_id` and `category_id` are lists.
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
    _write_files(out, counts, seed, like, any_number)
    marker.write_text(_marker(counts, seed, like, any_number))


def print_counts(root: Path) -> None:
    """Print how much a generated folder holds."""
    refs = load_refs(root / REFER / "refs(unc).p")
    for split in SPLITS:
        of_split = [ref for ref in refs if ref["split"] == split]
        num_images = len({ref["image_id"] for ref in of_split})
        num_sentences = sum(len(ref["sentences"]) for ref in of_split)
        print(f"{split}: {num_images} images, {len(of_split)} refs, {num_sentences} sentences")


def main(argv: Sequence[str] | None = None) -> None:
    parser = text_parser("Generate RefShapes, a data set in REFER format, from a seed.", EPILOG)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    for split, count in DEFAULT_IMAGES.items():
        parser.add_argument(f"--{split}", type=int, metavar="N", help=f"images (default {count})")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument(
        "--like",
        choices=LIKE,
        help="as many images and refs a split as this data set, and sentences but for train",
    )
    text = "add refs of several objects, and of none, to those of one"
    kind.add_argument("--any-number", action="store_true", help=text)
    args = parser.parse_args(argv)
    given = {s: n for s in SPLITS if (n := getattr(args, s)) is not None}
    if args.like and given:
        parser.error("--like gives the numbers of images: leave out --train and the others")
    like = {split: images for split, (images, _, _) in LIKE.get(args.like, {}).items()}
    counts = like or DEFAULT_IMAGES | given
    recipe = counts, args.seed, args.like, args.any_number
    if is_complete(args.output, *recipe):
        print(f"{args.output} is complete and was made with these parameters: reused")
    else:
        generate(args.output, *recipe)
        print(f"wrote {args.output}")
    print_counts(args.output)


if __name__ == "__main__":
    run_entry_point(main)
