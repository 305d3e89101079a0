"""tools/data_process.py: the release's JSON and masks from REFER folders, or a clear refusal."""

import json
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import largest_file, refer_instances, refer_ref, save_photo, user_error, write_refer

from tools import data_process, folder2lmdb, inspect_lmdb
from tools.odd_records import OddRecords
from utils.errors import UserError
from utils.records import RecordReader


def write(
    root: Path, refs: list, dataset: str = "toys", name: str = "refs(me).p", **changes: dict
) -> Path:
    """Write a REFER folder of refs, given whole or by their splits alone, with odd instances."""
    refs = [refer_ref(i, ref) if isinstance(ref, str) else ref for i, ref in enumerate(refs)]
    return write_refer(root, refs, refer_instances(refs, **changes), dataset, name)


def prepare(root: Path, out: Path, *more: str, dataset: str = "toys", split: str = "me") -> None:
    where = ["--data_root", str(root), "--output_dir", str(out)]
    data_process.main([*where, "--dataset", dataset, "--split", split, *more])


def files(out: Path) -> set[str]:
    return {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}


def entries_of(out: Path, name: str) -> list[dict]:
    return json.loads((out / f"anns/{name}.json").read_text())


def numbers_of_targets(entries: list[dict]) -> list[int]:
    return [entry.get("num_targets", 1) for entry in entries]


def assert_mask(path: Path, *areas: tuple) -> None:
    """The mask is 255 in these areas of a photo of 8 × 10 pixels."""
    expected = np.zeros((8, 10), np.uint8)
    for area in areas:
        expected[area] = 255
    np.testing.assert_array_equal(cv2.imread(str(path), cv2.IMREAD_UNCHANGED), expected)


def pack(root: Path, *more: str) -> RecordReader:
    """Pack toys' split train, with photos."""
    for image in (3, 7):
        save_photo(root / f"images/a_{image}.jpg", size=(8, 10))
    where = ["-i", root / "images", "-m", root / "masks/toys", "-o", root / "lmdb/toys"]
    folder2lmdb.main(["-j", str(root / "anns/toys/train.json"), *map(str, where), *more])
    return RecordReader(root / "lmdb/toys/train.lmdb")


def test_an_entry_has_the_releases_fields_in_their_order(tmp_path: Path) -> None:
    prepare(write(tmp_path / "in", ["val"]), tmp_path)
    (entry,) = entries_of(tmp_path, "toys/val")
    sentences = [
        {"idx": i, "sent_id": i, "sent": text} for i, text in enumerate(("thing é", "other"))
    ]
    assert list(entry.items()) == [
        ("bbox", [2, 1, 6, 5]),
        ("cat", 11),
        ("segment_id", 0),
        ("img_name", "a_7.jpg"),
        ("sentences", sentences),
        ("sentences_num", 2),
    ]


def test_masks_are_drawn_when_asked_for_and_splits_are_those_that_refs_name(tmp_path: Path) -> None:
    root = write(tmp_path / "in", ["hard-val", "testAB"])
    prepare(root, tmp_path / "a")
    assert files(tmp_path / "a") == {"anns/toys/hard-val.json", "anns/toys/testAB.json"}
    prepare(root, tmp_path / "b", "--generate_mask", "--name", "toys_u")
    names = ("anns/toys_u/hard-val.json", "anns/toys_u/testAB.json")
    assert files(tmp_path / "b") == {*names, "masks/toys_u/0.png", "masks/toys_u/1.png"}
    assert_mask(tmp_path / "b/masks/toys_u/1.png", np.s_[1:5, 2:6])


def test_the_summary_counts_refs_sentences_and_images(tmp_path: Path, capsys) -> None:
    prepare(write(tmp_path / "in", ["train", "train", "val"]), tmp_path)
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()[-3:]]
    assert head == ["split", "refs", "sentences", "images"]
    assert rows == [["train", "2", "4", "1"], ["val", "1", "2", "1"]]


def test_files_of_splits_that_a_run_does_not_write_are_removed(tmp_path: Path, capsys) -> None:
    said = []
    for split_by, splits in (("umd", ["train", "val", "test"]), ("google", ["train", "val"])):
        root = write(tmp_path / "in", splits, "refcocog", f"refs({split_by}).p")
        prepare(root, tmp_path, dataset="refcocog", split=split_by)
        (tmp_path / "anns/refcocog/note.txt").write_text("mine")
        said.append(capsys.readouterr().out)
    assert files(tmp_path / "anns/refcocog") == {"train.json", "val.json", "note.txt"}
    assert "removed" not in said[0]
    assert f"removed {tmp_path / 'anns/refcocog/test.json'}: of an earlier" in said[1]
    assert "pass --name" in said[1]


def test_a_failed_run_leaves_the_files_of_all_splits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(write(tmp_path / "in", ["train", "val", "old"]), out, "--generate_mask")
    before = files(out)
    root = write(tmp_path / "in", ["train", "val"], annotations={101: {"segmentation": [["x"]]}})
    with pytest.raises(UserError, match="unreadable segmentation"):
        prepare(root, out, "--generate_mask")
    assert files(out) == before


def test_refclef_takes_splits_by_letter_and_skips_the_bad_images(tmp_path: Path, capsys) -> None:
    bad = [refer_ref(i, image_id=i) for i in (19579, 17975, 19575)]
    refs = ["train", "testA", "testAB", "testBC", *bad]
    root = write(tmp_path / "in", refs, "refclef", "refs(unc).p")
    prepare(root, tmp_path, dataset="refclef", split="unc")
    found = {
        path.stem: [entry["segment_id"] for entry in json.loads(path.read_text())]
        for path in (tmp_path / "anns/refclef").iterdir()
    }
    assert found == {"train": [0], "testA": [1, 2], "testB": [2, 3], "testC": [3]}
    assert "val            0          0       0   no refs: nothing" in capsys.readouterr().out


def test_a_folder_without_any_known_split_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "in", ["dev"], "refclef", "refs(unc).p")
    with pytest.raises(UserError, match=r"no refs of train, val, testA, testB.*; its splits: dev"):
        prepare(root, tmp_path / "out", dataset="refclef", split="unc")


# ------------------------------------------------------------------------------- odd records


def sentences(*sent_ids: int, sent: str = "mug") -> list[dict]:
    return [{"sent": sent, "sent_id": i} for i in sent_ids]


ODD = [
    r"refs\(me\)\.p\[3\].sentences: must be one or more",
    r"refs\(me\)\.p\[10\].split: must be a valid string, not None",
    r"refs\(me\)\.p: ref_id 4 is there twice",
    r"has no image 404, which ref 1 ",
    r"refs\(me\)\.p\[2\].sentences\[1\].sent: must be a text with words, not ' &nbsp;'",
    r"annotation 104.bbox: must be a valid list, not None",
    r"annotation 105 \(ref 5\) has a segmentation of 9 x 10 pixels on an image of 8 x 10",
    r"annotation 106 \(ref 6\) covers no pixel: --empty says",
    r"annotation 107 \(ref 7\) has an unreadable segmentation",
    r"has no annotation 108, which ref 8 ",
]


def assert_matches(text: str, patterns: list[str]) -> None:
    lines = text.splitlines()
    assert len(lines) == len(patterns)
    for pattern in patterns:
        assert sum(bool(re.search(pattern, line)) for line in lines) == 1, pattern


def test_odd_records_are_listed_at_once_or_left_out_and_counted_as_far_as_the_lmdb(
    tmp_path: Path, capsys
) -> None:
    refs = [
        refer_ref(0, image_id=3),
        refer_ref(1, image_id=404),
        refer_ref(2, sentences=[*sentences(99), *sentences(98, sent=" &nbsp;")]),
        refer_ref(3, sentences=[]),
        *(refer_ref(i) for i in range(4, 9)),
        refer_ref(4, "val"),
        refer_ref(9, None),
    ]
    annotations = {
        104: {"bbox": None},
        105: {"segmentation": {"size": [9, 10], "counts": [90]}},
        106: {"segmentation": {"size": [8, 10], "counts": [80]}},
        107: {"segmentation": [[1, 1, 2, 2]]},
        108: None,
    }
    root = write(tmp_path / "in", refs, images={404: None}, annotations=annotations)
    told = user_error(prepare, root, tmp_path / "out", "--generate_mask")
    assert_matches(capsys.readouterr().err, ODD)
    for text in ("10 odd records (", "1 of kind 'empty mask'", "3 of kind 'malformed ref'"):
        assert text in told
    assert told.endswith("nothing written: put them right, or add --skip-odd")
    assert files(tmp_path / "out") == set()

    prepare(root, tmp_path, "--generate_mask", "--skip-odd")
    said = capsys.readouterr()
    assert_matches(said.err, ODD)
    assert "note: left out 10 odd records (" in said.out
    assert files(tmp_path / "anns") == {"toys/train.json", "toys/train.odd"}
    (entry,) = entries_of(tmp_path, "toys/train")
    twice = json.dumps([entry, entry | {"segment_id": 5}])  # its sentences
    (tmp_path / "anns/toys/train.json").write_text(twice)
    reader = pack(tmp_path, "--skip-odd")
    assert (reader.index.ref_ids, reader.meta["left_out"]) == ([0], 10)
    inspect_lmdb.main([str(reader.path), "--samples", "0"])
    assert "left out 10 odd refs" in capsys.readouterr().out
    for suffix in (".json", ".odd"):  # what has no split is in the list of each
        shutil.copy(tmp_path / f"anns/toys/train{suffix}", tmp_path / f"anns/toys/val{suffix}")
    both = [str(tmp_path / f"anns/toys/{split}.json") for split in ("train", "val")]
    pack(tmp_path, "--skip-odd", "-j", *both)
    assert RecordReader(tmp_path / "lmdb/toys/train+val.lmdb").meta["left_out"] == 12
    prepare(write(tmp_path / "in", ["train"]), tmp_path, "--generate_mask")
    assert "left_out" not in pack(tmp_path).meta


def test_a_set_of_odd_refs_alone_is_listed_too(tmp_path: Path, capsys) -> None:
    root = write(tmp_path / "in", [refer_ref(i, sentences=[]) for i in range(2)])
    with pytest.raises(UserError, match="2 odd records"):
        prepare(root, tmp_path)
    with pytest.raises(UserError, match=r"refs\(me\)\.p has no refs$"):
        prepare(root, tmp_path, "--skip-odd")
    assert len(capsys.readouterr().err.splitlines()) == 4


def test_a_disk_that_is_full_leaves_the_files_of_all_splits(tmp_path: Path) -> None:
    root = write(tmp_path / "in", ["train", *["val"] * 9])
    with largest_file(500), pytest.raises(OSError, match="File too large") as caught:
        prepare(root, tmp_path)
    assert caught.value.filename == str(tmp_path / "anns/toys/val.json")
    assert files(tmp_path / "anns") == set()


def test_of_refs_that_share_a_sentence_id_only_the_later_is_left_out(tmp_path: Path) -> None:
    numbers = {0: [1], 1: [5], 2: [5, 6], 3: [7, 6], 4: [7], 5: [8, 8]}
    refs = [refer_ref(i, sentences=sentences(*ids)) for i, ids in numbers.items()]
    refs += [refer_ref(6, "val", sentences=sentences(6))]
    root = write(tmp_path / "in", refs, annotations={101: None})  # sentence id 5 stays free
    with pytest.raises(UserError, match=r"3 odd records .*2 of kind 'number twice'"):
        prepare(root, tmp_path)
    prepare(root, tmp_path, "--skip-odd")
    patterns = [
        "no annotation 101",
        r"refs\(me\)\.p: ref 3: sent_id 6 is there twice: give each sentence a number",
        r"refs\(me\)\.p: ref 5: sent_id 8 is there twice",
    ]
    assert_matches((tmp_path / "anns/toys/train.odd").read_text(), patterns)
    paths = [tmp_path / f"anns/toys/{split}.json" for split in ("train", "val")]
    for chosen, kept in ((paths[:1], [0, 2, 4]), (paths[1:], [6]), (paths, [0, 2, 4])):
        odd = OddRecords()
        entries = folder2lmdb.read_entries(chosen, odd)
        assert [entry["segment_id"] for _, entry in entries] == kept
    (line,) = odd.of_split("train+val")
    assert "val.json[0]: sent_id 6 is there twice: " in line
    assert line.endswith(", or pack each JSON file alone")


@pytest.mark.parametrize("empty", ["skip", "no-target"])
def test_empty_masks_mean_what_is_said_of_them(tmp_path: Path, capsys, empty: str) -> None:
    nothing = {"segmentation": {"size": [8, 10], "counts": [80]}}
    root = write(tmp_path / "in", ["train"] * 3, annotations={101: nothing, 102: nothing})
    with pytest.raises(UserError, match="2 odd records"):
        prepare(root, tmp_path, "--generate_mask")
    said = capsys.readouterr().err
    assert all(f"(ref {i}) covers no pixel: --empty" in said for i in (1, 2))
    prepare(root, tmp_path, "--generate_mask", "--empty", empty)
    numbers = numbers_of_targets(entries_of(tmp_path, "toys/train"))
    assert numbers == ([1] if empty == "skip" else [1, 0, 0])
    reader = pack(tmp_path)
    assert [reader.ref(i).num_targets for i in range(len(reader))] == numbers
    assert reader.meta.get("left_out") == (2 if empty == "skip" else None)


# ---------------------------------------------------------------------------------- gRefCOCO

SEGMENTATIONS = {
    1: [[1, 1, 4, 1, 4, 4, 1, 4]],
    2: [[5, 1, 9, 1, 9, 4, 5, 4], [0, 0, 9, 9], [0, 0, 9, 0, 9, 7, 3]],
    3: {"size": [8, 10], "counts": [6, 2, *[6, 2] * 9]},
    4: {"size": [8, 10], "counts": [0, 80]},
    5: [[0, 0, 9, 9], [1, 1, 2, 2, 3]],
}
AREAS = {1: np.s_[1:4, 1:4], 2: np.s_[1:4, 5:9], 3: np.s_[6:8, :]}


def write_gref(
    root: Path, refs: list[dict], name: str = "grefs(unc).json", **first: object
) -> Path:
    """gRefCOCO's folder with annotations 1 to 5: 4 is a crowd, 5 has no sound polygon."""
    changes = {
        i: {"segmentation": parts, "iscrowd": int(i == 4), "image_id": 7}
        for i, parts in SEGMENTATIONS.items()
    }
    changes[1] |= first
    content = refer_instances([refer_ref(0, ann_id=i) for i in changes], annotations=changes)
    return write_refer(root, refs, content, "grefcoco", name)


def gref(ref_id: int, *ann_ids: int, split: str = "val") -> dict:
    categories = [-1 if i == -1 else 13 for i in ann_ids]
    return refer_ref(ref_id, split, ann_id=list(ann_ids), category_id=categories)


def prepare_gref(root: Path, out: Path) -> None:
    prepare(root, out, "--generate_mask", dataset="grefcoco", split="unc")


@pytest.mark.parametrize("name", ["grefs(unc).json", "grefs(unc).p"])
def test_a_list_of_objects_is_their_union_without_crowds_and_bad_polygons(
    tmp_path: Path, capsys, name: str
) -> None:
    lists = {1: [1, 2], 2: [3, 4, 1], 3: [2], 4: [-1], 5: [5, 1, 1]}
    refs = [gref(i, *ids) for i, ids in lists.items()]
    root = write_gref(tmp_path / "in", refs, name, bbox=[0.9, 3.5, 2.5, 4.2])
    (root / "grefcoco/refs(unc).p").write_bytes(b"of another data set")
    prepare_gref(root, tmp_path)
    entries = entries_of(tmp_path, "grefcoco/val")
    assert numbers_of_targets(entries) == [2, 2, 1, 0, 2]
    assert [entry["cat"] for entry in entries] == [11, 11, 11, None, 11]
    joined, alone = [0, 1, 6, 7], [2, 1, 6, 5]
    assert [entry["bbox"] for entry in entries] == [joined, joined, alone, None, joined]
    assert "refs of no target: 1, of one: 1, of several: 3" in capsys.readouterr().out
    for ref_id, ids in {1: [1, 2], 2: [3, 1], 3: [2], 4: [], 5: [1]}.items():
        assert_mask(tmp_path / f"masks/grefcoco/{ref_id}.png", *(AREAS[i] for i in ids))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (gref(7, 1, 99), r"instances\.json has no annotation 99, which ref 7 of grefs"),
        (gref(7, -1, 1), r"ref 7 has ann_id \[-1, 1\]: \[-1\] alone means that it has no target"),
        (gref(7), r"ref 7 has ann_id \[\]: "),
        (gref(7, 4), r"ref 7: its annotations \[4\] are all crowds"),
        (gref(7, 5), r"annotation \[5\] \(ref 7\) has no segmentation \(a polygon has three"),
        (gref(7, 1, split="testAB"), r"ref 7 is of split 'testAB', not of one of train, val, tes"),
        (gref(7, 1, split=["val"]), r"grefs\(unc\)\.json\[1\].split: must be a valid string"),
        (gref(7, 1) | {"image_id": 8}, r"ref 7: annotation 1 is on image 7, not on its image 8"),
        (gref(1, 2), r"grefs\(unc\)\.json: ref_id 1 is there twice"),
    ],
)
def test_a_bad_list_of_objects_is_refused_by_one_line(tmp_path: Path, bad, message) -> None:
    root = write_gref(tmp_path / "in", [gref(1, 1), bad])
    assert re.search(message, user_error(prepare_gref, root, tmp_path / "out"))
    assert files(tmp_path / "out") == set()


def test_a_missing_file_of_grefcoco_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grefcoco/grefs\(unc\)\.json does not exist; found no"):
        prepare_gref(tmp_path, tmp_path / "out")


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
