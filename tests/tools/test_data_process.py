"""tools/data_process.py: the release's JSON and masks from REFER folders, or a clear refusal."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import refer_ref, write_refer

from tools import data_process
from utils.errors import UserError


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
