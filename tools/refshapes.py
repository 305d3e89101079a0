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
from dataclasses import dataclass
from functools import cache, partial
from itertools import chain, product
from multiprocessing import get_context
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.machine import available_cores

EPILOG = """examples:
  python tools/refshapes.py -o datasets/refshapes
  python tools/refshapes.py -o /tmp/shapes --train 200 --val 50 --testA 0 --testB 0 --seed 7
then tools/data_process.py --dataset refshapes --split unc, as for COCO"""

Random = np.random.Generator
Counts = Mapping[str, int]  # images by split

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
_RELATIONS = {  # the anchor with its colour
    ("relation", "left"): "{shape} left of the {anchor}, {shape} to the left of the {anchor}",
    ("relation", "right"): "{shape} right of the {anchor}, {shape} to the right of the {anchor}",
    ("relation", "above"): "{shape} above the {anchor}, the {shape} above the {anchor}",
    ("relation", "below"): "{shape} under the {anchor}, {shape} below the {anchor}",
}
WORDINGS = {  # (form, word) -> the sentences that mean it
    ("attribute", ""): "the {colour} {shape}, {colour} {shape}, {shape} that is {colour}",
    ("position", "left"): "leftmost {shape}, {shape} on the far left, the {shape} on the left",
    ("position", "right"): "rightmost {shape}, {shape} on the far right, the {shape} on the right",
    ("position", "above"): "the top {shape}, {shape} at the top, topmost {shape}",
    ("position", "below"): "the bottom {shape}, {shape} at the bottom, lowest {shape}",
    ("size", "big"): "biggest {shape}, the largest {shape}, the biggest {shape}",
    ("size", "small"): "smallest {shape}, the smallest {shape}, the tiniest {shape}",
    **_RELATIONS,
}
PLURALS = {  # the same of several objects
    ("attribute", ""): "the {colour} {shape}s, {colour} {shape}s, {shape}s that are {colour}",
    ("attribute", "all"): "all {shape}s, the {shape}s",
    ("position", "left"): "all {shape}s on the left, the {shape}s in the left half",
    ("position", "right"): "all {shape}s on the right, the {shape}s in the right half",
    ("position", "above"): "all {shape}s at the top, the {shape}s in the upper half",
    ("position", "below"): "all {shape}s at the bottom, the {shape}s in the lower half",
    **{key: text.replace("{shape}", "{shape}s") for key, text in _RELATIONS.items()},
}
FORMS = "attribute", "position", "size", "relation"
# How often a form is drawn where an object offers several: rarer ones more, to even them out.
FORM_WEIGHTS = {"attribute": 2.1, "position": 0.6, "size": 0.9, "relation": 5.0}
ANY_WEIGHTS = {"attribute": 3, "position": 1, "relation": 1}  # of several objects, and of none
SPLITS = {"train": FORMS, "val": FORMS, "testA": FORMS[:1], "testB": FORMS[1:]}
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
        return wordings[self.form, self.word].format(**self._asdict()).split(", ")


Phrases = dict[tuple[int, ...], list[Phrase]]  # by the places of their referents in the scene


def _from_edge(scene: Scene, thing: Thing, word: str) -> float:
    """Return how far a thing is from the edge in a direction, as a share of the image's side."""
    dx, dy = DIRECTIONS[word]
    share = thing.x / scene.width if dx else thing.y / scene.height
    return 1 - share if dx + dy > 0 else share


def _slope(anchor: Thing, thing: Thing, word: str) -> float:
    """Return how far a thing is off a direction as seen from the anchor: |across| / along."""
    (dx, dy), x, y = DIRECTIONS[word], thing.x - anchor.x, thing.y - anchor.y
    along, across = dx * x + dy * y, abs(dy * x) + abs(dx * y)
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
        for form, word in (key for key in wordings if key[0] in forms):
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


def _lay_out(
    rng: Random, shapes: Sequence[str], size: np.ndarray, largest: float
) -> list[np.ndarray] | None:
    """Draw areas, tilts and places for these shapes: their outlines, or None if they do not fit."""
    areas = np.exp(rng.uniform(np.log(AREA_SHARE[0]), np.log(largest), len(shapes))) * size.prod()
    outlines: dict[int, np.ndarray] = {}
    for index in np.argsort(-areas):  # the big ones first, while there is room
        tilt = np.radians(rng.uniform(-MAX_TILT, MAX_TILT))
        turn = np.array([[np.cos(tilt), -np.sin(tilt)], [np.sin(tilt), np.cos(tilt)]])
        outline = _unit_outline(shapes[index]) @ turn.T * np.sqrt(areas[index])
        low, high = outline.min(0), outline.max(0)
        first, last = GAP - low, size - GAP - high
        if (first >= last).any():
            return None
        centres = rng.uniform(first, last, (60, 2))[:, None]
        boxes = np.array([(o.min(0), o.max(0)) for o in outlines.values()]).reshape(-1, 2, 2)
        apart = (centres + low > boxes[:, 1] + GAP) | (centres + high < boxes[:, 0] - GAP)
        free = centres[apart.any(axis=2).all(axis=1), 0]
        if len(free) == 0:
            return None
        outlines[index] = np.round(outline + free[0], 2)
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
        area = moments["m00"]
        x, y = moments["m10"] / area, moments["m01"] / area
        things.append(Thing(shape, str(rng.choice(palette)), x, y, area, outline))
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


def _render(rng: Random, scene: Scene) -> np.ndarray:
    """Paint a scene as (H, W, 3) uint8 RGB, anti-aliased."""
    image = _background(rng, scene.width, scene.height)
    for thing in scene.things:
        brightness = rng.uniform(0.85, 1.1)
        rgb = np.array(COLOURS[thing.colour]) * brightness + rng.uniform(-10, 10, 3)
        x0, y0 = np.floor(thing.outline.min(0)).astype(int)
        x1, y1 = np.ceil(thing.outline.max(0)).astype(int)
        fine = np.zeros(((y1 - y0) * SUPERSAMPLING, (x1 - x0) * SUPERSAMPLING), np.uint8)
        # OpenCV counts from pixel centres, the outline from pixel corners; 4 bits of sub-pixels.
        corners = ((thing.outline - (x0, y0)) * SUPERSAMPLING - 0.5) * 16
        cv2.fillPoly(fine, [np.round(corners).astype(np.int32)], 255, shift=4)
        alpha = cv2.resize(fine, (x1 - x0, y1 - y0), interpolation=cv2.INTER_AREA)
        alpha = (alpha.astype(np.float32) / 255)[..., None]
        image[y0:y1, x0:x1] += alpha * (rgb.astype(np.float32) - image[y0:y1, x0:x1])
    return np.clip(np.round(image), 0, 255).astype(np.uint8)


def _choose_sentences(
    rng: Random, phrases: Sequence[Phrase], form_weights: Mapping[str, float]
) -> list[str]:
    """Draw 1-4 of the sentences that phrases of the same things can be put in."""
    in_form = Counter(phrase.form for phrase in phrases)
    weights: dict[str, float] = {}
    for phrase in phrases:
        sentences = phrase.sentences()
        weight = form_weights[phrase.form] / in_form[phrase.form] / len(sentences)
        weights |= dict.fromkeys(sentences, weight)
    number = min(len(weights), rng.integers(1, MAX_SENTENCES, endpoint=True))
    chance = np.array(list(weights.values())) / sum(weights.values())
    return rng.choice(list(weights), number, replace=False, p=chance).tolist()


def _make_image(
    seed: int, any_number: bool, split: str, number: int
) -> tuple[np.ndarray, dict, list[dict], list[dict]]:
    """Make image `number` (from 1) of a split: RGB pixels, image entry, annotations, refs."""
    source = [seed, list(SPLITS).index(split), number]
    rng = Random(np.random.PCG64(source))
    referred: dict[tuple[int, ...], list[str]] = {}  # sentences by the places of what they mean
    while len(referred) < MIN_REFS:
        scene = _draw_scene(rng)
        phrases = phrases_about(scene, SPLITS[split], any_number)
        places = rng.permutation(sorted(key[0] for key in phrases if len(key) == 1)).tolist()
        single = [(place,) for place in sorted(places[:MAX_REFS])]
        referred = {key: _choose_sentences(rng, phrases[key], FORM_WEIGHTS) for key in single}
    if any_number:  # from a source of their own: the image and its other refs stay as they are
        more = Random(np.random.PCG64([*source, 1]))
        several = sorted(key for key in phrases if len(key) > 1)
        chosen = [several[more.integers(len(several))]] if several else []
        chosen += [key for key in phrases if not key]
        referred |= {key: _choose_sentences(more, phrases[key], ANY_WEIGHTS) for key in chosen}
    image_id = source[1] * IDS_PER_SPLIT + number
    image = {"id": image_id, "file_name": f"REFSHAPES_train2014_{image_id:012d}.jpg"}
    image |= {"width": scene.width, "height": scene.height, "license": 1}
    annotations = [_annotation(image_id, index, t) for index, t in enumerate(scene.things)]
    refs = [
        _ref(rank, split, image, [annotations[i] for i in places], sentences, any_number)
        for rank, (places, sentences) in enumerate(referred.items())
    ]
    return _render(rng, scene), image, annotations, refs


def draw_example(seed: int) -> tuple[np.ndarray, list[str]]:
    """Draw a picture that is in no split, (H, W, 3) uint8 RGB, and sentences true of it."""
    pixels, _, _, refs = _make_image(seed, False, "val", IDS_PER_SPLIT)
    return pixels, [sentence["sent"] for ref in refs for sentence in ref["sentences"]]


def _annotation(image_id: int, index: int, thing: Thing) -> dict:
    (x0, y0), (x1, y1) = thing.outline.min(0).tolist(), thing.outline.max(0).tolist()
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
    ids = [(annotation["id"], annotation["category_id"]) for annotation in meant] or [(-1, -1)]
    ann_ids, categories = map(list, zip(*ids, strict=True))
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


def _marker(counts: Counts, seed: int, any_number: bool) -> str:
    """Return the text of generator.json, which says what a complete folder was made with."""
    images = {split: counts.get(split, 0) for split in SPLITS}
    made = {"generator": "refshapes", "version": VERSION, "seed": seed, "images": images}
    made |= {"any_number": True} if any_number else {}
    return json.dumps(made, indent=2) + "\n"


def is_complete(out: Path, counts: Counts, seed: int, any_number: bool = False) -> bool:
    """Return whether `out` holds everything that `generate` would write there."""
    marker, *others = (out / REFER / n for n in ("generator.json", "instances.json", "refs(unc).p"))
    num_images = len(list((out / IMAGES).glob("REFSHAPES_*.jpg")))
    is_whole = all(p.is_file() for p in (marker, *others)) and num_images == sum(counts.values())
    return is_whole and marker.read_text() == _marker(counts, seed, any_number)


def generate(out: Path, counts: Counts, seed: int, any_number: bool = False) -> None:
    """Write the data set in REFER format; files of an earlier run in the same place go.

    Args:
        out: gets `images/train2014/*.jpg` and `refshapes/{instances.json,refs(unc).p}`.
        counts: images by split.
        any_number: add refs of several objects and of none; `ann_id` and `category_id` are lists.
    Raises:
        UserError: a count or the seed is out of range, or there is no image to draw.
    """
    numbers = counts.values()
    if min(*numbers, seed) < 0 or max(numbers) >= IDS_PER_SPLIT or not any(numbers):
        raise UserError(
            f"images {dict(counts)}, --seed {seed}: give numbers of images from 0 to "
            f"{IDS_PER_SPLIT - 1}, not all of them 0, and a seed that is not negative"
        )
    marker = out / REFER / "generator.json"
    marker.unlink(missing_ok=True)  # written last: an interrupted run is not a complete one
    for old in (out / IMAGES).glob("REFSHAPES_*.jpg"):
        old.unlink()
    for folder in (IMAGES, REFER):
        (out / folder).mkdir(parents=True, exist_ok=True)
    jobs = [(s, number) for s in SPLITS for number in range(1, counts.get(s, 0) + 1)]
    # Spawned, since a fork would take over threads of OpenCV's that are not there.
    pool = get_context("spawn").Pool if len(jobs) >= WORTH_A_POOL else ThreadPool
    with pool(available_cores()) as workers:
        made = workers.imap(partial(_write_image, out, seed, any_number), jobs, chunksize=20)
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
    marker.write_text(_marker(counts, seed, any_number))


def _write_image(
    out: Path, seed: int, any_number: bool, job: tuple[str, int]
) -> tuple[dict, list[dict], list[dict]]:
    """Draw and write one image; `job` is its split and number."""
    pixels, image, annotations, refs = _make_image(seed, any_number, *job)
    jpeg = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    (out / IMAGES / image["file_name"]).write_bytes(jpeg.tobytes())
    return image, annotations, refs


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the data set, unless it is there."""
    parser = text_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="folder to write")
    for split, count in DEFAULT_IMAGES.items():
        add(f"--{split}", type=int, default=count, metavar="N", help="images (%(default)s)")
    add("--seed", type=int, default=0, help="(%(default)s)")
    text = "add refs of several objects, and of none, to those of one"
    add("--any-number", action="store_true", help=text)
    args = parser.parse_args(argv)
    recipe = {split: getattr(args, split) for split in SPLITS}, args.seed, args.any_number
    if is_complete(args.output, *recipe):
        print(f"{args.output} is complete and was made with these parameters: reused")
    else:
        generate(args.output, *recipe)
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_entry_point(main)
