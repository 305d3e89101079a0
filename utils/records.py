"""Write and read records: refs and images in an LMDB file.

The file holds these entries. None is pickled, and all can be read without this module:

    __meta__         JSON: format_version, dataset, split, refs, sentences, images,
                     token_length {length: sentences}, tool, digest (SHA-256 of all other
                     entries, each as key and value, in the order they were written), and
                     left_out and no_target, numbers of refs, if there are any
    __index__        Arrow table, a row a ref: ref_id, image_key, image_id, num_sentences
    ref:<position>   Arrow table of one row, the fields of `RefRecord`; num_targets only where it
                     is not 1, so that older files read on and one-target files stay as they were
    image:<key>      the image file's original bytes, once however many refs share it
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

import lmdb
import numpy as np
import pyarrow as pa

from utils.errors import UserError
from utils.files import atomic_path
from utils.tokenizer import token_lengths

FORMAT_VERSION = 1
TOOL = "cris 0.1.0"

META_KEY = b"__meta__"
_INDEX_KEY = b"__index__"
RELEASE_KEY = b"__keys__"  # in every LMDB of the release
LARGEST = 2**63 - 1  # number that a record can hold
LONGEST_KEY = 500  # bytes of an image's name; LMDB's keys end at 511
HOW_TO_PACK = "python tools/folder2lmdb.py (see tools/prepare_datasets.md)"
REPACK = f"re-pack with {HOW_TO_PACK}"

T = TypeVar("T")

_INITIAL_MAP_BYTES = 64 << 20

_REF_SCHEMA = pa.schema(
    [
        pa.field("ref_id", pa.int64(), nullable=False),
        pa.field("image_key", pa.string(), nullable=False),
        ("image_id", pa.int64()),
        ("category", pa.int64()),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("mask", pa.binary(), nullable=False),
        pa.field("sentences", pa.list_(pa.string()), nullable=False),
        pa.field("sent_ids", pa.list_(pa.int64()), nullable=False),
    ]
)
_ANY_NUMBER_SCHEMA = _REF_SCHEMA.append(pa.field("num_targets", pa.int32(), nullable=False))
_INDEX_SCHEMA = pa.schema(
    [
        *(_REF_SCHEMA.field(name) for name in ("ref_id", "image_key", "image_id")),
        pa.field("num_sentences", pa.int32(), nullable=False),
    ]
)


@dataclass(frozen=True)
class RefRecord:
    """Holds one annotated object of one image, with the sentences that denote it.

    `mask` is a grey PNG of (height, width), the image's own size; non-zero is the object.
    `category` counts from 0. `image_id` and `category` are None where the source has none.
    `num_targets` is how many objects the mask joins; 0: the sentences are true of nothing in the
    image, and the mask is empty.
    """

    ref_id: int
    image_key: str
    image_id: int | None
    category: int | None
    height: int
    width: int
    mask: bytes
    sentences: tuple[str, ...]
    sent_ids: tuple[int, ...]
    num_targets: int = 1


class RefIndex(NamedTuple):
    """Columns that are read without any mask, for samplers and evaluators; one entry a ref."""

    ref_ids: list[int]
    image_keys: list[str]
    image_ids: list[int | None]
    num_sentences: list[int]


class RecordWriter:
    """Writes one split to one LMDB file.

        with RecordWriter.open(path, "refcoco", "val") as writer:
            writer.add_image(record.image_key, jpeg_bytes)
            writer.add_ref(record)

    `left_out`, the number of refs not packed, is for the meta entry.
    """

    def __init__(self, env: lmdb.Environment) -> None:
        self.left_out = 0
        self._env = env
        self._image_keys: set[str] = set()
        self._index: list[dict] = []  # its rows
        self._no_target = 0
        self._token_length: Counter[int] = Counter()
        self._digest = hashlib.sha256()

    @classmethod
    @contextmanager
    def open(cls, path: str | Path, dataset: str, split: str) -> Iterator[Self]:
        """Open a file that appears at `path` when the block ends; its folder is created.

        If the block raises, nothing is left and whatever stood at `path` before is untouched.

        Args:
            dataset, split: names for the meta entry.

        Raises:
            UserError: no ref was added.
        """
        # One process writes a file that nobody else knows of: no lock file is needed, and one sync
        # at the end is enough.
        how = {"subdir": False, "map_size": _INITIAL_MAP_BYTES, "lock": False, "sync": False}
        with atomic_path(path) as partial:  # names the file in errors of the system
            try:
                with lmdb.open(str(partial), **how) as env:
                    writer = cls(env)
                    yield writer
                    if not writer._index:
                        what = f"split {split} of {dataset} has no refs"
                        raise UserError(f"{what}: {path} not written")
                    writer._finish(dataset, split)
            except lmdb.Error as error:  # a full disk is an input/output error to LMDB
                if shutil.disk_usage(partial.parent).free == 0:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from None
                raise OSError(errno.EIO, str(error)) from None

    def add_image(self, key: str, data: bytes) -> None:
        """Store an image file's bytes under `key`; a key that is there already is left alone."""
        if key not in self._image_keys:
            self._image_keys.add(key)
            self._put(f"image:{key}".encode(), data)

    def add_ref(self, record: RefRecord) -> None:
        """Append a ref whose image has been added.

        Raises:
            ValueError: its image is missing, or it has no sentence, or not an id for each.
        """
        if record.image_key not in self._image_keys:
            raise ValueError(f"ref {record.ref_id}: image {record.image_key} was not added")
        count = len(record.sentences)
        if count == 0 or count != len(record.sent_ids):
            counted = f"{count} sentences with {len(record.sent_ids)} ids"
            raise ValueError(f"ref {record.ref_id} has {counted}")
        schema = _REF_SCHEMA if record.num_targets == 1 else _ANY_NUMBER_SCHEMA
        self._put(b"ref:%09d" % len(self._index), _to_arrow([vars(record)], schema))
        row = {name: getattr(record, name) for name in ("ref_id", "image_key", "image_id")}
        self._index.append(row | {"num_sentences": count})
        self._token_length.update(token_lengths(record.sentences))
        self._no_target += record.num_targets == 0

    def _put(self, key: bytes, value: bytes) -> None:
        """Write an entry, in a map that grows with the file: some systems give no terabyte."""
        while True:
            try:
                with self._env.begin(write=True) as txn:
                    txn.put(key, value)
            except lmdb.MapFullError:
                self._env.set_mapsize(2 * self._env.info()["map_size"])
            else:
                self._digest.update(key)
                self._digest.update(value)
                return

    def _finish(self, dataset: str, split: str) -> None:
        self._put(_INDEX_KEY, _to_arrow(self._index, _INDEX_SCHEMA))
        meta = {
            "format_version": FORMAT_VERSION,
            "dataset": dataset,
            "split": split,
            "refs": len(self._index),
            "sentences": self._token_length.total(),
            "images": len(self._image_keys),
            "token_length": dict(sorted(self._token_length.items())),
            "tool": TOOL,
            "digest": self._digest.hexdigest(),
        }
        rare = {"left_out": self.left_out, "no_target": self._no_target}
        meta |= {name: count for name, count in rare.items() if count}
        self._put(META_KEY, json.dumps(meta).encode())
        self._env.sync(True)


class RecordReader:
    """Reads a file of `RecordWriter`; opens it at the first use, in whichever process that is.

    It costs nothing to make and to pickle (only the path travels) and may be carried through a
    fork. Any number of readers, of the same file or not, may live in a process.

    Raises:
        UserError: the file, or what is asked for, is missing, damaged or in another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._env: lmdb.Environment | None = None
        self._pid = -1

    def __getstate__(self) -> dict:
        return {"path": self.path, "_env": None, "_pid": -1}

    def __len__(self) -> int:
        return self.meta["refs"]

    @cached_property
    def meta(self) -> dict:
        """Return the `__meta__` entry; the keys of `token_length` are integers."""
        if self._get(META_KEY) is None and self._get(RELEASE_KEY) is not None:
            raise UserError(
                f"{self.path} is in the release's pickled format, which is not read: {REPACK} (or, "
                "where only this file is left, python tools/folder2lmdb.py --from-lmdb "
                f"{self.path} -o FOLDER)"
            )
        return self._read(META_KEY, _parse_meta)

    @cached_property
    def index(self) -> RefIndex:
        """Return the `__index__` entry."""
        refs = len(self)  # refuses a file that is not ours
        index = self._read(_INDEX_KEY, _parse_index)
        if len(index.ref_ids) != refs:
            fault = f"an __index__ of {len(index.ref_ids)} rows for {refs} refs"
            raise UserError(f"{self.path} has {fault}: {REPACK}")
        return index

    def digest(self) -> str:
        """Return what tells these records from others, such as the same refs packed anew."""
        if "digest" in self.meta:
            return self.meta["digest"]
        entries = [self._read(key, bytes) for key in (META_KEY, _INDEX_KEY)]  # of an older file
        return hashlib.sha256(b"".join(entries)).hexdigest()

    def ref(self, i: int) -> RefRecord:
        """Read the ref at position `i`, 0 <= i < len."""
        return self._read(b"ref:%09d" % i, _parse_ref)

    def image(self, key: str) -> bytes:
        """Read the original bytes of an image file."""
        return self._read(f"image:{key}".encode(), bytes)

    def _read(self, key: bytes, parse: Callable[[bytes], T]) -> T:
        """Return what `parse` makes of the bytes under a key; UserError if it can make nothing."""
        name, data = key.decode(), self._get(key)
        if data is None:
            raise UserError(f"{self.path} has no {name}: {REPACK}")
        try:
            return parse(data)
        except Exception as error:  # damaged bytes can fail with almost anything
            fault = f"{self.path} has an unreadable {name} ({error!r:.120})"
            raise UserError(f"{fault}: {REPACK}") from None

    def _get(self, key: bytes) -> bytes | None:
        """Copy one value out of the file; a view would not outlive the transaction."""
        if self._pid != os.getpid():
            self._env, self._pid = open_lmdb(self.path), os.getpid()
        try:
            with self._env.begin() as txn:
                return txn.get(key)
        except lmdb.Error as error:
            fault = f"{self.path} is damaged at {key.decode()} ({error!r:.120})"
            raise UserError(f"{fault}: {REPACK}") from None


class JoinedReader:
    """Joins some refs of one file or several into one sequence of positions, file by file.

    `places` holds, for each position, the file and the ref's position there.

    Args:
        parts: files, and for each the positions of the refs that count.
    """

    def __init__(self, parts: Sequence[tuple[RecordReader, Sequence[int]]]) -> None:
        self.parts = parts
        self.places = [(reader, int(place)) for reader, places in parts for place in places]

    def __len__(self) -> int:
        return len(self.places)

    def image_names(self) -> list[tuple[Path, str]]:
        """Return the file and key of each ref's image; images of two files are two images."""
        return [(reader.path, reader.index.image_keys[place]) for reader, place in self.places]

    def ref(self, i: int) -> RefRecord:
        """Read the ref at position `i`."""
        reader, place = self.places[i]
        return reader.ref(place)


def group_positions(images: Iterable[Hashable]) -> list[list[int]]:
    """Return the positions of each image's refs, images in the order of their first ref."""
    groups: dict[Hashable, list[int]] = {}
    for position, image in enumerate(images):
        groups.setdefault(image, []).append(position)
    return list(groups.values())


def on_images_of(others: Sequence[RecordReader], reader: RecordReader) -> np.ndarray:
    """Return (refs,) bool: whether the image of each of the reader's refs is in another file.

    Images are told apart by their ids, as COCO numbers them; by their keys where either side has
    no id.
    """
    images = [
        image
        for other in others
        for image in zip(other.index.image_keys, other.index.image_ids, strict=True)
    ]
    keys = {key for key, _ in images}
    ids = {number for _, number in images if number is not None}
    keys_without_id = {key for key, number in images if number is None}
    own = zip(reader.index.image_keys, reader.index.image_ids, strict=True)
    return np.array(
        [key in keys if i is None else i in ids or key in keys_without_id for key, i in own]
    )


# py-lmdb refuses to open one file twice in a process, so readers share. Keyed by process id and
# by the file itself (device, inode): a file re-packed at the same path is another file. An
# environment closes when its last reader goes.
_environments: weakref.WeakValueDictionary = weakref.WeakValueDictionary()
_environments_lock = threading.Lock()


def open_lmdb(path: Path) -> lmdb.Environment:
    """Return this process's environment for an LMDB file, opened for reading if need be.

    Raises:
        UserError: the file is missing, no LMDB, or cut off.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist as a file: make it with {HOW_TO_PACK}")
    pid, stat = os.getpid(), path.stat()
    key = pid, stat.st_dev, stat.st_ino
    with _environments_lock:
        # A forked child closes its copies of its parent's environments, because py-lmdb would not
        # open their files again. Without locks they are its own, and the parent does not notice.
        for inherited in [other for other in _environments if other[0] != pid]:
            _environments.pop(inherited).close()
        if (env := _environments.get(key)) is not None:
            return env
        how = {"subdir": False, "readonly": True, "lock": False, "readahead": False}
        try:
            env = lmdb.open(str(path), meminit=False, **how)
        except lmdb.Error as error:
            raise UserError(f"no LMDB can be read from {error}: {REPACK}") from None
        # Pages beyond the end of a partly copied file would kill the process when they are touched.
        expected = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if stat.st_size < expected:
            env.close()
            raise UserError(f"{path} is cut off ({stat.st_size} bytes of {expected}): {REPACK}")
        _environments[key] = env
    return env


def _to_arrow(rows: list[dict], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
    return sink.getvalue().to_pybytes()


def _from_arrow(data: bytes, *schemas: pa.Schema) -> pa.RecordBatch:
    stream = pa.ipc.open_stream(data)
    if stream.schema not in schemas:
        raise ValueError(f"columns {stream.schema.names}")
    return stream.read_next_batch()


def _parse_index(data: bytes) -> RefIndex:
    return RefIndex(*_from_arrow(data, _INDEX_SCHEMA).to_pydict().values())


def _parse_ref(data: bytes) -> RefRecord:
    (row,) = _from_arrow(data, _REF_SCHEMA, _ANY_NUMBER_SCHEMA).to_pylist()
    row["sentences"] = tuple(row["sentences"])
    row["sent_ids"] = tuple(row["sent_ids"])
    return RefRecord(**row)


def _parse_meta(data: bytes) -> dict:
    meta = json.loads(data)
    if (version := meta["format_version"]) != FORMAT_VERSION:
        raise ValueError(f"record format {version!r}, this code reads {FORMAT_VERSION}")
    if meta["refs"] < 1:
        raise ValueError("it holds no refs")
    return meta | {"token_length": {int(k): int(n) for k, n in meta["token_length"].items()}}
