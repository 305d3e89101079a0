"""Compare two models sentence by sentence: who won, where, and is it more than luck?"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
from engine.report.statistics import counts, outcomes, paired_bootstrap
from engine.tester import print_aligned
from utils.errors import UserError, run_entry_point
from utils.metrics import METRIC_NAMES, summarize
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
SAME_PROTOCOL = ("protocol", "threshold", "swapped_sentences")
FIELDS = {
    "ref_id": int,
    "sent_id": int,
    "sentence": str,
    "image": str,
    "category": int | None,
    "height": int,
    "width": int,
    "target_area": int,
    "intersection": int,
    "union": int,
    "iou": int | float,
    "pred_rle": dict,
}


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
    write(folder, first, second, numbers, lmdb, args)
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
        pixels = ([line[key] for line in lines] for key in ("intersection", "union"))
        models.append(Scored(name, {**result, **summarize(*pixels)}, lines))
    return models


def read_result(path: Path) -> dict:
    """The scores and how they were made."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} is not there; test.py writes it beside the .jsonl, to say how that was made"
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): run test.py again") from None
    needed = (*SAME, *SAME_PROTOCOL, "checkpoint", "refs", "ceiling")
    missing = [name for name in needed if not isinstance(result, dict) or name not in result]
    if missing:
        raise UserError(f"{path} lacks {missing[0]}: it is not what test.py writes")
    return result


def read_lines(path: Path) -> list[dict]:
    """The records of all sentences."""
    if path.suffix != ".jsonl":
        raise UserError(f"{path} is no .jsonl: name the file with a line a sentence")
    lines = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
            except ValueError:
                raise UserError(f"{path}:{number} is no JSON: run test.py again") from None
            wrong = _wrong_field(line)
            if wrong:
                raise UserError(f"{path}:{number} has no usable {wrong}: test.py did not write it")
            lines.append(line)
    if not lines:
        raise UserError(f"{path} has no sentences")
    return lines


def _wrong_field(line: object) -> str | None:
    """The first field that is missing or of another type."""
    if not isinstance(line, dict):
        return "object"
    wrong = (n for n, kind in FIELDS.items() if n not in line or not isinstance(line[n], kind))
    return next(wrong, None)


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
    for here, there, mine, other in (
        (path_a, path_b, lines_a, lines_b),
        (path_b, path_a, lines_b, lines_a),
    ):
        extra = [line for key, line in mine.items() if key not in other]
        if extra:
            raise UserError(
                f"not the same sentences: {len(extra):,} of {here} are not in {there}, "
                f"such as {_describe(extra[0])}; score both on the same records"
            )
    for key, line in lines_a.items():
        for name in ("sentence", "image", "height", "width", "target_area"):
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
    a, b = counts(first.lines), counts(second.lines)
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
    intervals = [numbers["intervals"][name] for name in METRIC_NAMES]
    rows = [["", *METRIC_NAMES]]
    for letter, model in zip("AB", (first, second), strict=True):
        label = letter if model.name == letter else f"{letter}: {model.name}"
        rows.append([label, *(f"{100 * model.result[name]:.2f}" for name in METRIC_NAMES)])
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
    folder: Path,
    first: Scored,
    second: Scored,
    numbers: Mapping,
    lmdb: Path,
    args: argparse.Namespace,
) -> None:
    """Write the page and its photos.

    Raises:
        UserError: the LMDB is of other data than the results, or cannot be read.
    """
    reader, wanted = RecordReader(lmdb), [first.result[name] for name in SAME]
    held = [reader.meta[name] for name in SAME]
    if held != wanted:
        raise UserError(f"{lmdb} holds {' '.join(held)}, the results are of {' '.join(wanted)}")
    shown = choose_shown(second.lines, args.limit)
    lines = [first.lines[place] for place in shown]
    pictures = write_pictures(reader, lines, folder / PHOTOS, args.photo_size)
    models = [first, second]
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
        "--margin", type=_share, default=MARGIN, help="IoU within which it is a tie (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    parser.add_argument(
        "--limit", type=_positive, help="at most so many sentences to look at (default: all)"
    )
    parser.add_argument(
        "--photo-size", type=_positive, default=384, help="longest side in pixels (%(default)s)"
    )
    parser.add_argument(
        "--any-protocol", action="store_true", help="compare results of different protocols"
    )
    return parser.parse_args(argv)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


if __name__ == "__main__":
    run_entry_point(main)
