"""What test.py does with a split: score it, write the scores down, a report of them and pictures,
print the table.
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from loguru import logger
from torch import nn

from engine.evaluator import SentenceScore, evaluate, resolve_protocols, summarize_scores
from engine.loaders import build_evaluation_loader
from engine.pictures import draw_sentence
from engine.report import pages
from utils.config import Config
from utils.dataset import EvaluationDataset
from utils.distributed import Ranks
from utils.errors import UserError
from utils.files import atomic_path, write_text
from utils.logger import progress
from utils.metrics import describe_rule, percent
from utils.records import RecordReader
from utils.transforms import PROTOCOLS
from utils.visualize import file_stem, save_picture

REPORT = "report"  # folder in that of the run
Scored = tuple[dict, list[SentenceScore]]  # a result as its `.json` has it, and its sentences


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
    for head in result_heads(cfg, reader).values():
        path, earlier = cfg.run_folder / f"{result_stem(head)}.json", None
        with suppress(OSError, ValueError, AttributeError):  # there is none, or none to be read
            earlier = json.loads(path.read_text()).get("records")
        if earlier not in (None, head["records"]) and not cfg.TRAIN.force:
            raise UserError(
                f"{path} has the scores of other records than {reader.path} holds: give them "
                "another folder with TRAIN.exp_name (and TEST.weights), or replace them with "
                "TRAIN.force True"
            )


def result_heads(cfg: Config, reader: RecordReader) -> dict[str, dict]:
    """Return what is known of a split's results before it is scored, by protocol."""
    return {
        name: {
            # The records' own: the config may name another data set, or several together.
            "dataset": reader.meta["dataset"],
            "split": reader.meta["split"],
            "protocol": name,
            "threshold": protocol.threshold,
            "swapped_sentences": cfg.TEST.swap_sentences,
            "precision": cfg.TEST.precision,
            "lmdb": str(reader.path),
            "records": reader.digest(),
        }
        for name, protocol in resolve_protocols(cfg.TEST).items()
    }


def score_split(
    cfg: Config, model: nn.Module, ranks: Ranks, lmdb: str, weights: str
) -> tuple[EvaluationDataset, list[Scored]]:
    """Score one file of records by each protocol."""
    loader = build_evaluation_loader(cfg, lmdb, ranks, swap=cfg.TEST.swap_sentences)
    dataset, start = loader.dataset, time.monotonic()
    scores = evaluate(
        model,
        loader,
        ranks.device,
        resolve_protocols(cfg.TEST),
        cfg.TRAIN.batch_size_val,
        precision=cfg.TEST.precision,
        in_full=dataset.keys(),
        progress=progress(loader, len(loader), dataset.reader.meta["split"]),
    )
    made = {"checkpoint": weights, "seconds": time.monotonic() - start}
    heads, pixels = result_heads(cfg, dataset.reader), cfg.TEST.no_target_pixels
    return dataset, [
        (heads[name] | made | summarize_lines(lines, pixels), lines)
        for name, lines in scores.items()
    ]


def summarize_lines(lines: Sequence[SentenceScore], no_target_pixels: int) -> dict:
    """Return the scores of a split, its ceiling, and the rule by which predictions are none."""
    result = {"refs": len({line.ref_id for line in lines}), "sentences": len(lines)}
    result |= summarize_scores(lines) | {"ceiling": summarize_scores(lines, "ceiling_")}
    if not all(line.num_targets for line in lines):
        result["no_target_pixels"] = no_target_pixels
        result["no_target_rule"] = describe_rule(no_target_pixels)
    return result


def write_split(cfg: Config, dataset: EvaluationDataset, scored: Sequence[Scored]) -> None:
    """Write `test_<dataset>_<split>.json`, `.jsonl`, the report and pictures of one split."""
    for result, lines in scored:
        write_scores(result, lines, cfg.run_folder)
    if cfg.TEST.report:
        write_report(cfg, dataset.reader, scored)
    if cfg.TEST.visualize:
        result, lines = scored[0]
        name = "{dataset}_{split}".format(**result)
        name += ".swapped" if cfg.TEST.swap_sentences else ""
        draw(dataset, lines[: cfg.TEST.visualize_limit], cfg.run_folder / "vis" / name)


def result_stem(result: Mapping) -> str:
    """Name a result's files: what is not the published way of scoring is in the name."""
    protocol, threshold = result["protocol"], result["threshold"]
    stem = f"test_{result['dataset']}_{result['split']}"
    stem += "" if protocol == "published" else f".{protocol}"
    if threshold != PROTOCOLS[protocol].threshold:
        stem += f".threshold{threshold:g}"
    stem += ".swapped" if result["swapped_sentences"] else ""
    precision = result.get("precision", "fp32")
    return stem if precision == "fp32" else f"{stem}.{precision}"


def write_scores(result: Mapping, lines: Sequence[SentenceScore], folder: Path) -> None:
    """Write the two files of a result, whole or not at all."""
    stem = result_stem(result)
    with atomic_path(folder / f"{stem}.jsonl") as partial, partial.open("w") as file:
        file.writelines(json.dumps(line.record()) + "\n" for line in lines)
    write_text(folder / f"{stem}.json", json.dumps(result, indent=2) + "\n")


def write_report(cfg: Config, reader: RecordReader, scored: Sequence[Scored]) -> None:
    """Write a page for each result of a split; they share their photos."""
    folder = cfg.run_folder / REPORT
    look = folder / pages.PHOTOS, cfg.TEST.report_limit, cfg.TEST.report_photo_size
    for result, lines in scored:
        model = pages.Scored(result["protocol"], result, [line.record() for line in lines])
        links = {"page": result_stem(result), "results": "../results.js"}
        pages.write_page(folder / links["page"], reader, [model], *look, **links)
    pages.write_results(folder)


def draw(dataset: EvaluationDataset, lines: Sequence[SentenceScore], folder: Path) -> None:
    """Write one picture a sentence: photo, ground truth, prediction, sentence, IoU.

    Pictures of an earlier test are removed: the IoU is in their names, so they would stay beside.
    """
    for old in folder.glob("*-iou=*.png"):
        old.unlink()
    for line in progress(lines, len(lines), "pictures"):
        name = f"{line.ref_id}-{line.sent_id}-iou={line.iou:.2f}-{file_stem(line.sentence)}.png"
        picture = draw_sentence(dataset.reader, dataset.mask_source(line.key), line.record())
        save_picture(picture, folder / name)
    logger.info(f"{len(lines)} pictures in {folder}")


def print_table(results: Sequence[Mapping]) -> None:
    """Print one row a split and protocol in per cent, the ceiling of a perfect model below it.

    Splits with sentences that are true of nothing have metrics, so a table, of their own.
    """
    for names in dict.fromkeys(tuple(result["ceiling"]) for result in results):
        group = [result for result in results if tuple(result["ceiling"]) == names]
        rule = {"N-acc": f"N-acc (none: {group[0].get('no_target_rule')})"}
        rows = [["dataset", "split", "protocol", "sentences", *(rule.get(n, n) for n in names)]]
        for result in group:
            label = result["protocol"] + (" (swapped)" if result["swapped_sentences"] else "")
            head = [result["dataset"], result["split"], label, str(result["sentences"])]
            rows.append(head + [percent(result[name]) for name in names])
            ceiling = [percent(result["ceiling"][name]) for name in names]
            rows.append(["", "", "  perfect model", "", *ceiling])
        print_aligned(rows, left=3)


def print_aligned(rows: Sequence[Sequence[str]], left: int) -> None:
    """Print rows in columns; the first `left` of them begin under each other, the rest end so."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = zip(row, widths, strict=True)
        print("  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(cells)))
