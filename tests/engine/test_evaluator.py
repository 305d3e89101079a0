"""The one evaluation loop, and what test.py makes of it."""

import json
import shutil
import time
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    all_refs,
    assert_same,
    encoded,
    error_of,
    read_jsonl,
    repack,
    run_program,
    spawn,
    with_bad_image,
    write_any_number,
)
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn
from torch.utils.data import DataLoader

from engine.build import restore_trained
from engine.evaluator import (
    SentenceScore,
    describe_scores,
    evaluate,
    resolve_protocols,
    summarize_scores,
    validation_protocol,
)
from engine.loaders import build_evaluation_loader
from engine.tester import print_table
from model.loss import resize_target
from utils.checkpoint import BEST
from utils.config import Config, TestConfig, load_config
from utils.dataset import SentenceTask, collate_images
from utils.distributed import Ranks
from utils.errors import UserError
from utils.metrics import METRIC_NAMES, count_lines
from utils.records import RecordReader
from utils.transforms import PROTOCOLS, letterbox_mask, load_mask, normalize_masks

THRESHOLD = 0.15
LOWERED = f"threshold{THRESHOLD}"  # in the names of files
ALIGNED = {"aligned": PROTOCOLS["aligned"]}
RESULT_FIELDS = {
    *("dataset", "split", "checkpoint", "protocol", "refs", "sentences", "seconds", "threshold"),
    *("ceiling", "lmdb", "records", "precision", "swapped_sentences"),
}
LINE_FIELDS = {
    *("ref_id", "sent_id", "sentence", "image", "image_id", "category", "height", "width"),
    *("target_area", "intersection", "union", "iou", "pred_rle"),
}


@pytest.fixture(scope="module")
def cfg(trained) -> Config:
    return load_config(trained)


@pytest.fixture(scope="module")
def model(cfg) -> nn.Module:
    return restore_trained(cfg, ALONE.device, None, "TEST.weights")[0]


@pytest.fixture(scope="module")
def val(data) -> Path:
    return data / "lmdb/shapes/val.lmdb"


@pytest.fixture(scope="module")
def any_lmdb(val, tmp_path_factory) -> Path:
    """Val with sentences that mean one object, several, and none."""
    return write_any_number(val, tmp_path_factory.mktemp("any") / "val.lmdb")


def scores_of(
    model: nn.Module, cfg: Config, lmdb: Path, ranks: Ranks = ALONE
) -> list[SentenceScore]:
    loader = build_evaluation_loader(cfg, str(lmdb), ranks)
    protocols = {"_": replace(PROTOCOLS["aligned"], threshold=THRESHOLD, no_target_pixels=50)}
    return evaluate(model, loader, ranks.device, protocols, cfg.TRAIN.batch_size_val)["_"]


def assert_close(got: list[SentenceScore], expected: list[SentenceScore]) -> None:
    """Equal but for what another order of additions may do: a few pixels at outlines."""
    assert [s.key for s in got] == [s.key for s in expected]
    for a, b in zip(got, expected, strict=True):
        assert abs(a.intersection - b.intersection) <= 5
        assert abs(a.union - b.union) <= 5
        assert replace(a, intersection=b.intersection, union=b.union) == b
    assert summarize_scores(got) == pytest.approx(summarize_scores(expected), abs=1e-4)


class Oracle(nn.Module):
    """A model that answers each sentence with the target that training would have given it.

    It knows the sentence's own ref from the loop's order: let the loop go through `batches`.
    """

    def __init__(self, loader: DataLoader, target: str) -> None:
        super().__init__()
        self.loader = loader
        self.target = target
        self.tasks: list[SentenceTask] = []

    def batches(self) -> Iterator[dict]:
        for batch in self.loader:
            self.tasks += batch["tasks"]
            yield batch

    def encode_image(self, image: torch.Tensor) -> "Oracle":
        return self

    def repeat(self, image_index: torch.Tensor) -> "Oracle":
        return self

    def segment(self, features: "Oracle", tokens: torch.Tensor) -> torch.Tensor:
        asked = self.tasks[: len(tokens)]
        del self.tasks[: len(tokens)]  # in place: it is a twin that is asked
        side, reader = self.loader.dataset.input_size, self.loader.dataset.reader
        masks = [load_mask(reader.ref(task.key[0])) for task in asked]
        squares = torch.from_numpy(np.stack([letterbox_mask(mask, side) for mask in masks]))
        target = resize_target(normalize_masks(squares), (side // 4, side // 4), self.target)
        return torch.logit(target.double())


def ask_oracle(
    cfg: Config, lmdb: Path, name: str = "aligned", swap: bool = False, no_target_pixels: int = 1
) -> list[SentenceScore]:
    loader = build_evaluation_loader(cfg, str(lmdb), ALONE, swap=swap)
    oracle, keys = Oracle(loader, PROTOCOLS[name].target), loader.dataset.keys()
    protocols = resolve_protocols(TestConfig(protocol=name, no_target_pixels=no_target_pixels))
    # It answers each sentence once, in order, and has no BatchNorm.
    with mock.patch("engine.evaluator.check_folding"):
        asked = oracle, loader, ALONE.device, protocols, 4
        return evaluate(*asked, in_full=keys, progress=oracle.batches())[name]


# ------------------------------------------------------------------------------------- the loop


def test_every_sentence_is_scored_exactly_once_in_the_order_of_the_records(model, cfg, val):
    scores = scores_of(model, cfg, val)
    assert [
        (s.ref_id, s.sent_id, s.sentence, s.image, s.image_id, s.category, s.height, s.width)
        for s in scores
    ] == [
        (ref.ref_id, *said, ref.image_key, ref.image_id, ref.category, ref.height, ref.width)
        for ref in all_refs(val)
        for said in zip(ref.sent_ids, ref.sentences, strict=True)
    ]
    areas = {ref.ref_id: np.count_nonzero(load_mask(ref)) for ref in all_refs(val)}
    assert [s.target_area for s in scores] == [areas[s.ref_id] for s in scores]


@pytest.mark.parametrize(("name", "least"), [("published", 0.4), ("aligned", 0.75)])
def test_a_model_that_reproduces_its_target_reaches_exactly_the_ceiling(cfg, val, name, least):
    scores = ask_oracle(cfg, val, name)
    counts = [(s.intersection, s.union) for s in scores]
    assert counts == [(s.ceiling_intersection, s.ceiling_union) for s in scores]
    ceiling = summarize_scores(scores, "ceiling_")
    assert summarize_scores(scores) == ceiling
    assert least < ceiling["mIoU"] < 0.95


def test_swapped_sentences_defeat_a_model_that_reads(cfg, val):
    own, swapped = (ask_oracle(cfg, val, swap=swap) for swap in (False, True))
    assert {s.key for s in own} == {s.key for s in swapped}  # every image has two refs or more
    assert {(s.sent_id, s.sentence) for s in own} == {(s.sent_id, s.sentence) for s in swapped}
    for a, b in zip(own, swapped, strict=True):
        assert a.ref_id != b.ref_id
        assert a.image == b.image
    assert summarize_scores(swapped)["mIoU"] < 0.05
    assert summarize_scores(swapped, "ceiling_")["mIoU"] > 0.75


@pytest.mark.parametrize(("key", "value"), [("batch_size", 3), ("batch_size", 64), ("workers", 2)])
def test_scores_do_not_depend_on_batch_size_or_workers(model, cfg, trained, val, key, value):
    expected = scores_of(model, cfg, val)
    assert summarize_scores(expected)["mIoU"] > 0.01
    got = scores_of(model, load_config(trained, [f"TRAIN.{key}_val", str(value)]), val)
    assert_close(got, expected)
    assert got == expected or key == "batch_size"


def test_sentences_about_nothing_count_by_what_is_said_of_them(cfg, any_lmdb):
    own = ask_oracle(cfg, any_lmdb)
    scores = summarize_scores(own)
    assert scores == summarize_scores(own, "ceiling_")
    assert (scores["N-acc"], scores["T-acc"]) == (1, 1)
    assert {s.num_targets for s in own} == {0, 1, 3}
    assert {s.iou for s in own if s.num_targets == 0} == {1}
    # With the sentences of its neighbour, what has no target is answered with something.
    swapped = ask_oracle(cfg, any_lmdb, swap=True)
    assert {s.iou for s in swapped if s.union and s.num_targets == 0} == {0}
    answered = [s.union == 0 for s in swapped if s.num_targets == 0]
    assert summarize_scores(swapped)["N-acc"] == np.mean(answered) < 1


@pytest.mark.parametrize("is_any", [False, True])
def test_predictions_under_the_rule_are_emptied_where_some_sentences_have_no_target(
    cfg, val, any_lmdb, is_any
):
    lmdb = any_lmdb if is_any else val
    kept = ask_oracle(cfg, lmdb)
    areas = [s.union - s.target_area + s.intersection for s in kept]
    pixels = sorted(areas)[-3]
    assert sum(0 < area < pixels for area in areas) > 0
    less = ask_oracle(cfg, lmdb, no_target_pixels=pixels)
    assert (kept != less) == is_any
    for before, after, area in zip(kept, less, areas, strict=True):
        is_emptied = area < pixels and is_any
        counts = (0, before.target_area) if is_emptied else (before.intersection, before.union)
        assert (after.intersection, after.union) == counts
        assert (after.ceiling_intersection, after.ceiling_union) == counts
        assert coco_mask.area(after.record()["pred_rle"]) == (0 if is_emptied else area)


def score_on_rank(ranks: Ranks, config: Path, lmdbs: Iterable[Path]) -> list[dict]:
    """What one of several ranks does: validate, and tell what it got."""
    cfg, counts = load_config(config), []
    model, *_ = restore_trained(cfg, ranks.device, None, "TEST.weights")
    for lmdb in lmdbs:
        scores = scores_of(model, cfg, lmdb, ranks)
        counts.append({score.key: (score.intersection, score.union) for score in scores})
        own = build_evaluation_loader(cfg, str(lmdb), ranks)
        assert 0 < len(own.sampler) < len(own.dataset)
    return counts


def test_two_processes_score_the_same_sentences_as_one(model, cfg, trained, val, any_lmdb):
    of_ranks = spawn(2, score_on_rank, trained, (val, any_lmdb))
    for lmdb, first, second in zip((val, any_lmdb), *of_ranks, strict=True):
        assert first == second
        expected = scores_of(model, cfg, lmdb)
        assert list(first) == [score.key for score in expected]
        counts = zip(expected, first.values(), strict=True)
        assert_close([replace(s, intersection=i, union=u) for s, (i, u) in counts], expected)


def test_where_polygons_overlap_is_foreground_too(model, cfg, val, tmp_path):
    # There the official masks hold 254, and 253 where three do.
    ref = all_refs(val)[0]
    mask = load_mask(ref)
    overlapping = np.where(np.arange(mask.shape[1]) % 2, mask, mask // 255 * 253)
    lmdb = repack(val, tmp_path / "overlap.lmdb", [replace(ref, mask=encoded(overlapping))])
    expected = [s for s in scores_of(model, cfg, val) if s.ref_id == ref.ref_id]
    assert_close(scores_of(model, cfg, lmdb), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [([0, 1, 1, 2, 3, 4], "not scored: 0, scored twice: "), ([0, 1, 2, 3], "not scored: ")],
)
def test_a_sentence_scored_twice_or_never_is_an_error(model, cfg, val, images, message):
    dataset = build_evaluation_loader(cfg, str(val), ALONE).dataset
    loader = DataLoader(dataset, sampler=images, collate_fn=collate_images)
    with pytest.raises(RuntimeError, match=message):
        evaluate(model, loader, ALONE.device, ALIGNED, 16)


def test_what_is_stopped_does_not_wait_for_masks_that_nobody_will_see(model, cfg, val):
    def stop_after_a_batch(loader: DataLoader) -> Iterator[dict]:
        for batch in loader:
            yield batch
            assert len(batch["tasks"]) > 8
            raise KeyboardInterrupt

    loader, keys = build_evaluation_loader(cfg, str(val), ALONE), mock.MagicMock()
    keys.__contains__.side_effect = lambda _: time.sleep(0.2)  # is asked once a sentence
    asked = model, loader, ALONE.device, ALIGNED, 16
    with pytest.raises(KeyboardInterrupt):
        evaluate(*asked, in_full=keys, progress=stop_after_a_batch(loader))
    assert keys.__contains__.call_count <= 6  # those that two threads had begun


def test_a_mask_that_cannot_be_read_ends_it_before_the_next_photos(model, trained, val, tmp_path):
    refs, seen = all_refs(val), []
    refs[0] = replace(refs[0], mask=b"no PNG")
    lmdb = repack(val, tmp_path / "cut.lmdb", refs)

    def walk(loader: DataLoader) -> Iterator[dict]:
        for batch in loader:
            seen.append(batch)
            yield batch
            time.sleep(0.1)

    cfg = load_config(trained, ["TRAIN.batch_size_val", "1"])
    loader = build_evaluation_loader(cfg, str(lmdb), ALONE)
    assert len(loader) > 3
    with pytest.raises(UserError, match=f"mask of ref {refs[0].ref_id} cannot"):
        evaluate(model, loader, ALONE.device, ALIGNED, 1, progress=walk(loader))
    assert len(seen) <= 2


def test_the_model_is_left_as_it_was(model, cfg, val):
    for mode in (True, False):
        model.train(mode)
        before = deepcopy(model.state_dict())
        scores_of(model, cfg, val)
        assert all(module.training is mode for module in model.modules())
        assert_same(model.state_dict(), before)
        assert all(p.requires_grad for name, p in model.named_parameters() if "scale" not in name)


def test_protocols_are_chosen_by_name_and_may_have_another_threshold():
    published = replace(PROTOCOLS["published"], no_target_pixels=50)
    assert resolve_protocols(TestConfig(protocol="published")) == {"published": published}
    both = TestConfig(protocol="both", threshold=0.7, no_target_pixels=1)
    changed = {name: replace(PROTOCOLS[name], threshold=0.7) for name in ("aligned", "published")}
    assert list(resolve_protocols(both).items()) == list(changed.items())
    assert validation_protocol(both) == {"aligned": changed["aligned"]}


def test_a_line_names_another_threshold_than_the_protocols(cfg):
    dataset = build_evaluation_loader(cfg, cfg.DATA.val_lmdb, ALONE).dataset
    scores = {"mIoU": 0.5, "oIoU": 0.25, "sentences": 3}
    line = describe_scores(scores, dataset, resolve_protocols(cfg.TEST))
    assert line == "shapes val, 3 sentences, published, threshold 0.15: mIoU 50.00, oIoU 25.00"


# ------------------------------------------------------------------------------------- test.py


def with_best(trained: Path, out: Path) -> tuple:
    """Options to score the run's model and write below `out`."""
    best = load_config(trained).run_folder / BEST
    return "TRAIN.output_folder", out, "TEST.weights", best


def run_test(trained: Path, out: Path, *opts: object) -> Path:
    """Run test.py with the run's model, writing below `out`; gives the folder of the results."""
    run_program("test.py", trained, *with_best(trained, out), *opts)
    return out / "tiny"


@pytest.fixture(scope="module")
def tested(trained, tmp_path_factory) -> Path:
    """The folder of what test.py says of three splits by both protocols."""
    opts = ("TEST.splits", "[val, testA, testB]", "TEST.protocol", "both")
    return run_test(trained, tmp_path_factory.mktemp("tested"), *opts)


def read_result(folder: Path, stem: str) -> tuple[dict, list[dict]]:
    """Read the two files of a result."""
    return json.loads((folder / f"{stem}.json").read_text()), read_jsonl(folder / f"{stem}.jsonl")


def decode(line: dict) -> np.ndarray:
    return coco_mask.decode(line["pred_rle"]) > 0


def test_each_split_and_protocol_gets_its_two_files(tested):
    stems = {f"test_shapes_{s}{p}" for s in ("val", "testA", "testB") for p in ("", ".aligned")}
    assert {path.name for path in tested.glob("test_*")} == {
        f"{stem}.{LOWERED}.{suffix}" for stem in stems for suffix in ("json", "jsonl")
    }


@pytest.mark.parametrize(("split", "protocol"), [("val", "published"), ("testB", "aligned")])
def test_the_summary_is_that_of_the_lines(tested, split, protocol, data):
    name = "" if protocol == "published" else f".{protocol}"
    result, lines = read_result(tested, f"test_shapes_{split}{name}.{LOWERED}")
    assert set(result) == RESULT_FIELDS | set(METRIC_NAMES)
    assert all(set(line) == LINE_FIELDS for line in lines)
    inter, union = np.array([(line["intersection"], line["union"]) for line in lines]).T
    ious = inter / (union + 1e-6)
    assert [line["iou"] for line in lines] == pytest.approx(ious)
    expected = {f"Pr@{x}": (ious > x).mean() for x in (0.5, 0.6, 0.7, 0.8, 0.9)}
    expected |= {"mIoU": ious.mean(), "oIoU": inter.sum() / union.sum()}
    assert {key: result[key] for key in expected} == pytest.approx(expected)
    meta = RecordReader(data / f"lmdb/shapes/{split}.lmdb").meta
    expected = {"dataset": "shapes", "split": split, "protocol": protocol, "threshold": THRESHOLD}
    expected |= {"refs": meta["refs"], "sentences": meta["sentences"], "swapped_sentences": False}
    assert expected.items() <= result.items()
    assert result["checkpoint"].endswith("exp/tiny/best_model.pth")
    assert set(result["ceiling"]) == set(METRIC_NAMES)
    assert result["ceiling"]["mIoU"] > result["mIoU"] > 0
    assert 0 < result["seconds"] < 60


def test_the_run_lengths_decode_to_the_pixels_that_were_counted(tested, val):
    refs = {ref.ref_id: ref for ref in all_refs(val)}
    lines = read_jsonl(tested / f"test_shapes_val.aligned.{LOWERED}.jsonl")
    assert any(line["intersection"] for line in lines)
    for line in lines:
        mask, pred_mask = load_mask(refs[line["ref_id"]]) > 0, decode(line)
        assert pred_mask.shape == mask.shape == (line["height"], line["width"])
        assert (pred_mask & mask).sum() == line["intersection"]
        assert (pred_mask | mask).sum() == line["union"]
        assert mask.sum() == line["target_area"]


@pytest.mark.parametrize(("pixels", "rule"), [(1, "no pixel"), (50, "under 50 pixels")])
def test_a_split_with_sentences_about_nothing_is_scored_so_and_names_the_rule(
    trained, any_lmdb, tmp_path, capsys, pixels, rule
):
    opts = ("TEST.test_lmdb", any_lmdb, "TEST.no_target_pixels", pixels, "TEST.protocol", "both")
    folder = run_test(trained, tmp_path, *opts)
    names = ["gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]
    assert f"N-acc (none: {rule})" in capsys.readouterr().out
    for stem in (f"test_shapes_val.{LOWERED}", f"test_shapes_val.aligned.{LOWERED}"):
        result, lines = read_result(folder, stem)
        rule_fields = {"no_target_pixels": pixels, "no_target_rule": rule}
        assert rule_fields.items() <= result.items()
        assert set(result) == RESULT_FIELDS | set(names) | set(rule_fields)
        assert list(result["ceiling"]) == names
        assert {name: result[name] for name in names} == count_lines(lines).scores()
        assert result["gIoU"] == pytest.approx(np.mean([line["iou"] for line in lines]), abs=1e-6)
        assert {line.get("num_targets") for line in lines} == {None, 0, 3}
        for line in lines:
            area = int(decode(line).sum())
            assert area == line["union"] - line["target_area"] + line["intersection"]
            assert area == 0 or area >= pixels


def test_the_table_has_a_row_a_split(tested, capsys):
    stems = [f"test_shapes_{split}.{LOWERED}" for split in ("val", "testA")]
    results = [read_result(tested, stem)[0] for stem in stems]
    print_table(results)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["dataset", "split", "protocol", "sentences", *METRIC_NAMES]
    for row, result in zip(rows[1::2], results, strict=False):
        values = [f"{100 * result[name]:.2f}" for name in METRIC_NAMES]
        head = ["shapes", result["split"], "published", str(result["sentences"])]
        assert row.split() == head + values
    assert "perfect model" in rows[2]
    assert f"{100 * results[0]['ceiling']['mIoU']:.2f}" in rows[2]


def test_what_was_scored_is_printed_though_a_later_split_is_broken(
    trained, data, val, tmp_path, capsys
):
    shutil.copy(val, tmp_path)
    with_bad_image(data / "lmdb/shapes/testA.lmdb", tmp_path / "testA.lmdb", b"no photo")
    opts = ("TEST.splits", "[val, testA]", "TEST.test_lmdb", tmp_path / "val.lmdb")
    line = error_of("test.py", trained, *with_best(trained, tmp_path), *opts)
    assert "cannot be decoded" in line
    assert "shapes   val" in capsys.readouterr().out


def test_all_splits_are_looked_for_before_the_first_is_scored(trained, tmp_path):
    where = with_best(trained, tmp_path / "out")
    line = error_of("test.py", trained, *where, "TEST.splits", "[val, testX]")
    assert "testX.lmdb does not exist" in line
    assert not (tmp_path / "out").exists()


def test_swapped_scores_go_to_files_of_their_own(tested, trained):
    before = read_result(tested, f"test_shapes_val.{LOWERED}")
    run_test(trained, tested.parent, "TEST.swap_sentences", True)
    assert read_result(tested, f"test_shapes_val.{LOWERED}") == before
    result, _ = read_result(tested, f"test_shapes_val.{LOWERED}.swapped")
    assert result["swapped_sentences"] is True
    assert result["sentences"] == before[0]["sentences"]


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_another_precision_is_in_the_files_names_and_moves_few_pixels(
    tested, trained, tmp_path, precision
):
    folder = run_test(trained, tmp_path, "TEST.precision", precision)
    lines = read_jsonl(folder / f"test_shapes_val.{LOWERED}.{precision}.jsonl")
    exact = read_jsonl(tested / f"test_shapes_val.{LOWERED}.jsonl")
    pixels = sum((decode(a) != decode(b)).mean() for a, b in zip(lines, exact, strict=True))
    assert (pixels == 0) == (precision == "tf32")  # a CPU has no tf32
    assert pixels / len(lines) < 0.02


def test_the_official_name_of_val_is_understood_and_pictures_may_be_limited(
    trained, tested, tmp_path
):
    pictures = ("TEST.visualize", True, "TEST.visualize_limit", 3)
    folder = run_test(trained, tmp_path, "TEST.test_split", "val-test", *pictures)
    lines = read_jsonl(folder / f"test_shapes_val.{LOWERED}.jsonl")
    assert lines == read_jsonl(tested / f"test_shapes_val.{LOWERED}.jsonl")
    for line in lines[:3]:
        pattern = f"{line['ref_id']}-{line['sent_id']}-iou={line['iou']:.2f}-*.png"
        assert len(list((folder / "vis/shapes_val").glob(pattern))) == 1
    assert len(list((folder / "vis/shapes_val").iterdir())) == 3


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


def test_every_sentence_gets_a_picture_whatever_it_says(trained, val, tmp_path):
    ref = replace(all_refs(val)[0], sentences=tuple(ODD), sent_ids=tuple(range(len(ODD))))
    lmdb = repack(val, tmp_path / "odd.lmdb", [ref])
    opts = ("TEST.test_lmdb", lmdb, "TEST.test_split", "odd", "TEST.visualize", True)
    folder = run_test(trained, tmp_path, *opts)
    pictures = list((folder / "vis/shapes_odd").iterdir())
    assert len(pictures) == len(ODD)
    assert set(tmp_path.rglob("*.png")) == set(pictures)
    for path in pictures:
        height, width, _ = np.asarray(Image.open(path)).shape
        assert min(height, width / 3) > 300
    lines = read_jsonl(folder / f"test_shapes_odd.{LOWERED}.jsonl")
    assert [line["sentence"] for line in lines] == ODD
