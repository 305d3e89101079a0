"""Write the masks that a trained model finds in your photos, pictures of them, and measures."""

import argparse
import json
import sys
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from loguru import logger
from PIL import Image
from pydantic import BaseModel, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.predictor import Prediction, Predictor, check_sentence
from utils.arguments import model_parser, parse_with_opts
from utils.config import load_config
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import progress, setup_logging
from utils.photos import read_photo
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

Questions = Mapping[Path, Sequence[str]]  # the sentences that are asked of each photo


class Question(BaseModel):
    """Hold a line of `--jsonl`."""

    image: str
    sentence: str


def main(argv: Sequence[str] | None = None) -> None:
    """Read what is asked, answer it photo by photo, print a line an answer."""
    args = _parse_args(argv)
    questions = read_questions(args)
    setup_logging(None, is_main=True)
    for sentence in {sentence for asked in questions.values() for sentence in asked}:
        check_sentence(sentence)
    predictor = Predictor(load_config(args.config, args.opts), args.weights)
    records, failed = answer(predictor, questions, args.output)
    for record in records:
        print(describe_answer(record))
    if records:
        print(f"\n{len(records)} masks and overlays are in {args.output}")
    if failed:
        raise UserError(f"{failed} of {len(questions)} photos could not be read, see above")


def read_questions(args: argparse.Namespace) -> Questions:
    """Return what the command line asks; raise UserError for no photos or a malformed line."""
    if args.jsonl is not None:
        return _read_lines(args.jsonl)
    if not args.image.is_dir():
        return {args.image: args.text}
    photos = sorted(p for p in args.image.iterdir() if p.suffix.lower() in SUFFIXES)
    if not photos:
        raise UserError(f"{args.image} holds no photos ({', '.join(sorted(SUFFIXES))})")
    return dict.fromkeys(photos, args.text)


def _read_lines(path: Path) -> Questions:
    """Read a JSON Lines file; lines of a photo need not follow each other."""
    questions: dict[Path, list[str]] = {}
    for number, line in enumerate(path.read_bytes().removeprefix(BOM_UTF8).splitlines(), 1):
        if line.strip():
            try:
                question = Question.model_validate_json(line)
            except ValidationError:
                form = '{"image": "path", "sentence": "text"}'
                raise UserError(f"{path}: line {number} is not {form} in UTF-8") from None
            questions.setdefault(path.parent / question.image, []).append(question.sentence)
    if not questions:
        raise UserError(f"{path} has no lines")
    return questions


def answer(predictor: Predictor, questions: Questions, folder: Path) -> tuple[list[dict], int]:
    """Write the answers to all questions; a photo that cannot be read is told of and left out.

    Returns:
        What the JSON files hold, and how many photos could not be read; an only one is an error.
    """
    names: Counter[str] = Counter()
    records, failed = [], 0
    for path, sentences in progress(questions.items(), len(questions), "photos"):
        try:
            photo = read_photo(path)
        except (UserError, OSError) as error:
            if len(questions) == 1:
                raise
            logger.error(str(error))
            failed += 1
            continue
        encoded = predictor.encode(photo)
        for sentence in sentences:  # one at a time: the maps of a large photo are large
            (found,) = predictor(encoded, sentence)
            name = f"{file_stem(path.stem)}-{file_stem(sentence)}"
            names[name.casefold()] += 1  # no answer overwrites another
            if (number := names[name.casefold()]) > 1:
                name = f"{name}-{number}"
            records.append(write_answer(predictor, photo, found, path, folder, name))
    return records, failed


def write_answer(
    predictor: Predictor, photo: np.ndarray, found: Prediction, image: Path, folder: Path, name: str
) -> dict:
    """Write one prediction's three files, the JSON last, and return what that holds.

    Args:
        photo: (H, W, 3) uint8 RGB, read from `image`.
    """
    mask, shown = f"{name}.mask.png", f"{name}.overlay.png"
    save_picture(Image.fromarray(found.mask.astype(np.uint8) * 255), folder / mask)
    save_picture(Image.fromarray(overlay(photo, found.mask, PRED_COLOR)), folder / shown)
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
        "mask": mask,
        "overlay": shown,
    }
    with atomic_path(folder / f"{name}.json") as partial:
        text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
        partial.write_text(text, "utf-8", "backslashreplace")  # as JSON has bytes of a name, too
    return record


def describe_answer(record: Mapping) -> str:
    """Say in a line what was found; texts are quoted, since a terminal obeys some characters."""
    found = "nothing found"
    if record["box"] is not None:
        share = record["area"] / (record["height"] * record["width"])
        found = f"{record['area']} pixels, {share:.1%} of the photo, box {record['box']}, "
        found += f"mean probability {record['mean_probability']:.2f}"
    cut = "; the sentence is too long, its end was not read" if record["is_cut"] else ""
    return f"{Path(record['image']).name!r} {record['sentence'][:80]!r}: {found}{cut}"


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, EPILOG)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", type=Path, metavar="PATH", help="a photo, or a folder of photos")
    what.add_argument("--jsonl", type=Path, metavar="FILE", help="photos and sentences, one a line")
    parser.add_argument("--text", action="append", default=[], help="a sentence; may be repeated")
    parser.add_argument("-o", "--output", type=Path, default="predictions", metavar="DIR",
        help="default: %(default)s")  # fmt: skip
    args = parse_with_opts(parser, argv)
    if args.image is not None and not args.text:
        parser.error('--image needs a sentence: --text "the man on the left"')
    if args.jsonl is not None and args.text:
        parser.error("--jsonl holds the sentences: leave --text out")
    return args


if __name__ == "__main__":
    run_entry_point(main)
