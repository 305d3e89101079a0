"""Data of your own: a JSON Lines file of images, masks and sentences -> one LMDB file a split.

Everything is checked before anything is written, and all problems are listed with their lines.
"""

import argparse
import json
import posixpath
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import encode_mask
from tools.download import check_space
from tools.folder2lmdb import packed_summary, read_file
from tools.refer import draw_segmentation
from utils.errors import UserError, run_entry_point
from utils.files import is_plain_name
from utils.photos import decode
from utils.records import LARGEST, LONGEST_KEY, RecordWriter, RefRecord
from utils.tokenizer import has_words, token_lengths

EPILOG = """a line, an object of one image (spread out here):
  {"image": "photos/7.jpg",
   "mask": "masks/7-1.png",
   "sentences": ["the red mug", "mug on the left"],
   "split": "train"}

image      path of a JPEG or PNG; relative ones start at the folder of the file (or --images)
mask       path of a PNG (not black is the object), or a COCO run-length mask
           {"size": [height, width], "counts": ...}, or polygons [[x, y, x, y, ...], ...]
sentences  one or more, each true of this object alone
split      train, val, or any other name; each becomes OUTPUT/<split>.lmdb
and, if you like, on all lines or on none: ref_id (unique); on any line: image_id, category

docs/own_data.md has a worked example."""

FIELDS = ("image", "mask", "sentences", "split", "ref_id", "image_id", "category")
REQUIRED = FIELDS[:4]
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"

Report = Callable[[str], None]


@dataclass(frozen=True)
class Entry:
    """One line that can be packed: an object, the sentences that denote it, and its split."""

    ref_id: int
    image_key: str
    image_id: int | None
    category: int | None
    mask: str | dict | list
    sentences: tuple[str, ...]
    split: str


@dataclass
class Contents:
    """What has been read so far; `sizes` holds (height, width), None for an unusable image."""

    images: Path
    masks: Path
    entries: list[Entry] = field(default_factory=list)
    sizes: dict[str, tuple[int, int] | None] = field(default_factory=dict)
    image_ids: dict[str, tuple[int | None, int]] = field(default_factory=dict)
    ref_ids: dict[int, int] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Check the file, pack its splits, and print what went into them."""
    args = _parse_args(argv)
    images = args.images or args.jsonl.parent
    contents, problems = read(args.jsonl, images, args.jsonl.parent)
    if problems:
        for problem in problems:
            print(f"{args.jsonl}:{problem}", file=sys.stderr)
        raise UserError(f"{args.jsonl}: {len(problems)} problems, listed above; nothing written")
    _note_shared_images(contents.entries)
    if args.check:
        print(f"{args.jsonl}: {len(contents.entries)} refs, no problem; nothing written")
        return
    for path in pack(contents, args.output, args.output.resolve().name):
        print(packed_summary(path))
    print("next: python tools/inspect_lmdb.py on each, and look at the picture that it writes")


def read(path: Path, images: Path, masks: Path) -> tuple[Contents, list[str]]:
    """Read and check a JSON Lines file and all images and masks that it names.

    Args:
        path: the file; empty lines are skipped.
        images, masks: folders that relative paths start at.
    Returns:
        what it holds, and its problems in order, each "<line>: <text>".
    Raises:
        UserError: the file is missing, holds no line, or is not UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    contents, problems = Contents(images, masks), []
    lines = _lines(path)
    if not lines:
        raise UserError(f"{path} is empty: a line is one object (--help shows one)")
    has_ref_id = None
    for number, text in tqdm(lines.items(), desc="check", unit="ref", disable=None, leave=False):
        before = len(problems)

        def report(problem: str, number: int = number) -> None:
            problems.append(f"{number}: {problem}")

        line = _parse(text, report)
        if line is None:
            continue
        _check_fields(line, report)
        has_ref_id = "ref_id" in line if has_ref_id is None else has_ref_id
        if has_ref_id != ("ref_id" in line):
            report("ref_id is on some lines only: put it on all of them or on none")
        if len(problems) == before:
            _check_contents(line, number, contents, report)
        if len(problems) == before:
            contents.entries.append(_entry(line, number))
    return contents, problems


def pack(contents: Contents, output: Path, dataset: str) -> list[Path]:
    """Write <split>.lmdb for each split below `output`; all of them appear, or none.

    Raises:
        UserError: an image or mask has changed since it was checked.
    """
    counts = Counter(entry.split for entry in contents.entries)
    files = {(entry.split, entry.image_key) for entry in contents.entries}
    need = sum((contents.images / key).stat().st_size for _, key in files)
    check_space(output, need, "packing")
    sent_id = 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(RecordWriter(output / f"{split}.lmdb", dataset, split))
            for split in counts
        }
        stored = set()
        for entry in tqdm(contents.entries, desc=f"pack {dataset}", unit="ref", disable=None):
            writer = writers[entry.split]
            if (entry.split, entry.image_key) not in stored:
                stored.add((entry.split, entry.image_key))
                writer.add_image(entry.image_key, (contents.images / entry.image_key).read_bytes())
            height, width = contents.sizes[entry.image_key]
            mask = load_mask(entry.mask, height, width, contents.masks)
            record = RefRecord(
                ref_id=entry.ref_id,
                image_key=entry.image_key,
                image_id=entry.image_id,
                category=entry.category,
                height=height,
                width=width,
                mask=encode_mask(mask),
                sentences=entry.sentences,
                sent_ids=tuple(range(sent_id, sent_id + len(entry.sentences))),
            )
            sent_id += len(entry.sentences)
            writer.add_ref(record, token_lengths(record.sentences))
    return [output / f"{split}.lmdb" for split in counts]


def load_mask(mask: str | dict | list, height: int, width: int, folder: Path) -> np.ndarray:
    """Read or draw a mask: (height, width) uint8, 0 or 255.

    Args:
        mask: path of a PNG, a COCO run-length mask, or polygons.
        height, width: of the image.
        folder: where a relative path starts.
    Raises:
        UserError: it cannot be read, is no PNG, is of another size, or is empty.
    """
    if not isinstance(mask, str):
        return np.where(draw_segmentation(mask, height, width) > 0, np.uint8(255), np.uint8(0))
    path = folder / mask
    remedy = "check mask"
    data = read_file(path, remedy)
    pixels = decode(data, cv2.IMREAD_UNCHANGED, str(path), remedy)
    if not data.startswith(PNG_MAGIC):
        raise UserError(f"{path} is no PNG, and other formats blur a mask: save it as a PNG")
    if pixels.ndim == 3:
        pixels = pixels[..., :3].any(axis=2)  # without transparency
    if pixels.shape != (height, width):
        turned = (
            " (turned by the photo's EXIF orientation?)" if pixels.shape == (width, height) else ""
        )
        raise UserError(
            f"{path} is {pixels.shape[0]} x {pixels.shape[1]} pixels, its image {height} x {width}"
            f"{turned}"
        )
    if not pixels.any():
        raise UserError(f"{path} is an empty mask")
    return np.where(pixels > 0, np.uint8(255), np.uint8(0))


def _lines(path: Path) -> dict[int, str]:
    """The lines that are not empty, by number from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None
    return {i: line for i, line in enumerate(text.split("\n"), 1) if line.strip()}


def _parse(text: str, report: Report) -> dict | None:
    try:
        line = json.loads(text)
        json.dumps(line, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        report(f"is not JSON ({error})")
        return None
    if not isinstance(line, dict):
        report(f"is {line!r:.60}, not an object {{...}}")
        return None
    return line


def _check_fields(line: Mapping[str, Any], report: Report) -> None:
    """Report every field that is missing, unknown or of the wrong kind."""
    for name in REQUIRED:
        if name not in line:
            report(f"has no {name}")
    for name, value in line.items():
        if name not in FIELDS:
            near = get_close_matches(name, FIELDS, 1)
            report(f"has an unknown field {name}" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        problem = _PROBLEMS_OF[name](value)
        if problem:
            report(f"{name} {problem}, not {value!r:.80}")


def _path_problem(value: object) -> str | None:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        return "must be a path"
    return None


def _image_problem(value: object) -> str | None:
    problem = _path_problem(value)
    if problem is None and len(value.encode()) > LONGEST_KEY:
        problem = f"must be at most {LONGEST_KEY} bytes long"
    return problem


def _mask_problem(value: object) -> str | None:
    if isinstance(value, str):
        return _path_problem(value)
    if isinstance(value, dict):
        return _rle_problem(value)
    if not isinstance(value, list) or not value:
        return "must be a path, {size, counts}, or polygons [[x, y, ...], ...]"
    for polygon in value:
        if not isinstance(polygon, list):
            return "must be a list of polygons: [[x, y, ...], ...] even for one"
        if len(polygon) < 6 or len(polygon) % 2 or not all(map(_is_number, polygon)):
            return "must be polygons of three or more pairs x, y"
    if all(0 <= number <= 1 for polygon in value for number in polygon):
        return "must be in pixels (these polygons lie in [0, 1])"
    return None


def _rle_problem(value: Mapping[str, Any]) -> str | None:
    size, counts = value.get("size"), value.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(map(_is_count, size))):
        return "must have its size [height, width]"
    is_list = isinstance(counts, list) and all(map(_is_count, counts))
    if not is_list and not isinstance(counts, str):
        return "must have counts, a string or a list of numbers from 0"
    return None


def _sentences_problem(value: object) -> str | None:
    if isinstance(value, list) and value and all(isinstance(s, str) for s in value):
        return None if all(map(has_words, value)) else "must have words in each"
    return "must be a list of one or more texts"


def _split_problem(value: object) -> str | None:
    if isinstance(value, str) and is_plain_name(value):
        return None
    return "must be a name such as train"


def _number_problem(value: object) -> str | None:
    return None if _is_count(value) else "must be a whole number from 0"


_PROBLEMS_OF: dict[str, Callable[[object], str | None]] = {
    "image": _image_problem,
    "mask": _mask_problem,
    "sentences": _sentences_problem,
    "split": _split_problem,
    "ref_id": _number_problem,
    "image_id": lambda value: value if value is None else _number_problem(value),
    "category": lambda value: value if value is None else _number_problem(value),
}


def _is_number(value: object) -> bool:
    # Infinity and NaN, which Python's JSON knows, fail the comparison.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _check_contents(
    line: Mapping[str, Any], number: int, contents: Contents, report: Report
) -> None:
    """Report what is wrong with the image, the mask and the ids of a line whose fields are fine."""
    key = _image_key(line)
    if key not in contents.sizes:
        contents.sizes[key] = None
        try:
            path, remedy = contents.images / key, "check image"
            pixels = decode(read_file(path, remedy), cv2.IMREAD_COLOR, str(path), remedy)
            contents.sizes[key] = pixels.shape[:2]
        except (UserError, OSError) as error:
            report(str(error))
    elif contents.sizes[key] is None:
        report(f"its image {key} cannot be used, see above")
    if contents.sizes[key] is not None:
        try:
            load_mask(line["mask"], *contents.sizes[key], contents.masks)
        except (UserError, OSError) as error:
            is_drawn = not isinstance(line["mask"], str)
            report(f"its mask is {error}" if is_drawn else str(error))
    image_id = line.get("image_id")
    known, where = contents.image_ids.setdefault(key, (image_id, number))
    if known != image_id:
        report(f"its image {key} has image_id {image_id}, but {known} on line {where}")
    if "ref_id" in line:
        first = contents.ref_ids.setdefault(line["ref_id"], number)
        if first != number:
            report(f"ref_id {line['ref_id']} is that of line {first} as well")


def _entry(line: Mapping[str, Any], number: int) -> Entry:
    return Entry(
        ref_id=line.get("ref_id", number),
        image_key=_image_key(line),
        image_id=line.get("image_id"),
        category=line.get("category"),
        mask=line["mask"],
        sentences=tuple(sentence.strip() for sentence in line["sentences"]),
        split=line["split"],
    )


def _image_key(line: Mapping[str, Any]) -> str:
    return posixpath.normpath(line["image"])


def _note_shared_images(entries: Sequence[Entry]) -> None:
    """Say how many images are in several splits, where scores would be too good to be true."""
    splits: dict[str, set[str]] = {}
    for entry in entries:
        splits.setdefault(entry.image_key, set()).add(entry.split)
    shared = sorted(key for key, names in splits.items() if len(names) > 1)
    if shared:
        print(f"note: {len(shared)} images are in more than one split, such as {shared[0]}")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("jsonl", type=Path, help="the JSON Lines file, UTF-8")
    add("-o", "--output", type=Path, help="folder for <split>.lmdb; names the data")
    add("--images", type=Path, help="folder that image paths start at (that of the file)")
    add("--check", action="store_true", help="only look for problems")
    args = parser.parse_args(argv)
    if args.output is None and not args.check:
        parser.error("-o names the folder for <split>.lmdb; or only look for problems: --check")
    return args


if __name__ == "__main__":
    run_entry_point(main)
