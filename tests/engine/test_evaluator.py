"""The one evaluation loop, and what test.py makes of it."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    all_refs,
    error_of,
    make_run,
    on_cpu,
    read_jsonl,
    run_program,
    spawn,
    with_bad_image,
    write_any_number,
)
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torch.utils.data import DataLoader

from engine.build import restore_model
from engine.evaluator import (
    SentenceScore,
    describe_scores,
    evaluate,
    resolve_protocols,
    summarize_ceiling,
    summarize_scores,
    validation_protocol,
)
from engine.loaders import build_evaluation_loader
from model.loss import resize_target
from utils.config import Config, load_config
from utils.dataset import SentenceTask, collate_images
from utils.distributed import Ranks
from utils.errors import UserError
from utils.metrics import METRIC_NAMES, count_lines
from utils.records import RecordReader, RecordWriter, RefRecord
from utils.tokenizer import token_lengths
from utils.transforms import PROTOCOLS, letterbox_mask, load_mask, normalize_masks

THRESHOLD = 0.15
LOWERED = f"threshold{THRESHOLD}"  # in the names of files
RESULT_FIELDS = {
    *("dataset", "split", "checkpoint", "protocol", "refs", "sentences", *METRIC_NAMES, "seconds"),
    *("threshold", "ceiling", "lmdb", "records", "precision", "swapped_sentences"),
}
LINE_FIELDS = {
    *("ref_id", "sent_id", "sentence", "image", "image_id", "category", "height", "width"),
    *("target_area", "intersection", "union", "iou", "pred_rle"),
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, data) -> Path:
    """Return the folder of a run that predicts something at the threshold in its config."""
    folder = tmp_path_factory.mktemp("evaluated")
    make_run(folder, data, THRESHOLD)
    return folder


@pytest.fixture(scope="module")
def cfg(run_folder) -> Config:
    return load_config(run_folder / "tiny.yaml")


@pytest.fixture(scope="module")
def trained(run_folder, cfg) -> nn.Module:
    return best_model(cfg, run_folder)


def best_model(cfg: Config, folder: Path) -> nn.Module:
    best = str(folder / "exp/tiny/best_model.pth")
    return restore_model(cfg, ALONE.device, best, "TEST.weights")[0]


def val_lmdb(data: Path) -> str:
    return str(data / "lmdb/shapes/val.lmdb")


def repack(source: RecordReader, target: Path, refs: list[RefRecord]) -> str:
    """Write changed refs with their photos."""
    with RecordWriter(target, "shapes", target.stem) as writer:
        for ref in refs:
            writer.add_image(ref.image_key, source.image(ref.image_key))
            writer.add_ref(ref, token_lengths(ref.sentences))
    return str(target)


def run_test(run_folder: Path, out: Path, *opts: object) -> Path:
    """Run test.py with the run's model, writing below `out`; gives the folder of the results."""
    weights = run_folder / "exp/tiny/best_model.pth"
    where = ("TRAIN.output_folder", out, "TEST.weights", weights)
    run_program("test.py", run_folder / "tiny.yaml", *where, *opts)
    return out / "tiny"


def with_train(cfg: Config, **changes) -> Config:
    return cfg.model_copy(update={"TRAIN": cfg.TRAIN.model_copy(update=changes)})


def scores_of(
    model: nn.Module, cfg: Config, lmdb: str, protocol: str = "aligned", ranks: Ranks = ALONE
) -> list[SentenceScore]:
    loader = build_evaluation_loader(cfg, lmdb, ranks)
    count = cfg.TRAIN.batch_size_val
    protocols = resolve_protocols(protocol, THRESHOLD, 50)
    with on_cpu():
        return evaluate(model, loader, ranks.device, protocols, count)[protocol]


def assert_close(got: list[SentenceScore], expected: list[SentenceScore]) -> None:
    """Equal but for what another order of additions may do: a few pixels at outlines."""
    assert [s.key for s in got] == [s.key for s in expected]
    for a, b in zip(got, expected, strict=True):
        assert abs(a.intersection - b.intersection) <= 5
        assert abs(a.union - b.union) <= 5
        counts = {"intersection": b.intersection, "union": b.union}
        assert replace(a, **counts) == b
    assert summarize_scores(got) == pytest.approx(summarize_scores(expected), abs=1e-4)


class Oracle(nn.Module):
    """A model that answers each sentence with the target that training would have given it.

    It knows the sentence's own ref from the loop's order: `watch` the loader.
    """

    def __init__(self, reader: RecordReader, side: int, target: str) -> None:
        super().__init__()
        self.reader = reader
        self.side = side
        self.target = target
        self.tasks: list[SentenceTask] = []

    def watch(self, loader: DataLoader) -> Iterator[dict]:
        for batch in loader:
            self.tasks += batch["tasks"]
            yield batch

    def encode_image(self, image: torch.Tensor) -> "Oracle":
        return self

    def repeat(self, image_index: torch.Tensor) -> "Oracle":
        return self

    def segment(self, features: "Oracle", tokens: torch.Tensor) -> torch.Tensor:
        asked = self.tasks[: len(tokens)]
        del self.tasks[: len(tokens)]  # in place: it is a twin that is asked
        masks = [load_mask(self.reader.ref(task.key[0])) for task in asked]
        squares = np.stack([letterbox_mask(mask, self.side) for mask in masks])
        size = (self.side // 4, self.side // 4)
        target = resize_target(normalize_masks(torch.from_numpy(squares)), size, self.target)
        return torch.logit(target.double())


def ask_oracle(
    cfg: Config, lmdb: str, name: str, swap: bool = False, no_target_pixels: int = 1
) -> list[SentenceScore]:
    loader = build_evaluation_loader(cfg, lmdb, ALONE, swap=swap)
    oracle = Oracle(loader.dataset.reader, cfg.TRAIN.input_size, PROTOCOLS[name].target)
    protocols = resolve_protocols(name, None, no_target_pixels)
    # It answers each sentence once, in order, and has no BatchNorm.
    with on_cpu(), mock.patch("engine.evaluator.check_folding"):
        scores = evaluate(
            oracle, loader, ALONE.device, protocols, 4, ceiling=True, progress=oracle.watch(loader)
        )
    return scores[name]


# ------------------------------------------------------------------------------------- the loop


def test_every_sentence_is_scored_exactly_once_in_the_order_of_the_records(trained, cfg, data):
    refs = all_refs(val_lmdb(data))
    expected = [
        (ref.ref_id, sent_id, sentence)
        for ref in refs
        for sent_id, sentence in zip(ref.sent_ids, ref.sentences, strict=True)
    ]
    scores = scores_of(trained, cfg, val_lmdb(data))
    assert [(s.ref_id, s.sent_id, s.sentence) for s in scores] == expected
    for score in scores:
        ref = refs[score.key[0]]
        mask = load_mask(ref) > 0
        assert (score.image, score.image_id, score.category) == (
            *(ref.image_key, ref.image_id, ref.category),
        )
        assert (score.height, score.width) == mask.shape
        assert score.target_area == mask.sum()


@pytest.mark.parametrize("name", ["published", "aligned"])
def test_a_model_that_reproduces_its_target_reaches_exactly_the_ceiling(cfg, data, name):
    scores = ask_oracle(cfg, val_lmdb(data), name)
    counts = [(s.intersection, s.union) for s in scores]
    assert counts == [(s.ceiling_intersection, s.ceiling_union) for s in scores]
    ceiling = summarize_ceiling(scores)
    assert summarize_scores(scores) == ceiling
    assert {"published": 0.4, "aligned": 0.75}[name] < ceiling["mIoU"] < 0.95


def test_swapped_sentences_defeat_a_model_that_reads(cfg, data):
    own, swapped = (ask_oracle(cfg, val_lmdb(data), "aligned", swap) for swap in (False, True))
    assert {s.key for s in own} == {s.key for s in swapped}  # every image has two refs or more
    assert {(s.sent_id, s.sentence) for s in own} == {(s.sent_id, s.sentence) for s in swapped}
    for a, b in zip(own, swapped, strict=True):
        assert a.ref_id != b.ref_id
        assert a.image == b.image
    assert summarize_scores(swapped)["mIoU"] < 0.05
    assert summarize_ceiling(swapped)["mIoU"] > 0.75


@pytest.mark.parametrize(
    "changes", [{"batch_size_val": 3}, {"batch_size_val": 64}, {"workers_val": 2}]
)
def test_scores_do_not_depend_on_batch_size_or_workers(trained, cfg, data, changes):
    expected = scores_of(trained, cfg, val_lmdb(data))
    assert summarize_scores(expected)["mIoU"] > 0.01
    got = scores_of(trained, with_train(cfg, **changes), val_lmdb(data))
    assert_close(got, expected)
    if "workers_val" in changes:
        assert got == expected


@pytest.fixture(scope="module")
def any_lmdb(data, tmp_path_factory) -> str:
    """Val with sentences that mean one object, several, and none."""
    return str(write_any_number(Path(val_lmdb(data)), tmp_path_factory.mktemp("any") / "val.lmdb"))


def test_sentences_about_nothing_count_by_what_is_said_of_them(cfg, any_lmdb):
    own = ask_oracle(cfg, any_lmdb, "aligned")
    scores = summarize_scores(own)
    assert scores == summarize_ceiling(own)
    assert (scores["N-acc"], scores["T-acc"]) == (1, 1)
    assert {s.num_targets for s in own} == {0, 1, 3}
    assert {s.iou for s in own if s.num_targets == 0} == {1}
    # With the sentences of its neighbour, what has no target is answered with something.
    swapped = ask_oracle(cfg, any_lmdb, "aligned", swap=True)
    assert {s.iou for s in swapped if s.union and s.num_targets == 0} == {0}
    answered = [s.union == 0 for s in swapped if s.num_targets == 0]
    assert summarize_scores(swapped)["N-acc"] == np.mean(answered) < 1


def test_predictions_under_the_rule_are_emptied_where_some_sentences_have_no_target(
    cfg, data, any_lmdb
):
    for lmdb in (val_lmdb(data), any_lmdb):
        is_ordinary = lmdb != any_lmdb
        kept = ask_oracle(cfg, lmdb, "aligned")
        areas = [s.union - s.target_area + s.intersection for s in kept]
        pixels = sorted(areas)[-3]
        assert sum(0 < area < pixels for area in areas) > 0
        less = ask_oracle(cfg, lmdb, "aligned", no_target_pixels=pixels)
        assert (kept == less) == is_ordinary
        for before, after, area in zip(kept, less, areas, strict=True):
            is_emptied = area < pixels and not is_ordinary
            counts = (0, before.target_area) if is_emptied else (before.intersection, before.union)
            assert (after.intersection, after.union) == counts
            assert (after.ceiling_intersection, after.ceiling_union) == counts


def score_on_rank(ranks: Ranks, config: Path, lmdb: str, out: Path) -> None:
    """What one of several ranks does: validate, and tell what it got."""
    cfg = load_config(config)
    scores = scores_of(best_model(cfg, config.parent), cfg, lmdb, ranks=ranks)
    counts = {score.key: (score.intersection, score.union) for score in scores}
    torch.save(counts, out / f"{ranks.rank}.pt")
    own = build_evaluation_loader(cfg, lmdb, ranks).sampler
    assert 0 < len(own) < len(build_evaluation_loader(cfg, lmdb, ALONE).dataset)


@pytest.mark.parametrize("is_any", [False, True])
def test_two_processes_score_the_same_sentences_as_one(
    trained, cfg, run_folder, data, any_lmdb, tmp_path, is_any
):
    lmdb = any_lmdb if is_any else val_lmdb(data)
    spawn(2, score_on_rank, run_folder / "tiny.yaml", lmdb, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    expected = scores_of(trained, cfg, lmdb)
    assert list(first) == [score.key for score in expected]
    counts = [first[score.key] for score in expected]
    got = [replace(s, intersection=i, union=u) for s, (i, u) in zip(expected, counts, strict=True)]
    assert_close(got, expected)


def test_where_polygons_overlap_is_foreground_too(trained, cfg, data, tmp_path):
    # There the official masks hold 254, and 253 where three do.
    reader = RecordReader(val_lmdb(data))
    ref = reader.ref(0)
    mask = load_mask(ref)
    overlapping = np.where(np.arange(mask.shape[1]) % 2, mask, mask // 255 * 253)
    png = cv2.imencode(".png", overlapping)[1].tobytes()
    lmdb = repack(reader, tmp_path / "overlap.lmdb", [replace(ref, mask=png)])
    expected = [s for s in scores_of(trained, cfg, val_lmdb(data)) if s.ref_id == ref.ref_id]
    assert_close(scores_of(trained, cfg, lmdb), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [([0, 1, 1, 2, 3, 4], "not scored: 0, scored twice: "), ([0, 1, 2, 3], "not scored: ")],
)
def test_a_sentence_scored_twice_or_never_is_an_error(trained, cfg, data, images, message):
    dataset = build_evaluation_loader(cfg, val_lmdb(data), ALONE).dataset
    loader = DataLoader(dataset, sampler=images, collate_fn=collate_images)
    with on_cpu(), pytest.raises(RuntimeError, match=message):
        evaluate(trained, loader, ALONE.device, resolve_protocols("aligned"), 16)


class Slow:
    """A set of keys that takes its time to say that a key is not in it; it counts the keys."""

    def __init__(self) -> None:
        self.asked = 0

    def __contains__(self, key: object) -> bool:
        self.asked += 1
        time.sleep(0.2)
        return False


def test_what_is_stopped_does_not_wait_for_masks_that_nobody_will_see(trained, cfg, data):
    def stop_after_a_batch(loader: DataLoader) -> Iterator[dict]:
        for batch in loader:
            yield batch
            assert len(batch["tasks"]) > 8
            raise KeyboardInterrupt

    loader, slow = build_evaluation_loader(cfg, val_lmdb(data), ALONE), Slow()
    bar, protocols = stop_after_a_batch(loader), resolve_protocols("aligned")
    with on_cpu(), pytest.raises(KeyboardInterrupt):
        evaluate(trained, loader, ALONE.device, protocols, 16, rle=slow, progress=bar)
    assert slow.asked <= 6  # those that two threads had begun


def test_a_mask_that_cannot_be_read_ends_it_before_the_next_photos(trained, cfg, data, tmp_path):
    refs, seen = all_refs(val_lmdb(data)), []
    refs[0] = replace(refs[0], mask=b"no PNG")
    lmdb = repack(RecordReader(val_lmdb(data)), tmp_path / "cut.lmdb", refs)

    def walk(loader: DataLoader) -> Iterator[dict]:
        for batch in loader:
            seen.append(batch)
            yield batch
            time.sleep(0.1)

    loader = build_evaluation_loader(with_train(cfg, batch_size_val=1), lmdb, ALONE)
    protocols = resolve_protocols("aligned")
    assert len(loader) > 3
    with on_cpu(), pytest.raises(UserError, match=f"mask of ref {refs[0].ref_id} cannot"):
        evaluate(trained, loader, ALONE.device, protocols, 1, progress=walk(loader))
    assert len(seen) <= 2


def test_the_model_is_left_as_it_was(trained, cfg, data):
    for mode in (True, False):
        trained.train(mode)
        before = {key: value.clone() for key, value in trained.state_dict().items()}
        scores_of(trained, cfg, val_lmdb(data))
        assert all(module.training is mode for module in trained.modules())
        after = trained.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert all(p.requires_grad for name, p in trained.named_parameters() if "scale" not in name)


def test_protocols_are_chosen_by_name_and_may_have_another_threshold():
    assert resolve_protocols("published") == {"published": PROTOCOLS["published"]}
    assert list(resolve_protocols("both")) == ["aligned", "published"]
    changed = resolve_protocols("both", 0.7)
    assert {protocol.threshold for protocol in changed.values()} == {0.7}
    assert changed["published"].align_corners


def test_a_line_names_another_threshold_than_the_protocols(cfg):
    dataset = build_evaluation_loader(cfg, cfg.DATA.val_lmdb, ALONE).dataset
    scores = {"mIoU": 0.5, "oIoU": 0.25, "sentences": 3}
    line = describe_scores(scores, dataset, resolve_protocols("published", 0.15))
    assert line == "shapes val, 3 sentences, published, threshold 0.15: mIoU 50.00, oIoU 25.00"


def test_validation_scores_by_the_first_protocol_and_threshold_of_the_test(cfg):
    test = cfg.TEST.model_copy(update={"protocol": "both", "threshold": 0.7})
    both = cfg.model_copy(update={"TEST": test})
    assert validation_protocol(both) == resolve_protocols("aligned", 0.7, 50)
    assert validation_protocol(cfg) == resolve_protocols("published", THRESHOLD, 50)


# ------------------------------------------------------------------------------------- test.py


@pytest.fixture(scope="module")
def tested(run_folder) -> Path:
    """The run's folder after test.py scored three splits by both protocols."""
    opts = ("TEST.splits", "[val, testA, testB]", "TEST.protocol", "both")
    run_program("test.py", run_folder / "tiny.yaml", *opts)
    return run_folder / "exp/tiny"


def decode(line: dict) -> np.ndarray:
    return coco_mask.decode(line["pred_rle"]) > 0


def test_each_split_and_protocol_gets_its_two_files(tested):
    stems = {f"test_shapes_{s}{p}" for s in ("val", "testA", "testB") for p in ("", ".aligned")}
    stems = {f"{stem}.{LOWERED}" for stem in stems}
    assert {path.name for path in tested.glob("test_*")} == {
        f"{stem}.{suffix}" for stem in stems for suffix in ("json", "jsonl")
    }


@pytest.mark.parametrize(
    "name", [f"test_shapes_val.{LOWERED}", f"test_shapes_testB.aligned.{LOWERED}"]
)
def test_the_summary_is_that_of_the_lines(tested, name, data):
    result = json.loads((tested / f"{name}.json").read_text())
    lines = read_jsonl(tested / f"{name}.jsonl")
    assert set(result) == RESULT_FIELDS
    assert all(set(line) == LINE_FIELDS for line in lines)
    ious = np.array([line["intersection"] / (line["union"] + 1e-6) for line in lines])
    assert [line["iou"] for line in lines] == pytest.approx(ious)
    total = [sum(line[key] for line in lines) for key in ("intersection", "union")]
    expected = {f"Pr@{x}": (ious > x).mean() for x in (0.5, 0.6, 0.7, 0.8, 0.9)}
    expected |= {"mIoU": ious.mean(), "oIoU": total[0] / total[1]}
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    split = "testB" if "testB" in name else "val"
    meta = RecordReader(data / f"lmdb/shapes/{split}.lmdb").meta
    assert (result["refs"], result["sentences"]) == (meta["refs"], meta["sentences"])
    assert (result["dataset"], result["split"]) == ("shapes", split)
    assert result["protocol"] == ("aligned" if "aligned" in name else "published")
    assert result["checkpoint"].endswith("exp/tiny/best_model.pth")
    assert set(result["ceiling"]) == set(METRIC_NAMES)
    assert result["ceiling"]["mIoU"] > result["mIoU"] > 0
    assert 0 < result["seconds"] < 60
    assert result["swapped_sentences"] is False
    assert result["threshold"] == THRESHOLD


def test_the_run_lengths_decode_to_the_pixels_that_were_counted(tested, data):
    refs = {ref.ref_id: ref for ref in all_refs(val_lmdb(data))}
    lines = read_jsonl(tested / f"test_shapes_val.aligned.{LOWERED}.jsonl")
    assert any(line["intersection"] for line in lines)
    for line in lines:
        mask, pred_mask = load_mask(refs[line["ref_id"]]) > 0, decode(line)
        assert pred_mask.shape == mask.shape == (line["height"], line["width"])
        assert (pred_mask & mask).sum() == line["intersection"]
        assert (pred_mask | mask).sum() == line["union"]
        assert mask.sum() == line["target_area"]


@pytest.mark.parametrize("pixels", [1, 50])
def test_a_split_with_sentences_about_nothing_is_scored_so_and_names_the_rule(
    run_folder, any_lmdb, tmp_path, capsys, pixels
):
    opts = ("TEST.test_lmdb", any_lmdb, "TEST.no_target_pixels", pixels, "TEST.protocol", "both")
    folder = run_test(run_folder, tmp_path, *opts)
    names = ["gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]
    rule = {1: "no pixel", 50: "under 50 pixels"}[pixels]
    output = capsys.readouterr().out
    assert f"N-acc (none: {rule})" in output
    for stem in (f"test_shapes_val.{LOWERED}", f"test_shapes_val.aligned.{LOWERED}"):
        result = json.loads((folder / f"{stem}.json").read_text())
        lines = read_jsonl(folder / f"{stem}.jsonl")
        rule_fields = {"no_target_pixels": pixels, "no_target_rule": rule}
        assert rule_fields.items() <= result.items()
        assert set(result) == RESULT_FIELDS - set(METRIC_NAMES) | set(names) | set(rule_fields)
        assert list(result["ceiling"]) == names
        assert {name: result[name] for name in names} == count_lines(lines).scores()
        assert result["gIoU"] == pytest.approx(np.mean([line["iou"] for line in lines]), abs=1e-6)
        assert {line.get("num_targets") for line in lines} == {None, 0, 3}
        for line in lines:
            area = int(decode(line).sum())
            assert area == line["union"] - line["target_area"] + line["intersection"]
            assert area == 0 or area >= pixels


def test_the_table_has_a_row_a_split_and_the_papers_row(run_folder, capsys):
    opts = ("TEST.splits", "[val, testA]", "TEST.protocol", "published")
    run_program("test.py", run_folder / "tiny.yaml", *opts)
    rows = capsys.readouterr().out.splitlines()
    results = [
        json.loads((run_folder / f"exp/tiny/test_shapes_{split}.{LOWERED}.json").read_text())
        for split in ("val", "testA")
    ]
    assert rows[0].split() == ["dataset", "split", "protocol", "sentences", *METRIC_NAMES]
    for row, result in zip(rows[1::2], results, strict=False):
        values = [f"{100 * result[name]:.2f}" for name in METRIC_NAMES]
        head = ["shapes", result["split"], "published", str(result["sentences"])]
        assert row.split() == head + values
    assert "perfect model" in rows[2]
    assert f"{100 * results[0]['ceiling']['mIoU']:.2f}" in rows[2]
    means = " / ".join(f"{100 * result['mIoU']:.2f}" for result in results)
    assert rows[-1] == f"shapes mIoU (published), val / testA: {means}"


def test_what_was_scored_is_printed_though_a_later_split_is_broken(
    run_folder, data, tmp_path, capsys
):
    shutil.copy(data / "lmdb/shapes/val.lmdb", tmp_path)
    with_bad_image(data / "lmdb/shapes/testA.lmdb", tmp_path / "testA.lmdb", b"no photo")
    opts = ("TEST.splits", "[val, testA]", "TEST.test_lmdb", tmp_path / "val.lmdb")
    opts += ("TRAIN.exp_name", "broken", "TEST.weights", run_folder / "exp/tiny/best_model.pth")
    line = error_of("test.py", run_folder / "tiny.yaml", *opts)
    assert "cannot be decoded" in line
    assert "shapes   val" in capsys.readouterr().out


def test_swapped_scores_go_to_files_of_their_own(tested, run_folder):
    before = (tested / f"test_shapes_val.{LOWERED}.json").read_text()
    run_program("test.py", run_folder / "tiny.yaml", "TEST.swap_sentences", True)
    assert (tested / f"test_shapes_val.{LOWERED}.json").read_text() == before
    result = json.loads((tested / f"test_shapes_val.{LOWERED}.swapped.json").read_text())
    assert result["swapped_sentences"] is True
    assert result["sentences"] == json.loads(before)["sentences"]


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_another_precision_is_in_the_files_names_and_moves_few_pixels(
    tested, run_folder, tmp_path, precision
):
    folder = run_test(run_folder, tmp_path, "TEST.precision", precision)
    lines = read_jsonl(folder / f"test_shapes_val.{LOWERED}.{precision}.jsonl")
    exact = read_jsonl(tested / f"test_shapes_val.{LOWERED}.jsonl")
    pixels = sum((decode(a) != decode(b)).mean() for a, b in zip(lines, exact, strict=True))
    # A CPU has no tf32.
    assert (pixels == 0) == (precision == "tf32")
    assert pixels / len(lines) < 0.02


def test_a_lower_threshold_makes_larger_predictions(run_folder, tmp_path):
    areas = []
    for threshold in (0.1, 0.3):
        folder = run_test(run_folder, tmp_path, "TEST.threshold", threshold)
        lines = read_jsonl(folder / f"test_shapes_val.threshold{threshold}.jsonl")
        areas.append([decode(x).sum() for x in lines])
    assert all(low >= high for low, high in zip(*areas, strict=True))
    assert sum(areas[0]) > sum(areas[1])


def test_the_official_name_of_val_is_understood(run_folder, tested, tmp_path):
    folder = run_test(run_folder, tmp_path, "TEST.test_split", "val-test")
    lines = read_jsonl(folder / f"test_shapes_val.{LOWERED}.jsonl")
    assert lines == read_jsonl(tested / f"test_shapes_val.{LOWERED}.jsonl")


def test_all_splits_are_looked_for_before_the_first_is_scored(run_folder, tmp_path):
    opts = ("TEST.splits", "[val, testX]", "TRAIN.output_folder", tmp_path / "out")
    weights = run_folder / "exp/tiny/best_model.pth"
    line = error_of("test.py", run_folder / "tiny.yaml", *opts, "TEST.weights", weights)
    assert "testX.lmdb does not exist" in line
    assert not (tmp_path / "out").exists()


ODD = [
    "left/right or../../up\\down",
    "the 🐘 behind 'it' \"quoted\" <b>&amp;",
    "",
    "x" * 3000,
    "many words " * 200,
    "長頸鹿" * 60,
    "𝒳" * 100,  # four bytes each
    ".hidden",
    "two\nlines\tand\0nothing",
]


def test_every_sentence_gets_a_picture_whatever_it_says(run_folder, data, tmp_path):
    reader = RecordReader(val_lmdb(data))
    ref = replace(reader.ref(0), sentences=tuple(ODD), sent_ids=tuple(range(len(ODD))))
    lmdb = repack(reader, tmp_path / "odd.lmdb", [ref])
    opts = ("TEST.test_lmdb", lmdb, "TEST.test_split", "odd", "TEST.visualize", True)
    folder = run_test(run_folder, tmp_path, *opts)
    pictures = list((folder / "vis/shapes_odd").iterdir())
    assert len(pictures) == len(ODD)
    assert set(tmp_path.rglob("*.png")) == set(pictures)
    for path in pictures:
        with Image.open(path) as picture:
            picture.load()
            assert picture.width > 3 * 300
            assert picture.height > 300
    lines = read_jsonl(folder / f"test_shapes_odd.{LOWERED}.jsonl")
    assert [line["sentence"] for line in lines] == ODD


def test_pictures_may_be_limited(run_folder, tmp_path):
    opts = ("TEST.visualize", True, "TEST.visualize_limit", 3)
    folder = run_test(run_folder, tmp_path, *opts)
    names = sorted(path.name for path in (folder / "vis/shapes_val").iterdir())
    lines = read_jsonl(folder / f"test_shapes_val.{LOWERED}.jsonl")[:3]
    for name, line in zip(names, sorted(lines, key=lambda x: str(x["ref_id"])), strict=True):
        assert name.startswith(f"{line['ref_id']}-{line['sent_id']}-iou={line['iou']:.2f}-")
