"""tools/inspect_lmdb.py: what it says of a sound file, and that it finds each fault."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import all_refs, blob, encoded, put, repack, usage_error, user_error, write_records
from PIL import Image

from tools import inspect_lmdb
from tools.inspect_lmdb import differences
from utils import records
from utils.records import RecordReader
from utils.transforms import load_mask
from utils.visualize import TRUTH_COLOR

PER_IMAGE = [2, 3, 1, 2]
NUM_REFS = sum(PER_IMAGE)


@pytest.fixture
def path(tmp_path) -> Path:
    """Records of 4 photos, 8 refs and 20 sentences."""
    return write_records(tmp_path / "val.lmdb", PER_IMAGE)


def look(path: Path, *options: object) -> None:
    inspect_lmdb.main([str(path), *map(str, options)])


def faults(path: Path, capsys, *options: object) -> list[str]:
    """The faults that are listed; the program must end with an error that counts them."""
    told = user_error(look, path, *options)
    lines = capsys.readouterr().out.splitlines()
    listed = [line.removeprefix("  FAULT    ") for line in lines if "FAULT" in line]
    assert told == f"{path}: {len(listed)} faults, listed above"
    return listed


def rewrite(path: Path, changes: dict[int, dict]) -> None:
    """Change fields of records at some positions of a file."""
    refs = [replace(ref, **changes.get(i, {})) for i, ref in enumerate(all_refs(path))]
    repack(path, path, refs)


def change_meta(path: Path, **changes: object) -> None:
    put(path, {b"__meta__": json.dumps(RecordReader(path).meta | changes).encode()})


# ----------------------------------------------------------------------------------- sound files


def test_a_sound_file_is_described_and_without_fault(path, capsys):
    look(path)
    out = capsys.readouterr().out
    areas = [100 * (load_mask(ref) > 0).mean() for ref in all_refs(path)]
    assert f"{path}: shapes val, " in out
    assert "holds    8 refs with 20 sentences on 4 images; format " in out
    assert "photos   72-96 high, 83-110 wide" in out
    assert f"{min(areas):.1f}  " in out
    assert f"{max(areas):.1f}\n" in out
    assert "classes  5 categories" in out
    assert "(tokens:sentences): 6:20" in out  # <start> red thing 3 0 <end>
    assert "cut at word_len 17: 0, at 22: 0, of 20 sentences" in out
    assert "checked  every record: no fault" in out
    assert "published" not in out


GAP, (WIDTH, HEIGHT) = inspect_lmdb.GAP, inspect_lmdb.CELL


def test_the_sheet_has_as_many_refs_as_asked_for_chosen_by_the_seed(path, tmp_path, capsys):
    sheets = []
    for number, (samples, seed) in enumerate([(4, 0), (4, 0), (4, 1), (8, 0), (99, 0)]):
        sheet = tmp_path / f"{number}.png"
        look(path, "--samples", samples, "--seed", seed, "-o", sheet)
        assert f"to look at: {sheet}" in capsys.readouterr().out
        sheets.append(cv2.imread(str(sheet)))
    four, again, other, eight, all_there_are = sheets
    assert four.shape == (HEIGHT + 2 * GAP, 4 * (WIDTH + GAP) + GAP, 3)
    assert eight.shape == (2 * (HEIGHT + GAP) + GAP, 4 * (WIDTH + GAP) + GAP, 3)
    assert np.array_equal(four, again)
    assert not np.array_equal(four, other)
    assert np.array_equal(eight, all_there_are)


def test_the_sheet_lies_beside_the_file_and_shows_photo_and_mask(path):
    look(path, "--samples", 0)
    assert list(path.parent.iterdir()) == [path]
    look(path)
    assert sorted(path.parent.iterdir()) == [path.with_suffix(".jpg"), path]
    look(path, "-o", path.with_suffix(".png"))
    sheet = cv2.imread(str(path.with_suffix(".png")))[..., ::-1]
    outline = (sheet == TRUTH_COLOR).all(-1)
    for i in range(NUM_REFS):
        x, y = GAP + i % 4 * (WIDTH + GAP), GAP + i // 4 * (HEIGHT + GAP)
        head, photo = sheet[y : y + 20, x : x + WIDTH], outline[y + 92 : y + HEIGHT, x : x + WIDTH]
        assert head.min() < 100  # a sentence
        assert photo.sum() > 100


def test_refs_of_no_target_and_of_several_are_counted_and_on_the_sheet(path, capsys, monkeypatch):
    blank = encoded(np.zeros((80, 101), np.uint8))
    rewrite(path, {2: {"num_targets": 0, "mask": blank}, 5: {"num_targets": 3}})
    drawn, cell = [], Image.new("RGB", inspect_lmdb.CELL)
    monkeypatch.setattr(inspect_lmdb, "draw_cell", lambda _, ref: drawn.append(ref) or cell)
    for seed in range(4):
        drawn.clear()
        look(path, "--samples", 3, "--seed", seed)
        assert {0, 3} < {ref.num_targets for ref in drawn}
        assert len(drawn) == 3
    out = capsys.readouterr().out
    assert "targets  refs of no target: 1, of one: 6, of several: 1" in out
    assert "no fault" in out


def test_refs_left_out_are_told_and_count_as_published(path, capsys):
    change_meta(path, dataset="refcoco", left_out=3804)  # one had no split
    look(path)
    assert "left out 3,804 odd refs, when it was packed" in capsys.readouterr().out


# ------------------------------------------------------------------------------- published counts


@pytest.mark.parametrize(
    ("dataset", "split", "refs", "sentences", "found"),
    [
        ("refcoco", "val", 3811, 10834, []),
        ("refcoco", "train", 42404, 12345, []),  # sentences of train are not published
        ("refcoco", "testA+testB", 3785, 10752, []),
        ("refcocog_g", "val", 5000, 9535, ["9,535 sentences, where 9,536 are published"]),
        ("refcoco+", "testB", 1, 4889, ["1 refs, where 1,798 are published"]),
        ("refcocog_g", "test", 1, 1, []),  # has none
        ("mydata", "val", 1, 1, []),
    ],
)
def test_counts_are_compared_where_they_are_known(dataset, split, refs, sentences, found):
    meta = {"dataset": dataset, "split": split, "refs": refs, "sentences": sentences}
    assert differences(meta) == found


def test_a_part_of_a_known_data_set_is_a_fault_unless_it_is_said(path, capsys):
    change_meta(path, dataset="refcoco")
    assert faults(path, capsys) == [
        "8 refs, where 3,811 are published",
        "20 sentences, where 10,834 are published",
    ]
    look(path, "--subset")


# ----------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"mask": b""}, "mask is an empty file: replace it"),
        ({"mask": b"PNG"}, "mask cannot be decoded (3 bytes; cut off or no image): replace it"),
        ({"mask": encoded(np.zeros((72, 110), np.uint8))}, "its mask is an empty mask: replace it"),
        ({"mask": encoded(blob(50, 60))}, "mask is 50 x 60 pixels, its image 72 x 110: replace it"),
        ({"height": 71}, "says 71 x 110 pixels, its image has 72 x 110"),
        ({"sentences": (" ",)}, "its sentence ' ' has no words"),
        ({"ref_id": 101}, "ref_id 101 is there twice"),
        ({"sent_ids": (1001,)}, "sent_id 1001 is there twice"),
        ({"image_id": 77}, "another ref gives its image image_0.jpg another image_id"),
    ],
    ids=str,
)
def test_each_fault_of_a_record_is_found_and_named(path, capsys, changes, fault):
    rewrite(path, {0: changes})
    found = faults(path, capsys)
    assert any(text.startswith("ref ") and text.endswith(fault) for text in found), found
    assert len(found) <= 2


def test_masks_that_older_tools_packed_with_class_numbers_are_told(path, capsys):
    masks = [load_mask(ref) // 255 * (251 + i % 3) for i, ref in enumerate(all_refs(path))]
    rewrite(path, {i: {"mask": encoded(mask)} for i, mask in enumerate(masks)})
    ids = RecordReader(path).index.ref_ids
    found = [text for text in faults(path, capsys) if "values" in text]
    assert found == [
        f"6 masks, such as that of ref {ids[0]}, have values from 1 to 252, which training takes "
        "for background in part: pack the split again"
    ]


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\xff" * 500])
def test_what_cannot_be_read_is_named_once_and_the_rest_checked(path, capsys, content):
    cut_off = RecordReader(path).image("image_0.jpg")[:200]
    images = {b"image:image_0.jpg": cut_off, b"image:image_1.jpg": None}
    put(path, images | {b"ref:000000004": content})
    image, missing, record, *counts = faults(path, capsys)  # each image once, whose refs are two
    assert all(fault.startswith("the file says ") for fault in counts)
    assert image.startswith("ref 100 (position 0): image image_0.jpg cannot be decoded")
    assert missing.startswith(f"ref 102 (position 2): {path} has no image:image_1.jpg: re-pack")
    how = "has no" if content is None else "has an unreadable"
    assert record.startswith(f"position 4: {path} {how} ref:000000004")
    assert cv2.imread(str(path.with_suffix(".jpg"))) is not None  # of the others


def test_records_in_places_that_the_index_gives_to_others_are_found(path, capsys):
    first, second = (
        records._to_arrow([vars(ref)], records._REF_SCHEMA) for ref in all_refs(path)[:2]
    )
    put(path, {b"ref:000000000": second, b"ref:000000001": first})
    found = faults(path, capsys)
    assert len(found) == 2
    assert found[0].startswith("ref 101 (position 0): the index says (100, 'image_0.jpg', ")


def test_counts_and_lengths_that_are_not_those_of_the_records_are_found(path, capsys):
    change_meta(path, images=5, sentences=21, token_length={9: 20})
    assert faults(path, capsys) == [
        "the file says sentences 21, its records 20",
        "the file says images 5, its records 4",
        "the file says token_length {9: 20}, its records {6: 20}",
    ]


def test_faults_are_listed_though_the_sheet_cannot_be_written(path, tmp_path, capsys):
    change_meta(path, sentences=7)
    with pytest.raises(IsADirectoryError):
        look(path, "-o", tmp_path)
    assert "  FAULT    " in capsys.readouterr().out


def test_without_a_sound_ref_the_sheet_is_blank(path, capsys):
    rewrite(path, {i: {"mask": b""} for i in range(NUM_REFS)})
    assert len(faults(path, capsys)) == NUM_REFS
    assert (cv2.imread(str(path.with_suffix(".jpg"))) == 255).all()


@pytest.mark.parametrize("value", ["-1", "many"])
def test_a_number_that_is_none_is_refused(path, capsys, value):
    assert value in usage_error(capsys, look, path, f"--samples={value}")
