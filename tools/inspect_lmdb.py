"""Check a packed split: count what it holds, find unsound records, and draw some to look at."""

import argparse
import random
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.data_process import target_summary
from tools.folder2lmdb import check_mask, token_length_summary
from utils.arguments import check_at_least, text_parser
from utils.errors import UserError, run_entry_point
from utils.logger import progress
from utils.records import RecordReader, RefRecord
from utils.tokenizer import has_words, token_lengths
from utils.transforms import decode_image, decode_mask
from utils.visualize import TRUTH_COLOR, fade, grid, overlay, save_picture

EPILOG = """example:
  python tools/inspect_lmdb.py datasets/lmdb/refcoco/val.lmdb --samples 20 -o val.jpg

Every photo and mask is decoded and every sentence read. The numbers of refs and sentences of
RefCOCO, RefCOCO+ and G-Ref are compared with the published ones. Faults are listed, and the exit
code is 1 if there are any."""

# Refs and sentences (None where none are published) by the names that the configs use; the order of
# the splits is that of the papers' tables.
PUBLISHED = {
    "refcoco": {
        "train": (42404, None),
        "val": (3811, 10834),
        "testA": (1975, 5657),
        "testB": (1810, 5095),
    },
    "refcoco+": {
        "train": (42278, None),
        "val": (3805, 10758),
        "testA": (1975, 5726),
        "testB": (1798, 4889),
    },
    "refcocog_u": {"train": (42226, None), "val": (2573, 4896), "test": (5023, 9602)},
    "refcocog_g": {"train": (44822, None), "val": (5000, 9536)},
    "refcoco-m": {"val": (2080, 5598)},
}

QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
CELL, COLUMNS, GAP = (384, 380), 4, 16  # of the contact sheet; (width, height) in pixels
HEAD = 92  # of a cell, above the photo


class Inspection(NamedTuple):
    """Hold what was found in a file: refs without a fault by position, and all faults."""

    sound: dict[int, RefRecord]
    shares: list[float]  # of the photo that each of their masks covers
    faults: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Print what a file holds and what is wrong with it; write the contact sheet."""
    args = _parse_args(argv)
    sheet = args.output or args.lmdb.with_suffix(".jpg")
    if faults := inspect(args.lmdb, sheet, args.subset, args.samples, args.seed):
        raise UserError(f"{args.lmdb}: {len(faults)} faults, listed above")


def inspect(
    path: Path, sheet: Path, is_subset: bool, samples: int = 12, seed: int = 0
) -> list[str]:
    """Print what a file holds, check all of it, and write a picture of some of it.

    Args:
        sheet: where the picture goes (PNG or JPEG); none is written for 0 samples.
        is_subset: do not compare with the published numbers.
        samples, seed: how many refs are on the sheet, and what chooses them.
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
    found = check_records(reader)
    for line in statistics(meta, found):
        print(f"  {line}")
    if not is_subset and meta["dataset"] in PUBLISHED:
        differing = differences(meta)
        found.faults.extend(differing)
        print(f"  published {'differs' if differing else 'the same numbers'}")
    for fault in found.faults:
        print(f"  FAULT    {fault}")
    if not found.faults:
        print("  checked  every record: no fault")
    if samples:
        save_sheet(reader, sheet, samples, seed, found.sound)
        print(f"  to look at: {sheet}")
    return found.faults


def differences(meta: Mapping) -> list[str]:
    """Return how a file's counts differ from the published ones, if its data set is known.

    Args:
        meta: of a `RecordReader`. Splits that were packed as one (val+testA) are added up, and
            refs that were left out may be of them.
    """
    known = PUBLISHED.get(meta["dataset"], {})
    parts = [known.get(name) for name in meta["split"].split("+")]
    if None in parts:
        return []
    found, left_out = [], meta.get("left_out", 0)
    for what, counts in zip(("refs", "sentences"), zip(*parts, strict=True), strict=True):
        is_known = None not in counts and not (left_out and what == "sentences")
        if is_known and not meta[what] <= sum(counts) <= meta[what] + left_out:
            found.append(f"{meta[what]:,} {what}, where {sum(counts):,} are published")
    return found


def check_records(reader: RecordReader) -> Inspection:
    """Read every record, and decode each photo and mask."""
    found, ids, pale = Inspection({}, [], []), set(), []
    index, lengths = list(zip(*reader.index, strict=True)), Counter()
    images: dict[str, tuple | None] = {}  # height, width and image_id; None: it cannot be decoded
    for position in progress(range(len(reader)), len(reader), "check"):
        where, problems = f"position {position}", []
        try:
            ref = reader.ref(position)
            where, key = f"ref {ref.ref_id} (position {position})", ref.image_key
            own = ref.ref_id, key, ref.image_id, len(ref.sentences)
            if index[position] != own:
                problems.append(f"the index says {index[position]}, the record {own}")
            lengths.update(token_lengths(ref.sentences))
            if key not in images:
                images[key] = None
                photo = decode_image(reader.image(key), f"image {key}")
                images[key] = *photo.shape[:2], ref.image_id
            problems.extend(_problems(ref, images[key], ids))
            mask = decode_mask(ref.mask, "mask")
            check_mask(mask, (ref.height, ref.width), "its mask", "replace it", ref.num_targets)
        except UserError as error:
            problems.append(str(error))
        found.faults.extend(f"{where}: {problem}" for problem in problems)
        if problems or images[key] is None:
            continue
        found.sound[position] = ref
        found.shares.append(float((mask > 0).mean()))
        if ((mask > 0) & (mask < 253)).any():
            pale.append(ref.ref_id)
    counts = {"sentences": lengths.total(), "images": len(images), "token_length": dict(lengths)}
    for what, count in counts.items():
        if (said := reader.meta[what]) != count:
            found.faults.append(f"the file says {what} {said}, its records {count}")
    if pale:
        found.faults.append(
            f"{len(pale):,} masks, such as that of ref {pale[0]}, have values from 1 to 252, which "
            "training takes for background in part: pack the split again"
        )
    return found


def _problems(ref: RefRecord, image: tuple | None, ids: set[tuple[str, int]]) -> Iterator[str]:
    """Say what is wrong with a ref beside its mask; `ids` are those of earlier refs and grow."""
    if image is not None and image[:2] != (ref.height, ref.width):
        yield f"says {ref.height} x {ref.width} pixels, its image has {image[0]} x {image[1]}"
    if image is not None and image[2] != ref.image_id:
        yield f"another ref gives its image {ref.image_key} another image_id"
    for own in [("ref_id", ref.ref_id), *(("sent_id", number) for number in ref.sent_ids)]:
        if own in ids:
            yield f"{own[0]} {own[1]} is there twice"
        ids.add(own)
    for sentence in ref.sentences:
        if not has_words(sentence):
            yield f"its sentence {sentence!r} has no words"


def statistics(meta: Mapping, found: Inspection) -> Iterator[str]:
    """Yield the statistics of a file, a line each; of the refs, those without a fault count."""
    refs = found.sound.values()
    if refs:
        sizes = {ref.image_key: (ref.height, ref.width) for ref in refs}.values()
        heights, widths = zip(*sizes, strict=True)
        (((height, width), _),) = Counter(sizes).most_common(1)
        high, wide = (f"{min(sides)}-{max(sides)}" for sides in (heights, widths))
        yield f"photos   {high} high, {wide} wide, mostly {height} x {width}"
        shares = [share for share in found.shares if share]  # of those with a target
        quantiles = np.quantile(shares or [0], QUANTILES, method="nearest")
        values = "  ".join(f"{100 * share:.1f}" for share in quantiles)
        names = " ".join(f"{100 * q:g}" for q in QUANTILES)
        yield f"masks    % of the photo they cover, at quantiles {names} %: {values}"
    yield from (f"targets  {line}" for line in target_summary(ref.num_targets for ref in refs))
    yield f"classes  {len({ref.category for ref in refs} - {None}) or 'no'} categories"
    histogram, cut = token_length_summary(meta["token_length"]).splitlines()
    yield textwrap.fill(f"tokens   {histogram}", 97, subsequent_indent=" " * 11)
    yield f"         {cut}"


def save_sheet(
    reader: RecordReader, path: Path, samples: int, seed: int, sound: Mapping[int, RefRecord]
) -> None:
    """Write a picture of random refs: mask on photo, sentences above.

    Where there are refs of no, one or several targets, one of each is on it.
    """
    count = min(samples, len(sound))
    chosen = random.Random(seed).sample(list(sound), count)
    kinds = {min(ref.num_targets, 2): position for position, ref in sound.items()}
    if len(kinds) > 1:
        chosen = list(dict.fromkeys([*kinds.values(), *chosen]))[:count]
    cells = [draw_cell(reader, sound[position]) for position in sorted(chosen)]
    save_picture(grid(cells, min(COLUMNS, max(count, 1)), GAP), path)


def draw_cell(reader: RecordReader, ref: RefRecord) -> Image.Image:
    """Draw one ref as a picture of size `CELL`."""
    cell = Image.new("RGB", CELL, "white")
    photo = decode_image(reader.image(ref.image_key), ref.image_key)
    mask = decode_mask(ref.mask, "mask") > 0
    room = CELL[0], CELL[1] - HEAD
    small = [np.array(ImageOps.contain(Image.fromarray(p), room)) for p in (fade(photo), mask)]
    cell.paste(Image.fromarray(overlay(*small, TRUTH_COLOR)), (0, HEAD))
    draw = ImageDraw.Draw(cell)
    text = " ".join(f"“{sentence}”" for sentence in ref.sentences)
    lines = textwrap.wrap(text, 42, max_lines=3, placeholder=" …")
    draw.text((0, 0), "\n".join(lines), "black", ImageFont.load_default(17))
    targets = "" if ref.num_targets == 1 else f"{ref.num_targets} targets, "
    share = f"{targets}{100 * mask.mean():.1f} % of {ref.image_key[-36:]}"
    draw.text((0, 68), f"ref {ref.ref_id}, {share}", "dimgray", ImageFont.load_default(13))
    return cell


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("lmdb", type=Path, help="a file of tools/folder2lmdb.py or tools/own_data.py")
    add("--samples", type=int, default=12, metavar="N", help="refs on the sheet (%(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="chooses them (%(default)s)")
    add("-o", "--output", type=Path, help="the contact sheet, PNG or JPEG (X.jpg beside X.lmdb)")
    add("--subset", action="store_true", help="a part of a known data set: compare no counts")
    args = parser.parse_args(argv)
    check_at_least(parser, args, samples=0)
    return args


if __name__ == "__main__":
    run_entry_point(main)
