"""Compare two models sentence by sentence: who won, where, and is it more than luck?"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.report.pages import PHOTOS, Scored, write_page
from engine.report.statistics import outcomes, paired_bootstrap
from engine.tester import print_aligned
from utils.arguments import check_at_least, text_parser
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

DRAWS, LEVEL = 10_000, 0.95  # of the bootstrap
# What two results must share for their numbers to be comparable.
SAME = ("dataset", "split")
SAME_PROTOCOL = ("protocol", "threshold", "no_target_pixels", "swapped_sentences")
# What is read of a sentence's record, and of the scores and the way they were made.
LINE = dict.fromkeys(("ref_id", "sent_id", "height", "width", "target_area"), int)
LINE |= {"intersection": int, "union": int, "iou": int | float, "pred_rle": dict}
LINE |= {"sentence": str, "image": str, "category": int | None}
RESULT = dict.fromkeys(("dataset", "split", "protocol", "checkpoint", "lmdb", "records"), str)
RESULT |= {"threshold": int | float, "swapped_sentences": bool, "refs": int, "ceiling": dict}


def main(argv: Sequence[str] | None = None) -> None:
    """Print who won, and write the page."""
    args = _parse_args(argv)
    paths = args.first, args.second
    models = [read_result(path) for path in paths]
    if models[0].name == models[1].name:  # two results of one run
        names = [model.result["protocol"] for model in models]
        if names[0] == names[1]:
            names = ["A", "B"]
        models = [replace(model, name=name) for model, name in zip(models, names, strict=True)]
    lines = match_lines(paths, models, args.any_protocol)
    models[1] = replace(models[1], lines=lines)
    numbers = compare(*models, args.margin, args.seed)
    print_comparison(models, numbers)
    name = "_".join(file_stem(model.name) for model in models)
    folder = args.output or args.second.parent / f"comparison_{name}"
    reader = find_records(args.lmdb, models)
    look = folder / PHOTOS, args.limit, args.photo_size
    write_page(folder, reader, models, *look, comparison=numbers)
    print(f"\nopen {folder / 'index.html'} in a browser to look at them")


def read_result(path: Path) -> Scored:
    """Read a `.jsonl` and the `.json` beside it; the model is called by the folder of its run.

    Raises:
        UserError: a file is missing, or is not what test.py writes.
    """
    if path.suffix != ".jsonl":
        raise UserError(f"{path} is no .jsonl: name the file with a line a sentence")
    with path.open("rb") as file:
        lines = [_parse(text, LINE, f"{path}:{number}") for number, text in enumerate(file, 1)]
    if not lines:
        raise UserError(f"{path} has no sentences")
    beside = path.with_suffix(".json")
    if not beside.is_file():
        raise UserError(
            f"{beside} is not there; test.py writes it beside the .jsonl, to say how that was made"
        )
    result = _parse(beside.read_bytes(), RESULT, str(beside))
    return Scored(path.resolve().parent.name, result | count_lines(lines).scores(), lines)


def _parse(text: bytes, kinds: Mapping[str, type], where: str) -> dict:
    """Parse an object that must have some names, with values of their kinds."""
    try:
        value = json.loads(text)
    except ValueError:
        raise UserError(f"{where} is no JSON: run test.py again") from None
    for name, kind in kinds.items():
        is_there = isinstance(value, dict) and name in value
        if not is_there or not isinstance(value[name], kind):
            raise UserError(f"{where} has no usable {name}: this test.py did not write it")
    return value


def match_lines(
    paths: Sequence[Path], models: Sequence[Scored], any_protocol: bool
) -> list[Mapping]:
    """Return B's records in the order of A's.

    Raises:
        UserError: they are of other sentences or other objects, or, unless `any_protocol` says
            that this is meant, made in another way.
    """
    a, b = (model.result for model in models)
    for name in SAME + (() if any_protocol else SAME_PROTOCOL):
        if a.get(name) != b.get(name):
            how = "" if name in SAME else "; if that is meant, add --any-protocol"
            raise UserError(
                f"{paths[0]} has {name} {a.get(name)}, {paths[1]} has {b.get(name)}: "
                f"their scores do not compare{how}"
            )
    keyed = [by_sentence(path, model.lines) for path, model in zip(paths, models, strict=True)]
    for here, there in ((0, 1), (1, 0)):
        if extra := keyed[here].keys() - keyed[there].keys():
            raise UserError(
                f"not the same sentences: {len(extra):,} of {paths[here]} are not in "
                f"{paths[there]}, such as {_describe(keyed[here][min(extra)])}; score both on the "
                "same records"
            )
    for key, line in keyed[0].items():
        for name in ("sentence", "image", "height", "width", "target_area", "num_targets"):
            values = [lines[key].get(name) for lines in keyed]
            if values[0] != values[1]:
                raise UserError(
                    f"not the same records: {_describe(line)} has {name} {values[0]!r:.60} in "
                    f"{paths[0]} and {values[1]!r:.60} in {paths[1]}"
                )
    return [keyed[1][key] for key in keyed[0]]


def by_sentence(path: Path, lines: Sequence[Mapping]) -> dict[tuple[int, int], Mapping]:
    """Return the records by (ref_id, sent_id); a `UserError` if one is there twice."""
    found: dict[tuple[int, int], Mapping] = {}
    for line in lines:
        if found.setdefault((line["ref_id"], line["sent_id"]), line) is not line:
            raise UserError(f"{path} has {_describe(line)} twice")
    return found


def _describe(line: Mapping) -> str:
    return f"ref {line['ref_id']}, sentence {line['sent_id']} (“{line['sentence']:.60}”)"


def compare(first: Scored, second: Scored, margin: float, seed: int) -> dict:
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


def print_comparison(models: Sequence[Scored], numbers: Mapping) -> None:
    """Print both models' scores, the differences with their intervals, and who won."""
    what, intervals = models[0].result, numbers["intervals"]
    print(
        f"{what['dataset']} {what['split']}: {len(models[0].lines):,} sentences on "
        f"{numbers['images']:,} photos, in per cent"
    )
    rows = [["", *intervals]]
    for letter, model in zip("AB", models, strict=True):
        label = letter if model.name == letter else f"{letter}: {model.name}"
        rows.append([label, *(percent(model.result[name]) for name in intervals)])
    labels = "B − A", f"{100 * LEVEL:.0f} % interval from", "  to"
    for label, values in zip(labels, zip(*intervals.values(), strict=True), strict=True):
        rows.append([label, *(f"{100 * value:+.2f}" for value in values)])
    print_aligned(rows, left=1)
    print(
        f"B won {numbers['won']:,}, lost {numbers['lost']:,}, tied {numbers['tied']:,} "
        f"(IoU within {numbers['margin']:g})"
    )


def find_records(given: Path | None, models: Sequence[Scored]) -> RecordReader:
    """Open the records that were scored, whose photos the page shows.

    Raises:
        UserError: they are not where the results say, or others are there.
    """
    results = [model.result for model in models]
    named = [given] if given else [Path(result["lmdb"]) for result in results]
    path = next(filter(Path.is_file, named), None)
    if path is None:
        raise UserError(f"the photos are not in {named[0]}: name the LMDB with --lmdb")
    reader = RecordReader(path)
    is_same_split = all(reader.meta[name] == results[0][name] for name in SAME)
    if not is_same_split or reader.digest() not in [result["records"] for result in results]:
        raise UserError(f"{path} holds other records than were scored: name those with --lmdb")
    return reader


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = text_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("first", type=Path, metavar="A.jsonl", help="predictions of one model")
    add("second", type=Path, metavar="B.jsonl", help="and of the other")
    page = "folder of the page (default: comparison_<A>_<B> beside B.jsonl)"
    add("-o", "--output", type=Path, metavar="DIR", help=page)
    add("--lmdb", type=Path, metavar="FILE", help="records (default: those that the .json names)")
    add("--margin", type=float, default=0.01, help="IoU within which it is a tie (%(default)s)")
    add("--seed", type=int, default=0, help="of the bootstrap (%(default)s)")
    add("--limit", type=int, help="at most so many sentences to look at (default: all)")
    add("--photo-size", type=int, default=384, help="longest side in pixels (%(default)s)")
    add("--any-protocol", action="store_true", help="compare results of different protocols")
    args = parser.parse_args(argv)
    check_at_least(parser, args, margin=0, limit=1, photo_size=1)
    return args


if __name__ == "__main__":
    run_entry_point(main)
