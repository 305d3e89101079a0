"""Pack data of your own: a JSON Lines file of images, masks and sentences -> an LMDB file a split.

Everything is checked before anything is written, and all problems are listed with their lines.
"""

import argparse
import posixpath
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import encode_mask
from tools.folder2lmdb import check_mask, image_id_of, image_size, packed_summary
from tools.odd_records import MISSING_PHOTO
from tools.refer import ImageKey, draw_segmentation, join_masks, must, read_file
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.files import is_plain_name
from utils.photos import read_mask
from utils.records import LARGEST, LONGEST_KEY, RecordWriter, RefRecord
from utils.tokenizer import has_words, token_lengths

EPILOG = """a line, an object of one image (spread out here):
  {"image": "photos/7.jpg",
   "mask": "masks/7-1.png",
   "sentences": ["the red mug", "mug on the left"],
   "split": "train"}

A mask may also be polygons, run lengths, a list of masks, or null for nothing. docs/own_data.md
describes all fields and has a worked example."""

Stripped = StringConstraints(strip_whitespace=True)
Text = Annotated[str, Stripped, must(has_words, "texts with words in each")]
Count = Annotated[int | None, Field(ge=0, le=LARGEST, description="a whole number from 0")]
Polygons = Annotated[list[list[float]], Field(min_length=1)]
Mask = Annotated[str, must(lambda path: "\0" not in path)] | dict[str, Any] | Polygons


def _as_list(mask: Mask | list[Mask] | None) -> list[Mask]:
    """Return the masks that a line joins."""
    if mask is None:
        return []
    is_list = isinstance(mask, list) and not isinstance(mask[0], list)
    are_polygons = isinstance(mask, list) and any(isinstance(part, list) for part in mask[0])
    return mask if is_list or are_polygons else [mask]


def _are_in_pixels(masks: list[Mask]) -> bool:
    """Tell whether none of the masks is polygons that lie in [0, 1]."""
    return not any(
        isinstance(mask, list) and all(0 <= x <= 1 for polygon in mask for x in polygon)
        for mask in masks
    )


class Line(BaseModel):
    """Holds a line of the file: an object, the sentences that denote it, and its split.

    A field's description completes "must be", where no validator says more. `mask` becomes a
    list: of the masks that are joined.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    image: Annotated[ImageKey, must(str.strip), AfterValidator(posixpath.normpath)] = Field(
        description=f"a path of at most {LONGEST_KEY} bytes"
    )
    mask: Annotated[
        Mask | Annotated[list[Mask], Field(min_length=1)] | None,
        AfterValidator(_as_list),
        must(_are_in_pixels, "in pixels (these polygons lie in [0, 1])"),
    ] = Field(
        description="a path, {size: [height, width], counts: ...}, null, a list of masks, or a "
        "list of polygons in pixels: [[x, y, ...], ...] even for one"
    )
    sentences: list[Text] = Field(min_length=1, description="a list of one or more texts")
    split: Annotated[str, must(is_plain_name)] = Field(description="a name such as train")
    ref_id: Count = None
    image_id: Count = None
    category: Count = None


@dataclass
class Contents:
    """Holds what has been read so far, below two folders."""

    images: Path
    masks: Path
    entries: list[tuple[int, Line]] = field(default_factory=list)  # lines of sound fields
    sizes: dict[str, tuple[int, int] | None] = field(default_factory=dict)  # None: unusable
    missing: list[str] = field(default_factory=list)  # images
    # An image's id, and the line that first gave it; the line of a ref's id.
    image_ids: dict[str, tuple[int | None, int]] = field(default_factory=dict)
    ref_ids: dict[int, int] = field(default_factory=dict)
    # What a mask seldom is, and its lines.
    odd_masks: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))


def main(argv: Sequence[str] | None = None) -> None:
    """Check the file, pack its splits, and print what went into them."""
    args = _parse_args(argv)
    images = args.images or args.jsonl.parent
    contents, problems = read(args.jsonl, images, args.jsonl.parent)
    if problems:
        for problem in problems:
            print(f"{args.jsonl}:{problem}", file=sys.stderr)
        raise UserError(f"{args.jsonl}: {len(problems)} problems, listed above; nothing written")
    _print_notes(contents)
    if args.check:
        print(f"{args.jsonl}: {len(contents.entries)} refs, no problem; nothing written")
        return
    paths = {entry.split: args.output / f"{entry.split}.lmdb" for _, entry in contents.entries}
    there = [path for path in paths.values() if path.exists()]
    if there and not args.force:
        remedy = "choose another -o, or replace it with --force; nothing written"
        raise UserError(f"{there[0]} is there already: {remedy}")
    pack(contents, paths, args.output.resolve().name)
    for path in paths.values():
        print(packed_summary(path))


def read(path: Path, images: Path, masks: Path) -> tuple[Contents, list[str]]:
    """Read and check a JSON Lines file and all images and masks that it names.

    Args:
        images, masks: folders that relative paths start at.
    Returns:
        what it holds, and its problems, each "<line>: <text>", or " <text>" of the whole file.
    Raises:
        UserError: the file is missing, holds no line, or is not UTF-8.
    """
    try:
        text = read_file(path, "a line of it is one object (--help shows one)").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: a line of it is one object (--help shows one)")
    contents, problems = Contents(images, masks), []
    for number, line in tqdm(lines, desc="check", unit="ref", disable=None, leave=False):
        try:
            entry = Line.model_validate_json(line)
            contents.entries.append((number, entry))
            found = _content_problems(entry, number, contents)
        except ValidationError as error:
            found = _field_problems(error, line)
        problems += [f"{number}: {problem}" for problem in found]
    if (count := len(contents.missing)) > 1:
        problems.append(f" {count} images are not below {images}: name their folder with --images")
    return contents, problems


def _field_problems(error: ValidationError, line: str) -> Iterator[str]:
    """Say what is wrong with the fields of a line, once a field."""
    told = set()
    for fault in error.errors():
        kind, reason = fault["type"], fault.get("ctx", {}).get("error", "")
        name = fault["loc"][0] if fault["loc"] else ""
        if name in told:
            continue
        told.add(name)
        if kind == "json_invalid":
            yield f"is not JSON ({reason})"
        elif not name:
            yield f"is {line.strip():.60}, not an object {{...}}"
        elif kind == "missing":
            yield f"has no {name}"
        elif kind == "extra_forbidden":
            near = get_close_matches(name, Line.model_fields, 1)
            yield f"has an unknown field {name}" + (f"; did you mean {near[0]}?" if near else "")
        else:
            needed = str(reason) or Line.model_fields[name].description
            yield f"{name} must be {needed}, not {fault['input']!r:.80}"


def _content_problems(entry: Line, number: int, contents: Contents) -> Iterator[str]:
    """Say what is wrong with the image, the mask and the ids of a line whose fields are sound."""
    key = entry.image
    if key not in contents.sizes:
        contents.sizes[key] = None
        path, remedy = contents.images / key, "check image"
        try:
            data = read_file(path, remedy, MISSING_PHOTO)
            contents.sizes[key] = image_size(data, str(path), remedy)
        except (UserError, OSError) as error:
            if getattr(error, "kind", None) == MISSING_PHOTO:
                contents.missing.append(key)
            if key not in contents.missing[1:]:
                yield str(error)
    elif contents.sizes[key] is None and key not in contents.missing[1:]:
        yield f"its image {key} cannot be used, see above"
    if (size := contents.sizes[key]) is not None:
        try:
            parts = [load_mask(mask, size, contents.masks) for mask in entry.mask]
            if np.mean(join_masks(parts, size) > 0) >= 0.99:
                contents.odd_masks["cover 99 % of their photo or more"].append(number)
            if any(map(_has_several_values, parts)):
                contents.odd_masks["have several values, all taken for the object"].append(number)
        except (UserError, OSError) as error:
            yield str(error)
    known, first = contents.image_ids.setdefault(key, (entry.image_id, number))
    if known != entry.image_id:
        yield f"its image {key} has image_id {entry.image_id}, but {known} on line {first}"
    if entry.ref_id is not None:
        first = contents.ref_ids.setdefault(entry.ref_id, number)
        if first != number:
            yield f"ref_id {entry.ref_id} is that of line {first} as well"
    if (entry.ref_id is None) != (contents.entries[0][1].ref_id is None):
        yield "ref_id is on some lines only: put it on all of them or on none"


def _has_several_values(codes: np.ndarray) -> bool:
    """Tell whether the object has several; 253 to 255 are one, as the release writes it."""
    return len({min(code, 253) if code <= 255 else code for code in np.unique(codes)} - {0}) > 1


def _print_notes(contents: Contents) -> None:
    """Tell of odd masks, and of images in several splits, which flatter scores."""
    for what, numbers in contents.odd_masks.items():
        lines = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
        print(f"note: {len(numbers)} masks {what}: is that meant? Lines {lines}")
    places = {(entry.image, entry.split) for _, entry in contents.entries}
    splits = Counter(image for image, _ in places)
    if shared := sorted(image for image, count in splits.items() if count > 1):
        print(f"note: {len(shared)} images are in more than one split, such as {shared[0]}")


def pack(contents: Contents, paths: Mapping[str, Path], dataset: str) -> None:
    """Write the file of each split; all of them appear, or none.

    Raises:
        UserError: an image or mask has changed since it was checked.
    """
    count = 0  # of sentences
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(RecordWriter(path, dataset, split))
            for split, path in paths.items()
        }
        for number, entry in tqdm(contents.entries, desc="pack", unit="ref", disable=None):
            writer, key, size = writers[entry.split], entry.image, contents.sizes[entry.image]
            writer.add_image(key, (contents.images / key).read_bytes())
            parts = [load_mask(mask, size, contents.masks) for mask in entry.mask]
            mask = encode_mask(join_masks(parts, size))
            ref_id = number if entry.ref_id is None else entry.ref_id
            image_id = image_id_of(key) if entry.image_id is None else entry.image_id
            texts = tuple(entry.sentences)
            sent_ids = tuple(range(count, count + len(texts)))
            fields = key, image_id, entry.category, *size, mask, texts, sent_ids, len(entry.mask)
            writer.add_ref(RefRecord(ref_id, *fields), token_lengths(texts))
            count += len(texts)


def load_mask(mask: Mask, size: tuple[int, int], folder: Path) -> np.ndarray:
    """Read or draw one mask of a line: (height, width), 0 in the background.

    Args:
        mask: the path of a PNG, a COCO run-length mask, or polygons.
        size: (height, width) of the image.
        folder: where a relative path starts.
    Raises:
        UserError: it cannot be read, is no PNG, is of another size, or is empty.
    """
    if isinstance(mask, str):
        path, remedy = folder / mask, "check mask"
        codes = read_mask(read_file(path, remedy), str(path), remedy)
        check_mask(codes, size, str(path), remedy)
        return codes
    try:
        drawn = draw_segmentation(mask, *size)
    except UserError as error:
        raise UserError(f"its mask is {error}") from None
    check_mask(drawn, size, "its mask", "it covers no pixel")
    return drawn


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("jsonl", type=Path, help="the JSON Lines file, UTF-8")
    add("-o", "--output", type=Path, help="folder for <split>.lmdb; names the data")
    add("--images", type=Path, help="folder that image paths start at (that of the file)")
    add("--check", action="store_true", help="only look for problems")
    add("--force", action="store_true", help="replace records that are in the folder already")
    args = parser.parse_args(argv)
    if args.output is None and not args.check:
        parser.error("-o names the folder for <split>.lmdb; or only look for problems: --check")
    return args


if __name__ == "__main__":
    run_entry_point(main)
