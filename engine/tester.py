"""What test.py does with a split: score it, write the scores down, a report of them and pictures,
print the table.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from loguru import logger
from torch import nn

from engine.evaluator import (
    SentenceScore,
    evaluate,
    scoring_protocols,
    summarize_ceiling,
    summarize_scores,
)
from engine.loaders import build_evaluation_loader
from engine.pictures import draw_sentence
from engine.report import pages
from utils.config import Config
from utils.dataset import EvaluationDataset
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import atomic_path
from utils.logger import progress
from utils.metrics import describe_rule, main_metric, percent
from utils.records import RecordReader
from utils.transforms import PROTOCOLS
from utils.visualize import file_stem, save_picture

REPORT = "report"  # folder in that of the run


class Scored(NamedTuple):
    """Holds what a split was scored as: a result and the lines of its sentences, by protocol."""

    dataset: EvaluationDataset
    results: list[dict]
    lines: list[list[SentenceScore]]


def find_records(cfg: Config, weights: str) -> list[str]:
    """Return the LMDB paths of all that TEST asks for; `TEST.splits` lie beside `TEST.test_lmdb`.

    What holds another data set or split than the config names is scored all the same, and told.

    Raises:
        UserError: one of them cannot be read, two hold the same split, whose files would have the
            same names, or the run has scores of other records under such a name; told before the
            first is scored.
    """
    named = Path(cfg.TEST.test_lmdb)
    paths = {split: str(named.with_name(f"{split}.lmdb")) for split in cfg.TEST.splits}
    paths = paths or {cfg.TEST.test_split: cfg.TEST.test_lmdb}
    is_joint, first = len(cfg.DATA.train_lmdb) > 1, {}
    for split, path in paths.items():
        reader = RecordReader(path)
        held = reader.meta["dataset"], reader.meta["split"]
        expected = held[0] if is_joint else cfg.DATA.dataset, split
        if held != expected:
            logger.warning(
                f"{path} holds {' '.join(held)}, the config says {' '.join(expected)}: "
                f"{' '.join(held)} is scored with {weights}"
            )
        if first.setdefault(held, path) != path:
            raise UserError(f"TEST.splits: {first[held]} and {path} both hold {' '.join(held)}")
        _check_earlier_scores(cfg, reader)
    return list(paths.values())


def _check_earlier_scores(cfg: Config, reader: RecordReader) -> None:
    """Refuse to replace the scores of other records of the same name."""
    meta, swapped = reader.meta, cfg.TEST.swap_sentences
    for name, protocol in scoring_protocols(cfg).items():
        of_test = swapped, cfg.TEST.precision
        stem = result_stem(meta["dataset"], meta["split"], name, protocol.threshold, *of_test)
        path, earlier = cfg.run_folder / f"{stem}.json", None
        with suppress(OSError, ValueError, AttributeError):  # there is none, or none to be read
            earlier = json.loads(path.read_text()).get("records")
        if earlier not in (None, reader.digest()) and not cfg.TRAIN.force:
            raise UserError(
                f"{path} has the scores of other records than {reader.path} holds: give them "
                "another folder with TRAIN.exp_name (and TEST.weights), or replace them with "
                "TRAIN.force True"
            )


def score_split(cfg: Config, model: nn.Module, ranks: Ranks, lmdb: str, weights: str) -> Scored:
    """Score one file of records.

    Returns:
        By protocol, the content of its `.json` with `ceiling`, and the sentences' scores.
    """
    protocols = scoring_protocols(cfg)
    loader = build_evaluation_loader(cfg, lmdb, ranks, swap=cfg.TEST.swap_sentences)
    meta, start = loader.dataset.reader.meta, time.monotonic()
    scores = evaluate(
        model,
        loader,
        ranks.device,
        protocols,
        cfg.TRAIN.batch_size_val,
        precision=cfg.TEST.precision,
        ceiling=True,
        rle=loader.dataset.keys(),
        progress=progress(loader, len(loader), meta["split"]),
    )
    seconds = time.monotonic() - start
    results = [
        {
            # The records' own: the config may name another data set, or several together.
            "dataset": meta["dataset"],
            "split": meta["split"],
            "checkpoint": weights,
            "protocol": protocol,
            "threshold": protocols[protocol].threshold,
            "refs": len({line.ref_id for line in lines}),
            "sentences": len(lines),
            **summarize_scores(lines),
            "seconds": seconds,
            "ceiling": summarize_ceiling(lines),
            "swapped_sentences": cfg.TEST.swap_sentences,
            "precision": cfg.TEST.precision,
            "lmdb": lmdb,
            "records": loader.dataset.reader.digest(),
            **no_target_rule(cfg, lines),
        }
        for protocol, lines in scores.items()
    ]
    return Scored(loader.dataset, results, list(scores.values()))


def no_target_rule(cfg: Config, lines: Sequence[SentenceScore]) -> dict:
    """Return what a result says of predictions of nothing, if a sentence is true of nothing."""
    if all(line.num_targets for line in lines):
        return {}
    pixels = cfg.TEST.no_target_pixels
    return {"no_target_pixels": pixels, "no_target_rule": describe_rule(pixels)}


def write_split(cfg: Config, scored: Scored) -> None:
    """Write `test_<dataset>_<split>.json`, `.jsonl`, the report and pictures of one split."""
    for result, lines in zip(scored.results, scored.lines, strict=True):
        write_scores(result, lines, cfg.run_folder)
    if cfg.TEST.report:
        write_report(cfg, scored.dataset.reader, scored.results, scored.lines)
    if cfg.TEST.visualize:
        name = "{dataset}_{split}".format(**scored.results[0])
        name += ".swapped" if cfg.TEST.swap_sentences else ""
        lines = scored.lines[0][: cfg.TEST.visualize_limit]
        draw(scored.dataset, lines, cfg.run_folder / "vis" / name)


def result_stem(
    dataset: str,
    split: str,
    protocol: str,
    threshold: float,
    swapped: bool,
    precision: str = "fp32",
) -> str:
    """Name of a result's files: what is not the published way of scoring is in the name."""
    stem = f"test_{dataset}_{split}"
    if protocol != "published":
        stem += f".{protocol}"
    if threshold != PROTOCOLS[protocol].threshold:
        stem += f".threshold{threshold:g}"
    stem += ".swapped" if swapped else ""
    return stem if precision == "fp32" else f"{stem}.{precision}"


def stem_of(result: Mapping) -> str:
    """Return the name of a result's files from the content of its `.json`."""
    names = ("dataset", "split", "protocol", "threshold", "swapped_sentences")
    return result_stem(*(result[name] for name in names), result.get("precision", "fp32"))


def write_scores(result: dict, lines: list[SentenceScore], folder: Path) -> None:
    """Write the two files of a result, whole or not at all."""
    stem = stem_of(result)
    with atomic_path(folder / f"{stem}.jsonl") as partial, partial.open("w") as file:
        file.writelines(json.dumps(line.record()) + "\n" for line in lines)
    with atomic_path(folder / f"{stem}.json") as partial:
        partial.write_text(json.dumps(result, indent=2) + "\n")


def write_report(
    cfg: Config,
    reader: RecordReader,
    results: Sequence[Mapping],
    scores: Sequence[Sequence[SentenceScore]],
) -> None:
    """Write a page for each result of a split; they share their photos."""
    folder = cfg.run_folder / REPORT
    look = folder / pages.PHOTOS, cfg.TEST.report_limit, cfg.TEST.report_photo_size
    for result, lines in zip(results, scores, strict=True):
        model = pages.Scored(result["protocol"], result, [line.record() for line in lines])
        links = {"page": stem_of(result), "results": "../results.js"}
        pages.write_page(folder / links["page"], reader, [model], *look, **links)
    pages.write_results(folder)


def report_page(cfg: Config) -> Path | None:
    """Where to start looking, if a report was asked for and written."""
    page = cfg.run_folder / REPORT / pages.INDEX
    return page if cfg.TEST.report and page.exists() else None


def draw(dataset: EvaluationDataset, lines: list[SentenceScore], folder: Path) -> None:
    """Write one picture a sentence: photo, ground truth, prediction, sentence, IoU.

    Pictures of an earlier test are removed: the IoU is in their names, so they would stay beside.
    """
    for old in folder.glob("*-iou=*.png"):
        old.unlink()
    for line in progress(lines, len(lines), "pictures"):
        name = f"{line.ref_id}-{line.sent_id}-iou={line.iou:.2f}-{file_stem(line.sentence)}.png"
        save_picture(draw_sentence(dataset, line), folder / name)
    logger.info(f"{len(lines)} pictures in {folder}")


def print_table(results: list[dict]) -> None:
    """Print one row a split and protocol in per cent, the ceiling of a perfect model below it.

    Splits with sentences that are true of nothing have metrics, so a table, of their own.
    """
    for names in dict.fromkeys(tuple(result["ceiling"]) for result in results):
        _print_scores([r for r in results if tuple(r["ceiling"]) == names], names)


def _print_scores(results: Sequence[Mapping], names: Sequence[str]) -> None:
    rule = {"N-acc": f"N-acc (none: {results[0].get('no_target_rule')})"}
    rows = [["dataset", "split", "protocol", "sentences", *(rule.get(n, n) for n in names)]]
    for result in results:
        label = result["protocol"] + (" (swapped)" if result["swapped_sentences"] else "")
        head = [result["dataset"], result["split"], label, f"{result['sentences']}"]
        rows.append(head + [percent(result[name]) for name in names])
        ceiling = [percent(result["ceiling"][name]) for name in names]
        rows.append(["", "", "  perfect model", "", *ceiling])
    print_aligned(rows, left=3)
    main = main_metric(results[0])
    for group in dict.fromkeys((result["dataset"], result["protocol"]) for result in results):
        chosen = [r for r in results if (r["dataset"], r["protocol"]) == group]
        if len(chosen) > 1:  # as papers do
            splits = " / ".join(result["split"] for result in chosen)
            values = " / ".join(percent(result[main]) for result in chosen)
            print(f"{group[0]} {main} ({group[1]}), {splits}: {values}")


def print_aligned(rows: Sequence[Sequence[str]], left: int) -> None:
    """Print rows in columns; the first `left` of them begin under each other, the rest end so."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)))
