"""Convert REFER files into a JSON a split and a mask PNG a ref, as the release lays them out."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.refer import Ref, Refer
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path, staging_folder
from utils.tokenizer import token_lengths

EPILOG = """examples:
  python tools/data_process.py --data_root datasets/refer --output_dir datasets \\
      --dataset refcoco --split unc --generate_mask
  python tools/data_process.py --data_root datasets/refer --output_dir datasets \\
      --dataset refcocog --split umd --generate_mask --name refcocog_u

reads   DATA_ROOT/DATASET/refs(SPLIT).p and DATA_ROOT/DATASET/instances.json
writes  OUTPUT_DIR/anns/NAME/<split>.json and OUTPUT_DIR/masks/NAME/<ref_id>.png; JSON files of
        other splits in that folder are removed
next    python tools/folder2lmdb.py (tools/prepare_datasets.md has every command)"""

# Rows as they are: smaller for masks, and read twice as fast as OpenCV's default, differences.
_PNG_OPTIONS = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]

# Known folders have these splits, whatever names their files use (testAB, say).
_PLAIN_SPLITS = ("train", "val", "test")
_UNC_SPLITS = ("train", "val", "testA", "testB")
SPLITS_OF = {
    ("refcoco", "unc"): _UNC_SPLITS,
    ("refcoco", "google"): _PLAIN_SPLITS,
    ("refcoco+", "unc"): _UNC_SPLITS,
    ("refcocog", "umd"): _PLAIN_SPLITS,
    ("refcocog", "google"): _PLAIN_SPLITS,
    ("refclef", "unc"): (*_UNC_SPLITS, "testC"),
    ("refclef", "berkeley"): _PLAIN_SPLITS,
}
# Images whose files do not fit their annotations; the release leaves them out as well.
IMAGES_SKIPPED = {"refclef": frozenset({19579, 17975, 19575})}


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare every split of a REFER folder and print what was found in it."""
    args = _parse_args(argv)
    name = args.name or args.dataset
    refer = Refer(args.data_root, args.dataset, args.split)
    splits = SPLITS_OF.get((args.dataset, args.split)) or refer.split_names()
    skipped = IMAGES_SKIPPED.get(args.dataset, frozenset())

    by_split = {
        split: [ref for ref in refer.split_refs(split) if ref["image_id"] not in skipped]
        for split in splits
    }
    if not any(by_split.values()):
        raise UserError(
            f"{refer.refs_path} has no refs of {', '.join(splits)}; its splits: "
            f"{', '.join(refer.split_names())}"
        )
    # Entries come first and are quick to make: bad annotations show before anything is written.
    entries = {split: [make_entry(refer, ref) for ref in by_split[split]] for split in splits}
    if args.generate_mask:
        refs = {ref["ref_id"]: ref for split in splits for ref in by_split[split]}
        _write_masks(refer, refs, args.output_dir / "masks" / name)
    anns = args.output_dir / "anns" / name
    for path in sorted(anns.glob("*.json")):
        if not entries.get(path.stem):
            path.unlink()
            print(f"removed {path}: of an earlier run, whose masks are not those of this one")
    for split, items in entries.items():
        if items:
            with atomic_path(anns / f"{split}.json") as partial:
                partial.write_text(json.dumps(items), encoding="utf-8")

    print(f"{args.dataset} ({args.split}) -> {anns}")
    print(summary(entries))
    if name == "refcocog":
        print(
            "note: the configs call the two G-Ref splits refcocog_u (umd) and refcocog_g (google): "
            "pass --name, or rename the folders in anns and masks"
        )


def make_entry(refer: Refer, ref: Ref) -> dict:
    """Make a ref's entry of the split's JSON; bbox is [x1, y1, x2, y2] in whole pixels."""
    x, y, width, height = map(int, refer.annotation(ref)["bbox"])
    return {
        "bbox": [x, y, x + width, y + height],
        "cat": refer.category(ref),
        "segment_id": ref["ref_id"],
        "img_name": refer.image(ref)["file_name"],
        "sentences": [
            {"idx": idx, "sent_id": sentence["sent_id"], "sent": sentence["sent"].strip()}
            for idx, sentence in enumerate(ref["sentences"])
        ],
        "sentences_num": len(ref["sentences"]),
    }


def summary(entries: Mapping[str, Sequence[dict]]) -> str:
    """Return a table of counts, a row a split, and the lengths of all sentences in tokens."""
    lines = [f"{'split':<8}{'refs':>8}{'sentences':>11}{'images':>8}"]
    histogram: Counter[int] = Counter()
    for split, items in entries.items():
        texts = [sentence["sent"] for item in items for sentence in item["sentences"]]
        histogram.update(token_lengths(texts))
        images = len({item["img_name"] for item in items})
        note = "" if items else "   no refs: nothing written"
        lines.append(f"{split:<8}{len(items):>8}{len(texts):>11}{images:>8}{note}")
    return "\n".join([*lines, token_length_summary(histogram)])


def token_length_summary(histogram: Mapping[int, int]) -> str:
    """Return how long the sentences are, and how many each published `word_len` cuts."""
    counts = "  ".join(f"{length}:{histogram[length]}" for length in sorted(histogram))
    cut = {k: sum(n for length, n in histogram.items() if length > k) for k in (17, 22)}
    return (
        f"sentences by tokens, start and end included (tokens:sentences): {counts}\n"
        f"cut at word_len 17: {cut[17]}, at 22: {cut[22]}, of {sum(histogram.values())} sentences"
    )


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode a mask of (height, width) uint8 as a PNG."""
    return cv2.imencode(".png", mask, _PNG_OPTIONS)[1].tobytes()


def _write_masks(refer: Refer, refs: Mapping[int, Ref], folder: Path) -> None:
    """Draw all masks beside `folder`, then move them in: a bad annotation leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    with staging_folder(folder) as staging:
        for ref_id, ref in tqdm(
            refs.items(), desc=f"masks {folder.name}", unit="ref", disable=None
        ):
            try:
                (staging / f"{ref_id}.png").write_bytes(encode_mask(refer.mask(ref)))
            except OSError as error:  # writing names no file
                error.filename = str(folder / f"{ref_id}.png")
                raise
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_root", type=Path, required=True, help="folder that holds the REFER folders")
    add("--output_dir", type=Path, required=True, help="folder for anns/ and masks/")
    add(
        "--dataset",
        default="refcoco",
        help="refcoco, refcoco+, refcocog, refclef, or any folder of that layout (%(default)s)",
    )
    add(
        "--split",
        default="umd",
        help="who split it: unc, umd, google, berkeley, ...; refs(SPLIT).p is read (%(default)s)",
    )
    add("--generate_mask", action="store_true", help="write the mask PNGs as well")
    add("--name", help="name of the output folders (the dataset's), such as refcocog_u")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_entry_point(main)
