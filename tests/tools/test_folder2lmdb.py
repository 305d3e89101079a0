"""tools/folder2lmdb.py: a split packed into one file, or a clear refusal and no file."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, run_command, save_photo, user_error
from helpers import pack as pack_refer
from PIL import Image

from tools import folder2lmdb
from utils.errors import UserError
from utils.records import RecordReader
from utils.transforms import decode_mask

HEIGHT, WIDTH = 12, 16
COCO = "COCO_train2014_000000000012.jpg"
JSON = "anns/toys/val.json"


def make_entry(ref_id: int, img_name: str) -> dict:
    texts = ("the red thing", "número dos")
    sentences = [{"idx": i, "sent_id": 10 * ref_id + i, "sent": t} for i, t in enumerate(texts)]
    entry = {"bbox": [0, 0, 4, 4], "cat": 5, "segment_id": ref_id, "img_name": img_name}
    return entry | {"sentences": sentences, "sentences_num": 2}


def json_of(images: tuple[str, ...] = (COCO, "q.png", COCO), **second: object) -> bytes:
    """The JSON of a ref on each photo; `second` changes the second, ... takes a field out."""
    entries = [make_entry(i, name) for i, name in enumerate(images)]
    entries[1] = {key: v for key, v in (entries[1] | second).items() if v is not ...}
    return json.dumps(entries).encode()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """anns/toys/val.json with three refs on two images, and what belongs to them."""
    for folder in ("anns/toys", "masks/toys"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / JSON).write_bytes(json_of())
    for seed, name in enumerate((COCO, "q.png")):
        save_photo(tmp_path / "images" / name, seed, (HEIGHT, WIDTH))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:4, :4] = 254
    for ref_id in range(3):
        (tmp_path / f"masks/toys/{ref_id}.png").write_bytes(encoded(np.roll(mask, ref_id, 0)))
    return tmp_path


def pack(data: Path, *more: str) -> RecordReader:
    where = ["-j", JSON, "-i", "images", "-m", "masks/toys", "-o", "lmdb/toys"]
    folder2lmdb.main([arg if arg[0] == "-" else str(data / arg) for arg in where] + [*more])
    return RecordReader(data / "lmdb/toys/val.lmdb")


def test_everything_lies_in_the_file_as_it_was(data: Path) -> None:
    reader = pack(data)
    assert len(reader) == 3
    for i, (key, image_id) in enumerate(((COCO, 12), ("q.png", None), (COCO, 12))):
        record = reader.ref(i)
        assert (record.ref_id, record.image_key, record.image_id) == (i, key, image_id)
        assert (record.category, record.height, record.width) == (5, HEIGHT, WIDTH)
        assert record.sentences == ("the red thing", "número dos")
        assert record.sent_ids == (10 * i, 10 * i + 1)
        assert record.mask == (data / f"masks/toys/{i}.png").read_bytes()
        assert reader.image(key) == (data / "images" / key).read_bytes()
    assert os.listdir(data / "lmdb/toys") == ["val.lmdb"]


def test_photos_under_the_names_of_2017_are_packed_as_those_of_2014(data: Path) -> None:
    photo = data / "images" / COCO
    content = photo.read_bytes()
    photo.rename(photo.with_name(COCO.rpartition("_")[2]))
    reader = pack(data)
    assert reader.ref(0).image_key == COCO
    assert reader.image(COCO) == content


def test_dataset_and_split_are_named_after_the_json(data: Path, capsys) -> None:
    meta = pack(data).meta
    assert (meta["dataset"], meta["split"]) == ("toys", "val")
    assert meta["token_length"][5] == 3  # <start> the red thing <end>
    out = capsys.readouterr().out
    assert "val.lmdb: 3 refs, 6 sentences, 2 images, 0.1 MB" in out
    assert "at 22: 0, of 6 sentences" in out
    assert pack(data, "--dataset", "games").meta["dataset"] == "games"


@pytest.mark.parametrize(
    ("key", "image_id"),
    [
        ("COCO_train2014_000000581857.jpg", 581857),
        ("images/COCO_val2014_000000581857.png", 581857),
        ("000000581857.jpg", 581857),
        ("train2017/000000581857.jpg", 581857),
        ("clip3/000000581857.jpg", None),
        ("clip3/00007.jpg", None),
        ("saiapr/19579.jpg", None),
        ("REFSHAPES_train2014_000000000012.jpg", None),
        ("COCO_train2014_000000581857_2.jpg", None),
    ],
)
def test_only_a_name_of_coco_gives_an_image_id(key: str, image_id: int | None) -> None:
    assert folder2lmdb.image_id_of(key) == image_id


def picture(*channels: np.ndarray, palette: list[int] | None = None, **info) -> Image.Image:
    """A picture whose file may say, in `transparency`, that an index or colour is transparent."""
    image = Image.fromarray(channels[0] if len(channels) == 1 else np.dstack(channels))
    if palette is not None:
        image.putpalette(palette)
    image.info |= info
    return image


OBJECT = np.zeros((HEIGHT, WIDTH), np.uint8)
OBJECT[2:6, 3:9] = 1
NONE, WIDE = 0 * OBJECT, OBJECT.astype(np.uint16)
COLUMNS = np.tile([1, *[0] * 14, 1], (HEIGHT, 1)).astype(np.uint8)  # beside the object
WHITE = 255 * (OBJECT + COLUMNS)
SOFT = OBJECT * np.arange(200, 216, dtype=np.uint8)
SHADES = OBJECT * np.arange(16, dtype=np.uint8) % 5
PAINTED = [68, 1, 84, 253, 231, 37, 9, 0, 0, 0, 0, 9]  # the background too, as viewers write it
MASKS = {
    "ones": picture(OBJECT),
    "class numbers": picture(OBJECT * np.arange(1, 17, dtype=np.uint8)),
    "16 bits": picture(WIDE * 7),
    "one bit": picture(OBJECT > 0),
    "dark blue": picture(NONE, NONE, OBJECT),
    "palette": picture(OBJECT * np.tile([1, 2, 3, 3], 4).astype(np.uint8), palette=PAINTED),
    "cut-out of black": picture(NONE, NONE, NONE, 99 * OBJECT),
    "cut-out of a photo, black in places": picture(SHADES, SHADES, SHADES, 255 * OBJECT),
    "grey with alpha": picture(OBJECT + 200, 255 * OBJECT),
    "black around, columns transparent": picture(WHITE, WHITE, WHITE, 255 * (1 - COLUMNS)),
    "the same, of several greys": picture(SOFT, SOFT, SOFT, 255 * (1 - COLUMNS)),
    "transparent index": picture(OBJECT + 2 * COLUMNS, palette=PAINTED, transparency=2),
    "black shape of a palette": picture(1 - OBJECT, palette=PAINTED, transparency=1),
    "transparent grey": picture(200 * OBJECT + 9 * COLUMNS, transparency=9),
    "transparent grey of 16 bits": picture(
        500 * WIDE + np.uint16(60_000) * COLUMNS, transparency=60_000
    ),
    "transparent colour": picture(
        200 * OBJECT + 9 * COLUMNS, OBJECT, 9 * COLUMNS, transparency=(9, 0, 9)
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_other_codes_are_packed_as_white_and_counted(data, capsys, kind) -> None:
    MASKS[kind].save(data / "masks/toys/1.png")
    reader = pack(data)
    assert np.array_equal(decode_mask(reader.ref(1).mask, "mask"), 255 * OBJECT)
    assert reader.ref(0).mask == (data / "masks/toys/0.png").read_bytes()
    said = "note: 1 of 3 masks are not of 0 and 253 to 255: made so, object 255\n"
    assert (said in capsys.readouterr().out) == (kind != "one bit")


def test_an_object_of_253_to_255_is_packed_bit_for_bit(data, capsys) -> None:
    file = encoded(OBJECT * np.tile([253, 254, 255, 255], 4).astype(np.uint8))
    (data / "masks/toys/1.png").write_bytes(file)
    assert pack(data).ref(1).mask == file
    assert "note:" not in capsys.readouterr().out


def sentence(**fields: object) -> bytes:
    """The JSON with a changed second sentence of the second entry."""
    first, second = make_entry(1, "q.png")["sentences"]
    return json_of(sentences=[first, second | fields])


BLANK = encoded(NONE)
OTHER_SIZE = encoded(np.full((WIDTH, HEIGHT), 255, np.uint8))
CUT_OFF = encoded(np.zeros((99, 99, 3), np.uint8), ".jpg")[:500]


def test_a_ref_of_no_target_is_packed_with_its_empty_mask(data: Path) -> None:
    (data / JSON).write_bytes(json_of(num_targets=0))
    with pytest.raises(UserError, match=r"1\.png is not empty, though num_targets is 0: check -m"):
        pack(data)
    (data / "masks/toys/1.png").write_bytes(BLANK)
    reader = pack(data)
    assert [reader.ref(i).num_targets for i in range(3)] == [1, 0, 1]
    assert reader.ref(1).mask == BLANK
    (data / JSON).write_bytes(json_of(num_targets=2))
    with pytest.raises(UserError, match=r"1\.png is an empty mask: check -m"):
        pack(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("images", None, r"\(-i\) does not exist: .*images"),
        ("masks", None, r"\(-m\) does not exist: .*masks"),
        ("images/q.png", None, r"q\.png does not exist: check --images"),
        ("images/q.png", b"<html>", r"q\.png cannot be decoded \(6 bytes.*check --images"),
        (f"images/{COCO}", CUT_OFF, r"012\.jpg cannot be decoded .* cut off"),
        (JSON, json_of(img_name="q" * 300), "q: File name too long: check --images, .*--skip-odd"),
        ("masks/toys/1.png", None, r"1\.png does not exist: .*data_process.py --generate_mask"),
        ("masks/toys/1.png", b"", r"1\.png is an empty file: .*data_process"),
        ("masks/toys/1.png", BLANK, r"1\.png is an empty mask: check -m"),
        ("masks/toys/1.png", OTHER_SIZE, r"1\.png is 16 x 12 pixels, its image 12 x 16"),
        (JSON, None, r"val\.json does not exist: make it again with .*data_proc"),
        (JSON, b'[{"bbox": [0', r"val\.json is not readable JSON"),
        (JSON, b"[" * 100_000, r"val\.json is not readable JSON \(.*recurs"),
        (JSON, b"{}", r"val\.json: must be a valid list, not \{\}"),
        (JSON, b'["ref"]', r"val\.json\[0\]: must be a valid dictionary, not 'ref'"),
        (JSON, json_of(img_name=...), r"\[1\].img_name: is missing: make it"),
        (JSON, json_of(img_name=None), r"\[1\].img_name: must be a valid string, not None"),
        (JSON, json_of(img_name="x" * 600), "img_name: must be a path of at most 500 bytes, not"),
        (JSON, json_of(img_name="a\0.jpg"), r"img_name: must be a path .*, not 'a\\x00"),
        (JSON, json_of(img_name="\udc80"), r"img_name: .* unicode string, not '.udc80"),
        (JSON, json_of(num_targets=-1), r"\[1\].num_targets: must be greater than .* 0, not -1"),
        (JSON, json_of(sentences=[]), r"\[1\].sentences: must be one or more, not \[\]"),
        (JSON, json_of(cat=10**30), r"\[1\].cat: must be less than or equal to .*, not 1000"),
        (JSON, json_of(segment_id=10**30), r"\[1\].segment_id: must be less than"),
        (JSON, json_of(segment_id=0), r"val\.json\[1\]: segment_id 0 is there twice"),
        (JSON, sentence(sent=3), r"\[1\].sentences\[1\].sent: must be a valid string, not 3"),
        (JSON, sentence(sent="mug \ud800"), r"sent: .* unicode string, not 'mug .ud800"),
        (JSON, sentence(sent=" &nbsp; "), r"sent: must be a text with words, not ' &nbsp; '"),
        (JSON, sentence(sent_id=10), r"val\.json\[1\]: sent_id 10 is there twice"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_bad_file_is_named_and_leaves_no_packed_one(data: Path, name, content, message) -> None:
    if content is None:
        (data / name).rename(data / "elsewhere")
    else:
        (data / name).write_bytes(content)
    assert re.search(message, user_error(pack, data))
    assert not list(data.glob("lmdb/toys/*"))


def test_missing_photos_share_a_line_and_sizes_that_differ_are_told(data: Path, capsys) -> None:
    (data / JSON).write_bytes(json_of((COCO, "q.png", "r.png", "s.png", "s.png")))
    (data / "masks/toys/0.png").write_bytes(OTHER_SIZE)
    assert user_error(pack, data).startswith(
        "4 odd records (3 of kind 'missing photo', 1 of kind 'mask of another size'), listed above"
    )
    assert capsys.readouterr().err.splitlines()[-2:] == [
        f"{data}/masks/toys/0.png is 16 x 12 pixels, its image 12 x 16 (turned by its EXIF "
        "orientation?): check -m and --images, or make it again with python tools/data_process.py "
        "--generate_mask",
        f"{data}/images/r.png and 1 more do not exist: check --images, or get the image again "
        "(tools/prepare_datasets.md)",
    ]
    assert os.listdir(data / "lmdb/toys") == []
    reader = pack(data, "--skip-odd")
    assert (reader.index.ref_ids, reader.meta["images"]) == ([1], 1)
    assert reader.meta["left_out"] == 4


@pytest.mark.parametrize(
    ("dataset", "split_by", "refs"),
    [
        ("refcoco", "unc", {"train": 38, "val": 13, "testA": 4, "testB": 8}),
        ("refcoco+", "unc", {"val": 13, "testA": 4, "testB": 8}),
        ("refcocog", "umd", {"train": 23, "val": 8, "test": 4}),
    ],
)
def test_real_photos_go_through_both_tools(
    mini_root: Path, tmp_path: Path, dataset: str, split_by: str, refs: dict[str, int]
) -> None:
    pack_refer(mini_root, tmp_path, dataset, split_by, dataset)
    images = mini_root / "images/train2014"
    found = {}
    for path in (tmp_path / "anns" / dataset).iterdir():
        reader = RecordReader(tmp_path / f"lmdb/{dataset}/{path.stem}.lmdb")
        for i, entry in enumerate(json.loads(path.read_text())):
            record = reader.ref(i)
            assert record.ref_id == entry["segment_id"]
            assert reader.image(record.image_key) == (images / entry["img_name"]).read_bytes()
            assert str(record.image_id) in record.image_key
        found[path.stem] = len(reader)
    assert found == refs


def test_a_disk_that_is_full_is_named_with_the_file(data: Path) -> None:
    disk = data / "small"
    disk.mkdir()
    mount = run_command("env", "mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk)
    if mount.returncode:
        pytest.skip(f"no small disk: {mount.stderr.strip()}")
    try:
        noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
        (data / "images/q.png").write_bytes(encoded(noise))
        (data / "masks/toys/1.png").write_bytes(encoded(np.full((500, 500), 255, np.uint8)))
        with pytest.raises(OSError, match="No space left") as caught:
            pack(data, "-o", str(disk / "toys"))
        assert caught.value.filename == str(disk / "toys/val.lmdb")
        assert os.listdir(disk / "toys") == []
    finally:
        assert run_command("umount", disk).returncode == 0
