"""Packing as a whole: memory, kill -9, and converting the release's files."""

import os
import pickle
import re
import resource
import signal
import sys
from collections.abc import Callable
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import lmdb
import numpy as np
import pytest
from helpers import all_refs, blob, encoded, put, usage_error, user_error, write_records

from tools import folder2lmdb
from utils import records
from utils.errors import UserError
from utils.records import RecordReader, RecordWriter, RefRecord
from utils.transforms import decode_mask

# ----------------------------------------------------------------- the release's own files


def write_release(
    path: Path, items: list[object], dumps: Callable[[object], bytes] = pickle.dumps
) -> Path:
    """An LMDB as the release's packer lays it out, with its lock file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = [b"%d" % number for number in range(len(items))]
    env = lmdb.open(str(path), subdir=False, map_size=1 << 30, meminit=False, map_async=True)
    with env, env.begin(write=True) as txn:
        for key, item in zip(keys, items, strict=True):
            txn.put(key, dumps(item))
        txn.put(b"__keys__", dumps(keys))
        txn.put(b"__len__", dumps(len(keys)))
    return path


def release_item(ref_id: int, image: bytes, key: str, *sents: str) -> dict:
    item = {"img": image, "mask": MASK, "cat": 5, "seg_id": ref_id, "img_name": key}
    return item | {"num_sents": len(sents), "sents": list(sents)}


HEIGHT, WIDTH = 40, 60
PHOTOS = [
    encoded(np.random.default_rng(i).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), ".jpg")
    for i in range(2)
]
MASK = encoded(blob(HEIGHT, WIDTH))
COCO = "COCO_train2014_000000000012.jpg"
ITEMS = [
    release_item(7, PHOTOS[0], COCO, "the red one", "red"),
    release_item(3, PHOTOS[1], "b.jpg", "número dos"),
    release_item(9, PHOTOS[0], COCO, "left"),
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The items as a file of the release."""
    return write_release(tmp_path / "old/refcoco/val.lmdb", ITEMS)


def convert(source: Path, out: Path) -> RecordReader:
    folder2lmdb.main(["--from-lmdb", str(source), "-o", str(out)])
    return RecordReader(out / f"{source.stem}.lmdb")


@pytest.mark.parametrize("protocol", [3, 5])
def test_a_file_of_the_release_is_converted_with_each_image_once(tmp_path, protocol, capsys):
    of_ones = release_item(4, PHOTOS[1], "b.jpg", "masked by ones")
    of_ones["mask"] = encoded(blob(HEIGHT, WIDTH) // 255)
    items = [*ITEMS, of_ones]
    source = tmp_path / "old/refcoco/val.lmdb"
    write_release(source, items, lambda item: pickle.dumps(item, protocol))
    reader = convert(source, tmp_path / "new/refcoco")
    assert (reader.meta["dataset"], reader.meta["split"]) == ("refcoco", "val")
    assert (reader.meta["refs"], reader.meta["images"], reader.meta["sentences"]) == (4, 2, 5)
    for ref, item in zip(all_refs(reader.path), items, strict=True):
        assert (ref.ref_id, ref.image_key) == (item["seg_id"], item["img_name"])
        assert (ref.category, ref.height, ref.width) == (item["cat"], HEIGHT, WIDTH)
        assert list(ref.sentences) == item["sents"]
        assert ref.mask == item["mask"] or item is of_ones
        assert np.array_equal(decode_mask(ref.mask, "mask"), blob(HEIGHT, WIDTH))
        assert reader.image(ref.image_key) == item["img"]
    assert reader.index.image_ids == [12, None, 12, None]
    assert [reader.ref(i).sent_ids for i in range(4)] == [(0, 1), (2,), (3,), (4,)]
    said = capsys.readouterr().out
    assert "sentence ids: 0 to 4 in the order of" in said
    assert "note: 1 of 4 masks are not of 0 and 253 to 255" in said
    assert sorted(os.listdir(source.parent)) == ["val.lmdb", "val.lmdb-lock"]


def test_a_file_of_the_release_in_a_folder_is_converted_too(tmp_path, source):
    folder = tmp_path / "folder/val.lmdb"
    folder.mkdir(parents=True)
    source.rename(folder / "data.mdb")
    assert len(convert(folder, tmp_path / "new")) == 3


def changed(**fields: object) -> Callable[[Path], object]:
    """What changes the second item of a file."""
    return with_entry(b"1", pickle.dumps(ITEMS[1] | fields))


def with_entry(key: bytes, value: bytes | None) -> Callable[[Path], object]:
    return lambda path: put(path, {key: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (changed(img=PHOTOS[1][:300]), r"entry 1, image b\.jpg cannot be decoded \(300 bytes"),
        (changed(mask=encoded(np.zeros((HEIGHT, WIDTH), np.uint8))), "entry 1, mask is an empty m"),
        (changed(mask=encoded(blob(WIDTH, HEIGHT))), "entry 1, mask is 60 x 40 pixels"),
        (changed(img_name=ITEMS[0]["img_name"]), "entry 1 has another image COCO_.* than an"),
        (changed(seg_id=7), "seg_id 7 is there twice"),
        (changed(seg_id="7"), "entry 1.seg_id: must be a valid integer, not '7'"),
        (changed(img="text"), "entry 1.img: must be a valid bytes, not 'text'"),
        (changed(sents=[]), r"entry 1.sents: must be one or more, not \[\]"),
        (changed(sents=[" "]), r"entry 1.sents\[0\]: must be a text with words, not ' '"),
        (with_entry(b"1", pickle.dumps({"img": PHOTOS[0]})), "entry 1.mask: is missing"),
        (with_entry(b"1", pickle.dumps([1, 2])), r"entry 1: must be a valid dictionary, not \[1,"),
        (with_entry(b"1", pickle.dumps(os.system)), r"entry 1 asks for posix\.system: .* not load"),
        (with_entry(b"1", b"\x80\x04\x95"), "entry 1 is not a readable pickle, or cut off"),
        (with_entry(b"1", b"\xff" * 4), r"entry 1 is no .* pyarrow\.serialize.*: re-pack with"),
        (with_entry(b"__len__", pickle.dumps(0)), "has no refs"),
        (with_entry(b"__len__", pickle.dumps(4)), "entry 3 is missing: re-pack with"),
        (with_entry(b"__len__", pickle.dumps("3")), "__len__: must be a valid integer, not '3': r"),
        (with_entry(b"__len__", None), "__len__ is missing: re-pack with"),
        (with_entry(b"__keys__", None), "is no LMDB of the release: re-pack with"),
        (with_entry(b"__meta__", b"{}"), "is in this repository's format already"),
        (lambda p: p.unlink(), "val.lmdb does not exist as a file"),
        (lambda p: p.write_text("<html>" * 4000), "no LMDB can be read from .*: re-pack with"),
        (lambda p: os.truncate(p, p.stat().st_size // 2), r"is cut off \(.*: re-pack with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_the_release_that_cannot_be_read_is_refused(tmp_path, source, damage, message):
    damage(source)
    assert re.search(message, user_error(convert, source, tmp_path / "new"))
    assert os.listdir(tmp_path / "new") == []


def test_a_file_of_the_release_is_never_written_over(source):
    before = source.read_bytes()
    with pytest.raises(UserError, match="is the file to convert: give another folder as -o"):
        convert(source, source.parent)
    assert source.read_bytes() == before


def test_the_refusal_of_a_file_of_the_release_gives_the_command_that_converts_it(tmp_path, source):
    command = f"python tools/folder2lmdb.py --from-lmdb {source} -o FOLDER"
    assert command in user_error(len, RecordReader(source))
    folder2lmdb.main(command.replace("FOLDER", str(tmp_path / "new")).split()[2:])
    assert len(RecordReader(tmp_path / "new/val.lmdb")) == 3


@pytest.mark.parametrize(
    "words", [["-j", "a.json"], ["--from-lmdb", "a.lmdb", "-i", "images"], ["-i", "x", "-m", "y"]]
)
def test_the_command_line_takes_either_files_or_an_old_lmdb(words, capsys):
    told = usage_error(capsys, folder2lmdb.main, [*words, "-o", "out"])
    assert "give -j, -i and -m, or --from-lmdb alone" in told


# ------------------------------------------------------------------------------------------ memory


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


def pack_many(path: Path, count: int, grown: Connection) -> None:
    """Pack more than 150 MB, and say by how much this process has grown."""
    photo, mask, before = os.urandom(20_000), os.urandom(1_500), peak()
    with RecordWriter.open(path, "toys", "train") as writer:
        for i in range(count):
            image = i * 2 // 5
            key = f"COCO_train2014_{image:012d}.jpg"
            writer.add_image(key, photo)
            sent_ids = (3 * i, 3 * i + 1, 3 * i + 2)
            ref = RefRecord(i, key, image, 3, 480, 640, mask, ("a", "b", "c"), sent_ids)
            writer.add_ref(ref)
    grown.send(peak() - before)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems count bytes")
def test_packing_holds_a_batch_in_memory_and_not_the_photos(tmp_path):
    path, (here, there) = tmp_path / "train.lmdb", Pipe()
    child = get_context("fork").Process(target=pack_many, args=(path, 15_000, there))
    child.start()
    there.close()
    assert 1024 * here.recv() < 100_000_000
    child.join()
    assert path.stat().st_size > 150_000_000


def test_the_map_is_never_much_larger_than_the_file(tmp_path):
    """The release's packer maps 2 TiB."""
    path = write_records(tmp_path / "val.lmdb", [2])
    with lmdb.open(str(path), subdir=False, readonly=True, lock=False) as env:
        assert env.info()["map_size"] <= max(2 * path.stat().st_size, records._INITIAL_MAP_BYTES)


# ----------------------------------------------------------------------------------------- kill -9


def die_at(moment: bytes, path: Path) -> None:
    """Pack other records, and die before such an entry is written, or the file moved."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    put = RecordWriter._put

    def put_or_die(self: RecordWriter, key: bytes, value: bytes) -> None:
        if key.startswith(moment):
            die()
        put(self, key, value)

    if moment == b"the move":
        os.replace = die
    RecordWriter._put = put_or_die
    write_records(path, [1, 3])


def kill_at(moment: bytes, path: Path) -> None:
    child = get_context("fork").Process(target=die_at, args=(moment, path))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert len(list(path.parent.glob(".*.partial"))) == 1


@pytest.mark.parametrize(
    "moment", [b"image:", b"ref:000000002", b"__index__", b"__meta__", b"the move"]
)
def test_kill_9_at_a_given_moment_leaves_the_old_file_or_none(tmp_path, moment):
    path = tmp_path / "val.lmdb"
    kill_at(moment, path)
    assert not path.exists()
    write_records(path, [2, 2])
    assert os.listdir(tmp_path) == ["val.lmdb"]
    before = path.read_bytes()
    kill_at(moment, path)
    assert path.read_bytes() == before


def test_temporary_files_of_living_processes_and_of_others_are_left_alone(tmp_path):
    path = tmp_path / "val.lmdb"
    others = [f".val.lmdb.{os.getppid()}.partial", ".val.lmdb.partial"]
    others += [".val.lmdb.note.partial", ".train.lmdb.999999999.partial"]
    for name in others:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".val.lmdb.999999999.partial").write_bytes(b"")
    write_records(path, [1])
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "val.lmdb"])
