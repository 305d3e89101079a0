"""Score saved masks, of this code or any other, as CRIS, LAVT and ReLA score them."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from pydantic import AliasChoices, BaseModel, Field, StrictInt, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.tester import print_aligned
from tools.refer import draw_segmentation
from utils import metrics
from utils.arguments import check_at_least, text_parser
from utils.config import TestConfig
from utils.errors import UserError, run_entry_point
from utils.logger import progress
from utils.records import RecordReader
from utils.transforms import load_mask

FORM = '{"sent_id": 7, "pred_rle": {"size": [height, width], "counts": ...}}'
EPILOG = f"""example:
  python tools/rescore.py test_refcoco_val.jsonl datasets/lmdb/refcoco/val.lmdb --as cris lavt

a line of the predictions, of each sentence in the LMDB once:
  {FORM}
pred_rle is COCO's RLE at the photo's size; it may be called segmentation or rle too."""

CONVENTIONS = {  # how it scores, who uses it, and what it does
    "cris": (metrics.CRIS, "CRIS, ETRIS, DETRIS", "at the photo's size, Pr@X above X"),
    "lavt": (metrics.LAVT, "LAVT", "squashed to 480 x 480 (an approximation), Pr@X from X"),
    "gres": (metrics.GRES, "ReLA, gRefCOCO", "at the photo's size (ReLA: 480 x 480), Pr@X from X"),
}


class Line(BaseModel):
    """Hold what is read of a sentence's line."""

    sent_id: StrictInt
    rle: dict = Field(validation_alias=AliasChoices("pred_rle", "segmentation", "rle"))


def main(argv: Sequence[str] | None = None) -> None:
    """Read the predictions, score them by each convention, print one table."""
    args = _parse_args(argv)
    reader, beside = RecordReader(args.lmdb), args.predictions.with_suffix(".json")
    scores = rescore(args, reader)
    print("{dataset} {split}: {sentences:,} sentences, in per cent".format(**reader.meta))
    print_scores(scores, args.no_target_pixels)
    with suppress(OSError, ValueError, AttributeError):  # only test.py writes it
        if (pixels := json.loads(beside.read_text()).get("no_target_pixels", 1)) > 1:
            print(f"predictions of {metrics.describe_rule(pixels)} were emptied before saving")


def read_predictions(path: Path) -> dict[int, dict]:
    """Read RLEs by `sent_id`; a `UserError` if a line has none or a sentence is there twice."""
    found: dict[int, dict] = {}
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        try:
            line = Line.model_validate_json(text)
        except ValidationError:
            raise UserError(f"{path}:{number} is not {FORM}") from None
        if line.sent_id in found:
            raise UserError(f"{path}:{number}: sent_id {line.sent_id} is there twice")
        found[line.sent_id] = line.rle
    return found


def check_sentences(path: Path, predictions: Mapping[int, dict], reader: RecordReader) -> None:
    """Refuse predictions that are not of exactly the sentences of the records."""
    held = [sent_id for i in range(len(reader)) for sent_id in reader.ref(i).sent_ids]
    if len(held) > len(set(held)):
        raise UserError(f"{reader.path} has a sent_id twice: ids must be unique")
    if alone := predictions.keys() ^ held:
        sent_id, names = min(alone), (path, reader.path)
        has, lacks = names if sent_id in predictions else names[::-1]
        raise UserError(f"{has} has sent_id {sent_id}, {lacks} has not: {len(alone):,} such in all")


def rescore(args: argparse.Namespace, reader: RecordReader) -> dict[str, dict[str, float | None]]:
    """Return the scores of a command line's predictions by each convention."""
    predictions = read_predictions(args.predictions)
    check_sentences(args.predictions, predictions, reader)
    lines: dict[str, list[dict]] = {name: [] for name in args.conventions}
    for ref in map(reader.ref, progress(range(len(reader)), len(reader), "refs")):
        truth = load_mask(ref) > 0
        for sent_id in ref.sent_ids:
            try:
                pred = draw_segmentation(predictions[sent_id], *truth.shape) > 0
            except UserError as error:
                raise UserError(f"{args.predictions}: sent_id {sent_id} has {error}") from None
            for name, own in lines.items():
                pixels = count_pixels(name, pred, truth, args.no_target_pixels)
                own.append(pixels | {"num_targets": ref.num_targets})
    return {
        name: replace(metrics.count_lines(own), convention=CONVENTIONS[name][0]).scores()
        for name, own in lines.items()
    }


def count_pixels(
    convention: str, pred: np.ndarray, truth: np.ndarray, no_target_pixels: int
) -> dict[str, int]:
    """Count one sentence's pixels; masks are (H, W) bool at the photo's size."""
    if convention == "lavt":
        how = {"dsize": (480, 480), "interpolation": cv2.INTER_NEAREST_EXACT}
        pred, truth = (cv2.resize(m.astype(np.uint8), **how) > 0 for m in (pred, truth))
    if convention == "gres":
        pred = pred & (np.count_nonzero(pred) >= no_target_pixels)
    intersection, union = metrics.intersection_and_union(pred, truth)
    area = np.count_nonzero(truth)
    return {"intersection": intersection, "union": union, "target_area": area}


def print_scores(scores: Mapping[str, Mapping[str, float | None]], no_target_pixels: int) -> None:
    """Print a row a convention with who uses it, and below what it does."""
    names = list(dict.fromkeys(name for values in scores.values() for name in values))
    rule = f"N-acc (none: {metrics.describe_rule(no_target_pixels)})"
    rows = [["as", "used by", *(rule if name == "N-acc" else name for name in names)]]
    for convention, values in scores.items():
        cells = (metrics.percent(values[name]) if name in values else "" for name in names)
        rows.append([convention, CONVENTIONS[convention][1], *cells])
    print_aligned(rows, left=2)
    for convention in scores:
        print(f"{convention}: {CONVENTIONS[convention][2]}")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS.jsonl")
    parser.add_argument("lmdb", type=Path, metavar="LMDB", help="the records that were predicted")
    known = {"choices": CONVENTIONS, "default": list(CONVENTIONS), "help": "default: all"}
    parser.add_argument("--as", nargs="+", dest="conventions", **known)
    rule = {"default": TestConfig().no_target_pixels, "help": "gres: fewer are none (%(default)s)"}
    parser.add_argument("--no-target-pixels", type=int, **rule)
    args = parser.parse_args(argv)
    check_at_least(parser, args, no_target_pixels=1)
    return args


if __name__ == "__main__":
    run_entry_point(main)
