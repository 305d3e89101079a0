"""Made-up results on small records, written by the real code, for tests of reports."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from samples import blob, encoded, smooth_photo

from engine import tester
from engine.evaluator import SentenceScore, encode_rle, summarize_ceiling, summarize_scores
from utils.config import Config, TestConfig, TrainConfig
from utils.records import RecordReader, RecordWriter, RefRecord
from utils.tokenizer import token_lengths
from utils.transforms import PROTOCOLS, decode_mask

HOSTILE = "<script>document.title = 'mine'</script><img src=x onerror=\"document.title='mine'\">"
ODD_SENTENCES = (HOSTILE, "日本語 🐕 “café” & <b>bold</b>", "a\u2028b\\\"'`${1}", "x" * 400)


def write_odd_records(path: Path) -> Path:
    """Two photos whose names need care, one far larger than a report shows, with odd sentences."""
    rng = np.random.default_rng(1)
    names, sizes = ("sub/50% #1?.jpg", "фото 犬.png"), ((600, 900), (40, 50))
    with RecordWriter(path, "odd", path.stem) as writer:
        for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
            writer.add_image(name, encoded(smooth_photo(rng, *size), Path(name).suffix))
            sentences = ODD_SENTENCES[2 * i : 2 * i + 2]
            mask = encoded(blob(*size, seed=i))
            ref = RefRecord(i, name, None, None, *size, mask, sentences, (2 * i, 2 * i + 1))
            writer.add_ref(ref, token_lengths(ref.sentences))
    return path


def score_of(
    ref: RefRecord, key: tuple[int, int], mask: np.ndarray, pred: np.ndarray
) -> SentenceScore:
    """Of the ref's sentence at `key[1]`; mask and prediction are (H, W) bool."""
    area, intersection = int(mask.sum()), int((pred & mask).sum())
    return SentenceScore(
        key=key,
        ref_id=ref.ref_id,
        sent_id=ref.sent_ids[key[1]],
        sentence=ref.sentences[key[1]],
        image=ref.image_key,
        image_id=ref.image_id,
        category=ref.category,
        height=ref.height,
        width=ref.width,
        target_area=area,
        intersection=intersection,
        union=int((pred | mask).sum()),
        ceiling_intersection=area,
        ceiling_union=area,
        pred_rle=encode_rle(pred),
    )


def made_up_scores(reader: RecordReader, step: int) -> list[SentenceScore]:
    """Every sentence answered with its mask moved aside, the farther the later it comes."""
    scores = []
    for position in range(len(reader)):
        ref = reader.ref(position)
        mask = decode_mask(ref.mask, "mask") > 0
        for place in range(len(ref.sentences)):
            pred = np.roll(mask, step * len(scores) % mask.shape[1], axis=1)
            scores.append(score_of(ref, (position, place), mask, pred))
    return scores


def write_result(
    folder: Path,
    lmdb: Path,
    protocols: Sequence[str] = ("published",),
    step: int = 7,
    is_swapped: bool = False,
    **test_keys,
) -> Path:
    """What test.py leaves in `folder` for a model that is wrong by `step`; gives the `.jsonl`."""
    reader = RecordReader(lmdb)
    scores = made_up_scores(reader, step)
    train = TrainConfig(output_folder=str(folder.parent), exp_name=folder.name)
    cfg = replace(Config(), TRAIN=train, TEST=TestConfig(**test_keys))
    results = [
        {
            "dataset": reader.meta["dataset"],
            "split": reader.meta["split"],
            "checkpoint": f"{folder.name}/best_model.pth",
            "protocol": protocol,
            "threshold": PROTOCOLS[protocol].threshold,
            "refs": len(reader),
            "sentences": len(scores),
            **summarize_scores(scores),
            "seconds": 1.0,
            "ceiling": summarize_ceiling(scores),
            "swapped_sentences": is_swapped,
            "lmdb": str(lmdb),
        }
        for protocol in protocols
    ]
    for result in results:
        tester.write_scores(result, scores, folder)
    tester.write_report(cfg, reader, results, [scores] * len(results))
    return folder / f"{tester.stem_of(results[0])}.jsonl"


def read_script(path: Path) -> dict | list:
    """The value that a data file of a page sets."""
    text = path.read_text("ascii")
    return json.loads(text.partition(" = ")[2].rstrip().removesuffix(";"))
