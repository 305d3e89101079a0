"""RefShapes: REFER's format, sentences true of exactly one object, no luck without reading."""

import hashlib
import json
import pickle
import re
from collections import Counter, defaultdict
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pytest
from helpers import contents

from engine.report.statistics import sentence_kinds
from tools import refshapes
from utils.errors import UserError

COUNTS = {"train": 20, "val": 150, "testA": 15, "testB": 25}


def read(root: Path) -> tuple[dict, list[dict]]:
    folder = root / "refshapes"
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    return json.loads((folder / "instances.json").read_text()), refs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    refshapes.generate(out, COUNTS, seed=0)
    return out


@pytest.fixture(scope="module")
def any_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("any")
    refshapes.generate(out, COUNTS, seed=0, any_number=True)
    return out


@pytest.fixture(scope="module")
def images(root: Path) -> dict[int, dict]:
    return measured(root)


def measured(root: Path) -> dict[int, dict]:
    """Image id -> {width, height, refs, objects}, objects re-measured from their masks."""
    instances, refs = read(root)
    names = {c["id"]: c["name"] for c in instances["categories"]}
    images = {i["id"]: {**i, "refs": [], "objects": []} for i in instances["images"]}
    for annotation in instances["annotations"]:
        image = images[annotation["image_id"]]
        polygon = np.array(annotation["segmentation"][0]).reshape(-1, 2)
        mask = np.zeros((image["height"], image["width"]), np.uint8)
        cv2.fillPoly(mask, [np.round((polygon - 0.5) * 16).astype(np.int32)], 1, shift=4)
        ys, xs = np.nonzero(mask)
        image["objects"].append(
            annotation
            | {"shape": names[annotation["category_id"]], "mask": mask, "pixels": mask.sum()}
            | {"x": xs.mean() + 0.5, "y": ys.mean() + 0.5}
            | {"width": image["width"], "height": image["height"]}
        )
    for ref in refs:
        images[ref["image_id"]]["refs"].append(ref)
    return images


SUPERLATIVES = {  # words -> what they maximise, and the margin within which all are meant
    "left": (lambda o: -o["x"] / o["width"], 0.07),
    "right": (lambda o: o["x"] / o["width"], 0.07),
    "top": (lambda o: -o["y"] / o["height"], 0.07),
    "bottom|lowest": (lambda o: o["y"] / o["height"], 0.07),
    "biggest|largest": (lambda o: np.log(o["pixels"]), np.log(1.25)),
    "smallest|tiniest": (lambda o: -np.log(o["pixels"]), np.log(1.25)),
}
SENTENCE = re.compile(
    rf"(?:the |all )?(?:(?P<colour>{'|'.join(refshapes.COLOURS)}) )?"
    rf"(?P<shape>{'|'.join(refshapes.SHAPES)})s?(?: that (?:is|are) (?P<which>\w+))?"
    r"(?: (?:on|in|at) the (?P<side>left|right|top|upper|bottom|lower)(?: half)?)?"
    r"(?: (?:to the )?(?P<way>left of|right of|above|below|under) the (?P<anchor>\w+ \w+))?"
)
ANGLES = {"left": 180, "right": 0, "above": -90, "top": -90, "upper": -90}  # else downwards
FORMS = dict(zip(("colour", "position", "size", "relation"), refshapes.FORMS, strict=True))


def kind_of(sentence: str) -> str:
    """Return the last of the report's kinds: relations name a colour, and some a side, as well."""
    return sentence_kinds(sentence)[-1]


def superlative(sentence: str, rivals: list[dict]) -> list[dict]:
    """Return those of the shape that a position or size means, read with a margin."""
    value, margin = next(v for words, v in SUPERLATIVES.items() if re.search(words, sentence))
    best = max(map(value, rivals))
    return [o for o in rivals if value(o) > best - margin]


def true_of(sentence: str, image: dict, slack: int) -> list[dict]:
    """Return all that another sentence, of any number, is true of, read loosely or strictly.

    Args:
        slack: 1 or -1: half an image is that and 6 % more or less, a side of an anchor is 50
            degrees and 10 more or less.
    """
    said = SENTENCE.fullmatch(sentence).groupdict()
    centre = ANGLES.get((said["side"] or said["way"] or "").split(" ")[0], 90)
    colour = said["colour"] or said["which"]
    objects = image["objects"]
    anchors = [o for o in objects if f"{o['colour']} {o['shape']}" == said["anchor"]]
    assert len(anchors) == bool(said["anchor"]), sentence

    def is_meant(o: dict) -> bool:
        if o["shape"] != said["shape"] or colour not in (None, o["colour"]) or o in anchors:
            return False
        if anchors:
            angle = np.degrees(np.arctan2(o["y"] - anchors[0]["y"], o["x"] - anchors[0]["x"]))
            return abs((angle - centre + 180) % 360 - 180) < 50 + 10 * slack
        share = o["x"] / o["width"] if centre in (0, 180) else o["y"] / o["height"]
        is_low = said["side"] in ("left", "top", "upper")
        return not said["side"] or (share if is_low else 1 - share) < 0.5 + 0.06 * slack

    return [o for o in objects if is_meant(o)]


def ids_of(objects: list[dict]) -> list[int]:
    return [o["id"] for o in objects]


def test_each_sentence_is_true_of_its_object_alone_and_faces_a_distractor(images):
    for image in images.values():
        assert 2 <= len(image["refs"]) <= 4
        for ref in image["refs"]:
            texts = [sentence["sent"] for sentence in ref["sentences"]]
            assert 1 <= len(set(texts)) == len(texts) <= 4
            for text in texts:
                shape = next(word for word in text.split() if word in refshapes.SHAPES)
                rivals = [o for o in image["objects"] if o["shape"] == shape]
                if kind_of(text) in ("position", "size"):
                    meant = superlative(text, rivals)
                else:
                    meant = true_of(text, image, 1)
                    assert meant == true_of(text, image, -1), text
                if kind_of(text) == "colour":
                    rivals += [o for o in image["objects"] if o["colour"] in text.split()]
                if kind_of(text) == "relation":
                    rivals = [o for o in rivals if not text.endswith(f"{o['colour']} {o['shape']}")]
                assert ids_of(meant) == [ref["ann_id"]], text
                assert len(set(ids_of(rivals))) >= 2, text


def test_plurals_name_exactly_their_objects_and_others_are_nearly_true_of_something(any_root):
    """By a reading of its own of each sentence, loose and strict."""
    sentences, of_kind = Counter(), defaultdict(set)
    for image in measured(any_root).values():
        shapes, colours = ({o[name] for o in image["objects"]} for name in ("shape", "colour"))
        for ref in image["refs"]:
            number = 0 if ref["ann_id"] == [-1] else len(ref["ann_id"])
            sentences[number] += len(ref["sentences"])
            assert len(ref["category_id"]) == len(ref["ann_id"]) < len(image["objects"])
            if number == 1:
                continue
            for sentence in ref["sentences"]:
                text = sentence["sent"]
                meant = [] if number == 0 else ref["ann_id"]
                loose, strict = (ids_of(true_of(text, image, slack)) for slack in (1, -1))
                assert loose == strict == meant, text
                said = SENTENCE.fullmatch(text).groupdict()
                assert said["shape"] in shapes
                assert (said["colour"] or said["which"] or next(iter(colours))) in colours
                of_kind[number > 1].add((said["side"] is not None, said["way"] is not None))
    several = sum(count for number, count in sentences.items() if number > 1)
    for count in (sentences[0], several):
        assert 0.1 < count / sentences.total() < 0.3
    assert [len(kinds) for kinds in of_kind.values()] == [3, 3]  # attributes, sides, relations


def test_images_and_refs_of_one_object_are_the_same_with_any_number(root, any_root):
    plain, richer = contents(root), contents(any_root)
    changed = {name for name, data in plain.items() if richer[name] != data}
    assert changed == {"refshapes/refs(unc).p", "refshapes/generator.json"}
    single = [r for r in read(any_root)[1] if len(r["ann_id"]) == 1 and r["ann_id"] != [-1]]
    lists = ("ann_id", "category_id")
    assert [r | {k: r[k][0] for k in lists} for r in single] == read(root)[1]
    ids = [i for ref in read(any_root)[1] for i in (*ref["sent_ids"], -ref["ref_id"])]
    assert len(set(ids)) == len(ids)


def test_a_seed_gives_the_same_bytes_in_several_processes_and_another_seed_does_not(
    tmp_path, monkeypatch
):
    counts = {"train": 22, "testA": 2}
    refshapes.generate(tmp_path / "alone", counts, seed=5)
    refshapes.generate(tmp_path / "other", counts, seed=6)
    monkeypatch.setattr(refshapes, "WORTH_A_POOL", 1)
    refshapes.generate(tmp_path / "together", counts, seed=5)
    alone, other, together = (contents(tmp_path / name) for name in ("alone", "other", "together"))
    assert together == alone
    assert len(alone) == sum(counts.values()) + 3
    assert all(other[name] != data for name, data in alone.items())


def test_seed_0_draws_what_it_has_always_drawn(root):
    """The scores in the documents are of these sentences."""
    name = "refshapes/refs(unc).p"
    digest = hashlib.sha256(contents(root)[name]).hexdigest()
    assert (refshapes.VERSION, digest[:16]) == (5, "d64dbbd59aadac53")


def test_an_image_does_not_depend_on_how_many_are_asked_for(root, tmp_path):
    refshapes.generate(tmp_path / "few", {"train": 1, "val": 2}, seed=0)
    few, many = contents(tmp_path / "few"), contents(root)
    assert all(many[name] == data for name, data in few.items() if name.startswith("images"))
    assert [r for r in read(root)[1] if r["image_id"] in (1, 1_000_001, 1_000_002)] == (
        read(tmp_path / "few")[1]
    )


def test_refs_have_refers_fields_and_stable_unique_ids(root):
    instances, refs = read(root)
    names = {image["id"]: image["file_name"].removesuffix(".jpg") for image in instances["images"]}
    annotations = {a["id"]: a for a in instances["annotations"]}
    sent_ids = [i for ref in refs for i in ref["sent_ids"]]
    ref_ids, ann_ids = ([ref[name] for ref in refs] for name in ("ref_id", "ann_id"))
    for ids in (sent_ids, ref_ids, ann_ids, [a["id"] for a in instances["annotations"]]):
        assert len(set(ids)) == len(ids)
    assert max(sent_ids) < 2**31
    fields = "ref_id ann_id image_id category_id split sentences sent_ids file_name"
    for ref in refs:
        assert list(ref) == fields.split()
        annotation = annotations[ref["ann_id"]]
        for name in ("image_id", "category_id"):
            assert annotation[name] == ref[name]
        assert ref["file_name"] == f"{names[ref['image_id']]}_{ref['ann_id']}.jpg"
        assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"]
        for sentence in ref["sentences"]:
            assert sentence["sent"] == sentence["raw"] == " ".join(sentence["tokens"])


def test_instances_are_whole_objects_inside_their_image(root, images):
    assert list(read(root)[0]) == ["info", "licenses", "images", "annotations", "categories"]
    for thing in (o for image in images.values() for o in image["objects"]):
        polygon = np.array(thing["segmentation"][0]).reshape(-1, 2)
        x, y, w, h = thing["bbox"]
        assert np.allclose([*polygon.min(0), *polygon.max(0)], [x, y, x + w, y + h])
        assert polygon.min() > 0
        assert (polygon.max(0) < (thing["width"], thing["height"])).all()
        area = cv2.contourArea(polygon.astype(np.float32))
        assert thing["area"] == pytest.approx(area, rel=1e-3)
        assert thing["iscrowd"] == 0


def test_images_hold_three_to_seven_objects_that_do_not_touch_and_are_small(images):
    for image in images.values():
        assert 3 <= len(image["objects"]) <= 7
        grown = [cv2.dilate(o["mask"], np.ones((3, 3), np.uint8)) for o in image["objects"]]
        assert np.sum(grown, axis=0).max() == 1
    shares = [o["mask"].mean() for image in images.values() for o in image["objects"]]
    assert 0.03 < np.median(shares) < 0.05


def test_painted_colour_lies_where_the_polygon_says(root, images):
    for image in images.values():
        pixels = cv2.imread(str(root / "images" / "train2014" / image["file_name"]))[..., ::-1]
        assert pixels.shape == (image["height"], image["width"], 3)
        for thing in image["objects"]:
            inner = cv2.erode(thing["mask"], np.ones((3, 3), np.uint8)).astype(bool)
            seen = np.median(pixels[inner], axis=0)
            distance = {name: np.linalg.norm(seen - rgb) for name, rgb in refshapes.COLOURS.items()}
            assert min(distance, key=distance.get) == thing["colour"]


def test_splits_hold_their_kinds_and_share_no_image(images):
    kinds, counts = defaultdict(Counter), Counter()
    for image in images.values():
        (split,) = {ref["split"] for ref in image["refs"]}
        counts[split] += 1
        texts = [s["sent"] for ref in image["refs"] for s in ref["sentences"]]
        kinds[split].update(FORMS[kind_of(text)] for text in texts)
    assert counts == COUNTS
    for split, allowed in refshapes.SPLITS.items():
        assert set(kinds[split]) == set(allowed)
    lowest, highest = (0.28, 0.2, 0.12, 0.15), (0.42, 0.34, 0.24, 0.28)
    for kind, low, high in zip(refshapes.FORMS, lowest, highest, strict=True):
        assert low < kinds["val"][kind] / kinds["val"].total() < high, kind


def test_choosing_an_object_without_reading_scores_below_035_on_val(images):
    """The largest object, the one nearest the centre, and any."""
    scores = []
    for image in images.values():
        objects, centre = image["objects"], np.array([image["width"], image["height"]]) / 2
        masks = np.stack([o["mask"] for o in objects]).reshape(len(objects), -1).astype(int)
        common = masks @ masks.T
        ious = common / (masks.sum(1) + masks.sum(1)[:, None] - common)
        largest = np.argmax(masks.sum(1))
        central = np.argmin([np.hypot(*((o["x"], o["y"]) - centre)) for o in objects])
        for ref in image["refs"]:
            if ref["split"] == "val":
                iou = ious[ids_of(objects).index(ref["ann_id"])]
                scores += [(iou[largest], iou[central], iou.mean())] * len(ref["sentences"])
    assert all(0.05 < score < 0.35 for score in np.mean(scores, axis=0)), scores


def test_a_phrase_has_the_referents_that_it_is_clearly_true_of():
    looks = (
        ("star", "red", 20, 20, 100),
        ("star", "red", 25, 80, 130),
        ("star", "blue", 80, 50, 300),
        ("circle", "blue", 60, 15, 100),
    )
    things = tuple(refshapes.Thing(*look, outline=np.empty((0, 2))) for look in looks)
    scene = refshapes.Scene(100, 100, things)
    expected = {
        ("attribute", "star", "", "red"): None,  # two of them
        ("attribute", "star", "", "blue"): [2],
        ("attribute", "circle", "", "red"): [],
        ("position", "star", "left"): None,  # 5 % ahead only
        ("position", "star", "right"): [2],
        ("position", "circle", "above"): None,  # no other circle
        ("size", "star", "big"): [2],
        ("size", "star", "small"): None,  # 1.3 times only
        ("relation", "star", "below", "", "blue circle"): None,  # two fairly below
        ("relation", "star", "left", "", "blue circle"): None,  # the second nearly so
        ("relation", "star", "left", "", "red star"): None,  # which red star?
        ("relation", "star", "above", "", "blue circle"): [],
        ("attribute", "star", "", "red", "", True): [0, 1],
        ("attribute", "star", "", "blue", "", True): None,  # one of them
        ("attribute", "circle", "", "red", "", True): [],
        ("attribute", "star", "all", "", "", True): [0, 1, 2],
        ("attribute", "circle", "all", "", "", True): None,  # one of them
        ("position", "star", "left", "", "", True): [0, 1],
        ("position", "star", "above", "", "", True): None,  # one is in the middle
        ("position", "circle", "below", "", "", True): [],
        ("relation", "star", "above", "", "blue circle", True): [],
    }
    for phrase, places in expected.items():
        found = refshapes.referents(scene, refshapes.Phrase(*phrase))
        assert found == (None if places is None else [things[i] for i in places]), phrase


def test_a_complete_folder_is_reused_and_other_parameters_replace_it(tmp_path, capsys):
    out = tmp_path / "shapes"
    counts = ["--train", "2", "--val", "2", "--testA", "0", "--testB", "0"]

    def is_reused(*words: str) -> bool:
        refshapes.main(["-o", str(out), *counts, *words])
        return "reused" in capsys.readouterr().out

    runs = [is_reused(), is_reused("--any-number"), is_reused("--any-number"), is_reused()]
    assert runs == [False, False, True, False]
    foreign = out / "images" / "train2014" / "COCO_train2014_000000000009.jpg"
    foreign.write_bytes(b"a photo of the user's")
    before = contents(out)
    assert is_reused()
    assert contents(out) == before
    assert not is_reused("--seed", "1", "--train", "1")
    assert {r["image_id"] for r in read(out)[1]} == {1, 1_000_001, 1_000_002}
    assert len(list(out.glob("images/train2014/REFSHAPES_*"))) == 3
    assert foreign.exists()
    next(out.glob("images/train2014/REFSHAPES_*")).unlink()
    assert not is_reused("--seed", "1", "--train", "1")
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]


def test_an_interrupted_run_is_not_taken_for_a_complete_one(tmp_path, monkeypatch):
    refshapes.generate(tmp_path / "s", {"val": 2}, seed=0)
    monkeypatch.setattr(refshapes, "_ref", mock.Mock(side_effect=RuntimeError))
    with pytest.raises(RuntimeError):
        refshapes.generate(tmp_path / "s", {"val": 2}, seed=0)
    assert not refshapes.is_complete(tmp_path / "s", {"val": 2}, seed=0)


def test_a_file_in_the_way_is_named_and_kept(tmp_path):
    (tmp_path / "s").write_text("mine")
    with pytest.raises(NotADirectoryError, match=str(tmp_path / "s")):
        refshapes.generate(tmp_path / "s", {"val": 1}, seed=0)
    assert (tmp_path / "s").read_text() == "mine"


@pytest.mark.parametrize(
    ("counts", "seed"),
    [({"val": 0}, 0), ({"val": -1, "train": 1}, 0), ({"val": 10**6}, 0), ({"val": 1}, -1)],
)
def test_impossible_parameters_are_named(tmp_path, counts, seed):
    with pytest.raises(UserError, match=rf"'val': {counts['val']}.*--seed {seed}: give"):
        refshapes.generate(tmp_path / "s", counts, seed)
    assert list(tmp_path.iterdir()) == []


def test_a_crowd_that_cannot_be_laid_out_is_given_up_for_another(monkeypatch):
    drawn = {6: 0, 7: 0}
    lay_out = refshapes._lay_out

    def fits_six(rng, shapes, *others):
        drawn[len(shapes)] += 1
        return lay_out(rng, shapes, *others) if len(shapes) == 6 else None

    monkeypatch.setattr(refshapes, "_lay_out", fits_six)
    monkeypatch.setattr(refshapes, "THINGS", {6: 0.5, 7: 0.5})
    monkeypatch.setattr(refshapes, "LAYOUTS", 3)
    for seed in range(5):
        assert len(refshapes._draw_scene(np.random.default_rng(seed)).things) == 6
    assert drawn[7] >= 3
