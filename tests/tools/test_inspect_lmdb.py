"""tools/inspect_lmdb.py: what it says of a sound file, and that it finds each fault."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import lmdb
import numpy as np
import pytest
from helpers import (
    all_refs,
    blob,
    encoded,
    pack,
    run_command,
    sample_ref,
    smooth_photo,
    write_records,
)

from tools import inspect_lmdb
from tools.inspect_lmdb import differences
from utils.errors import UserError
from utils.records import RecordReader, RecordWriter, RefRecord
from utils.tokenizer import token_lengths
from utils.transforms import load_mask

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
    with pytest.raises(UserError) as caught:
        look(path, *options)
    listed = [
        line.removeprefix("  FAULT    ")
        for line in capsys.readouterr().out.splitlines()
        if "FAULT" in line
    ]
    assert str(caught.value) == f"{path}: {len(listed)} faults, listed above"
    return listed


def rewrite(
    path: Path, change: Callable[[int, RefRecord], RefRecord], lengths=None, **names
) -> Path:
    """The same file with some of its records changed."""
    reader, refs = RecordReader(path), all_refs(path)
    images = {ref.image_key: reader.image(ref.image_key) for ref in refs}
    del reader
    dataset, split = names.get("dataset", "shapes"), names.get("split", "val")
    with RecordWriter(path, dataset, split) as writer:
        for i, ref in enumerate(refs):
            changed = change(i, ref)
            if changed.image_key not in images:
                images[changed.image_key] = encoded(smooth_photo(np.random.default_rng(0), 9, 9))
            writer.add_image(changed.image_key, images[changed.image_key])
            writer.add_ref(changed, (lengths or token_lengths)(changed.sentences))
    return path


def first(**changes) -> Callable[[int, RefRecord], RefRecord]:
    return lambda i, ref: replace(ref, **changes) if i == 0 else ref


def poke(path: Path, key: bytes, value: bytes | None) -> None:
    """Change or delete one entry of a file."""
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        txn.delete(key) if value is None else txn.put(key, value)


def entries(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as env, env.begin() as txn:
        return dict(txn.cursor())


# ----------------------------------------------------------------------------------- sound files


def test_a_sound_file_is_described_and_without_fault(path, capsys):
    look(path)
    out = capsys.readouterr().out
    areas = [
        100 * (cv2.imdecode(np.frombuffer(r.mask, np.uint8), 0) > 0).mean() for r in all_refs(path)
    ]
    assert f"{path}: shapes val, " in out
    assert "holds    8 refs with 20 sentences on 4 images; format " in out
    assert "photos   72-96 high, 83-110 wide" in out
    assert f"{min(areas):.1f}  " in out
    assert f"{max(areas):.1f}\n" in out
    assert "classes  5 categories" in out
    assert "(tokens:sentences): 6:20" in out  # <start> red thing 3 0 <end>
    assert "0 of 20 sentences are cut at word_len 17" in out
    assert "checked  every record: no fault" in out
    assert "published" not in out


def test_sentences_that_a_length_cuts_are_counted(path, capsys):
    look(path, "--word-len", 5)
    assert "20 of 20 sentences are cut at word_len 5" in capsys.readouterr().out


def test_the_sheet_has_as_many_refs_as_asked_for_chosen_by_the_seed(path, tmp_path, capsys):
    sheets = {}
    for samples, seed in ((4, 0), (4, 1), (8, 0), (99, 0)):
        sheet = tmp_path / f"{samples}-{seed}.png"
        look(path, "--samples", samples, "--seed", seed, "-o", sheet)
        assert f"to look at: {sheet}" in capsys.readouterr().out
        sheets[samples, seed] = cv2.imread(str(sheet))
    width, height = inspect_lmdb.CELL[0] + inspect_lmdb.GAP, inspect_lmdb.CELL[1] + inspect_lmdb.GAP
    gap = inspect_lmdb.GAP
    assert sheets[4, 0].shape == (height + gap, 4 * width + gap, 3)
    assert sheets[8, 0].shape == (2 * height + gap, 4 * width + gap, 3)
    assert np.array_equal(sheets[8, 0], sheets[99, 0])
    assert not np.array_equal(sheets[4, 0], sheets[4, 1])
    look(path, "--samples", 4, "-o", tmp_path / "again.png")
    assert np.array_equal(cv2.imread(str(tmp_path / "again.png")), sheets[4, 0])


def test_the_sheet_shows_photo_and_mask(path, tmp_path):
    look(path, "--samples", 99, "-o", tmp_path / "sheet.png")
    sheet = cv2.imread(str(tmp_path / "sheet.png"))[..., ::-1]
    outline = (sheet == (46, 204, 113)).all(-1)
    gap, (width, height) = inspect_lmdb.GAP, inspect_lmdb.CELL
    for i in range(NUM_REFS):
        x, y = gap + i % 4 * (width + gap), gap + i // 4 * (height + gap)
        head, photo = sheet[y : y + 20, x : x + width], outline[y + 92 : y + height, x : x + width]
        assert head.min() < 100  # a sentence
        assert photo.sum() > 100


def test_refs_of_no_target_and_of_several_are_counted_and_on_the_sheet(path, capsys, monkeypatch):
    blank = encoded(np.zeros((80, 101), np.uint8))
    changes = {2: {"num_targets": 0, "mask": blank}, 5: {"num_targets": 3}}
    rewrite(path, lambda i, ref: replace(ref, **changes.get(i, {})))
    drawn = []
    monkeypatch.setattr(inspect_lmdb, "grid", lambda cells, *_: cells[0])
    cell = inspect_lmdb._cell
    monkeypatch.setattr(inspect_lmdb, "_cell", lambda r, i: drawn.append(i) or cell(r, i))
    for seed in range(4):
        drawn.clear()
        look(path, "--samples", 3, "--seed", seed)
        assert {2, 5} < set(drawn)
        assert len(drawn) == 3
    out = capsys.readouterr().out
    assert "targets  refs of no target: 1, of one: 6, of several: 1" in out
    assert "no fault" in out


def test_refs_left_out_are_told_and_count_as_published(path, capsys):
    with RecordWriter(path, "refcoco", "val") as writer:
        writer.left_out = 3810
        ref = sample_ref(0, 0, (72, 110), 1)
        writer.add_image(ref.image_key, encoded(smooth_photo(np.random.default_rng(0), 72, 110)))
        writer.add_ref(ref, token_lengths(ref.sentences))
    look(path)
    assert "left out 3,810 odd refs, when it was packed" in capsys.readouterr().out


def test_the_sheet_lies_beside_the_file_and_none_is_written_for_no_samples(path):
    look(path, "--samples", 0)
    assert os.listdir(path.parent) == ["val.lmdb"]
    look(path)
    assert sorted(os.listdir(path.parent)) == ["val.jpg", "val.lmdb"]


def test_real_records_are_sound(mini_root, tmp_path):
    pack(mini_root, tmp_path, "refcoco", "unc", "refcoco")
    for lmdb_path in (tmp_path / "lmdb/refcoco").glob("*.lmdb"):
        look(lmdb_path, "--subset")


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
    rewrite(path, lambda i, ref: ref, dataset="refcoco")
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
        (
            {"mask": encoded(blob(50, 60))},
            "its mask is 50 x 60 pixels, its image 72 x 110: replace it",
        ),
        ({"height": 71}, "says 71 x 110 pixels, its image has 72 x 110"),
        ({"sentences": (" ",)}, "its sentence ' ' has no words"),
        ({"ref_id": 101}, "ref_id 101 is there twice"),
        ({"sent_ids": (1001,)}, "sent_id 1001 is there twice"),
        ({"image_id": 77}, "another ref gives its image image_0.jpg another image_id"),
    ],
    ids=str,
)
def test_each_fault_of_a_record_is_found_and_named(path, capsys, changes, fault):
    rewrite(path, first(**changes))
    found = faults(path, capsys)
    assert any(text.startswith("ref ") and text.endswith(fault) for text in found), found
    assert len(found) <= 2


def test_masks_that_older_tools_packed_with_class_numbers_are_told(path, capsys):
    rewrite(path, lambda i, ref: replace(ref, mask=encoded(load_mask(ref) // 255 * (251 + i % 3))))
    ids = RecordReader(path).index.ref_ids
    found = [text for text in faults(path, capsys) if "values" in text]
    assert found == [
        f"6 masks, such as that of ref {ids[0]}, have values from 1 to 252, which training takes "
        "for background in part: pack the split again"
    ]


def test_an_image_that_cannot_be_decoded_is_named_once(path, capsys):
    rewrite(path, lambda i, ref: ref)
    poke(path, b"image:image_1.jpg", entries(path)[b"image:image_1.jpg"][:200])
    found = faults(path, capsys)
    assert [text for text in found if "cannot be decoded" in text] == found
    assert found[0].startswith("ref 102 (position 2): image image_1.jpg")
    assert len(found) == 1


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\xff" * 500])
def test_a_record_that_cannot_be_read_is_named_and_the_rest_checked(path, capsys, content):
    poke(path, b"ref:000000004", content)
    found = faults(path, capsys)
    how = "has no" if content is None else "has an unreadable"
    assert found[0].startswith(f"position 4: {path} {how} ref:000000004")
    assert found[1].startswith("the file says that it holds 20 sentences, but ")


def test_an_index_that_is_not_that_of_the_records_is_found(path, capsys):
    records = entries(path)
    poke(path, b"ref:000000000", records[b"ref:000000001"])
    found = faults(path, capsys)
    assert "ref 101 (position 0): the index says ref_id 100, the record 101" in found
    assert "ref 101 (position 1): ref_id 101 is there twice" in found


def test_counts_that_are_not_those_of_the_records_are_found(path, capsys):
    meta = json.loads(entries(path)[b"__meta__"])
    meta |= {"images": 5, "sentences": 21}
    poke(path, b"__meta__", json.dumps(meta).encode())
    assert faults(path, capsys) == [
        "the file says that it holds 21 sentences, but 20 were found",
        "the file says that it holds 5 images, but 4 were found",
    ]


def test_a_wrong_histogram_of_lengths_is_found(path, capsys):
    rewrite(path, lambda i, ref: ref, lengths=lambda sentences: [9] * len(sentences))
    (found,) = faults(path, capsys)
    assert found == "the file's histogram of sentence lengths is not that of its sentences"


def test_the_sheet_is_written_even_of_records_that_cannot_be_read(path, capsys, tmp_path):
    poke(path, b"ref:000000004", b"nonsense")
    poke(path, b"image:image_0.jpg", b"nonsense")
    faults(path, capsys, "--samples", 8, "-o", tmp_path / "sheet.jpg")
    assert cv2.imread(str(tmp_path / "sheet.jpg")) is not None


@pytest.mark.parametrize("option", ["--samples", "--seed", "--word-len"])
@pytest.mark.parametrize("value", ["-1", "many"])
def test_a_number_that_is_none_is_refused(path, capsys, option, value):
    with pytest.raises(SystemExit) as stop:
        look(path, f"{option}={value}")
    assert stop.value.code == 2
    assert f"'{value}' is no whole number" in capsys.readouterr().err


def test_a_missing_image_is_named_and_the_program_ends_with_one_line_and_exit_code_1(path):
    poke(path, b"image:image_1.jpg", None)
    result = run_command(sys.executable, "tools/inspect_lmdb.py", path)
    assert result.returncode == 1
    assert result.stderr == f"error: {path}: 1 faults, listed above\n"
    assert f"ref 102 (position 2): {path} has no image:image_1.jpg: re-pack" in result.stdout
