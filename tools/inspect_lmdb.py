"""Check a packed split: count what it holds, find unsound records, and draw some to look at."""

import argparse
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import target_summary, token_length_summary
from tools.folder2lmdb import check_mask
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.records import RecordReader, RefRecord
from utils.tokenizer import has_words, token_lengths
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
    "refcocog_g": {"train": Published(44822), "val": Published(5000, 9536)},
    "refcoco-m": {"val": Published(2080, 5598)},
}

QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
CELL, COLUMNS, GAP = (384, 380), 4, 16  # of the contact sheet; (width, height) in pixels
HEAD = 92  # of a cell, above the photo


@dataclass
class Check:
    """Holds the faults and the counts of all records."""

    faults: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # (height, width) of an image
    image_ids: dict[str, int | None] = field(default_factory=dict)  # of every image that refs name
    num_targets: dict[int, int] = field(default_factory=dict)  # by the position of the ref
    pale: list[int] = field(default_factory=list)  # ids of refs whose masks have 1 to 252
    shares: list[float] = field(default_factory=list)  # of the image that a mask covers, (0, 1]
    token_lengths: Counter[int] = field(default_factory=Counter)
    categories: Counter[int | None] = field(default_factory=Counter)
    seen: Counter[tuple[str, int]] = field(default_factory=Counter)  # ids


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
    """Print what a file holds, check all of it, and write a picture of some of it.

    Args:
        sheet: where the picture goes (PNG or JPEG); none is written for 0 samples.
        seed: chooses the refs on it.
        word_len: how many sentences it would cut is counted.
        is_subset: do not compare with the published numbers.
    Returns:
        A line for each fault.
    """
    reader = RecordReader(path)
    meta = reader.meta
    print(f"{path}: {meta['dataset']} {meta['split']}, {path.stat().st_size / 1e6:,.1f} MB")
    print(
        f"  holds    {meta['refs']:,} refs with {meta['sentences']:,} sentences on "
        f"{meta['images']:,} images; format {meta['format_version']}, packed by {meta['tool']}"
    )
    if "left_out" in meta:
        print(f"  left out {meta['left_out']:,} odd refs, when it was packed")
    check = check_records(reader)
    for line in statistics(check, word_len):
        print(f"  {line}")
    if not is_subset and meta["dataset"] in PUBLISHED:
        differing = differences(meta)
        check.faults += differing
        print(f"  published {'differs' if differing else 'the same numbers'}")
    if samples:
        save_sheet(reader, sheet, samples, seed, check.num_targets)
        print(f"  to look at: {sheet}")
    for fault in check.faults:
        print(f"  FAULT    {fault}")
    if not check.faults:
        print("  checked  every record: no fault")
    return check.faults


def differences(meta: Mapping) -> list[str]:
    """Return how a file's counts differ from the published ones, if its data set is known.

    Args:
        meta: of a `RecordReader`. Splits that were packed as one (val+testA) are added up, and
            refs that were left out count.
    """
    known = PUBLISHED.get(meta["dataset"], {})
    parts = [known.get(name) for name in meta["split"].split("+")]
    if not known or None in parts:
        return []
    found = []
    left_out = meta.get("left_out", 0)
    for what in ("refs", "sentences")[: 1 if left_out else 2]:
        counts = [getattr(part, what) for part in parts]
        if None not in counts and sum(counts) != meta[what] + left_out:
            found.append(f"{meta[what]:,} {what}, where {sum(counts):,} are published")
    return found


def check_records(reader: RecordReader) -> Check:
    """Read every record, decode its photo and mask, and compare and count them."""
    check = Check()
    for position in tqdm(range(len(reader)), desc="check", unit="ref", disable=None, leave=False):
        try:
            ref = reader.ref(position)
        except UserError as error:
            check.faults.append(f"position {position}: {error}")
            continue
        problems = [
            *_index_problems(reader, position, ref),
            *_image_problems(reader, ref, check),
            *_mask_problems(ref, check),
            *_sentence_problems(ref, check),
        ]
        check.categories[ref.category] += 1
        check.num_targets[position] = ref.num_targets
        check.faults += [f"ref {ref.ref_id} (position {position}): {p}" for p in problems]
    check.faults += _count_problems(reader.meta, check)
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


def _image_problems(reader: RecordReader, ref: RefRecord, check: Check) -> Iterator[str]:
    key = ref.image_key
    if key not in check.image_ids:
        check.image_ids[key] = ref.image_id
        try:
            check.sizes[key] = decode_image(reader.image(key), f"image {key}").shape[:2]
        except UserError as error:
            yield str(error)
    if check.image_ids[key] != ref.image_id:
        yield f"another ref gives its image {key} another image_id"
    height, width = check.sizes.get(key, (ref.height, ref.width))
    if (height, width) != (ref.height, ref.width):
        yield f"says {ref.height} x {ref.width} pixels, its image has {height} x {width}"


def _mask_problems(ref: RefRecord, check: Check) -> Iterator[str]:
    try:
        mask = decode_mask(ref.mask, "mask")
        check_mask(mask, (ref.height, ref.width), "its mask", "replace it", ref.num_targets)
        if ref.num_targets:
            check.shares.append(float((mask > 0).mean()))
        if ((mask > 0) & (mask < 253)).any():
            check.pale.append(ref.ref_id)
    except UserError as error:
        yield str(error)


def _sentence_problems(ref: RefRecord, check: Check) -> Iterator[str]:
    for kind, ids in (("ref_id", [ref.ref_id]), ("sent_id", ref.sent_ids)):
        for number in ids:
            check.seen[kind, number] += 1
            if check.seen[kind, number] > 1:
                yield f"{kind} {number} is there twice"
    if not ref.sentences or len(ref.sentences) != len(ref.sent_ids):
        yield f"it has {len(ref.sentences)} sentences and {len(ref.sent_ids)} sentence ids"
    check.token_lengths.update(token_lengths(ref.sentences))
    for sentence in ref.sentences:
        if not has_words(sentence):
            yield f"its sentence {sentence!r} has no words"


def _count_problems(meta: Mapping, check: Check) -> Iterator[str]:
    found = {"sentences": check.token_lengths.total(), "images": len(check.image_ids)}
    for what, count in found.items():
        if meta[what] != count:
            yield f"the file says that it holds {meta[what]:,} {what}, but {count:,} were found"
    if meta["token_length"] != dict(check.token_lengths):
        yield "the file's histogram of sentence lengths is not that of its sentences"
    if check.pale:
        yield (
            f"{len(check.pale):,} masks, such as that of ref {check.pale[0]}, have values from 1 "
            "to 252, which training takes for background in part: pack the split again"
        )


def statistics(check: Check, word_len: int) -> list[str]:
    """Return the statistics of a file, a line each."""
    lines = []
    if check.sizes:
        heights, widths = zip(*check.sizes.values(), strict=True)
        (height, width), _ = Counter(check.sizes.values()).most_common(1)[0]
        lines.append(
            f"photos   {min(heights)}-{max(heights)} high, {min(widths)}-{max(widths)} wide, "
            f"mostly {height} x {width}"
        )
    if check.shares:
        shares = np.quantile(check.shares, QUANTILES, method="nearest")
        values = "  ".join(f"{100 * share:.1f}" for share in shares)
        names = " ".join(f"{100 * q:g}" for q in QUANTILES)
        lines.append(f"masks    % of the photo they cover, at quantiles {names} %: {values}")
    lines += [f"targets  {line}" for line in target_summary(check.num_targets.values())]
    known = [category for category in check.categories if category is not None]
    lines.append(f"classes  {len(known)} categories" if known else "classes  no categories")
    cut = sum(n for length, n in check.token_lengths.items() if length > word_len)
    total = check.token_lengths.total()
    histogram = token_length_summary(check.token_lengths).splitlines()[0]
    lines.append(textwrap.fill(f"tokens   {histogram}", 97, subsequent_indent=" " * 11))
    lines.append(f"         {cut:,} of {total:,} sentences are cut at word_len {word_len}")
    return lines


def save_sheet(
    reader: RecordReader, path: Path, samples: int, seed: int, num_targets: Mapping[int, int]
) -> None:
    """Write a picture of random refs: mask on photo, sentences above; unreadable ones say so.

    Where there are refs of no, one or several targets (`num_targets`, by position), one of each
    is on it.
    """
    count, rng = min(samples, len(reader)), random.Random(seed)
    chosen = rng.sample(range(len(reader)), count)
    kinds = {min(number, 2): place for place, number in num_targets.items()}
    if len(kinds) > 1:
        chosen = list(dict.fromkeys([*kinds.values(), *chosen]))[:count]
    chosen.sort()
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
        room = CELL[0], CELL[1] - HEAD
        small_photo, small_mask = (
            np.array(ImageOps.contain(Image.fromarray(pixels), room)) for pixels in (photo, mask)
        )
        picture = overlay(small_photo, small_mask, TRUTH_COLOR, is_tinted=False)
    except Exception as error:  # the fault itself is in the list
        draw.text((0, HEAD), "\n".join(textwrap.wrap(f"{error!r}", 50)), "crimson", small)
        return cell
    text = " ".join(f"“{sentence}”" for sentence in ref.sentences)
    lines = textwrap.wrap(text, 42, max_lines=3, placeholder=" …")
    draw.text((0, 0), "\n".join(lines), "black", normal)
    share = f"{100 * mask.mean():.1f} % of {ref.image_key[-36:]}"
    if ref.num_targets != 1:
        share = f"{ref.num_targets} targets, {share}"
    draw.text((0, 68), f"ref {ref.ref_id}, {share}", "dimgray", small)
    cell.paste(Image.fromarray(picture), (0, HEAD))
    return cell


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
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
