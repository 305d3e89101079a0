"""Writes a report: a folder of plain files that a browser opens from the disk, without a network.

    <report>/index.html, results.js    all results of a run, linked
    <report>/photos/*.jpg              each photo once, whichever results show it
    <report>/<result>/index.html       one result: page.css and scripts as they lie here,
        data.js                        numbers and a row a sentence,
        masks.js                       run lengths of every mask, read after the page is drawn

Pages are fixed: head.html above page.html or results.html. What a data set says reaches them as
JSON and is set as text, never as HTML.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from engine.evaluator import encode_rle
from engine.report import statistics
from utils.errors import UserError
from utils.files import write_text
from utils.logger import progress
from utils.machine import available_cores
from utils.metrics import count_lines
from utils.records import RecordReader
from utils.transforms import decode_image, load_mask
from utils.visualize import file_stem, save_picture

TEMPLATES = Path(__file__).parent
PHOTOS, INDEX = "photos", "index.html"

Photo = tuple[str, int, int, int, int, str]  # file, height, width, both as shown, key in the LMDB


@dataclass(frozen=True)
class Scored:
    """Hold a model's name on the page, its `.json` on a split, and the records of its `.jsonl`."""

    name: str
    result: Mapping
    lines: Sequence[Mapping]


def write_page(
    folder: Path,
    reader: RecordReader,
    models: Sequence[Scored],
    photos: Path,
    limit: int | None,
    photo_size: int,
    **more: object,
) -> None:
    """Write the page of a result, or of two side by side; the folder may hold an older one.

    `index.html` is removed first and written last: it never stands beside files of two results.

    Args:
        reader: the LMDB that was scored.
        models: one, or two with the same sentences in the same order.
        photos: folder of the photos.
        limit, photo_size: as TEST.report_limit and TEST.report_photo_size.
        more: goes into the page's data.
    Raises:
        UserError: the LMDB lacks a photo or a ref, or holds one that cannot be decoded.
    """
    shown = choose_shown(models[-1].lines, limit)
    shown_photos, truth = write_pictures(
        reader, [models[0].lines[place] for place in shown], photos, photo_size
    )
    data = _report_data(models, shown, shown_photos)
    data["photos_folder"] = f"{os.path.relpath(photos, folder)}/"
    predictions = [[m.lines[place]["pred_rle"]["counts"] for place in shown] for m in models]
    (folder / INDEX).unlink(missing_ok=True)
    _write_script(folder / "masks.js", "MASKS", {"truth": truth, "predictions": predictions})
    _write_script(folder / "data.js", "REPORT", data | more)
    _write_templates(folder, "Report", "page.html", "page.js")


def choose_shown(lines: Sequence[Mapping], limit: int | None) -> list[int]:
    """Return the places of sentences that get a card: all, or `limit` from worst to best."""
    if limit is None or limit >= len(lines):
        return list(range(len(lines)))
    ranking = sorted(range(len(lines)), key=lambda place: lines[place]["iou"])
    picked = np.linspace(0, len(lines) - 1, limit).round().astype(int)
    return sorted(ranking[place] for place in picked)


def write_pictures(
    reader: RecordReader, lines: Sequence[Mapping], folder: Path, photo_size: int
) -> tuple[list[Photo], dict[int, str]]:
    """Write the photos of these records, unless they are there, and read the refs' masks.

    Args:
        folder: where the photos go.
        photo_size: longest side in pixels; smaller photos stay as large as they are.
    Returns:
        The photos in the order of the records, and ground truth (COCO's RLE) by ref.
    """
    sizes = {line["image"]: (line["height"], line["width"]) for line in lines}
    positions = {ref_id: place for place, ref_id in enumerate(reader.index.ref_ids)}
    refs = list(dict.fromkeys(line["ref_id"] for line in lines))
    if missing := [ref_id for ref_id in refs if ref_id not in positions]:
        raise UserError(f"{reader.path} has no ref {missing[0]}: it is not what was scored")

    def encode_mask(ref_id: int) -> str:
        return encode_rle(load_mask(reader.ref(positions[ref_id])) > 0)

    # Decoding, shrinking and compressing let go of the interpreter, so threads use all cores.
    with ThreadPoolExecutor(available_cores()) as pool:
        write = partial(_write_photo, reader, folder, photo_size)
        photos = pool.map(write, sizes, sizes.values())
        masks = pool.map(encode_mask, refs)
        photos = list(progress(photos, len(sizes), "photos of the report"))
        return photos, dict(zip(refs, masks, strict=True))


def _write_photo(
    reader: RecordReader, folder: Path, photo_size: int, key: str, size: tuple[int, int]
) -> Photo:
    """Write a photo whose name tells content and size: what is there already is the same."""
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


def _report_data(
    models: Sequence[Scored], shown: Sequence[int], photos: Sequence[Photo]
) -> dict[str, object]:
    """Return what `page.js` draws, without masks: all in numbers, and rows of those shown."""
    lines = models[0].lines
    counts = [count_lines(model.lines) for model in models]
    dataset, split = (models[0].result[name] for name in ("dataset", "split"))
    groupings = statistics.group_sentences(lines, dataset)
    chosen = [lines[place] for place in shown]
    places = {photo[-1]: place for place, photo in enumerate(photos)}
    rows = {name: [line[name] for line in chosen] for name in ("ref_id", "sent_id", "sentence")}
    rows["photo"] = [places[line["image"]] for line in chosen]
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
            {name: value for name, value in grouping._asdict().items() if name != "members"}
            | {"rows": statistics.group_scores(grouping, counts)}
            for grouping in groupings
        ],
        "photos": photos,
        "rows": rows,  # the shown sentences as columns, a value a sentence
    }


def write_results(folder: Path) -> None:
    """Write `index.html` and `results.js`: what there are pages of, by the `.json` files beside."""
    results = []
    for path in sorted(folder.parent.glob("test_*.json")):
        if (folder / path.stem / INDEX).is_file():
            with suppress(ValueError, TypeError):  # a foreign file, or no object in it
                results.append({"page": path.stem, **json.loads(path.read_text())})
    _write_script(folder / "results.js", "RESULTS", results)
    _write_templates(folder, "Results", "results.html", "results_page.js")


def _write_templates(folder: Path, title: str, body: str, script: str) -> None:
    """Write style and scripts as they lie here, and last the index, of a body below the head."""
    names = "page.css", "elements.js", script
    texts = {name: (TEMPLATES / name).read_text("utf-8") for name in names}
    head, rest = ((TEMPLATES / name).read_text("utf-8") for name in ("head.html", body))
    for name, text in (texts | {INDEX: head.replace("TITLE", title) + rest}).items():
        write_text(folder / name, text)


def _write_script(path: Path, name: str, value: object) -> None:
    """Write JSON as a script in ASCII: pages from the disk may load those, and nothing else."""
    write_text(path, f"window.{name} = {json.dumps(value, separators=(',', ':'))};\n")
