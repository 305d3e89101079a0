"""Check a packed split: count what it holds, find unsound records, and draw some to look at."""

import argparse
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import token_length_summary
from utils.errors import UserError, run_entry_point
from utils.records import RecordReader, RefRecord
from utils.tokenizer import token_lengths
from utils.transforms import decode_image, decode_mask
from utils.visualize import TRUTH_COLOR, grid, overlay, save_picture

EPILOG = """example:
  python tools/inspect_lmdb.py datasets/lmdb/refcoco/val.lmdb --samples 20 -o val.jpg

Every photo and mask is decoded and every sentence read. The numbers of refs and sentences of
RefCOCO, RefCOCO+ and G-Ref are compared with the published ones. Faults are listed, and the exit
code is 1 if there are any."""


class Published(NamedTuple):
    """Holds a split's published counts; `sentences` is None where none is published."""

    refs: int
    sentences: int | None = None


# By the names that the configs use; the order of the splits is that of the papers' tables.
PUBLISHED = {
    "refcoco": {
        "train": Published(42404),
        "val": Published(3811, 10834),
        "testA": Published(1975, 5657),
        "testB": Published(1810, 5095),
    },
    "refcoco+": {
        "train": Published(42278),
        "val": Published(3805, 10758),
        "testA": Published(1975, 5726),
        "testB": Published(1798, 4889),
    },
    "refcocog_u": {
        "train": Published(42226),
        "val": Published(2573, 4896),
        "test": Published(5023, 9602),
    },
    "refcocog_g": {
        "train": Published(44822),
        "val": Published(5000, 9536),
    },
}

QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
CELL, COLUMNS, GAP = (384, 380), 4, 16  # of the contact sheet; (width, height) in pixels
HEAD = 92  # of a cell, above the photo
MAX_LINES = 3  # of sentences in a cell


class Check(NamedTuple):
    """Holds the faults and the counts of all records."""

    faults: list[str]
    sizes: list[tuple[int, int]]  # (height, width), one an image
    image_bytes: list[int]  # one an image
    mask_bytes: list[int]  # one a ref
    shares: list[float]  # of the image that a mask covers, in (0, 1]; one a ref
    token_lengths: Counter[int]
    categories: Counter[int | None]


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a file holds and what is wrong with it; write the contact sheet."""
    args = _parse_args(argv)
    sheet = args.output or args.lmdb.with_suffix(".jpg")
    faults = inspect(args.lmdb, sheet, args.samples, args.seed, args.word_len, args.subset)
    if faults:
        raise UserError(f"{args.lmdb}: {len(faults)} faults, listed above")


def inspect(
    path: Path,
    sheet: Path,
    samples: int = 12,
    seed: int = 0,
    word_len: int = 17,
    is_subset: bool = False,
) -> list[str]:
    """Print what a file holds, check all of it, write a picture of some of it.

    Args:
        path: an LMDB of ours.
        sheet: where the contact sheet goes (PNG or JPEG); nothing is written for 0 samples.
        samples, seed: how many refs are on it, and what chooses them.
        word_len: tokens; how many sentences it would cut is counted.
        is_subset: do not compare with the published numbers.
    Returns:
        A line for each fault.
    Raises:
        UserError: the file cannot be read at all.
    """
    reader = RecordReader(path)
    meta = reader.meta
    print(f"{path}: {meta['dataset']} {meta['split']}, {path.stat().st_size / 1e6:,.1f} MB")
    print(
        f"  holds    {meta['refs']:,} refs with {meta['sentences']:,} sentences on "
        f"{meta['images']:,} images; format {meta['format_version']}, packed by {meta['tool']}"
    )
    check = check_records(reader)
    for line in statistics(check, word_len):
        print(f"  {line}")
    if not is_subset and meta["dataset"] in PUBLISHED:
        differing = differences(meta)
        check.faults.extend(differing)
        print(f"  published {'differs' if differing else 'the same numbers'}")
    if samples:
        save_sheet(reader, sheet, samples, seed)
        print(f"  to look at: {sheet}")
    for fault in check.faults:
        print(f"  FAULT    {fault}")
    if not check.faults:
        print("  checked  every record: no fault")
    return check.faults


def differences(meta: Mapping) -> list[str]:
    """Return how a file's counts differ from the published ones, if its data set is known.

    Args:
        meta: of a `RecordReader`. Splits that were packed as one (val+testA) are added up.
    """
    known = PUBLISHED.get(meta["dataset"], {})
    parts = [known.get(name) for name in meta["split"].split("+")]
    if not known or None in parts:
        return []
    found = []
    for what in ("refs", "sentences"):
        counts = [getattr(part, what) for part in parts]
        if None not in counts and sum(counts) != meta[what]:
            found.append(f"{meta[what]:,} {what}, where {sum(counts):,} are published")
    return found


def check_records(reader: RecordReader) -> Check:
    """Read every record, decode its photo and mask, and compare and count them."""
    check = Check([], [], [], [], [], Counter(), Counter())
    sizes: dict[str, tuple[int, int] | None] = {}
    image_ids: dict[str, int | None] = {}
    seen: dict[str, set[int]] = {"ref_id": set(), "sent_id": set()}
    for position in tqdm(range(len(reader)), desc="check", unit="ref", disable=None, leave=False):
        try:
            ref = reader.ref(position)
        except UserError as error:
            check.faults.append(f"position {position}: {error}")
            continue
        check.categories[ref.category] += 1
        problems = [*_index_problems(reader, position, ref), *_id_problems(ref, seen)]
        if image_ids.setdefault(ref.image_key, ref.image_id) != ref.image_id:
            problems.append(f"another ref gives its image {ref.image_key} another image_id")
        if ref.image_key not in sizes:
            sizes[ref.image_key] = None
            problems += _image_problems(reader, ref, sizes, check)
        if sizes[ref.image_key] not in (None, (ref.height, ref.width)):
            height, width = sizes[ref.image_key]
            problems.append(
                f"says {ref.height} x {ref.width} pixels, its image has {height} x {width}"
            )
        problems += _mask_problems(ref, check)
        problems += _sentence_problems(ref, check)
        check.faults.extend(f"ref {ref.ref_id} (position {position}): {p}" for p in problems)
    check.faults.extend(_count_problems(reader.meta, sizes, check))
    return check


def _index_problems(reader: RecordReader, position: int, ref: RefRecord) -> Iterator[str]:
    index = reader.index
    for what, kept, own in (
        ("ref_id", index.ref_ids, ref.ref_id),
        ("image", index.image_keys, ref.image_key),
        ("image_id", index.image_ids, ref.image_id),
        ("number of sentences", index.num_sentences, len(ref.sentences)),
    ):
        if kept[position] != own:
            yield f"the index says {what} {kept[position]}, the record {own}"


def _id_problems(ref: RefRecord, seen: dict[str, set[int]]) -> Iterator[str]:
    for kind, ids in (("ref_id", [ref.ref_id]), ("sent_id", ref.sent_ids)):
        for number in ids:
            if number in seen[kind]:
                yield f"{kind} {number} is there twice"
            seen[kind].add(number)


def _image_problems(
    reader: RecordReader, ref: RefRecord, sizes: dict, check: Check
) -> Iterator[str]:
    try:
        data = reader.image(ref.image_key)
        size = decode_image(data, f"image {ref.image_key}").shape[:2]
    except UserError as error:
        yield str(error)
    else:
        sizes[ref.image_key] = size
        check.sizes.append(size)
        check.image_bytes.append(len(data))


def _mask_problems(ref: RefRecord, check: Check) -> Iterator[str]:
    try:
        mask = decode_mask(ref.mask, "mask")
    except UserError as error:
        yield str(error)
        return
    check.mask_bytes.append(len(ref.mask))
    if mask.shape != (ref.height, ref.width):
        yield f"its mask is {mask.shape[0]} x {mask.shape[1]}, not {ref.height} x {ref.width}"
    if not mask.any():
        yield "its mask is empty"
    else:
        check.shares.append(float((mask > 0).mean()))


def _sentence_problems(ref: RefRecord, check: Check) -> Iterator[str]:
    if not ref.sentences or len(ref.sentences) != len(ref.sent_ids):
        yield f"it has {len(ref.sentences)} sentences and {len(ref.sent_ids)} sentence ids"
    for sentence, length in zip(ref.sentences, token_lengths(ref.sentences), strict=True):
        check.token_lengths[length] += 1
        if length <= 2:  # start and end
            yield f"its sentence {sentence!r} has no words"


def _count_problems(meta: Mapping, sizes: Mapping, check: Check) -> Iterator[str]:
    found = {"sentences": check.token_lengths.total(), "images": len(sizes)}
    for what, count in found.items():
        if meta[what] != count:
            yield f"the file says that it holds {meta[what]:,} {what}, but {count:,} were found"
    if meta["token_length"] != dict(check.token_lengths):
        yield "the file's histogram of sentence lengths is not that of its sentences"


def statistics(check: Check, word_len: int) -> list[str]:
    """Return the statistics of a file, a line each."""
    lines = []
    if check.sizes:
        common = Counter(check.sizes).most_common(1)[0][0]
        heights, widths = zip(*check.sizes, strict=True)
        lines.append(
            f"photos   {min(heights)}-{max(heights)} high, {min(widths)}-{max(widths)} wide, "
            f"mostly {common[0]} x {common[1]}; "
            f"{sum(check.image_bytes) / len(check.image_bytes) / 1e3:,.1f} kB each"
        )
    if check.shares:
        shares = np.quantile(check.shares, QUANTILES, method="nearest")
        values = "  ".join(f"{100 * share:.1f}" for share in shares)
        names = " ".join(f"{100 * q:g}" for q in QUANTILES)
        lines.append(f"masks    {sum(check.mask_bytes) / len(check.mask_bytes) / 1e3:,.1f} kB each")
        lines.append(f"         % of the photo they cover, at quantiles {names} %: {values}")
    known = [category for category in check.categories if category is not None]
    lines.append(f"classes  {len(known)} categories" if known else "classes  no categories")
    cut = sum(n for length, n in check.token_lengths.items() if length > word_len)
    total = check.token_lengths.total()
    histogram = token_length_summary(check.token_lengths).splitlines()[0]
    lines.append(textwrap.fill(f"tokens   {histogram}", 97, subsequent_indent=" " * 11))
    lines.append(f"         {cut:,} of {total:,} sentences are cut at word_len {word_len}")
    return lines


def save_sheet(reader: RecordReader, path: Path, samples: int, seed: int) -> None:
    """Write a picture of random refs: mask on photo, sentences above; unreadable ones say so."""
    count = min(samples, len(reader))
    chosen = sorted(random.Random(seed).sample(range(len(reader)), count))
    cells = [_cell(reader, position) for position in chosen]
    save_picture(grid(cells, CELL, min(COLUMNS, count), GAP), path)


def _cell(reader: RecordReader, position: int) -> Image.Image:
    """Draw one ref as a picture of size `CELL`."""
    cell = Image.new("RGB", CELL, "white")
    draw = ImageDraw.Draw(cell)
    small, normal = ImageFont.load_default(13), ImageFont.load_default(17)
    try:
        ref = reader.ref(position)
        photo = decode_image(reader.image(ref.image_key), ref.image_key)
        mask = decode_mask(ref.mask, "mask") > 0
        share = mask.mean()
        scale = min(CELL[0] / ref.width, (CELL[1] - HEAD) / ref.height)
        size = max(1, round(ref.width * scale)), max(1, round(ref.height * scale))
        photo = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
        mask = cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) >= 0.5
        picture = overlay(photo, mask, TRUTH_COLOR, is_tinted=False)
    except Exception as error:  # the fault itself is in the list
        draw.text((0, HEAD), "\n".join(textwrap.wrap(f"{error!r}", 50)), "crimson", small)
        return cell
    lines = [line for sentence in ref.sentences for line in textwrap.wrap(f"“{sentence}”", 42)]
    if len(lines) > MAX_LINES:
        lines = [*lines[: MAX_LINES - 1], f"… ({len(ref.sentences)} sentences)"]
    for row, line in enumerate(lines):
        draw.text((0, 21 * row), line, "black", normal)
    key = ref.image_key if len(ref.image_key) <= 36 else f"…{ref.image_key[-35:]}"
    draw.text((0, 68), f"ref {ref.ref_id}, {100 * share:.1f} % of {key}", "dimgray", small)
    cell.paste(Image.fromarray(picture), (0, HEAD))
    return cell


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("lmdb", type=Path, help="a file of tools/folder2lmdb.py or tools/own_data.py")
    add("--samples", type=_count, default=12, metavar="N", help="refs on the sheet (%(default)s)")
    add("--seed", type=_count, default=0, metavar="S", help="chooses them (%(default)s)")
    add("-o", "--output", type=Path, help="the contact sheet, PNG or JPEG (X.jpg beside X.lmdb)")
    add("--word-len", type=_count, default=17, help="TRAIN.word_len to try (%(default)s)")
    add("--subset", action="store_true", help="a part of a known data set: compare no counts")
    return parser.parse_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)


if __name__ == "__main__":
    run_entry_point(main)
