"""Writes a report: a folder of plain files that a browser opens from the disk, without a network.

    <report>/index.html, results.js    all results of a run, linked
    <report>/photos/*.jpg              each photo once, whichever results show it
    <report>/<result>/index.html       one result: page.css and page.js as they lie here,
        data.js                        numbers and a row a sentence,
        masks.js                       run lengths of every mask, read after the page is drawn

Pages are fixed: head.html above page.html or results.html. What a data set says reaches them as
JSON and is set as text, never as HTML.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from engine.report import statistics
from utils.errors import UserError
from utils.files import atomic_path
from utils.logger import progress
from utils.machine import available_cores
from utils.metrics import count_lines
from utils.records import RecordReader
from utils.transforms import decode_image, decode_mask
from utils.visualize import file_stem, save_picture

TEMPLATES = Path(__file__).parent
PHOTOS, INDEX, RESULTS = "photos", "index.html", "results.js"


Photo = tuple[str, int, int, int, int, str]  # file, height, width, both as shown, key in the LMDB


@dataclass(frozen=True)
class Pictures:
    """Hold what is shown of some sentences: photos by key, ground truth (RLE counts) by ref."""

    photos: dict[str, Photo]
    masks: dict[int, str]


@dataclass(frozen=True)
class Scored:
    """A model's result on a split: what is in the `.json`, and its records, those of the `.jsonl`.

    `name`: what the page calls the model.
    """

    name: str
    result: Mapping
    lines: Sequence[Mapping]


# ----------------------------------------------------------------------------------------- pictures


def choose_shown(lines: Sequence[Mapping], limit: int | None) -> list[int]:
    """Places of the sentences that get a card: all, or `limit` evenly spread from worst to best."""
    if limit is None or limit >= len(lines):
        return list(range(len(lines)))
    ranking = sorted(range(len(lines)), key=lambda place: lines[place]["iou"])
    picked = np.linspace(0, len(lines) - 1, limit).round().astype(int)
    return sorted(ranking[place] for place in picked)


def write_pictures(
    reader: RecordReader, lines: Sequence[Mapping], folder: Path, photo_size: int
) -> Pictures:
    """Write the photos of these records, unless they are there, and read the refs' masks.

    Args:
        reader: the LMDB that was scored.
        folder: where the photos go.
        photo_size: longest side in pixels; smaller photos stay as large as they are.
    Raises:
        UserError: the LMDB lacks a photo or a ref, or holds one that cannot be decoded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {line["image"]: (line["height"], line["width"]) for line in lines}
    refs = list(dict.fromkeys(line["ref_id"] for line in lines))
    positions = {ref_id: place for place, ref_id in enumerate(reader.index.ref_ids)}
    if missing := [ref_id for ref_id in refs if ref_id not in positions]:
        raise UserError(f"{reader.path} has no ref {missing[0]}: it is not what was scored")

    # Decoding, shrinking and compressing let go of the interpreter, so threads use all cores.
    with ThreadPoolExecutor(available_cores()) as pool:
        write = partial(_write_photo, reader, folder, photo_size)
        photos = progress(
            pool.map(write, sizes, sizes.values()), len(sizes), "photos of the report"
        )
        masks = pool.map(lambda ref_id: _encode_mask(reader, positions[ref_id]), refs)
        return Pictures({photo[-1]: photo for photo in photos}, dict(zip(refs, masks, strict=True)))


def _write_photo(
    reader: RecordReader, folder: Path, photo_size: int, key: str, size: tuple[int, int]
) -> Photo:
    """Its content and size are in its name: what is there already is what would be written."""
    scale = min(1.0, photo_size / max(size))
    shown = tuple(max(1, round(side * scale)) for side in size)
    data = reader.image(key)
    digest = hashlib.blake2b(data, digest_size=6).hexdigest()
    path = folder / f"{file_stem(Path(key).stem, 60)}-{digest}-{max(shown)}.jpg"
    if not path.exists():
        image = decode_image(data, f"{reader.path}, image {key}")
        small = cv2.resize(image, shown[::-1], interpolation=cv2.INTER_AREA)
        save_picture(Image.fromarray(small), path)
    return (path.name, *size, *shown, key)


def _encode_mask(reader: RecordReader, position: int) -> str:
    ref = reader.ref(position)
    mask = decode_mask(ref.mask, f"mask of ref {ref.ref_id}") > 0
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()


# --------------------------------------------------------------------------------------------- data


def report_data(
    models: Sequence[Scored],
    shown: Sequence[int],
    pictures: Pictures,
    photos_folder: str = f"../{PHOTOS}/",
) -> dict:
    """Return what `page.js` draws, without masks: all in numbers, and rows of those shown.

    Args:
        models: one, or two with the same sentences in the same order.
        shown: places of the sentences that have a card.
        pictures: at least of these.
        photos_folder: where the photos are, seen from the page.
    """
    lines = models[0].lines
    counts = [count_lines(model.lines) for model in models]
    dataset, split = (models[0].result[name] for name in ("dataset", "split"))
    groupings = statistics.group_sentences(lines, dataset)
    chosen = [lines[place] for place in shown]
    keys = list(dict.fromkeys(line["image"] for line in chosen))
    photo_places = {key: place for place, key in enumerate(keys)}
    rows = {name: [line[name] for line in chosen] for name in ("ref_id", "sent_id", "sentence")}
    rows["photo"] = [photo_places[line["image"]] for line in chosen]
    rows["share"] = [round(statistics.object_share(line), 6) for line in chosen]
    rows["iou"] = [[model.lines[place]["iou"] for place in shown] for model in models]
    rows["groups"] = {g.key: [g.members[place] for place in shown] for g in groupings}
    return {
        "title": f"{dataset} {split}",
        "metrics": [name for name, value in counts[0].scores().items() if value is not None],
        "models": [{"name": model.name, **model.result} for model in models],
        "sentences": len(lines),
        "histogram": [statistics.histogram(count.ious) for count in counts],
        "curve": [statistics.precision_curve(count) for count in counts],
        "groupings": [
            {
                "key": grouping.key,
                "title": grouping.title,
                "is_scale": grouping.is_scale,
                "labels": grouping.labels,
                "rows": statistics.group_scores(grouping, counts),
            }
            for grouping in groupings
        ],
        "photos_folder": photos_folder,
        "photos": [pictures.photos[key] for key in keys],
        "rows": rows,  # the shown sentences as columns, a value a sentence
    }


def mask_data(models: Sequence[Scored], shown: Sequence[int], pictures: Pictures) -> dict:
    """Run lengths (COCO's compressed RLE) of the ground truth by ref and of the predictions."""
    refs = dict.fromkeys(models[0].lines[place]["ref_id"] for place in shown)
    return {
        "truth": {ref_id: pictures.masks[ref_id] for ref_id in refs},
        "predictions": [
            [model.lines[place]["pred_rle"]["counts"] for place in shown] for model in models
        ],
    }


# -------------------------------------------------------------------------------------------- files


def write_page(folder: Path, data: Mapping, masks: Mapping) -> None:
    """Write the page of a result to `folder`, which may hold an older one.

    `index.html` is removed first and written last: it never stands beside files of two results.
    """
    (folder / INDEX).unlink(missing_ok=True)
    _write_script(folder / "masks.js", "MASKS", masks)
    _write_script(folder / "data.js", "REPORT", data)
    _copy_templates(folder, "page.css", "page.js")
    _write_html(folder / INDEX, "Report", "page.html")


def write_results(folder: Path) -> None:
    """Write `index.html` and `results.js`: what there are pages of, by the `.json` files beside."""
    results = []
    for path in sorted(folder.parent.glob("test_*.json")):
        if (folder / path.stem / INDEX).is_file():
            with suppress(ValueError):  # a foreign file
                results.append({"page": path.stem, **json.loads(path.read_text())})
    _write_script(folder / RESULTS, "RESULTS", results)
    _copy_templates(folder, "page.css", "results_page.js")
    _write_html(folder / INDEX, "Results", "results.html")


def _copy_templates(folder: Path, *names: str) -> None:
    for name in names:
        with atomic_path(folder / name) as partial_path:
            shutil.copyfile(TEMPLATES / name, partial_path)


def _write_html(path: Path, title: str, body: str) -> None:
    """The head that all pages share, above the body in a file that lies here."""
    head, rest = ((TEMPLATES / name).read_text("utf-8") for name in ("head.html", body))
    with atomic_path(path) as partial_path:
        partial_path.write_text(head.replace("TITLE", title) + rest, encoding="utf-8")


def _write_script(path: Path, name: str, value: object) -> None:
    """JSON as a script: pages from the disk may load those, and nothing else."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    with atomic_path(path) as partial_path:
        partial_path.write_text(f"window.{name} = {text};\n", encoding="ascii")
