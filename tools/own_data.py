"""Pack data of your own: a JSON Lines file of images, masks and sentences -> an LMDB file a split.

All lines that cannot be used are listed with what is wrong, and then nothing is written.
"""

import argparse
import posixpath
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated, Any, NotRequired

import numpy as np
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, WrapValidator, with_config
from tqdm import tqdm
from typing_extensions import TypedDict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import encode_mask
from tools.folder2lmdb import check_mask, find_photo, image_id_of, image_size, packed_summary
from tools.odd_records import MISSING_PHOTO, OddError, OddRecords
from tools.refer import (
    ImageKey,
    SplitName,
    Text,
    draw_segmentation,
    join_masks,
    must,
    read_as,
    read_file,
    refuse_seen,
)
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.photos import read_mask
from utils.records import LARGEST, RecordWriter, RefRecord

EPILOG = """a line, an object of one image (spread out here):
  {"image": "photos/7.jpg",
   "mask": "masks/7-1.png",
   "sentences": ["the red mug", "mug on the left"],
   "split": "train"}

A mask may also be polygons, run lengths, a list of masks, or null for nothing. docs/own_data.md
describes all fields and has a worked example."""

_REMEDY = "docs/own_data.md describes the fields"
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Polygons = Annotated[list[list[float]], Field(min_length=1)]
Mask = Annotated[str, must(lambda path: "\0" not in path)] | dict[str, Any] | Polygons


def _read_masks(value: Any, check: Callable[[Any], list[Mask]]) -> list[Mask]:
    """Check the mask, or list of masks, of a line, and return the masks that it joins."""
    if value is None:
        return []
    for masks in ([value], value):
        with suppress(ValidationError):
            return check(masks)
    raise ValueError(
        "a path, {size: [height, width], counts: ...}, null, a list of masks, or a list of "
        "polygons in pixels: [[x, y, ...], ...] even for one"
    )


@with_config({"extra": "forbid"})
class Line(TypedDict):
    """Describe a line of the file: an object, the sentences that denote it, and its split."""

    image: Annotated[ImageKey, AfterValidator(posixpath.normpath)]
    mask: Annotated[list[Mask], Field(min_length=1), WrapValidator(_read_masks)]
    sentences: Annotated[
        list[Annotated[Text, AfterValidator(str.strip)]], must(bool, "one or more")
    ]
    split: SplitName
    ref_id: NotRequired[Count | None]
    image_id: NotRequired[Count | None]
    category: NotRequired[Count | None]


_OBJECT, _LINE = TypeAdapter(dict), TypeAdapter(Line)


def main(argv: Sequence[str] | None = None) -> None:
    """Pack the splits of a file, and print what went into them."""
    args = _parse_args(argv)
    odd = OddRecords(args.skip_odd)
    reader = LineReader(args, odd)
    writers: dict[str, RecordWriter] = {}
    count = 0  # of refs
    lines = read_file(args.jsonl, "a line of it is one object (--help shows one)").split(b"\n")
    with ExitStack() as stack:  # no split appears before all lines are read
        for number, line in enumerate(tqdm(lines, desc="pack", unit="line", disable=None), 1):
            found = reader.read(number, line) if line.strip() else None
            count += found is not None
            if found is None or args.check:
                continue
            split, photo, ref = found
            if split not in writers:
                path = args.output / f"{split}.lmdb"
                if path.exists() and not args.force:
                    raise UserError(f"{path} is there already: give another -o, or --force")
                writer = RecordWriter.open(path, args.output.resolve().name, split)
                writers[split] = stack.enter_context(writer)
            writers[split].add_image(ref.image_key, photo)
            writers[split].add_ref(ref)
        odd.settle()
        for split, writer in writers.items():
            writer.left_out = len(odd.of_split(split))
    if not count:
        raise UserError(f"{args.jsonl} has no line to pack: {_REMEDY}")
    reader.print_notes()
    if args.check:
        print(f"{args.jsonl}: {count} refs can be packed; nothing written")
    for split in writers:
        print(packed_summary(args.output / f"{split}.lmdb"))


class LineReader:
    """Reads lines into records, and notes what is odd about them."""

    def __init__(self, args: argparse.Namespace, odd: OddRecords) -> None:
        self._path, self._masks = args.jsonl, args.jsonl.parent
        self._images = args.images or args.jsonl.parent
        self._odd = odd
        self._ref_ids: set[str] = set()
        self._missing: dict[str, str] = {}  # what is told of each missing photo
        self._image_ids: dict[str, int | None] = {}
        self._splits: defaultdict[str, set[str]] = defaultdict(set)  # of images
        self._sizes: dict[str, tuple[int, int]] = {}  # of images
        self._odd_masks: defaultdict[str, list[int]] = defaultdict(list)  # their lines
        self._sentences = 0

    def read(self, number: int, line: bytes) -> tuple[str, bytes, RefRecord] | None:
        """Read a line into its split, photo and record; None, and noted, if it cannot be used."""
        where = f"{self._path}:{number}"
        with self._odd.catch("malformed line", None, number):
            item = read_as(_OBJECT, line, where, _REMEDY)
            with self._odd.catch("malformed line", item.get("split"), number):
                entry = read_as(_LINE, item, where, _REMEDY)
                try:
                    found = self._record(entry, number)
                except UserError as error:
                    kind = getattr(error, "kind", "unusable line")
                    text = f"{where}: {error}"
                    if kind == MISSING_PHOTO:  # told with the first of its lines
                        text = self._missing.setdefault(str(error), text)
                    raise OddError(kind, text) from None
                numbers = [f"ref_id {found[-1].ref_id}"]
                refuse_seen(self._ref_ids, numbers, where, "give each line another, or none")
                return found
        return None

    def _record(self, entry: Line, number: int) -> tuple[str, bytes, RefRecord]:
        """Read the photo and masks of a line, whose fields are sound."""
        key, image_id, texts = entry["image"], entry.get("image_id"), tuple(entry["sentences"])
        path = find_photo(self._images, key)
        remedy = "check image, or name its folder with --images"
        photo = read_file(path, remedy, MISSING_PHOTO)
        size = self._sizes.get(key) or image_size(photo, str(path), remedy)
        self._sizes[key] = size
        self._splits[key].add(entry["split"])
        parts = [self._load_mask(mask, size) for mask in entry["mask"]]
        mask = join_masks(parts, size)
        if np.mean(mask > 0) >= 0.99:
            self._odd_masks["cover 99 % of their photo or more"].append(number)
        if any(map(_has_several_values, parts)):
            self._odd_masks["have several values, all taken for the object"].append(number)
        known = self._image_ids.setdefault(key, image_id)
        if known != image_id:
            raise UserError(f"its image {key} has image_id {image_id}, but {known} on a line above")
        ref_id = number if entry.get("ref_id") is None else entry["ref_id"]
        sent_ids = tuple(range(self._sentences, self._sentences + len(texts)))
        self._sentences += len(texts)
        image_id = image_id_of(key) if image_id is None else image_id
        encoded = encode_mask(mask)
        fields = key, image_id, entry.get("category"), *size, encoded, texts, sent_ids
        return entry["split"], photo, RefRecord(ref_id, *fields, len(parts))

    def _load_mask(self, mask: Mask, size: tuple[int, int]) -> np.ndarray:
        """Read or draw one mask of a photo of (height, width): 0 in the background."""
        if isinstance(mask, str):
            path, remedy = self._masks / mask, "check mask"
            codes = read_mask(read_file(path, remedy), str(path), remedy)
            check_mask(codes, size, str(path), remedy)
            return codes
        if isinstance(mask, list) and all(0 <= x <= 1 for polygon in mask for x in polygon):
            raise UserError("its mask must be in pixels (these polygons lie in [0, 1])")
        try:
            drawn = draw_segmentation(mask, *size)
        except UserError as error:
            raise UserError(f"its mask is {error}") from None
        check_mask(drawn, size, "its mask", "it covers no pixel")
        return drawn

    def print_notes(self) -> None:
        """Tell of masks that are perhaps not what was meant, and of images in several splits."""
        for what, numbers in self._odd_masks.items():
            lines = ", ".join(map(str, numbers[:20])) + (", ..." if len(numbers) > 20 else "")
            print(f"note: {len(numbers)} masks {what}: is that meant? Lines {lines}")
        if shared := [key for key, splits in self._splits.items() if len(splits) > 1]:
            print(f"note: {len(shared)} images are in more than one split, such as {shared[0]}")


def _has_several_values(codes: np.ndarray) -> bool:
    """Tell whether the object has several; 253 to 255 are one, as the release writes it."""
    return len({min(code, 253) if code <= 255 else code for code in np.unique(codes)} - {0}) > 1


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("jsonl", type=Path, help="the JSON Lines file, UTF-8")
    add("-o", "--output", type=Path, help="folder for <split>.lmdb; names the data")
    add("--images", type=Path, help="folder that image paths start at (that of the file)")
    add("--check", action="store_true", help="only look for problems")
    add("--skip-odd", action="store_true", help="leave out lines that cannot be used")
    add("--force", action="store_true", help="replace records that are in the folder already")
    args = parser.parse_args(argv)
    if args.output is None and not args.check:
        parser.error("-o names the folder for <split>.lmdb; or only look for problems: --check")
    return args


if __name__ == "__main__":
    run_entry_point(main)
