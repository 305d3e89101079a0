"""Compare two models sentence by sentence: who won, where, and is it more than luck?"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.report.pages import (
    PHOTOS,
    Scored,
    choose_shown,
    mask_data,
    report_data,
    write_page,
    write_pictures,
)
from engine.report.statistics import outcomes, paired_bootstrap
from engine.tester import print_aligned
from utils.arguments import check_at_least
from utils.errors import UserError, run_entry_point
from utils.metrics import count_lines, percent
from utils.records import RecordReader
from utils.visualize import file_stem

EPILOG = """example:
  python tools/compare_runs.py exp/refcoco/r50/test_refcoco_val.jsonl \\
      exp/refcoco/r101/test_refcoco_val.jsonl -o r101_against_r50

A and B are what test.py wrote for two checkpoints on one split; the .json of the same name lies
beside each. The difference is B minus A. Its interval is a paired bootstrap over photos: a photo is
drawn with all its sentences, since these are not independent of each other."""

MARGIN = 0.01  # of IoU: closer than that is a tie
DRAWS, LEVEL = 10_000, 0.95
# What two results must share for their numbers to be comparable.
SAME = ("dataset", "split")
SAME_PROTOCOL = ("protocol", "threshold", "no_target_pixels", "swapped_sentences")


class Line(BaseModel):
    """Holds what is read of a sentence's record."""

    model_config = ConfigDict(strict=True)

    ref_id: int
    sent_id: int
    sentence: str
    image: str
    category: int | None
    height: int
    width: int
    target_area: int
    intersection: int
    union: int
    iou: float
    pred_rle: dict
    num_targets: int = 1


class Result(BaseModel):
    """Holds what the scores and the way they were made must name; all else is kept too."""

    model_config = ConfigDict(strict=True, extra="allow")

    dataset: str
    split: str
    protocol: str
    threshold: float
    swapped_sentences: bool
    no_target_pixels: int | None = None
    checkpoint: str
    refs: int
    ceiling: dict
    lmdb: str | None = None
    records: str | None = None  # their digest


def main(argv: Sequence[str] | None = None) -> None:
    """Print who won, and write the page."""
    args = _parse_args(argv)
    first, second = load_results(args.first, args.second)
    check_same(args.first, first.result, args.second, second.result, args.any_protocol)
    second = align(args.first, first, args.second, second)
    numbers = compare(first, second, args.margin, args.seed)
    print_comparison(first, second, numbers)
    name = "_".join(file_stem(model.name) for model in (first, second))
    folder = args.output or args.second.parent / f"comparison_{name}"
    lmdb = find_lmdb(args.lmdb, [first.result, second.result])
    write(folder, [first, second], numbers, lmdb, args)
    print(f"\nopen {folder / 'index.html'} in a browser to look at them")


def load_results(*paths: Path) -> list[Scored]:
    """Read each `.jsonl` and the `.json` beside it.

    Models are called by the folders of their runs; two of one run by what tells their files apart.

    Raises:
        UserError: a file is missing, or is not what test.py writes.
    """
    contents = [(read_lines(path), read_result(path.with_suffix(".json"))) for path in paths]
    names = [path.resolve().parent.name for path in paths]
    if len(set(names)) < len(names):
        names = [result["protocol"] for _, result in contents]
    if len(set(names)) < len(names):
        names = list("AB")
    models = []
    for name, (lines, result) in zip(names, contents, strict=True):
        models.append(Scored(name, {**result, **count_lines(lines).scores()}, lines))
    return models


def read_result(path: Path) -> dict:
    """Read the scores and how they were made."""
    if not path.is_file():
        raise UserError(
            f"{path} is not there; test.py writes it beside the .jsonl, to say how that was made"
        )
    return _checked(Result, path.read_bytes(), str(path))


def read_lines(path: Path) -> list[dict]:
    """Read the records of all sentences."""
    if path.suffix != ".jsonl":
        raise UserError(f"{path} is no .jsonl: name the file with a line a sentence")
    with path.open("rb") as file:
        lines = [_checked(Line, text, f"{path}:{number}") for number, text in enumerate(file, 1)]
    if not lines:
        raise UserError(f"{path} has no sentences")
    return lines


def _checked(model: type[BaseModel], text: bytes, where: str) -> dict:
    try:
        return model.model_validate_json(text).model_dump()
    except ValidationError as error:
        fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        raise UserError(f"{where} is no JSON: run test.py again")
    name = fault["loc"][0] if fault["loc"] else "object"
    raise UserError(f"{where} has no usable {name}: test.py did not write it")


def check_same(
    path_a: Path, a: Mapping, path_b: Path, b: Mapping, any_protocol: bool = False
) -> None:
    """Refuse results on other data, or, unless that is meant, made in another way.

    Raises:
        UserError: they differ.
    """
    for name in SAME + (() if any_protocol else SAME_PROTOCOL):
        if a[name] != b[name]:
            how = "" if name in SAME else "; if that is meant, add --any-protocol"
            raise UserError(
                f"{path_a} has {name} {a[name]}, {path_b} has {b[name]}: "
                f"their scores do not compare{how}"
            )


def align(path_a: Path, a: Scored, path_b: Path, b: Scored) -> Scored:
    """B with its sentences in A's order.

    Raises:
        UserError: they have different sentences, or the same sentences of other objects.
    """
    lines_a, lines_b = by_sentence(path_a, a.lines), by_sentence(path_b, b.lines)
    for here, there, extra in (
        (path_a, path_b, lines_a.keys() - lines_b.keys()),
        (path_b, path_a, lines_b.keys() - lines_a.keys()),
    ):
        if extra:
            raise UserError(
                f"not the same sentences: {len(extra):,} of {here} are not in {there}, such as "
                f"{_describe((lines_a | lines_b)[min(extra)])}; score both on the same records"
            )
    for key, line in lines_a.items():
        for name in ("sentence", "image", "height", "width", "target_area", "num_targets"):
            if line[name] != lines_b[key][name]:
                raise UserError(
                    f"not the same records: {_describe(line)} has {name} {line[name]!r:.60} in "
                    f"{path_a} and {lines_b[key][name]!r:.60} in {path_b}"
                )
    return replace(b, lines=[lines_b[key] for key in lines_a])


def by_sentence(path: Path, lines: Sequence[Mapping]) -> dict[tuple[int, int], Mapping]:
    """Records by (ref_id, sent_id)."""
    found: dict[tuple[int, int], Mapping] = {}
    for line in lines:
        key = line["ref_id"], line["sent_id"]
        if key in found:
            raise UserError(f"{path} has {_describe(line)} twice")
        found[key] = line
    return found


def _describe(line: Mapping) -> str:
    return f"ref {line['ref_id']}, sentence {line['sent_id']} (“{line['sentence']:.60}”)"


def compare(first: Scored, second: Scored, margin: float = MARGIN, seed: int = 0) -> dict:
    """Count who won, and give all metrics' differences with intervals, as the page takes them."""
    a, b = count_lines(first.lines), count_lines(second.lines)
    photos = [line["image"] for line in first.lines]
    verdicts = outcomes(a, b, margin).tolist()
    return {
        "margin": margin,
        "won": verdicts.count(1),
        "lost": verdicts.count(-1),
        "tied": verdicts.count(0),
        "images": len(set(photos)),
        "draws": DRAWS,
        "level": LEVEL,
        "seed": seed,
        "intervals": paired_bootstrap(a, b, photos, DRAWS, LEVEL, seed),
    }


def print_comparison(first: Scored, second: Scored, numbers: Mapping) -> None:
    """Print both models' scores, the differences with their intervals, and who won."""
    what = first.result
    print(
        f"{what['dataset']} {what['split']}: {len(first.lines):,} sentences on "
        f"{numbers['images']:,} photos, in per cent"
    )
    names = list(numbers["intervals"])
    intervals = numbers["intervals"].values()
    rows = [["", *names]]
    for letter, model in zip("AB", (first, second), strict=True):
        label = letter if model.name == letter else f"{letter}: {model.name}"
        rows.append([label, *(percent(model.result[name]) for name in names)])
    rows.append(["B − A", *(f"{100 * i.difference:+.2f}" for i in intervals)])
    rows.append([f"{100 * LEVEL:.0f} % interval from", *(f"{100 * i.low:+.2f}" for i in intervals)])
    rows.append(["  to", *(f"{100 * i.high:+.2f}" for i in intervals)])
    print_aligned(rows, left=1)
    print(
        f"B won {numbers['won']:,}, lost {numbers['lost']:,}, tied {numbers['tied']:,} "
        f"(IoU within {numbers['margin']:g})"
    )


def find_lmdb(given: Path | None, results: Sequence[Mapping]) -> Path:
    """The records that were scored, whose photos the page shows.

    Raises:
        UserError: they are not where the results say.
    """
    if given:
        return given
    named = [Path(result["lmdb"]) for result in results if result.get("lmdb")]
    for path in named:
        if path.is_file():
            return path
    where = f"they are not in {named[0]}" if named else "the results do not say where they are"
    raise UserError(f"no page without the photos, and {where}: name the LMDB with --lmdb")


def write(
    folder: Path, models: Sequence[Scored], numbers: Mapping, lmdb: Path, args: argparse.Namespace
) -> None:
    """Write the page and its photos.

    Raises:
        UserError: the LMDB is of other data than the results, or cannot be read.
    """
    reader = RecordReader(lmdb)
    held, wanted = ([what[name] for name in SAME] for what in (reader.meta, models[0].result))
    if held != wanted:
        raise UserError(f"{lmdb} holds {' '.join(held)}, the results are of {' '.join(wanted)}")
    scored = {model.result["records"] for model in models} - {None}  # older results do not say
    if scored and reader.digest() not in scored:
        raise UserError(f"{lmdb} holds other records than were scored: name those with --lmdb")
    shown = choose_shown(models[1].lines, args.limit)
    lines = [models[0].lines[place] for place in shown]
    pictures = write_pictures(reader, lines, folder / PHOTOS, args.photo_size)
    data = report_data(models, shown, pictures, photos_folder=f"{PHOTOS}/")
    data["comparison"] = numbers
    write_page(folder, data, mask_data(models, shown, pictures))


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, metavar="A.jsonl", help="predictions of one model")
    parser.add_argument("second", type=Path, metavar="B.jsonl", help="and of the other")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR",
        help="folder of the page (default: comparison_<A>_<B> beside B.jsonl)",
    )  # fmt: skip
    parser.add_argument(
        "--lmdb", type=Path, metavar="FILE", help="records (default: those that B.json names)"
    )
    parser.add_argument(
        "--margin", type=float, default=MARGIN, help="IoU within which it is a tie (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    parser.add_argument(
        "--limit", type=int, help="at most so many sentences to look at (default: all)"
    )
    parser.add_argument(
        "--photo-size", type=int, default=384, help="longest side in pixels (%(default)s)"
    )
    parser.add_argument(
        "--any-protocol", action="store_true", help="compare results of different protocols"
    )
    args = parser.parse_args(argv)
    check_at_least(parser, args, margin=0, limit=1, photo_size=1)
    return args


if __name__ == "__main__":
    run_entry_point(main)
