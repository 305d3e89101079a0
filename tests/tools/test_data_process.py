"""tools/data_process.py: the release's JSON and masks from REFER folders, or a clear refusal."""

import json
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import encoded, refer_instances, refer_ref, write_refer

from tools import data_process, folder2lmdb, inspect_lmdb
from tools.odd_records import OddRecords
from utils.errors import UserError
from utils.records import RecordReader


def write(root: Path, splits: list[str], dataset: str = "toys", split_by: str = "me") -> Path:
    refs = [refer_ref(i, split) for i, split in enumerate(splits)]
    return write_refer(root, refs, dataset=dataset, split_by=split_by)


def prepare(root: Path, out: Path, *more: str, dataset: str = "toys", split: str = "me") -> None:
    where = ["--data_root", str(root), "--output_dir", str(out)]
    data_process.main([*where, "--dataset", dataset, "--split", split, *more])


def files(out: Path) -> set[str]:
    return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}


def test_an_entry_has_the_releases_fields_in_their_order(tmp_path: Path) -> None:
    prepare(write(tmp_path / "in", ["val"]), tmp_path)
    assert json.loads((tmp_path / "anns/toys/val.json").read_text()) == [
        {
            "bbox": [2, 1, 6, 5],
            "cat": 11,
            "segment_id": 0,
            "img_name": "a_7.jpg",
            "sentences": [
                {"idx": 0, "sent_id": 0, "sent": "thing é"},
                {"idx": 1, "sent_id": 1, "sent": "other"},
            ],
            "sentences_num": 2,
        }
    ]


def test_masks_are_drawn_only_when_asked_for(tmp_path: Path) -> None:
    root = write(tmp_path / "in", ["train", "val"])
    prepare(root, tmp_path / "a")
    assert files(tmp_path / "a") == {"anns/toys/train.json", "anns/toys/val.json"}
    prepare(root, tmp_path / "b", "--generate_mask", "--name", "toys_u")
    assert files(tmp_path / "b") == {
        "anns/toys_u/train.json", "anns/toys_u/val.json",
        "masks/toys_u/0.png", "masks/toys_u/1.png",
    }  # fmt: skip
    mask = cv2.imread(str(tmp_path / "b/masks/toys_u/1.png"), cv2.IMREAD_UNCHANGED)
    expected = np.zeros((8, 10), np.uint8)
    expected[1:5, 2:6] = 255
    np.testing.assert_array_equal(mask, expected)


def test_the_summary_counts_refs_sentences_images_and_tokens(tmp_path: Path, capsys) -> None:
    prepare(write(tmp_path / "in", ["train", "train", "val"]), tmp_path)
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines()]
    assert ["split", "refs", "sentences", "images"] in rows
    assert ["train", "2", "4", "1"] in rows
    assert ["val", "1", "2", "1"] in rows
    assert "3:3  4:3" in out  # start, word(s), end
    assert "cut at word_len 17: 0, at 22: 0, of 6 sentences" in out


def test_an_empty_split_gets_a_notice_and_no_file(tmp_path: Path, capsys) -> None:
    root = write(tmp_path / "in", ["train", "val"], "refcocog", "google")
    prepare(root, tmp_path / "out", dataset="refcocog", split="google")
    assert files(tmp_path / "out") == {"anns/refcocog/train.json", "anns/refcocog/val.json"}
    out = capsys.readouterr().out
    assert "test           0          0       0   no refs: nothing written" in out
    assert "pass --name" in out


def test_files_of_splits_that_a_run_does_not_write_are_removed(tmp_path: Path, capsys) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    write(root, ["train", "val", "test"], "refcocog", "umd")
    prepare(root, out, dataset="refcocog", split="umd")
    (out / "anns/refcocog/note.txt").write_text("mine")
    assert "removed" not in capsys.readouterr().out
    write(root, ["train", "val"], "refcocog", "google")
    prepare(root, out, dataset="refcocog", split="google")
    assert files(out) == {
        f"anns/refcocog/{name}" for name in ("train.json", "val.json", "note.txt")
    }
    assert f"removed {out / 'anns/refcocog/test.json'}: of an earlier" in capsys.readouterr().out


def test_a_failed_run_leaves_the_files_of_all_splits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(write(tmp_path / "in", ["train", "val", "old"]), out, "--generate_mask")
    before = files(out)
    write(tmp_path / "in", ["train", "val"])
    path = tmp_path / "in/toys/instances.json"
    path.write_text(path.read_text().replace('"segmentation": [[2', '"segmentation": [["x"'))
    with pytest.raises(UserError, match="unreadable segmentation"):
        prepare(tmp_path / "in", out, "--generate_mask")
    assert files(out) == before


def test_refclef_takes_splits_by_letter_and_skips_the_bad_images(tmp_path: Path) -> None:
    splits = ["train", "val", "testA", "testAB", "testBC"]
    refs = [refer_ref(i, split) for i, split in enumerate(splits)]
    refs += [refer_ref(i, image_id=i) for i in (19579, 17975, 19575)]
    write_refer(tmp_path / "in", refs, dataset="refclef", split_by="unc")
    prepare(tmp_path / "in", tmp_path / "out", dataset="refclef", split="unc")
    found = {
        path.stem: [entry["segment_id"] for entry in json.loads(path.read_text())]
        for path in (tmp_path / "out/anns/refclef").iterdir()
    }
    assert found == {"train": [0], "val": [1], "testA": [2, 3], "testB": [3, 4], "testC": [4]}


def test_other_folders_get_the_splits_their_refs_name(tmp_path: Path) -> None:
    prepare(write(tmp_path / "in", ["train", "hard-val", "testAB"]), tmp_path / "out")
    assert files(tmp_path / "out") == {
        f"anns/toys/{split}.json" for split in ("train", "hard-val", "testAB")
    }


def test_a_folder_without_any_known_split_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "in", ["dev"], "refcoco", "unc")
    with pytest.raises(UserError, match="no refs of train, val, testA, testB; its splits: dev"):
        prepare(root, tmp_path / "out", dataset="refcoco", split="unc")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": []}, r"annotation 101 \(ref 1\) has no segmentation: unpack"),
        ({"bbox": [1, 2, 3]}, r"annotations\[1\].bbox: must be x, y, width, height"),
        ({"bbox": [1, 2, 3, None]}, r"annotations\[1\].bbox\[3\]: must be a valid number"),
        ({"id": 555}, "has no annotation 101, which ref 1"),
    ],
)
def test_a_bad_annotation_is_named_and_leaves_no_file(tmp_path: Path, changes, message) -> None:
    root = write(tmp_path / "in", ["train", "val"])
    path = root / "toys" / "instances.json"
    content = json.loads(path.read_text())
    content["annotations"][1].update(changes)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        prepare(root, tmp_path / "out", "--generate_mask")
    assert files(tmp_path / "out") == set()


# ------------------------------------------------------------------------------- odd records


def write_odd(root: Path) -> Path:
    """Ten refs, of which nine are odd, each in its own way; no ref names another odd annotation."""
    texts = [{"sent": "a mug", "sent_id": 99}, {"sent": " &nbsp;", "sent_id": 98}]
    refs = [
        refer_ref(0, image_id=3),
        refer_ref(1, image_id=404),
        refer_ref(2, sentences=texts),
        refer_ref(3, sentences=[]),
        *(refer_ref(i) for i in range(4, 9)),
        refer_ref(4, "val"),
    ]
    content = refer_instances(refs)
    content["images"] = [image for image in content["images"] if image["id"] != 404]
    annotations = {item["id"]: item for item in content["annotations"]}
    annotations[104]["bbox"] = None
    annotations[105]["segmentation"] = {"size": [9, 10], "counts": [90]}
    annotations[106]["segmentation"] = {"size": [8, 10], "counts": [80]}
    annotations[107]["segmentation"] = [[1, 1, 2, 2]]
    del annotations[108]
    unused = {"id": 500, "bbox": "none", "segmentation": 3}
    content["annotations"] = [unused, *annotations.values()]
    return write_refer(root, refs, content)


ODD = [
    r"refs\(me\)\.p\[3\].sentences: must be one or more",
    r"refs\(me\)\.p: ref_id 4 is there twice",
    r"has no image 404, which ref 1 ",
    r"ref 2 has a sentence without words, ' &nbsp;'",
    r"annotations\[\d+\].bbox: must be a valid list, not None",
    r"annotation 105 \(ref 5\) has a segmentation of 9 x 10 pixels on an image of 8 x 10",
    r"annotation 106 \(ref 6\) covers no pixel: --empty says",
    r"annotation 107 \(ref 7\) has an unreadable segmentation",
    r"has no annotation 108, which ref 8 ",
]


def assert_matches(lines: list[str], patterns: list[str]) -> None:
    assert len(lines) == len(patterns)
    for pattern in patterns:
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, pattern


def test_all_odd_records_are_listed_at_once_with_counts_by_kind(tmp_path: Path, capsys) -> None:
    root = write_odd(tmp_path / "in")
    with pytest.raises(UserError) as caught:
        prepare(root, tmp_path / "out", "--generate_mask")
    assert_matches(capsys.readouterr().err.splitlines(), ODD)
    for text in ("9 odd records (", "1 of kind 'empty mask'", "1 of kind 'empty sentence'"):
        assert text in str(caught.value)
    assert str(caught.value).endswith("nothing written: put them right, or add --skip-odd")
    assert files(tmp_path / "out") == set()


def test_odd_records_are_left_out_and_counted_as_far_as_the_lmdb(tmp_path: Path, capsys) -> None:
    prepare(write_odd(tmp_path / "in"), tmp_path, "--generate_mask", "--skip-odd")
    said = capsys.readouterr()
    assert_matches(said.err.splitlines(), ODD)
    assert "note: left out 9 odd records (" in said.out
    assert files(tmp_path / "anns") == {"toys/train.json", "toys/train.odd"}
    for image in (3, 7):
        path = tmp_path / f"images/a_{image}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encoded(np.zeros((8, 10, 3), np.uint8), ".jpg"))
    path = tmp_path / "anns/toys/train.json"
    entries = json.loads(path.read_text())
    path.write_text(json.dumps([*entries, entries[0] | {"segment_id": 5}]))  # sentences twice
    lmdb = pack(tmp_path, "--skip-odd")
    assert RecordReader(lmdb).index.ref_ids == [0]
    assert RecordReader(lmdb).meta["left_out"] == 9
    inspect_lmdb.main([str(lmdb), "--samples", "0"])
    assert "left out 9 odd refs" in capsys.readouterr().out
    prepare(write(tmp_path / "in", ["train"]), tmp_path, "--generate_mask")
    assert "left_out" not in RecordReader(pack(tmp_path)).meta


def sentences(*sent_ids: int, sent: str = "mug") -> list[dict]:
    return [{"sent": sent, "sent_id": i} for i in sent_ids]


def test_of_refs_that_share_a_sentence_id_only_the_later_is_left_out(tmp_path: Path) -> None:
    numbers = {0: [1], 1: [5], 2: [5, 6], 3: [7, 6], 4: [7], 5: [8, 8]}
    refs = [refer_ref(i, sentences=sentences(*ids)) for i, ids in numbers.items()]
    refs += [refer_ref(6, "val", sentences=sentences(6))]
    refs[1] |= {"ann_id": 500}  # not there: its sentence id stays free
    content = refer_instances(refs)
    content["annotations"] = [item for item in content["annotations"] if item["id"] != 500]
    root = write_refer(tmp_path / "in", refs, content)
    with pytest.raises(UserError, match=r"3 odd records .*2 of kind 'number twice'"):
        prepare(root, tmp_path)
    prepare(root, tmp_path, "--skip-odd")
    assert_matches(
        (tmp_path / "anns/toys/train.odd").read_text().splitlines(),
        [
            "no annotation 500",
            r"refs\(me\)\.p: ref 3: sent_id 6 is there twice: give each sentence a number",
            r"refs\(me\)\.p: ref 5: sent_id 8 is there twice",
        ],
    )
    paths = [tmp_path / f"anns/toys/{split}.json" for split in ("train", "val")]
    for chosen, kept in ((paths[:1], [0, 2, 4]), (paths[1:], [6]), (paths, [0, 2, 4])):
        odd = OddRecords()
        entries = folder2lmdb.read_entries(chosen, odd)
        assert [entry["segment_id"] for _, entry in entries] == kept
    (line,) = odd.of_split("train+val")
    assert line.endswith("val.json[0]: sent_id 6 is there twice: pack each JSON file alone")


@pytest.mark.parametrize(
    ("sent", "sent_id", "file_name", "message"),
    [
        ("mug \ud800", 9, "a.jpg", r"sentences\[0\].sent: must be .* unicode string"),
        ("mug", 2**63, "a.jpg", r"sentences\[0\].sent_id: must be less than"),
        ("mug", 9, "x" * 501, r"file_name: must be a path of at most 500 bytes"),
        ("mug", 9, "a\0.jpg", r"file_name: must be a path of at most 500 bytes"),
        ("mug", 9, "\ud800", r"file_name: must be .* unicode string"),
    ],
)
def test_what_cannot_be_packed_later_is_odd_here(
    tmp_path: Path, sent, sent_id, file_name, message
) -> None:
    refs = [refer_ref(0), refer_ref(1, image_id=3, sentences=sentences(sent_id, sent=sent))]
    content = refer_instances(refs)
    (image,) = (item for item in content["images"] if item["id"] == 3)
    image["file_name"] = file_name
    with pytest.raises(UserError, match=message) as caught:
        prepare(write_refer(tmp_path / "in", refs, content), tmp_path)
    assert str(caught.value).endswith("; --skip-odd leaves such records out")


def pack(root: Path, *more: str) -> Path:
    where = ["-i", root / "images", "-m", root / "masks/toys", "-o", root / "lmdb/toys"]
    folder2lmdb.main(["-j", str(root / "anns/toys/train.json"), *map(str, where), *more])
    return root / "lmdb/toys/train.lmdb"


@pytest.mark.parametrize("empty", ["skip", "no-target"])
def test_empty_masks_mean_what_is_said_of_them(tmp_path: Path, capsys, empty: str) -> None:
    refs = [refer_ref(i) for i in range(3)]
    content = refer_instances(refs)
    for item in content["annotations"][1:]:
        item["segmentation"] = {"size": [8, 10], "counts": [80]}
    root = write_refer(tmp_path / "in", refs, content)
    with pytest.raises(UserError, match="2 odd records"):
        prepare(root, tmp_path, "--generate_mask")
    said = capsys.readouterr().err
    assert all(f"(ref {i}) covers no pixel: --empty" in said for i in (1, 2))
    prepare(root, tmp_path, "--generate_mask", "--empty", empty)
    entries = json.loads((tmp_path / "anns/toys/train.json").read_text())
    numbers = [entry.get("num_targets", 1) for entry in entries]
    assert numbers == ([1] if empty == "skip" else [1, 0, 0])
    (tmp_path / "images").mkdir()
    photo = encoded(np.zeros((8, 10, 3), np.uint8), ".jpg")
    (tmp_path / "images/a_7.jpg").write_bytes(photo)
    reader = RecordReader(pack(tmp_path))
    assert [reader.ref(i).num_targets for i in range(len(reader))] == numbers
    assert reader.meta.get("left_out") == (2 if empty == "skip" else None)


# ---------------------------------------------------------------------------------- gRefCOCO

SQUARES = {
    1: [[1, 1, 4, 1, 4, 4, 1, 4]],
    2: [[5, 1, 9, 1, 9, 4, 5, 4], [0, 0, 9, 9], [0, 0, 9, 0, 9, 7, 3]],
    3: {"size": [8, 10], "counts": [6, 2, *[6, 2] * 9]},
    4: {"size": [8, 10], "counts": [0, 80]},
    5: [[0, 0, 9, 9], [1, 1, 2, 2, 3]],
}


def write_gref(root: Path, refs: list[dict], name: str = "grefs(unc).json") -> Path:
    """gRefCOCO's folder with annotations 1 to 5: 4 is a crowd, 5 has no sound polygon."""
    folder = root / "grefcoco"
    folder.mkdir(parents=True, exist_ok=True)
    content = refer_instances([refer_ref(0, ann_id=i) for i in SQUARES])
    for item in content["annotations"]:
        item |= {"segmentation": SQUARES[item["id"]], "iscrowd": int(item["id"] == 4)}
        item |= {"image_id": 7}
    (folder / "instances.json").write_text(json.dumps(content))
    data = json.dumps(refs).encode() if name.endswith("json") else pickle.dumps(refs, 2)
    (folder / name).write_bytes(data)
    return root


def gref(ref_id: int, *ann_ids: int, split: str = "val") -> dict:
    return refer_ref(ref_id, split, ann_id=list(ann_ids), category_id=[13] * len(ann_ids))


@pytest.mark.parametrize("name", ["grefs(unc).json", "grefs(unc).p"])
def test_a_list_of_objects_is_their_union_without_crowds_and_bad_polygons(
    tmp_path: Path, capsys, name: str
) -> None:
    lists = {1: [1, 2], 2: [3, 4, 1], 3: [2], 4: [-1], 5: [5, 1, 1]}
    refs = [gref(i, *ids) for i, ids in lists.items()]
    refs[3]["category_id"] = [-1]
    root = write_gref(tmp_path / "in", refs, name)
    prepare(root, tmp_path, "--generate_mask", dataset="grefcoco", split="unc")
    entries = json.loads((tmp_path / "anns/grefcoco/val.json").read_text())
    assert [entry.get("num_targets", 1) for entry in entries] == [2, 2, 1, 0, 2]
    assert [entry["cat"] for entry in entries] == [11, 11, 11, None, 11]
    assert [entry["bbox"] for entry in entries] == [[2, 1, 6, 5]] * 3 + [None] + [[2, 1, 6, 5]]
    assert "refs of no target: 1, of one: 1, of several: 3" in capsys.readouterr().out
    areas = {1: np.s_[1:4, 1:4], 2: np.s_[1:4, 5:9], 3: np.s_[6:8, :]}
    for ref_id, ids in {1: [1, 2], 2: [3, 1], 3: [2], 4: [], 5: [1]}.items():
        expected = np.zeros((8, 10), np.uint8)
        for number in ids:
            expected[areas[number]] = 255
        mask = cv2.imread(str(tmp_path / f"masks/grefcoco/{ref_id}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(mask, expected)


def test_boxes_of_several_objects_are_joined(tmp_path: Path) -> None:
    root = write_gref(tmp_path / "in", [gref(1, 1, 2)])
    path = root / "grefcoco/instances.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [0.9, 3.5, 2.5, 4.2]
    path.write_text(json.dumps(content))
    prepare(root, tmp_path, dataset="grefcoco", split="unc")
    (entry,) = json.loads((tmp_path / "anns/grefcoco/val.json").read_text())
    assert entry["bbox"] == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (gref(7, 1, 99), r"instances\.json has no annotation 99, which ref 7 of grefs"),
        (gref(7, -1, 1), r"ref 7 has ann_id \[-1, 1\]: \[-1\] alone means that it has no target"),
        (gref(7), r"ref 7 has ann_id \[\]: "),
        (gref(7, 4), r"ref 7: its annotations \[4\] are all crowds"),
        (gref(7, 5), r"ref 7: its annotations \[5\] have no polygon of three points or more"),
        (
            gref(7, 1, split="testAB"),
            r"ref 7 is of split 'testAB', not of one of train, val, testA",
        ),
        (gref(7, 1, split=["val"]), r"grefs\(unc\)\.json\[1\].split: must be a valid string"),
        (gref(7, 1) | {"image_id": 8}, r"ref 7: annotation 1 is on image 7, not on its image 8"),
        (gref(1, 2), r"grefs\(unc\)\.json: ref_id 1 is there twice"),
    ],
)
def test_a_bad_list_of_objects_is_refused_by_one_line(tmp_path: Path, bad, message) -> None:
    root = write_gref(tmp_path / "in", [gref(1, 1), bad])
    with pytest.raises(UserError, match=message) as caught:
        prepare(root, tmp_path / "out", "--generate_mask", dataset="grefcoco", split="unc")
    assert "\n" not in str(caught.value)
    assert files(tmp_path / "out") == set()


def test_a_missing_file_of_grefcoco_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grefcoco/grefs\(unc\)\.json does not exist; found no"):
        prepare(tmp_path, tmp_path / "out", dataset="grefcoco", split="unc")


def test_real_refcoco_equals_what_the_releases_tool_wrote(mini_root: Path, tmp_path: Path) -> None:
    expected = mini_root.parent / "refcoco_mini_expected"
    if not expected.is_dir():
        pytest.skip(f"the release's output is not part of the repository: no {expected}")
    prepare(mini_root, tmp_path, "--generate_mask", dataset="refcoco", split="unc")
    assert files(tmp_path) == files(expected)
    for name in files(expected):
        ours, theirs = tmp_path / name, expected / name
        if name.endswith(".json"):
            assert ours.read_text() == theirs.read_text(), name
        else:
            pixels = [cv2.imread(str(p), cv2.IMREAD_UNCHANGED) for p in (ours, theirs)]
            np.testing.assert_array_equal(*pixels, err_msg=name)
