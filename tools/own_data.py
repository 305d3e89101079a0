"""Pack data of your own: a JSON Lines file of images, masks and sentences -> an LMDB file a split.

Everything is checked before anything is written, and all problems are listed with their lines.
"""

import argparse
import posixpath
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationError,
)
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import encode_mask
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

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def _must(holds: Callable[[Any], bool], what: str = "") -> AfterValidator:
    """Make a validator that refuses all values but those for which `holds`."""

    def check(value: Any) -> Any:
        if not holds(value):
            raise ValueError(what)
        return value

    return AfterValidator(check)


def _form_of(mask: object) -> str | None:
    """Name the form of a mask, by which its type is chosen."""
    if isinstance(mask, list) and any(not isinstance(polygon, list) for polygon in mask):
        return "flat"
    return {str: "path", dict: "runs", list: "polygons"}.get(type(mask))


Text = Annotated[str, StringConstraints(strip_whitespace=True)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Coordinate = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
AnyPath = Annotated[str, _must(lambda path: path.strip() and "\0" not in path)]
ImageKey = Annotated[
    AnyPath,
    _must(lambda path: len(path.encode()) <= LONGEST_KEY),
    AfterValidator(posixpath.normpath),
]
Polygon = Annotated[list[Coordinate], Field(min_length=6), _must(lambda p: len(p) % 2 == 0)]
Polygons = Annotated[
    list[Polygon],
    Field(min_length=1),
    _must(
        lambda polygons: not all(0 <= number <= 1 for polygon in polygons for number in polygon),
        "in pixels (these polygons lie in [0, 1])",
    ),
]


class RunLengths(BaseModel):
    """Holds a run-length mask as COCO writes it."""

    model_config = ConfigDict(strict=True)
    size: Annotated[list[Count], Field(min_length=2, max_length=2)]
    counts: str | list[Count]


Mask = Annotated[
    Annotated[AnyPath, Tag("path")]
    | Annotated[RunLengths, Tag("runs")]
    | Annotated[Polygons, Tag("polygons")]
    | Annotated[
        list,
        _must(lambda _: False, "a list of polygons: [[x, y, ...], ...] even for one"),
        Tag("flat"),
    ],
    Discriminator(_form_of),
]


class Entry(BaseModel):
    """Holds one line: an object, the sentences that denote it, and its split.

    A field's description completes "must be", where no validator says more.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    image: ImageKey = Field(description=f"a path of at most {LONGEST_KEY} bytes")
    mask: Mask = Field(
        description="a path, {size: [height, width], counts: text or whole numbers from 0}, or "
        "polygons [[x, y, ...], ...] of three or more pairs x, y"
    )
    sentences: Annotated[
        list[Text],
        Field(min_length=1, description="a list of one or more texts"),
        _must(lambda texts: all(map(has_words, texts)), "texts with words in each"),
    ]
    split: Annotated[str, _must(is_plain_name)] = Field(description="a name such as train")
    ref_id: Count = Field(default=None, description="a whole number from 0")
    image_id: Count | None = Field(default=None, description="a whole number from 0")
    category: Count | None = Field(default=None, description="a whole number from 0")


@dataclass
class Contents:
    """Holds what has been read so far.

    `sizes` has (height, width), None for an unusable image; `image_ids` and `ref_ids` know the
    lines that first gave them.
    """

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
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: a line is one object (--help shows one)")
    contents, problems = Contents(images, masks), []
    has_ref_ids = None  # as the first sound line says
    for number, line in tqdm(lines, desc="check", unit="ref", disable=None, leave=False):
        try:
            entry = Entry.model_validate_json(line)
        except ValidationError as error:
            problems += [f"{number}: {problem}" for problem in _field_problems(error, line)]
            continue
        has_ref_id = entry.ref_id is not None
        has_ref_ids = has_ref_id if has_ref_ids is None else has_ref_ids
        found = list(_content_problems(entry, number, contents))
        if has_ref_id != has_ref_ids:
            found.append("ref_id is on some lines only: put it on all of them or on none")
        problems += [f"{number}: {problem}" for problem in found]
        entry.ref_id = entry.ref_id if has_ref_id else number
        contents.entries.append(entry)
    return contents, problems


def _field_problems(error: ValidationError, line: str) -> Iterator[str]:
    """Say what is wrong with the fields of a line, once a field."""
    told = set()
    for fault in error.errors():
        kind, reason = fault["type"], fault.get("ctx", {}).get("error", "")
        name = fault["loc"][0] if fault["loc"] else ""
        is_field = len(fault["loc"]) == 1
        if name in told:
            continue
        told.add(name)
        if kind == "json_invalid":
            yield f"is not JSON ({reason})"
        elif not name:
            yield f"is {line.strip():.60}, not an object {{...}}"
        elif kind == "missing" and is_field:
            yield f"has no {name}"
        elif kind == "extra_forbidden" and is_field:
            near = get_close_matches(name, Entry.model_fields, 1)
            yield f"has an unknown field {name}" + (f"; did you mean {near[0]}?" if near else "")
        else:
            must = str(reason) or Entry.model_fields[name].description
            yield f"{name} must be {must}, not {fault['input']!r:.80}"


def _content_problems(entry: Entry, number: int, contents: Contents) -> Iterator[str]:
    """Say what is wrong with the image, the mask and the ids of a line whose fields are sound."""
    key = entry.image
    if key not in contents.sizes:
        contents.sizes[key] = None
        try:
            path, remedy = contents.images / key, "check image"
            pixels = decode(read_file(path, remedy), cv2.IMREAD_COLOR, str(path), remedy)
            contents.sizes[key] = pixels.shape[:2]
        except (UserError, OSError) as error:
            yield str(error)
    elif contents.sizes[key] is None:
        yield f"its image {key} cannot be used, see above"
    if contents.sizes[key] is not None:
        try:
            load_mask(entry.mask, *contents.sizes[key], contents.masks)
        except (UserError, OSError) as error:
            yield str(error) if isinstance(entry.mask, str) else f"its mask is {error}"
    known, first = contents.image_ids.setdefault(key, (entry.image_id, number))
    if known != entry.image_id:
        yield f"its image {key} has image_id {entry.image_id}, but {known} on line {first}"
    if entry.ref_id is not None:
        first = contents.ref_ids.setdefault(entry.ref_id, number)
        if first != number:
            yield f"ref_id {entry.ref_id} is that of line {first} as well"


def pack(contents: Contents, output: Path, dataset: str) -> list[Path]:
    """Write <split>.lmdb for each split below `output`; all of them appear, or none.

    Raises:
        UserError: an image or mask has changed since it was checked.
    """
    counts = Counter(entry.split for entry in contents.entries)
    sent_id = 0
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(RecordWriter(output / f"{split}.lmdb", dataset, split))
            for split in counts
        }
        stored = set()
        for entry in tqdm(contents.entries, desc=f"pack {dataset}", unit="ref", disable=None):
            writer = writers[entry.split]
            if (entry.split, entry.image) not in stored:
                stored.add((entry.split, entry.image))
                writer.add_image(entry.image, (contents.images / entry.image).read_bytes())
            height, width = contents.sizes[entry.image]
            mask = load_mask(entry.mask, height, width, contents.masks)
            record = RefRecord(
                ref_id=entry.ref_id,
                image_key=entry.image,
                image_id=entry.image_id,
                category=entry.category,
                height=height,
                width=width,
                mask=encode_mask(mask),
                sentences=tuple(entry.sentences),
                sent_ids=tuple(range(sent_id, sent_id + len(entry.sentences))),
            )
            sent_id += len(entry.sentences)
            writer.add_ref(record, token_lengths(record.sentences))
    return [output / f"{split}.lmdb" for split in counts]


def load_mask(mask: str | RunLengths | list, height: int, width: int, folder: Path) -> np.ndarray:
    """Read or draw a mask: (height, width) uint8, 0 or 255.

    Args:
        mask: path of a PNG, a COCO run-length mask, or polygons.
        height, width: of the image.
        folder: where a relative path starts.
    Raises:
        UserError: it cannot be read, is no PNG, is of another size, or is empty.
    """
    if isinstance(mask, RunLengths):
        mask = mask.model_dump()
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


def _note_shared_images(entries: Sequence[Entry]) -> None:
    """Say how many images are in several splits, where scores would be too good to be true."""
    splits: dict[str, set[str]] = {}
    for entry in entries:
        splits.setdefault(entry.image, set()).add(entry.split)
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
