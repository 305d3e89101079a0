"""Convert REFER files into a JSON a split and a mask PNG a ref, as the release lays them out."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.odd_records import OddRecords
from tools.refer import Ref, Refer, refuse_seen
from utils.arguments import text_parser
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path, staging_folder

EPILOG = """examples:
  python tools/data_process.py --data_root datasets/refer --output_dir datasets \\
      --dataset refcoco --split unc --generate_mask
  python tools/data_process.py --data_root datasets/refer --output_dir datasets \\
      --dataset refcocog --split umd --generate_mask --name refcocog_u

reads   DATA_ROOT/DATASET/refs(SPLIT).p, or gRefCOCO's grefs(SPLIT).json, and instances.json there
writes  OUTPUT_DIR/anns/NAME/<split>.json and OUTPUT_DIR/masks/NAME/<ref_id>.png; JSON files of
        other splits in that folder are removed; <split>.odd lists what --skip-odd has left out
next    python tools/folder2lmdb.py (tools/prepare_datasets.md has every command)"""

# Rows as they are: smaller for masks, and read twice as fast as OpenCV's default, differences.
_PNG_OPTIONS = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]

# Where refs may name other splits (testAB, say). Elsewhere the splits are those that refs name.
SPLITS_OF = {
    ("refclef", "unc"): ("train", "val", "testA", "testB", "testC"),
    ("grefcoco", "unc"): ("train", "val", "testA", "testB"),
}
# Images whose files do not fit their annotations; the release leaves them out as well.
IMAGES_SKIPPED = {"refclef": frozenset({19579, 17975, 19575})}


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare every split of a REFER folder and print what was found in it."""
    args = _parse_args(argv)
    odd = OddRecords(args.skip_odd, args.empty == "skip")
    refer = Refer(args.data_root, args.dataset, args.split, odd)
    entries = convert(refer, _refs_by_split(refer, args, odd), args, odd)
    anns = args.output_dir / "anns" / args.name
    files = {anns / f"{split}.json": json.dumps(items) for split, items in entries.items() if items}
    lists = {anns / f"{split}.odd": "\n".join(odd.of_split(split)) for split in entries}
    files |= {path: lines for path, lines in lists.items() if lines}
    for path in sorted({*anns.glob("*.json"), *anns.glob("*.odd")} - files.keys()):
        path.unlink()
        print(f"removed {path}: of an earlier run, whose masks are not those of this one")
    with ExitStack() as stack:  # no split appears before all are written
        for path, text in files.items():
            stack.enter_context(atomic_path(path)).write_text(text, encoding="utf-8")
    print(f"{args.dataset} ({args.split}) -> {anns}")
    print(summary(entries))
    if args.name == "refcocog":
        print("note: the configs call it refcocog_u (umd) or refcocog_g (google): pass --name")


def _refs_by_split(refer: Refer, args: argparse.Namespace, odd: OddRecords) -> dict[str, list[Ref]]:
    """Return the refs of each split, one or more in all; gRefCOCO has no other splits."""
    splits = SPLITS_OF.get((args.dataset, args.split)) or refer.split_names()
    skipped = IMAGES_SKIPPED.get(args.dataset, frozenset())
    by_split = {
        split: [ref for ref in refer.split_refs(split) if ref["image_id"] not in skipped]
        for split in splits
    }
    if not any(by_split.values()):
        odd.settle()
        names = ", ".join(refer.split_names())
        what = f" of {', '.join(splits)}; its splits: {names}" if names else ""
        raise UserError(f"{refer.refs_path} has no refs{what}")
    for ref in refer.refs if refer.refs_path.name.startswith("grefs") else ():
        with odd.catch("unknown split", ref["split"], ref["ref_id"]):
            if ref["split"] not in splits:
                what = f"{refer.refs_path}: ref {ref['ref_id']} is of split {ref['split']!r}"
                raise UserError(f"{what}, not of one of {', '.join(splits)}")
    return by_split


def convert(
    refer: Refer, by_split: Mapping[str, Sequence[Ref]], args: argparse.Namespace, odd: OddRecords
) -> dict[str, list[dict]]:
    """Make the entries of all splits and, if asked for, their masks.

    Masks are drawn beside their folder and moved in at the end: odd records leave none behind.

    Raises:
        UserError: records are odd, and not left out.
    """
    entries: dict[str, list[dict]] = {split: [] for split in by_split}
    seen: dict[str, set[str]] = {split: set() for split in by_split}
    refs = [(split, ref) for split, found in by_split.items() for ref in found]
    masks = args.output_dir / "masks" / args.name
    with staging_folder(masks if args.generate_mask else args.output_dir / args.name) as staging:
        for split, ref in tqdm(refs, desc=args.name, unit="ref", disable=None):
            with odd.catch("malformed record", split, ref["ref_id"]):
                entry = make_entry(refer, ref)
                if args.generate_mask or args.empty:
                    mask = refer.mask(ref, may_be_empty=args.empty == "no-target")
                    entry |= {} if mask.any() else {"num_targets": 0}
                numbers = [f"sent_id {sentence['sent_id']}" for sentence in ref["sentences"]]
                where = f"{refer.refs_path}: ref {ref['ref_id']}"
                refuse_seen(seen[split], numbers, where, "give each sentence a number of its own")
                if args.generate_mask:
                    (staging / f"{ref['ref_id']}.png").write_bytes(encode_mask(mask))
                entries[split].append(entry)
        odd.settle()
        for path in sorted(staging.iterdir()):
            masks.mkdir(parents=True, exist_ok=True)
            os.replace(path, masks / path.name)
    return entries


def make_entry(refer: Refer, ref: Ref) -> dict:
    """Make a ref's entry of the split's JSON; bbox is [x1, y1, x2, y2] in whole pixels.

    Where the ref has not one target, `num_targets` is there as well; without any, bbox is None.
    """
    annotations, bbox = refer.annotations(ref), None
    if annotations:
        boxes = (map(int, item["bbox"]) for item in annotations)
        corners = ((x, y, x + width, y + height) for x, y, width, height in boxes)
        lefts, tops, rights, bottoms = zip(*corners, strict=True)
        bbox = [min(lefts), min(tops), max(rights), max(bottoms)]
    entry = {
        "bbox": bbox,
        "cat": refer.category(ref),
        "segment_id": ref["ref_id"],
        "img_name": refer.image(ref)["file_name"],
        "sentences": [
            {"idx": idx, "sent_id": sentence["sent_id"], "sent": sentence["sent"].strip()}
            for idx, sentence in enumerate(ref["sentences"])
        ],
        "sentences_num": len(ref["sentences"]),
    }
    return entry if len(annotations) == 1 else entry | {"num_targets": len(annotations)}


def summary(entries: Mapping[str, Sequence[dict]]) -> str:
    """Return a table of counts, a row a split."""
    lines = [f"{'split':<8}{'refs':>8}{'sentences':>11}{'images':>8}"]
    for split, items in entries.items():
        sentences = sum(len(item["sentences"]) for item in items)
        images = len({item["img_name"] for item in items})
        note = "" if items else "   no refs: nothing written"
        lines.append(f"{split:<8}{len(items):>8}{sentences:>11}{images:>8}{note}")
    numbers = [item.get("num_targets", 1) for items in entries.values() for item in items]
    return "\n".join([*lines, *target_summary(numbers)])


def target_summary(numbers: Iterable[int]) -> list[str]:
    """Return how many refs mean nothing, one object and several; no line if all mean one."""
    kinds = Counter(min(number, 2) for number in numbers)
    told = f"refs of no target: {kinds[0]:,}, of one: {kinds[1]:,}, of several: {kinds[2]:,}"
    return [told] if set(kinds) - {1} else []


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask of (height, width) uint8 as a PNG."""
    return cv2.imencode(".png", mask, _PNG_OPTIONS)[1].tobytes()


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("--data_root", type=Path, required=True, help="folder that holds the REFER folders")
    add("--output_dir", type=Path, required=True, help="folder for anns/ and masks/")
    known = "refcoco, refcoco+, refcocog, refclef, grefcoco, or any other"
    add("--dataset", default="refcoco", help=f"the REFER folder: {known} (%(default)s)")
    who = "who split it: unc, umd, google, berkeley, ...; refs(SPLIT).p is read (%(default)s)"
    add("--split", default="umd", help=who)
    add("--generate_mask", action="store_true", help="write the mask PNGs as well")
    add("--name", help="name of the output folders (the dataset's), such as refcocog_u")
    add("--skip-odd", action="store_true", help="leave out refs that cannot be used")
    what = "what a segmentation without a pixel means: leave the ref out, or nothing is meant"
    add("--empty", choices=("skip", "no-target"), help=what)
    args = parser.parse_args(argv)
    args.name = args.name or args.dataset
    return args


if __name__ == "__main__":
    run_entry_point(main)
