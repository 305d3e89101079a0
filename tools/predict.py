"""Write the masks that a trained model finds in your photos, pictures of them, and measures."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from loguru import logger
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.predictor import Prediction, Predictor, check_sentence
from utils.config import load_config
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import progress, setup_logging
from utils.photos import read_photo
from utils.tokenizer import token_lengths
from utils.visualize import PRED_COLOR, file_stem, overlay, save_picture

EPILOG = """examples:
  python tools/predict.py --config config/refcoco/cris_r50.yaml --weights best_model.pth \\
      --image photo.jpg --text "the man on the left" --text "red umbrella"
  python tools/predict.py --config exp/refcoco/CRIS_R50/config.yaml --image photos/ --text dog
  python tools/predict.py --config ... --jsonl asked.jsonl -o answers

writes for each photo and sentence, at the photo's size:
  <photo>-<sentence>.mask.png      white where the sentence points
  <photo>-<sentence>.overlay.png   the photo with the mask over it
  <photo>-<sentence>.json          image, sentence, area, box, mean probability, threshold, ...

a line of --jsonl: {"image": "photos/7.jpg", "sentence": "the red mug"}; relative paths start at the
folder of the file"""

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif"}
PIXELS_AT_ONCE = 50_000_000  # of maps that are in memory together
LONGEST_TABLE = 50  # rows


class Task(NamedTuple):
    """A photo with the sentences that are asked of it."""

    image: Path
    sentences: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Read what is asked, answer it photo by photo, print a table."""
    args = _parse_args(argv)
    tasks = read_tasks(args)
    setup_logging(None, is_main=True)
    for sentence in {sentence for task in tasks for sentence in task.sentences}:
        check_sentence(sentence)
    predictor = Predictor(load_config(args.config, args.opts), args.weights)
    records, failed = answer(predictor, tasks, args.output)
    if records:
        print_table(records)
        print(f"\n{len(records)} masks and overlays are in {args.output}")
    if failed:
        raise UserError(f"{failed} of {len(tasks)} photos could not be read, see above")


def read_tasks(args: argparse.Namespace) -> list[Task]:
    """Return the photos and sentences that the command line names.

    Raises:
        UserError: there is no such folder or file, or a line of it is malformed.
    """
    if args.jsonl is not None:
        asked: dict[Path, list[str]] = {}  # lines of a photo need not follow each other
        for image, sentence in _read_lines(args.jsonl):
            asked.setdefault(image, []).append(sentence)
        return [Task(image, sentences) for image, sentences in asked.items()]
    if not args.image.is_dir():
        return [Task(args.image, args.text)]
    photos = sorted(p for p in args.image.iterdir() if p.suffix.lower() in SUFFIXES)
    if not photos:
        raise UserError(f"{args.image} holds no photos ({', '.join(sorted(SUFFIXES))})")
    return [Task(photo, args.text) for photo in photos]


def _read_lines(path: Path) -> Iterator[tuple[Path, str]]:
    """Yield the photo and the sentence of each line of a JSON Lines file."""
    if not path.is_file():
        raise UserError(f"--jsonl: there is no file {path}")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from None
    filled = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise UserError(f"{path} has no lines")
    for number, line in filled:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is no JSON ({error})") from None
        fields = [entry.get(k) for k in ("image", "sentence")] if isinstance(entry, dict) else []
        if len(fields) != 2 or not all(isinstance(field, str) for field in fields):
            raise UserError(f'{path}: line {number} is not {{"image": "path", "sentence": "text"}}')
        yield path.parent / fields[0], fields[1]


def answer(predictor: Predictor, tasks: Sequence[Task], folder: Path) -> tuple[list[dict], int]:
    """Write the answers to all tasks; a photo that cannot be read is told of and left out.

    Returns:
        What was written to the JSON files, and how many photos could not be read.
    Raises:
        UserError: the only photo cannot be read.
    """
    names, records, failed, told = Names(), [], 0, set()
    for task in progress(tasks, len(tasks), "photos"):
        try:
            photo = read_photo(task.image, predictor.max_pixels)
        except (UserError, OSError) as error:
            if len(tasks) == 1:
                raise
            logger.error(str(error))
            failed += 1
            continue
        for found in _found(predictor, photo, task.sentences):
            if found.is_cut and found.sentence not in told:
                _tell_cut(predictor, found.sentence)
                told.add(found.sentence)
            name = names.of(task.image, found.sentence)
            records.append(write_answer(predictor, photo, found, task.image, folder / name))
    return records, failed


def _found(
    predictor: Predictor, photo: np.ndarray, sentences: Sequence[str]
) -> Iterable[Prediction]:
    """Yield predictions of one photo, encoded once, as many in memory as its size allows."""
    encoded = predictor.encode(photo)
    count = max(1, PIXELS_AT_ONCE // (photo.shape[0] * photo.shape[1]))
    for start in range(0, len(sentences), count):
        yield from predictor(encoded, sentences[start : start + count])


def _tell_cut(predictor: Predictor, sentence: str) -> None:
    (length,) = token_lengths(sentence)
    logger.warning(
        f"“{_short(sentence, 60)}” has {length} tokens, the model reads "
        f"{predictor.config.TRAIN.word_len} (TRAIN.word_len): its end was not read"
    )


class Names:
    """Names of answers, no two alike in a run."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, image: Path, sentence: str) -> str:
        """Return `<photo>-<sentence>`, with a number if another answer is called so."""
        base = name = f"{file_stem(image.stem)}-{file_stem(sentence)}"
        number = 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{base}-{number}"
        self._taken.add(name.casefold())
        return name


def write_answer(
    predictor: Predictor, photo: np.ndarray, found: Prediction, image: Path, stem: Path
) -> dict:
    """Write one prediction's three files, each whole or not at all; the JSON last.

    Args:
        photo: (H, W, 3) uint8 RGB.
        image: where the photo is from.
        stem: path of the files without their suffixes.
    Returns:
        What the JSON holds.
    """
    mask_path, overlay_path, json_path = (
        stem.with_name(stem.name + suffix) for suffix in (".mask.png", ".overlay.png", ".json")
    )
    save_picture(Image.fromarray(found.mask.astype(np.uint8) * 255), mask_path)
    save_picture(Image.fromarray(overlay(photo, found.mask, PRED_COLOR)), overlay_path)
    record = {
        "image": str(image),
        "sentence": found.sentence,
        "height": photo.shape[0],
        "width": photo.shape[1],
        "area": found.area,
        "box": found.box,
        "mean_probability": found.mean_probability,
        "threshold": found.threshold,
        "protocol": predictor.protocol,
        "is_cut": found.is_cut,
        "weights": predictor.weights,
        "mask": mask_path.name,
        "overlay": overlay_path.name,
    }
    with atomic_path(json_path) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return record


def print_table(records: Sequence[dict]) -> None:
    """Print a row an answer: share of the photo, box, mean probability."""
    heads = ["photo", "sentence", "area", "of photo", "box (x1 y1 x2 y2)", "mean prob."]
    rows = [
        [
            _short(Path(r["image"]).name, 30),
            _short(r["sentence"], 40),
            f"{r['area']}",
            f"{100 * r['area'] / (r['height'] * r['width']):.1f} %",
            " ".join(map(str, r["box"])) if r["box"] else "nothing found",
            f"{r['mean_probability']:.2f}" if r["box"] else "",
        ]
        for r in records[:LONGEST_TABLE]
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    for row in [heads, *rows]:
        left = [cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        print("  ".join(left + right).rstrip())
    if len(records) > LONGEST_TABLE:
        print(f"... and {len(records) - LONGEST_TABLE} more")


def _short(text: str, limit: int) -> str:
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the model's YAML file")
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint (default: TEST.weights, or the run's best)"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="PATH", help="a photo, or a folder of photos")
    what.add_argument("--jsonl", type=Path, metavar="FILE", help="photos and sentences, one a line")
    parser.add_argument("--text", action="append", default=[], help="a sentence; may be repeated")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("predictions"), metavar="DIR",
        help="default: predictions",
    )  # fmt: skip
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="override config values; last on the line, such as --opts TEST.threshold 0.5",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.image is not None and not args.text:
        parser.error('--image needs a sentence: --text "the man on the left"')
    if args.jsonl is not None and args.text:
        parser.error("--jsonl holds the sentences: leave --text out")
    return args


if __name__ == "__main__":
    run_entry_point(main)
