"""tools/own_data.py: JSON Lines to records, or all problems with their lines and no file."""

import json
import os
import re
import runpy
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, all_refs, contents, encoded, read_jsonl, save_photo, usage_error
from PIL import Image
from pycocotools import mask as coco_mask

from tools import data_process, own_data
from utils.errors import UserError
from utils.records import RecordReader, RecordWriter, RefRecord
from utils.transforms import decode_mask

DOC = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
HEIGHT, WIDTH = 40, 60
POLYGON = [10, 5, 30, 5, 30, 25, 10, 25]
DRAWN = np.zeros((HEIGHT, WIDTH), bool)
DRAWN[5:25, 10:30] = True
RLE = coco_mask.encode(np.asfortranarray(DRAWN))
COMPRESSED = {"size": [HEIGHT, WIDTH], "counts": RLE["counts"].decode()}
LISTED = {"size": [HEIGHT, WIDTH], "counts": [405, *([20, 20] * 20)[:-1], 1215]}


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder with photos 1-3 and a mask."""
    for number in (1, 2, 3):
        save_photo(tmp_path / f"photos/{number}.jpg", number, (HEIGHT, WIDTH))
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks/1.png").write_bytes(encoded(np.uint8(255) * DRAWN))
    return tmp_path


def line(**changes) -> dict:
    """A good line; `changes` over it, and ... takes a field out."""
    fields = {"image": "photos/1.jpg", "mask": [POLYGON], "split": "train"}
    fields |= {"sentences": ["the red mug", "número dos"]}
    return {key: value for key, value in (fields | changes).items() if value is not ...}


def write(data: Path, *lines: object) -> Path:
    path = data / "data.jsonl"
    texts = [text if isinstance(text, str) else json.dumps(text) for text in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def pack(data: Path, *lines: object, options: tuple[str, ...] = ()) -> Path:
    own_data.main([str(write(data, *lines)), "-o", str(data / "lmdb/mine"), *options])
    return data / "lmdb/mine"


def pack_one(data: Path, **changes: object) -> RefRecord:
    """The ref that a line makes."""
    (ref,) = all_refs(pack(data, line(**changes)) / "train.lmdb")
    return ref


def problems(data: Path, capture, *lines: object) -> list[str]:
    """What is wrong with the lines, a text for each; nothing is written then."""
    with pytest.raises(UserError) as caught:
        pack(data, *lines)
    assert list(data.glob("lmdb/mine/*")) == []
    listed = capture.readouterr().err.splitlines() or [str(caught.value)]
    texts = [text.removesuffix("; --skip-odd leaves such records out") for text in listed]
    return [text.replace(f"{data / 'data.jsonl'}:", "") for text in texts]


# ------------------------------------------------------------------------------- what is packed


def test_everything_lies_in_the_file_of_its_split(data, capsys):
    out = pack(
        data,
        line(split="val", image="photos/2.jpg"),
        "",
        line(),
        line(image="./photos/1.jpg", mask="masks/1.png", sentences=["  mug "], category=3),
    )
    assert sorted(os.listdir(out)) == ["train.lmdb", "val.lmdb"]
    train, val = RecordReader(out / "train.lmdb"), RecordReader(out / "val.lmdb")
    assert (train.meta["dataset"], train.meta["split"]) == ("mine", "train")
    assert (train.meta["refs"], train.meta["sentences"], train.meta["images"]) == (2, 3, 1)
    first, second = train.ref(0), train.ref(1)
    assert (first.ref_id, second.ref_id, val.ref(0).ref_id) == (3, 4, 1)  # numbers of their lines
    assert first.image_key == second.image_key == "photos/1.jpg"
    assert (first.image_id, first.category, second.category) == (None, None, 3)
    assert (first.height, first.width) == (HEIGHT, WIDTH)
    assert first.sentences == ("the red mug", "número dos")
    assert second.sentences == ("mug",)
    assert train.image("photos/1.jpg") == (data / "photos/1.jpg").read_bytes()
    ids = [i for ref in (*all_refs(out / "train.lmdb"), val.ref(0)) for i in ref.sent_ids]
    assert len(set(ids)) == len(ids) == 5
    assert "train.lmdb: 2 refs, 3 sentences, 1 images" in capsys.readouterr().out


CUT_OUT = np.dstack([np.full_like(DRAWN, 80, np.uint8)] * 3 + [np.uint8(255) * DRAWN])
LABELS = Image.fromarray(DRAWN.astype(np.uint8))
LABELS.putpalette([68, 1, 84, 0, 0, 0])
MASKS = {
    "polygons": [POLYGON],
    "overlapping polygons": [POLYGON, POLYGON],
    "compressed runs": COMPRESSED,
    "listed runs": LISTED,
    "png": Image.fromarray(np.uint8(255) * DRAWN),
    "cut-out": Image.fromarray(CUT_OUT),
    "palette": LABELS,
}


@pytest.mark.parametrize("kind", MASKS)
def test_each_way_to_give_a_mask_gives_the_same_mask(data, kind):
    mask = MASKS[kind]
    if isinstance(mask, Image.Image):
        mask.save(data / "masks/2.png")
        mask = "masks/2.png"
    assert pack_one(data, mask=mask).mask == data_process.encode_mask(np.uint8(255) * DRAWN)


def test_a_line_may_mean_several_objects_or_none(data):
    other = [32, 5, 50, 5, 50, 25, 32, 25]
    several = [[POLYGON], "masks/1.png", COMPRESSED, [other]]
    masks = (None, several, [[POLYGON]])
    refs = all_refs(pack(data, *(line(mask=mask) for mask in masks)) / "train.lmdb")
    assert [ref.num_targets for ref in refs] == [0, 4, 1]
    joined = DRAWN.copy()
    joined[5:25, 32:50] = True
    for ref, expected in zip(refs, (np.zeros_like(DRAWN), joined, DRAWN), strict=True):
        assert np.array_equal(decode_mask(ref.mask, "mask"), np.uint8(255) * expected)


def test_masks_of_a_whole_photo_or_of_several_values_are_told_with_their_lines(data, capsys):
    colours = np.full((HEIGHT, WIDTH, 3), (84, 1, 68), np.uint8)
    colours[DRAWN] = 37, 231, 253
    cv2.imwrite(str(data / "masks/2.png"), colours)
    cv2.imwrite(str(data / "masks/3.png"), DRAWN * np.uint8(9) + np.tri(HEIGHT, WIDTH, dtype="u1"))
    parts = [f"masks/{number}.png" for number in (1, 3, 3)]
    pack(data, *(line(mask=mask) for mask in ("masks/2.png", [POLYGON], parts, "masks/1.png")))
    assert [text for text in capsys.readouterr().out.splitlines() if text.startswith("note")] == [
        "note: 1 masks cover 99 % of their photo or more: is that meant? Lines 1",
        "note: 2 masks have several values, all taken for the object: is that meant? Lines 1, 3",
    ]


def test_a_photo_that_its_exif_tag_turns_is_turned_like_its_mask(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(data / "photos/1.jpg").save(data / "photos/turned.jpg", exif=exif)
    cv2.imwrite(str(data / "masks/2.png"), np.uint8(255) * DRAWN.T)
    ref = pack_one(data, image="photos/turned.jpg", mask="masks/2.png")
    assert (ref.height, ref.width) == (WIDTH, HEIGHT)


def test_ids_are_kept_and_absolute_paths_and_other_folders_of_images_are_read(data, tmp_path):
    (data / "photos").rename(tmp_path / "elsewhere")
    absolute = str(tmp_path / "elsewhere/2.jpg")
    (tmp_path / "elsewhere/3.jpg").rename(tmp_path / "elsewhere/000000000003.jpg")
    of_2014 = "COCO_train2014_000000000003.jpg"  # COCO's photo, under its name of 2017
    fields = {"1.jpg": (70, 5), absolute: (60, None), of_2014: (50, 3)}
    lines = [line(image=key, ref_id=i, image_id=j) for key, (i, j) in fields.items()]
    out = pack(data, *lines, options=("--images", str(tmp_path / "elsewhere")))
    refs = all_refs(out / "train.lmdb")
    assert {ref.image_key: (ref.ref_id, ref.image_id) for ref in refs} == fields


def test_a_file_from_a_windows_editor_is_read(data):
    path = write(data, line())
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    own_data.main([str(path), "-o", str(data / "lmdb")])
    assert len(RecordReader(data / "lmdb/train.lmdb")) == 1


def test_photos_in_two_splits_are_counted(data, capsys):
    pack(data, line(), line(split="val"), line(image="photos/2.jpg"))
    said = capsys.readouterr().out
    assert "note: 1 images are in more than one split, such as photos/1.jpg" in said


def test_a_check_needs_no_folder_and_writes_nothing(data, capsys):
    path = write(data, line())
    own_data.main([str(path), "--check"])
    assert "1 refs can be packed; nothing written" in capsys.readouterr().out
    own_data.main([str(path), "--check", "-o", str(data / "lmdb")])
    assert not (data / "lmdb").exists()
    assert "-o names the folder" in usage_error(capsys, own_data.main, [str(path)])


# ---------------------------------------------------------------------------------- what is not


def test_all_problems_of_all_lines_are_listed_at_once(data, capfd):
    os.truncate(save_photo(data / "photos/cut.tif"), 3000)  # libtiff would tell of it
    found = problems(
        data,
        capfd,
        line(),
        "{",
        line(split=..., mask=3, sentences=["fine", 3]),
        line(mask="masks/none.png", image_id=4),
        line(image="photos/cut.tif"),
        line(image="photos/cut.tif"),
    )
    assert sorted(text[0] for text in found) == list("23456")
    (fields,) = [text for text in found if text[0] == "3"]
    for text in (".mask: must be a path, ", ".sentences[1]: must be ", ".split: is missing"):
        assert text in fields


def test_missing_images_share_a_line_that_asks_for_their_folder(data, capsys):
    images = ["photos/1.jpg", "a.jpg", "b.jpg", "a.jpg", "c.jpg"]
    assert problems(data, capsys, *(line(image=image) for image in images)) == [
        f"2: {data}/a.jpg and 2 more do not exist: check image, or name its folder with --images"
    ]


def test_lines_that_cannot_be_used_are_left_out_and_counted_when_that_is_meant(data, capsys):
    lines = [line(image="none.jpg"), line(mask=[POLYGON[:4]]), line(split="val"), line()]
    out = pack(data, *lines, "{", line(split=["val"]), options=("--skip-odd",))
    assert "note: left out 4 odd records" in capsys.readouterr().out
    (train, val) = (RecordReader(out / f"{split}.lmdb") for split in ("train", "val"))
    assert (train.index.ref_ids, train.meta["left_out"]) == ([4], 4)
    assert val.meta["left_out"] == 2  # the lines of no split
    with pytest.raises(UserError, match="has no line to pack"):
        pack(data, line(image="none.jpg"), options=("--skip-odd", "--force"))
    assert train.index.ref_ids == RecordReader(train.path).index.ref_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "a" * 600}, ".image: must be a path of at most 500 bytes"),
        ({"image": "a" * 400}, ": .*File name too long"),
        ({"image": "photos"}, ": .*photos does not exist: check image, or .* --images"),
        ({"mask": 3}, r".mask: must be a path, \{size: \[height, .*, null, .* of polygons in"),
        ({"mask": [None]}, r".mask: must be a path, "),
        ({"mask": ["masks/1.png", POLYGON]}, r".mask: must be a path, "),
        ({"mask": []}, r".mask: must be a path, .* even for one, not \[\]"),
        ({"mask": POLYGON}, r".mask: must be a path, "),
        ({"mask": [[1, 2, 3, 4, 5, "6"]]}, ".mask: must be a path, "),
        ({"mask": [[1, 2, 3, 4, 5, 10**400]]}, ".mask: must be a path, "),
        ({"mask": [[POLYGON], [[0.1, 0.1, 0.9, 0.1, 0.5, 0.8]]]}, ": .* must be in pixels"),
        ({"mask": [[0.1, 0.1, 0.9, 0.1, 0.5, 0.8]]}, r": .* must be in pixels \(these polygons li"),
        ({"mask": [[-9, -9, -8, -9, -8, -8]]}, ": its mask is an empty mask: it covers no pixel"),
        ({"mask": ["masks/1.png", "masks/9.png"]}, r": .*masks/9\.png does not exist: check mask"),
        ({"mask": [[1, 2, 3, 4]]}, ": its mask is an unreadable .* three or more pairs"),
        ({"mask": {"counts": "x"}}, ": .*unreadable segmentation .*'size'"),
        ({"mask": {"size": [WIDTH, HEIGHT], "counts": [0, 2400]}}, ": .* of 60 x 40 pixels on an"),
        ({"sentences": "the mug"}, ".sentences: must be a valid list, not 'the mug'"),
        ({"sentences": []}, r".sentences: must be one or more, not \[\]"),
        ({"sentences": ["mug", 3]}, r".sentences\[1\]: must be a valid string, not 3"),
        ({"sentences": ["mug", " \t"]}, r".sentences\[1\]: must be a text with words"),
        ({"sentences": ["mug \ud800"]}, r".sentences\[0\]: must be .* unicode string"),
        ({"split": ...}, ".split: is missing"),
        ({"split": "../train"}, ".split: must be a plain name"),
        ({"ref_id": "7"}, ".ref_id: must be a valid integer, not '7'"),
        ({"ref_id": 2**63}, ".ref_id: must be less than or equal to"),
        ({"image_id": True}, ".image_id: must be a valid integer, not True"),
        ({"category": -1}, ".category: must be greater than or equal to 0, not -1"),
        ({"sentense": []}, ".sentense: is unknown: docs/own_data.md describes the fields"),
        ("nonsense", r" is not readable JSON \(Expecting value"),
        ("[1]", r": must be a valid dictionary, not \[1\]"),
        ("[" * 100_000, r" is not readable JSON \(.*recursion"),
    ],
    ids=lambda value: json.dumps(value, default=lambda _: "absent")[:40],
)
def test_a_bad_line_is_named_with_its_field(data, capsys, changes, message):
    bad = changes if isinstance(changes, str) else line(**changes)
    (found,) = problems(data, capsys, line(), bad)
    assert re.match(f"2{message}", found)


def test_ids_that_contradict_each_other_are_named(data, capsys):
    ids = ((7, 5), (7, 5), (None, 5), (8, 9), (3, 5))
    assert problems(data, capsys, *(line(ref_id=i, image_id=j) for i, j in ids)) == [
        "2: ref_id 7 is there twice: give each line another, or none",
        "5: ref_id 3 is there twice: give each line another, or none",
        "4: its image photos/1.jpg has image_id 9, but 5 on a line above",
    ]


NARROW = encoded(np.ones((HEIGHT, 50), np.uint8))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("photos/1.jpg", b"<html>", r"photos/1\.jpg cannot be decoded \(6 bytes"),
        ("masks/1.png", b"PNG", r"masks/1\.png cannot be decoded .*: check mask"),
        ("masks/1.png", encoded(np.uint8(255) * DRAWN, ".jpg"), r"masks/1\.png is no PNG"),
        ("masks/1.png", encoded(np.uint8(0) * DRAWN), r"masks/1\.png is an empty mask"),
        ("masks/1.png", NARROW, r"is 40 x 50 pixels, its image 40 x 60: check mask$"),
    ],
)
def test_a_bad_photo_or_mask_is_named_with_its_line(data, capsys, name, content, message):
    (data / name).write_bytes(content)
    (found,) = problems(data, capsys, line(image="photos/2.jpg"), line(mask="masks/1.png"))
    assert re.match(f"2: .*{message}", found)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    messages = {None: " does not exist", b"\n \n": " has no line", b"\xe9{": ":1 is not reada"}
    for content, message in messages.items():
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=rf"data\.jsonl{message}"):
            own_data.main([str(path), "-o", str(tmp_path / "lmdb")])
    assert not (tmp_path / "lmdb").exists()


def test_records_that_are_there_are_replaced_only_when_that_is_meant(data):
    out = pack(data, line(), line(split="val"))
    before = contents(out)
    with pytest.raises(UserError, match=r"^\S+/val.lmdb is there already: .*--force$"):
        pack(data, line(sentences=["other"], split="val"), line(split="test"))
    assert contents(out) == before
    pack(data, line(sentences=["other"], split="val"), options=("--force",))
    assert RecordReader(out / "val.lmdb").ref(0).sentences == ("other",)


def test_a_bad_line_and_a_full_disk_leave_all_splits_as_they_were(data, monkeypatch):
    out = pack(data, line(), line(split="val"))
    before = contents(out)
    lines = [line(sentences=["new"], split=split) for split in ("train", "val", "testA")]
    with pytest.raises(UserError, match=":4 is not readable JSON"):
        pack(data, *lines, "{", options=("--force",))
    assert contents(out) == before
    add_ref = RecordWriter.add_ref

    def fails(self, ref):
        if ref.ref_id == 3:  # of testA
            raise OSError(28, "No space left on device", "disk")
        add_ref(self, ref)

    monkeypatch.setattr(RecordWriter, "add_ref", fails)
    with pytest.raises(OSError, match="No space"):
        pack(data, *lines, options=("--force",))
    assert contents(out) == before


# --------------------------------------------------------------------------- docs/own_data.md


def blocks(language: str) -> list[str]:
    """The fenced blocks of the page in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)


def test_the_page_shows_the_problems_that_its_bad_file_has(data, capsys, monkeypatch):
    monkeypatch.chdir(data)
    (content,), (answer,) = blocks("json"), blocks("text")
    Path("data.jsonl").write_text(content)
    with pytest.raises(UserError) as caught:
        own_data.main(["data.jsonl", "-o", "lmdb"])
    listed = capsys.readouterr().err.splitlines()
    assert [*listed, f"error: {caught.value}"] == answer.splitlines()


def test_the_config_on_the_page_is_the_one_that_is_shipped():
    (shown,) = blocks("yaml")
    shipped = (ROOT / "config/own/cris_r50.yaml").read_text()
    assert shipped.partition("\n")[2] == shown


@pytest.mark.slow
def test_the_worked_example_runs_from_pictures_to_scores(tmp_path, monkeypatch):
    for name in ("train.py", "test.py", "tools", "config"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "datasets").mkdir()
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python (?:- <<'END'\n(.*?)^END|(\S[^\n]*))$", DOC, re.M | re.S)
    assert len(commands) == 6
    for script, words in commands:
        if script:
            exec(script, {})
        else:
            monkeypatch.setattr(sys, "argv", words.split())
            runpy.run_path(sys.argv[0], run_name="__main__")
    run = tmp_path / "exp/example/cris_tiny"
    scores = json.loads((run / "test_example_val.aligned.json").read_text())
    val = RecordReader(tmp_path / "datasets/lmdb/example/val.lmdb").meta
    assert scores["sentences"] == val["sentences"]
    assert 0 <= scores["mIoU"] <= 1
    assert (tmp_path / "datasets/example/train.png").is_file()
    assert list((run / "vis/example_val").glob("*.png"))
    rows = read_jsonl(tmp_path / "datasets/example/data.jsonl")
    assert {type(row["mask"]) for row in rows} == {str, dict, list}
