"""Reports: their numbers by hand, and what is written, shared, replaced or left out."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ODD_SENTENCES,
    ROOT,
    all_refs,
    read_jsonl,
    read_script,
    run_program,
    write_any_number,
    write_odd_records,
    write_result,
)
from PIL import Image

from engine.evaluator import encode_rle
from engine.report import statistics
from engine.report.categories import NAMES, category_name
from engine.report.pages import choose_shown, write_pictures
from engine.report.statistics import Grouping
from tools.refer import Refer
from tools.refshapes import SHAPES
from utils.config import load_config
from utils.errors import UserError
from utils.metrics import CRIS, Convention, Counts, count_lines
from utils.records import RecordReader
from utils.transforms import load_mask


def model(*pixels: tuple[int, int]) -> Counts:
    """Counts of (intersection, union) a sentence."""
    return Counts(*np.array(pixels).T)


# ----------------------------------------------------------------------------------------- numbers


def test_histogram_has_twenty_bins_and_a_perfect_answer_is_in_the_last():
    counts = statistics.histogram(np.array([0, 0.049, 0.05, 0.51, 0.96, 1.0]))
    assert len(counts) == 20
    assert {i: n for i, n in enumerate(counts) if n} == {0: 2, 1: 1, 10: 1, 19: 2}


def test_curve_is_the_share_strictly_above_each_x():
    share = np.array([0.0, 0.5, 0.6, 1.0])
    exactly = Convention(lambda counts: counts.intersections, CRIS.metrics)
    curve = statistics.precision_curve(Counts(share, share, convention=exactly))
    assert len(curve) == 51
    # 0 is not above 0, nor 0.5 above 0.5
    assert [curve[i] for i in (0, 24, 25, 50)] == [0.75, 0.75, 0.5, 0]


def test_curve_counts_sentences_with_a_target_from_each_x_on_where_some_have_none():
    curve = statistics.precision_curve(count_lines(any_number_lines((5, 10), (9, 10), (0, 0))))
    assert [curve[i] for i in (0, 25, 26, 45, 46)] == [1, 1, 0.5, 0.5, 0]
    assert statistics.precision_curve(count_lines(any_number_lines((0, 0)))) == [0] * 51


def any_number_lines(*pixels: tuple[int, int]) -> list[dict]:
    """Records of (intersection, union), which is the target's; without a target where it is 0."""
    names = ("intersection", "union", "target_area", "num_targets")
    return [dict(zip(names, (i, u, u, 2 * (u > 0)), strict=True)) for i, u in pixels]


@pytest.mark.parametrize(
    ("sentence", "kinds"),
    [
        ("man on the LEFT", "position"),
        ("red  shirt", "colour"),
        ("tallest guy, second from left", "position size"),
        ("triangle under the blue circle", "colour relation"),
        ("woman next\tto the van", "relation"),
        ("left of the grey car", "position colour relation"),
        ("biggest", "size"),
        ("leftover bread, reddish, overall", "other"),  # words, not parts of words
        ("", "other"),
        ("犬", "other"),
    ],
)
def test_kinds_are_told_by_whole_words(sentence, kinds):
    assert statistics.sentence_kinds(sentence) == kinds.split()


def record(sentence: str, area: int, category: int | None = None) -> dict:
    """As far as the groups read it; the photo has 1,000 pixels."""
    size = {"height": 20, "width": 50, "target_area": area}
    return {"sentence": sentence, "category": category, **size}


def groups_of(*lines: dict, dataset: str = "own") -> dict[str, tuple[list, list]]:
    """Labels and members by key."""
    return {g.key: (g.labels, g.members) for g in statistics.group_sentences(lines, dataset)}


def test_sentences_are_grouped_by_kind_category_size_and_length():
    lines = [record("red man", 9, 5), record("it", 10, 0), record("man on the far left", 999, 5)]
    assert groups_of(*lines, dataset="refcoco") == {
        "kind": (["position", "colour", "other"], [(1,), (2,), (0,)]),
        "category": (["bus", "person"], [(0,), (1,), (0,)]),
        "size": (["under 1 %", "1–2 %", "from 40 %"], [(0,), (1,), (2,)]),
        "length": (["1", "2", "5–6"], [(1,), (0,), (2,)]),
    }


def test_sentences_of_no_target_and_of_several_are_groups_and_nothing_has_no_size():
    groups = groups_of(*(record("red man", 9 * n) | {"num_targets": n} for n in (0, 1, 3)))
    labels = ["colour", "no target", "several targets"]
    assert groups["kind"] == (labels, [(0, 1), (0,), (0, 2)])
    assert groups["size"][1] == [(), (0,), (1,)]


def test_without_categories_there_is_no_such_group_and_a_few_without_are_in_none():
    assert list(groups_of(record("a", 9), record("b", 9))) == ["kind", "size", "length"]
    groups = groups_of(record("a", 9), record("b", 9, 7))
    assert groups["category"] == (["category 7"], [(), (0,)])


def test_scores_of_a_group_are_those_of_its_sentences():
    grouping = Grouping("kind", "kind", ["a", "b"], [(0,), (0, 1), (1,)])
    first = model((1, 4), (3, 4), (0, 8))
    second = model((4, 4), (4, 4), (4, 8))
    a, b = statistics.group_scores(grouping, [first, second])
    assert a["sentences"] == b["sentences"] == 2
    assert a["models"][0] == pytest.approx({"mIoU": 0.5, "oIoU": 0.5, "Pr@0.5": 0.5})
    assert b["models"][0] == pytest.approx({"mIoU": 0.375, "oIoU": 0.25, "Pr@0.5": 0.5})
    assert b["models"][1] == pytest.approx({"mIoU": 0.75, "oIoU": 8 / 12, "Pr@0.5": 0.5}, abs=1e-6)


def test_closer_than_the_margin_is_a_tie():
    first = model((50, 100), (50, 100), (50, 100), (50, 100))
    second = model((52, 100), (48, 100), (51, 100), (50, 100))
    assert statistics.outcomes(first, second, 0.015).tolist() == [1, -1, 0, 0]
    assert statistics.outcomes(first, second, 0.0).tolist() == [1, -1, 1, 0]


def test_names_of_categories_are_those_of_the_data_sets():
    assert tuple(NAMES["refshapes"]) == tuple(SHAPES)
    assert len(set(NAMES["refcoco"])) == 80
    assert category_name("refcoco+", 9) == "traffic light"
    assert category_name("refcocog_u", 79) == "toothbrush"
    assert category_name("refcocog_u", 80) == "category 80"
    assert category_name("own", 3) == "category 3"


def test_names_of_cocos_categories_are_those_in_its_annotations(mini_root):
    refer = Refer(mini_root, "refcoco", "unc")
    content = json.loads((mini_root / "refcoco/instances.json").read_text())
    names = {item["id"]: item["name"] for item in content["categories"]}
    for ref in refer.refs:
        assert category_name("refcoco", refer.category(ref)) == names[ref["category_id"]]


# --------------------------------------------------------------------------------------- intervals


def random_models(count: int) -> tuple[Counts, Counts]:
    rng = np.random.default_rng(5)
    unions = rng.integers(50, 100, (2, count))
    return tuple(Counts((u * rng.random(count)).astype(int), u) for u in unions)


def test_a_difference_is_that_of_the_whole_set_for_every_metric_and_of_equal_models_nothing():
    first, second = random_models(40)
    found = statistics.paired_bootstrap(first, second, range(40), draws=50)
    a, b = (model.scores() for model in (first, second))
    assert list(found) == list(a)
    for name, interval in found.items():
        assert interval.difference == pytest.approx(b[name] - a[name], abs=1e-12)
        assert interval.low <= interval.high
    equal = statistics.paired_bootstrap(first, first, range(40), draws=200)
    assert set(equal.values()) == {(0, 0, 0)}


def test_draws_without_a_sentence_about_nothing_do_not_count_for_n_acc():
    first = count_lines(any_number_lines((0, 0), *[(5, 10)] * 3))
    second = replace(first, areas=np.array([60.0, 10, 10, 0]))
    found = statistics.paired_bootstrap(first, second, range(4), draws=50)
    assert list(found) == ["gIoU", "cIoU", "N-acc", "T-acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"]
    assert found["N-acc"] == (-1, -1, -1)
    assert found["T-acc"].difference == pytest.approx(-1 / 3)
    assert "T-acc" not in statistics.paired_bootstrap(*[first.of([0])] * 2, [0], draws=5)


def test_the_interval_is_that_of_the_mean_where_photos_are_many():
    first, second = random_models(400)
    found = statistics.paired_bootstrap(first, second, range(400))["mIoU"]
    difference = second.ious - first.ious
    half = 1.96 * difference.std() / 20
    assert found.low == pytest.approx(difference.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(difference.mean() + half, abs=0.05 * half)


def test_more_sentences_of_the_same_photos_do_not_make_it_surer():
    first, second = random_models(50)
    copies = np.tile(np.arange(50), 9)
    pairs = (first, second), *[(first.of(copies), second.of(copies))] * 2
    clusters = range(50), copies, range(450)
    once, repeated, alone = (
        statistics.paired_bootstrap(*pair, photos, draws=2000)
        for pair, photos in zip(pairs, clusters, strict=True)
    )
    for name in once:
        # (The epsilon of the IoU counts once for all unions together.)
        assert repeated[name] == pytest.approx(once[name], abs=1e-9)
    width = [i["mIoU"].high - i["mIoU"].low for i in (once, alone)]
    assert width[0] == pytest.approx(3 * width[1], rel=0.1)


def test_two_photos_give_the_interval_that_can_be_counted():
    # Both photos, either one twice: the mean difference is 0, 0.5 or 1.
    first, second = model((0, 10), (0, 10)), model((0, 10), (10, 10))
    found = statistics.paired_bootstrap(first, second, ["a", "b"], draws=1000)["mIoU"]
    assert found == pytest.approx((0.5, 0, 1), abs=1e-6)


# ----------------------------------------------------------------------------------------- writing


def page_of(jsonl: Path, name: str = "data.js") -> dict:
    """A data file of a result's page."""
    return read_script(jsonl.parent / "report" / jsonl.stem / name)


def test_a_page_has_every_sentence_each_photo_once_and_the_numbers_of_its_result(
    tmp_path, shapes_lmdb
):
    jsonl = write_result(tmp_path / "run", shapes_lmdb)
    lines, refs = read_jsonl(jsonl), all_refs(shapes_lmdb)
    data, masks = page_of(jsonl), page_of(jsonl, "masks.js")
    rows, photos = data["rows"], tmp_path / "run/report/photos"
    for name in ("ref_id", "sent_id", "sentence"):
        assert rows[name] == [line[name] for line in lines]
    assert rows["iou"] == [[line["iou"] for line in lines]]
    assert [data["photos"][i][-1] for i in rows["photo"]] == [line["image"] for line in lines]
    assert masks["predictions"] == [[line["pred_rle"]["counts"] for line in lines]]
    for ref in refs:
        assert masks["truth"][str(ref.ref_id)] == encode_rle(load_mask(ref) > 0)
    files = [photo[0] for photo in data["photos"]]
    assert sorted(files) == sorted(p.name for p in photos.iterdir())
    assert len(files) == len({ref.image_key for ref in refs})
    for file, height, width, shown_height, shown_width, _ in data["photos"]:
        with Image.open(photos / file) as image:
            assert (image.format, image.size) == ("JPEG", (shown_width, shown_height))
        assert (shown_height, shown_width) == (height, width)  # small ones stay as they are
    result = json.loads(jsonl.with_suffix(".json").read_text())
    assert data["models"] == [{"name": "published", **result}]
    assert sum(data["histogram"][0]) == data["sentences"] == result["sentences"]
    assert data["curve"][0][25] == result["Pr@0.5"]
    for grouping in data["groupings"]:
        assert len(grouping["rows"]) == len(grouping["labels"])
    categories = next(g for g in data["groupings"] if g["key"] == "category")
    assert sum(row["sentences"] for row in categories["rows"]) == result["sentences"]


def test_a_page_of_sentences_about_nothing_has_their_metrics_kinds_and_rule(tmp_path, shapes_lmdb):
    lmdb = write_any_number(shapes_lmdb, tmp_path / "train.lmdb")
    jsonl = write_result(tmp_path / "run", lmdb)
    data = page_of(jsonl)
    result = json.loads(jsonl.with_suffix(".json").read_text())
    assert data["metrics"][:4] == ["gIoU", "cIoU", "N-acc", "T-acc"]
    assert data["models"][0]["no_target_rule"] == "under 50 pixels"
    assert data["curve"][0][35] == result["Pr@0.7"]
    kinds = data["groupings"][0]
    rows = dict(zip(kinds["labels"], (row["models"][0] for row in kinds["rows"]), strict=True))
    assert rows["no target"] == {"gIoU": 1, "cIoU": None, "N-acc": 1, "T-acc": None}
    several = [line["iou"] for line in read_jsonl(jsonl) if line.get("num_targets") == 3]
    assert rows["several targets"]["gIoU"] == pytest.approx(np.mean(several), abs=1e-6)
    assert rows["several targets"]["N-acc"] is None


def test_results_of_a_run_stand_side_by_side_share_photos_and_are_listed(tmp_path, shapes_lmdb):
    folder = tmp_path / "run"
    write_result(folder, shapes_lmdb, "both")
    photos = {p: p.stat().st_mtime_ns for p in (folder / "report/photos").iterdir()}
    for text in ("{", "[]"):
        (folder / f"test_foreign{text}.json").write_text(text)
        (page := folder / f"report/test_foreign{text}/index.html").parent.mkdir()
        page.touch()
    write_result(folder, shapes_lmdb, step=3, is_swapped=True)
    assert {p: p.stat().st_mtime_ns for p in (folder / "report/photos").iterdir()} == photos
    listed = read_script(folder / "report/results.js")
    stem = "test_shapes_train"
    assert [r["page"] for r in listed] == [f"{stem}{s}" for s in (".aligned", "", ".swapped")]
    for result in listed:
        page = folder / "report" / result["page"]
        assert (page / "index.html").is_file()
        models = read_script(page / "data.js")["models"]
        assert models[0]["mIoU"] == result["mIoU"]
        assert models[0]["swapped_sentences"] == result["swapped_sentences"]


def test_a_second_test_replaces_the_page_and_a_limit_leaves_the_numbers(tmp_path, shapes_lmdb):
    pages = []
    for step, limit in ((7, None), (2, 5)):
        jsonl = write_result(tmp_path / "run", shapes_lmdb, step=step, report_limit=limit)
        pages.append(page_of(jsonl))
    assert pages[0]["models"][0]["mIoU"] < pages[1]["models"][0]["mIoU"]
    assert not list((tmp_path / "run").rglob("*.partial"))
    ious = [line["iou"] for line in read_jsonl(jsonl)]
    assert pages[1]["sentences"] == len(ious) == sum(pages[1]["histogram"][0])
    shown = pages[1]["rows"]["iou"][0]
    assert len(shown) == 5
    assert (min(shown), max(shown)) == (min(ious), max(ious))


@pytest.mark.parametrize(
    ("limit", "shown"), [(None, [0, 1, 2]), (99, [0, 1, 2]), (2, [1, 2]), (1, [1])]
)
def test_limits_beyond_the_sentences_show_all_and_one_shows_the_worst(limit, shown):
    assert choose_shown([{"iou": iou} for iou in (0.5, 0.1, 0.9)], limit) == shown


def test_photos_are_shrunk_and_odd_names_and_sentences_survive(tmp_path):
    lmdb = write_odd_records(tmp_path / "val.lmdb")
    jsonl = write_result(tmp_path / "run", lmdb, report_photo_size=120)
    data = page_of(jsonl)
    assert data["rows"]["sentence"] == list(ODD_SENTENCES)
    assert [photo[1:5] for photo in data["photos"]] == [[600, 900, 80, 120], [40, 50, 40, 50]]
    for photo in data["photos"]:
        assert not set(photo[0]) & set("/%#? ")
        assert (tmp_path / "run/report/photos" / photo[0]).is_file()
    # No sentence is in the HTML, and the scripts are plain ASCII (read_script).
    assert "mine" not in (tmp_path / "run/report" / jsonl.stem / "index.html").read_text()


def test_another_photo_under_the_same_name_is_another_file(tmp_path, shapes_lmdb):
    line = {"image": "image_0.jpg", "height": 72, "width": 110, "ref_id": 100}
    reader, names = RecordReader(shapes_lmdb), set()
    for size in (384, 50, 384):
        ((photo, *_),), _ = write_pictures(reader, [line], tmp_path, size)
        names.add(photo)
    assert len(names) == 2
    assert sorted(names) == sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=r"train.lmdb has no ref 7: it is not what was scored"):
        write_pictures(reader, [line | {"ref_id": 7}], tmp_path, 384)


def test_pages_ask_for_nothing_beyond_their_folder():
    for path in (ROOT / "engine/report").glob("*.*"):
        if path.suffix != ".py":
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), path
            assert "innerHTML" not in text


def test_the_program_writes_a_report_when_told_to(tmp_path, data, trained):
    cfg, folder = load_config(trained), tmp_path / "tiny"
    options = ["TEST.weights", cfg.run_folder / "best_model.pth", "TRAIN.output_folder", tmp_path]
    options += ["TEST.protocol", "both", "TEST.threshold", "null"]
    run_program("test.py", trained, *options)
    assert not (folder / "report").exists()
    run_program("test.py", trained, *options, "TEST.report", True)
    pages = [r["page"] for r in read_script(folder / "report/results.js")]
    assert pages == ["test_shapes_val.aligned", "test_shapes_val"]
    result = json.loads((folder / f"{pages[1]}.json").read_text())
    assert result["lmdb"] == str(data / "lmdb/shapes/val.lmdb")
