"""utils/records.py: what is written is read, from any process, and bad files are refused."""

import json
import multiprocessing
import os
import pickle
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import lmdb
import pyarrow as pa
import pytest
from helpers import ROOT, all_refs, put, user_error

from utils import records
from utils.errors import UserError
from utils.records import RecordReader, RecordWriter, RefRecord

SHARED = "café.jpg"


def make_ref(ref_id: int, **changes) -> RefRecord:
    size = {"height": 4, "width": 6, "mask": b"\x89PNG" + bytes([ref_id])}
    text = {"sentences": ("the red one", "número dos"), "sent_ids": (10 * ref_id, 10 * ref_id + 1)}
    fields = {"image_key": SHARED, "image_id": 7, "category": 3} | size | text
    return RefRecord(ref_id, **(fields | changes))


NAMELESS = {"image_key": "b.png", "image_id": None, "category": None}
REFS = [make_ref(1), make_ref(2, **NAMELESS), make_ref(3)]


def write(path: Path, refs: Iterable[RefRecord] = REFS, content: str = "bytes of") -> Path:
    with RecordWriter.open(path, "toys", "val") as writer:
        for ref in refs:
            writer.add_image(ref.image_key, f"{content} {ref.image_key}".encode())
            writer.add_ref(ref)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "val.lmdb")


def entries_of(path: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(path), subdir=False, lock=False, readonly=True) as env:
        return dict(env.begin().cursor())


def test_what_is_written_is_read(path: Path) -> None:
    reader = RecordReader(path)
    assert all_refs(path) == REFS
    assert reader.image(SHARED) == f"bytes of {SHARED}".encode()
    assert reader.image("b.png") == b"bytes of b.png"
    assert reader.index.ref_ids == [1, 2, 3]
    assert reader.index.image_keys == [SHARED, "b.png", SHARED]
    assert reader.index.image_ids == [7, None, 7]
    assert reader.index.num_sentences == [2, 2, 2]


def test_refs_of_none_one_and_several_targets_are_read_as_written(tmp_path: Path) -> None:
    refs = [make_ref(1, num_targets=0), make_ref(2), make_ref(3, num_targets=4)]
    assert all_refs(write(tmp_path / "x.lmdb", refs)) == refs


def test_a_ref_of_one_target_is_stored_in_arrow_as_before_there_were_others(path: Path) -> None:
    """Byte for byte: older files are what is written now, and have one target a ref."""
    entries = entries_of(path)
    assert set(entries) == {
        b"__meta__", b"__index__", b"ref:000000000", b"ref:000000001", b"ref:000000002",
        b"image:" + SHARED.encode(), b"image:b.png",
    }  # fmt: skip
    columns = {
        "ref_id": pa.int64(), "image_key": pa.string(), "image_id": pa.int64(),
        "category": pa.int64(), "height": pa.int32(), "width": pa.int32(), "mask": pa.binary(),
        "sentences": pa.list_(pa.string()), "sent_ids": pa.list_(pa.int64()),
    }  # fmt: skip
    nullable = ("image_id", "category")
    schema = pa.schema([pa.field(n, k, nullable=n in nullable) for n, k in columns.items()])
    for i, ref in enumerate(REFS):
        row = {name: getattr(ref, name) for name in columns}
        table = pa.ipc.open_stream(entries[b"ref:%09d" % i]).read_all()
        assert table.equals(pa.Table.from_pylist([row], schema))
        assert entries[b"ref:%09d" % i] == records._to_arrow([row], schema)
    assert "num_targets" not in json.dumps(RecordReader(path).meta)
    assert RecordReader(path).ref(0).num_targets == 1


def test_meta_counts_the_split(path: Path) -> None:
    version = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())
    assert RecordReader(path).meta == {
        "digest": RecordReader(path).digest(),
        "format_version": 1,
        "dataset": "toys",
        "split": "val",
        "refs": 3,
        "sentences": 6,
        "images": 2,
        "token_length": {5: 3, 6: 3},
        "tool": f"cris {version['project']['version']}",
    }


def test_records_packed_anew_have_another_digest_only_if_they_differ(path, tmp_path) -> None:
    digest = RecordReader(path).digest()
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert RecordReader(write(tmp_path / "same.lmdb")).digest() == digest
    other_mask = [REFS[0], make_ref(2, **NAMELESS, mask=b"\x89PNG\x09"), REFS[2]]
    assert RecordReader(write(tmp_path / "mask.lmdb", other_mask)).digest() != digest
    other_photo = write(tmp_path / "photo.lmdb", content="other bytes of")
    assert RecordReader(other_photo).digest() != digest


def test_records_of_an_older_tool_read_on_and_have_a_digest_too(path) -> None:
    meta = {k: v for k, v in RecordReader(path).meta.items() if k != "digest"}
    put(path, {b"__meta__": json.dumps(meta).encode()})
    assert all_refs(path) == REFS
    digest = RecordReader(path).digest()
    assert digest == RecordReader(path).digest() != ""
    put(path, {b"__meta__": json.dumps(meta | {"sentences": 7}).encode()})
    assert RecordReader(path).digest() != digest


def test_an_image_is_stored_once_and_a_second_one_of_its_name_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "x.lmdb"
    with RecordWriter.open(path, "toys", "val") as writer:
        writer.add_image(SHARED, b"first")
        writer.add_image(SHARED, b"second")
        writer.add_ref(make_ref(1))
    assert RecordReader(path).image(SHARED) == b"first"


def test_the_map_grows_from_almost_nothing(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(records, "_INITIAL_MAP_BYTES", 1 << 14)
    refs = [make_ref(i, mask=os.urandom(9_000)) for i in range(100)]
    assert all_refs(write(tmp_path / "x.lmdb", refs)) == refs


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("old", [[], ["x.lmdb"]])
def test_a_failing_writer_leaves_what_was_there(tmp_path: Path, error, old: list[str]) -> None:
    for name in old:
        write(tmp_path / name)

    def refs() -> Iterator[RefRecord]:
        yield REFS[0]
        raise error

    with pytest.raises(error):
        write(tmp_path / "x.lmdb", refs())
    assert os.listdir(tmp_path) == old
    assert all(RecordReader(tmp_path / name).ref(2) == REFS[2] for name in old)


def test_a_split_without_refs_is_not_written(tmp_path: Path) -> None:
    assert "split val of toys has no refs" in user_error(write, tmp_path / "x.lmdb", [])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (make_ref(1, image_key="other.jpg"), "image other.jpg was not added"),
        (make_ref(1, sent_ids=(1,)), "2 sentences with 1 ids"),
        (make_ref(1, sentences=(), sent_ids=()), "0 sentences with 0 ids"),
    ],
)
def test_an_inconsistent_ref_is_refused(tmp_path: Path, ref, message) -> None:
    path = tmp_path / "x.lmdb"
    with RecordWriter.open(path, "toys", "val") as writer:
        writer.add_image(SHARED, b"x")
        with pytest.raises(ValueError, match=message):
            writer.add_ref(ref)
        writer.add_ref(make_ref(2))
    assert RecordReader(path).index.ref_ids == [2]


def test_two_readers_of_one_file_live_side_by_side(path: Path, tmp_path: Path) -> None:
    (link := tmp_path / "train.lmdb").symlink_to(path)
    train, val = RecordReader(link), RecordReader(path)
    assert train.ref(0) == val.ref(0) == REFS[0]
    del train
    assert val.ref(1) == REFS[1]


def test_a_file_packed_anew_is_read_by_the_next_reader(path: Path) -> None:
    old = RecordReader(path)
    assert len(old) == 3
    write(path, REFS[:1])
    assert len(RecordReader(path)) == 1
    assert old.ref(2) == REFS[2]


def test_making_and_pickling_a_reader_opens_nothing_and_only_the_path_travels(
    path: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        len(pickle.loads(pickle.dumps(RecordReader(tmp_path / "missing.lmdb"))))
    reader = RecordReader(path)
    assert reader.index.ref_ids == [1, 2, 3]
    data = pickle.dumps(reader)
    assert len(data) < 500
    assert pickle.loads(data).ref(1) == REFS[1]


def read_in_child(reader: RecordReader, queue: multiprocessing.Queue) -> None:
    queue.put(([reader.ref(i) for i in range(len(reader))], reader.image(SHARED)))


@pytest.mark.parametrize("opened_before", [False, True])
def test_forked_children_read_what_the_parent_reads(path: Path, opened_before: bool) -> None:
    context = multiprocessing.get_context("fork")
    reader, other = RecordReader(path), RecordReader(path)
    if opened_before:
        assert reader.ref(0) == other.ref(0)
    queue = context.Queue()
    children = [context.Process(target=read_in_child, args=(r, queue)) for r in (reader, other)]
    for child in children:
        child.start()
    for _ in children:
        assert queue.get(timeout=60) == (REFS, f"bytes of {SHARED}".encode())
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert reader.ref(2) == other.ref(2) == REFS[2]


META = b'{"format_version": %d, "refs": %s, "token_length": %s}'
EMPTY_INDEX = records._to_arrow([], records._INDEX_SCHEMA)


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        (b"__meta__", b"", "an unreadable __meta__"),
        (b"__meta__", b"\xff garbage", "an unreadable __meta__"),
        (b"__meta__", b"[" * 100_000, "an unreadable __meta__"),
        (b"__meta__", b"[1]", "an unreadable __meta__"),
        (b"__meta__", b'{"refs": 3}', r"an unreadable __meta__ \(KeyError\('format_version'"),
        (b"__meta__", b'{"format_version": 1}', r"an unreadable __meta__ \(KeyError\('refs'"),
        (b"__meta__", META % (1, b"3", b'{"a": 1}'), "an unreadable __meta__"),
        (b"__meta__", META % (9, b"1", b"{}"), ".*record format 9, this code reads 1"),
        (b"__meta__", META % (1, b"0", b"{}"), ".*it holds no refs"),
        (b"__index__", None, "no __index__"),
        (b"__index__", b"garbage", "an unreadable __index__"),
        (b"__index__", EMPTY_INDEX, "an __index__ of 0 rows for 3 refs"),
        (b"ref:000000000", None, "no ref:000000000"),
        (b"ref:000000000", EMPTY_INDEX, "an unreadable ref:0.*columns"),
        (b"image:" + SHARED.encode(), None, f"no image:{SHARED}"),
    ],
)
def test_what_is_missing_or_damaged_is_named_with_the_command(
    path: Path, key: bytes, content: bytes | None, message: str
) -> None:
    put(path, {key: content})

    reader = RecordReader(path)
    with pytest.raises(UserError, match=rf"val\.lmdb has {message}.*: re-pack with") as caught:
        _ = len(reader), reader.index, reader.ref(0), reader.image(SHARED)
    assert "\n" not in str(caught.value)


def test_damaged_pages_are_named_with_the_command(path: Path) -> None:
    psize = 4096
    data = bytearray(path.read_bytes())
    for page in range(2, len(data) // psize):  # but those that say where the tree begins
        data[page * psize + 8 : page * psize + 16] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"val\.lmdb is damaged at __meta__ .*: re-pack with"):
        len(RecordReader(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, r"x\.lmdb does not exist as a file: make it with"),
        (lambda p: p.mkdir(), r"x\.lmdb does not exist as a file: make it with"),
        (lambda p: p.write_bytes(b""), r"no LMDB can be read from .*x\.lmdb.*: re-pack with"),
        (lambda p: p.write_text("<html>" * 4000), "no LMDB can be read from .*: re-pack with"),
        (lambda p: put(p, {b"__keys__": b"\x80", b"__len__": b"\x80"}), "the release's pickled"),
        (lambda p: put(p, {b"a": b"b"}), "has no __meta__: re-pack with"),
        (lambda p: os.truncate(write(p), 9_000), r"is cut off \(9000 bytes of [1-9]\d+\): re-pack"),
    ],
    ids=["missing", "folder", "empty", "html", "release", "other", "cut"],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_command(tmp_path, make, message) -> None:
    make(tmp_path / "x.lmdb")
    for use in (len, lambda r: r.meta, lambda r: r.index):
        line = user_error(use, RecordReader(tmp_path / "x.lmdb"))
        assert re.search(f"{message}.* python tools/folder2lmdb.py", line)
