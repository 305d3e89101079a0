"""DATA.cache: the samples are the same to the bit, and whatever does not fit is made again."""

import multiprocessing
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import (
    ALONE,
    error_of,
    loader_config,
    run_program,
    spawn,
    with_bad_image,
    write_config,
    write_records,
)
from torch.utils.data import DataLoader

from engine.loaders import build_train_loader, make_caches
from utils import cache as module
from utils.cache import SquareCache
from utils.dataset import TrainingDataset, collate_refs
from utils.distributed import Ranks
from utils.errors import UserError
from utils.records import RecordReader

SIDE = 32


def open_one(path: Path, folder: Path, said: list[str] | None = None) -> SquareCache:
    """The cache of a file; what is said about it is appended to `said`."""
    say = [].append if said is None else said.append
    return next(iter(make_caches(folder, [RecordReader(path)], SIDE, say).values()))


def contents(folder: Path) -> dict[str, int]:
    """Name and date of each file in the folder but locks."""
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix != ".lock"}


def equals_fresh(cache: SquareCache, path: Path) -> bool:
    """Whether the cache gives every ref's photo and mask as they are made anew."""
    dataset = TrainingDataset(RecordReader(path), SIDE, 9, 0)
    samples = [dataset[position, 0] for position in range(len(dataset))]
    return all(
        np.array_equal(cache.image(i), sample["image"])
        and np.array_equal(cache.mask(i), sample["mask"])
        for i, sample in enumerate(samples)
    )


@pytest.fixture
def lmdb(tmp_path) -> Path:
    return write_records(tmp_path / "shapes/train.lmdb", [2, 3, 1, 2])


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


# --------------------------------------------------------------------------------- the same samples


@pytest.mark.parametrize("batch_by", ["refs", "images"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_files", [1, 2])
def test_batches_are_the_same_to_the_bit_with_and_without_cache(
    tmp_path, shapes_lmdb, lmdb, folder, batch_by, workers, num_files
):
    files = [str(shapes_lmdb), str(lmdb)][:num_files]
    opts = {"batch_by": batch_by, "workers": workers}
    plain = build_train_loader(loader_config(shapes_lmdb, files=files, **opts), 4, ALONE)
    cached = build_train_loader(
        loader_config(shapes_lmdb, files=files, cache=folder, **opts), 4, ALONE
    )
    assert len(contents(folder)) == num_files
    for epoch in range(2):
        batches = []
        for loader in (plain, cached):
            loader.batch_sampler.set_epoch(epoch)
            batches.append(list(loader))
        assert len(batches[0]) == len(plain) > 6
        for expected, found in zip(*batches, strict=True):
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert value is found[key] is None or torch.equal(value, found[key])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("read_before", [False, True])
def test_workers_read_the_cache_however_they_are_started(lmdb, folder, method, read_before):
    reader = RecordReader(lmdb)
    caches = make_caches(folder, [reader], SIDE, print)
    dataset = TrainingDataset(reader, SIDE, 9, 0, caches)
    visits = [(position, 0) for position in range(len(dataset))]
    if read_before:
        dataset[0, 0]
    loader = DataLoader(
        dataset,
        4,
        sampler=visits,
        num_workers=1,
        collate_fn=collate_refs,
        multiprocessing_context=method,
    )
    fresh = TrainingDataset(reader, SIDE, 9, 0)
    for batch in loader:
        for row, position in enumerate(batch["positions"].tolist()):
            assert torch.equal(batch["images"][row], fresh[position, 0]["image"])
            assert torch.equal(batch["masks"][row], fresh[position, 0]["mask"])


def test_real_photos_come_out_of_the_cache_as_they_are_made(mini_root, tmp_path, folder):
    from helpers import pack

    pack(mini_root, tmp_path, "refcoco", "unc", "refcoco")
    for split in ("train", "val"):
        path = tmp_path / f"lmdb/refcoco/{split}.lmdb"
        assert equals_fresh(open_one(path, folder), path)


def test_neither_jpegs_nor_masks_are_decoded_with_a_cache(lmdb, folder, monkeypatch):
    reader = RecordReader(lmdb)
    caches = make_caches(folder, [reader], SIDE, print)
    monkeypatch.setattr("utils.dataset.decode_image", None)
    monkeypatch.setattr("utils.dataset.decode_mask", None)
    assert TrainingDataset(reader, SIDE, 9, 0, caches)[5, 0]["image"].shape == (SIDE, SIDE, 3)


def test_only_names_travel_to_another_process(lmdb, folder):
    cache = open_one(lmdb, folder)
    cache.image(0)
    data = pickle.dumps(cache)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).mask(3), cache.mask(3))


def test_what_is_read_is_a_copy(lmdb, folder):
    cache = open_one(lmdb, folder)
    image = cache.image(0)
    image[:] = 0
    assert cache.image(0).any()


# ------------------------------------------------------------------------------ made once, and anew


def test_it_is_made_once_and_its_size_is_said_before(lmdb, folder):
    said: list[str] = []
    cache = open_one(lmdb, folder, said)
    assert re.fullmatch(
        rf"DATA\.cache: making {re.escape(str(cache.path))} \(there is none yet\), 0\.00 GB "
        "for 4 images and 8 masks",
        said[0],
    )
    before = contents(folder)
    assert list(before) == [cache.path.name]
    assert cache.path.stat().st_size == 2 * 4096 + 4 * SIDE * SIDE * 3 + 8 * SIDE * SIDE
    said.clear()
    assert equals_fresh(open_one(lmdb, folder, said), lmdb)
    assert said == []
    assert contents(folder) == before


def test_other_sizes_and_files_of_the_same_name_have_their_own(lmdb, tmp_path, folder):
    other = write_records(tmp_path / "elsewhere/shapes/train.lmdb", [1, 1])
    paths = [
        *(open_one(path, folder).path for path in (lmdb, other)),
        *(c.path for c in make_caches(folder, [RecordReader(lmdb)], 64, print).values()),
    ]
    assert sorted(contents(folder)) == sorted(path.name for path in paths)
    assert len(set(paths)) == 3


def repacked(lmdb: Path, path: Path) -> None:
    write_records(lmdb, [2, 3, 1, 1, 1])


def touched(lmdb: Path, path: Path) -> None:
    os.utime(lmdb, ns=(1, 1))


def cut_off(lmdb: Path, path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def write_at(offset: int, data: bytes) -> Callable[[Path, Path], None]:
    def write(lmdb: Path, path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(data)

    return write


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (repacked, "of another .*LMDB's date, LMDB's index"),
        (touched, "of another LMDB's date"),
        (cut_off, r"has 28671 bytes of 28672"),
        (lambda lmdb, path: os.truncate(path, 100), "unfinished or damaged"),
        (lambda lmdb, path: path.write_bytes(b""), "unfinished or damaged"),
        (lambda lmdb, path: path.write_bytes(b"[1]".ljust(4096)), "damaged"),
        (write_at(0, bytes(4096)), "unfinished or damaged"),
        (write_at(2 * 4096, b"\0\1\2\3\4"), "other pixels for ref 100"),
        (write_at(-1, b"\7"), "other pixels for ref 107"),
    ],
    ids=[
        *("LMDB packed anew", "LMDB touched", "cut off", "cut to its head", "empty", "foreign"),
        *("no header", "an image's pixels", "a mask's pixels"),
    ],
)
def test_a_cache_that_does_not_fit_is_made_again_and_the_reason_said(lmdb, folder, damage, reason):
    path = open_one(lmdb, folder).path
    damage(lmdb, path)
    said: list[str] = []
    cache = open_one(lmdb, folder, said)
    assert len(said) == 1
    assert re.search(reason, said[0])
    assert cache.path == path
    assert equals_fresh(cache, lmdb)
    assert list(contents(folder)) == [path.name]


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("CACHE_VERSION", 99, "another cache version"),
        ("cv2.__version__", "4.0", "another OpenCV"),
    ],
)
def test_another_version_makes_it_again(lmdb, folder, monkeypatch, name, value, reason):
    open_one(lmdb, folder)
    monkeypatch.setattr(f"utils.cache.{name}", value)
    said: list[str] = []
    open_one(lmdb, folder, said)
    assert reason in said[0]


def test_a_cache_that_was_replaced_under_a_reader_is_noticed(lmdb, folder):
    cache = pickle.loads(pickle.dumps(open_one(lmdb, folder)))
    repacked(lmdb, cache.path)
    open_one(lmdb, folder)
    with pytest.raises(UserError, match=r"was replaced while it was in use .*LMDB's date"):
        cache.image(0)


# --------------------------------------------------------------------------------- several at once


def open_and_report(lmdb: Path, folder: Path, queue: multiprocessing.Queue) -> None:
    said: list[str] = []
    cache = open_one(lmdb, folder, said)
    queue.put((said, equals_fresh(cache, lmdb)))


def test_of_several_processes_one_makes_it_and_the_others_wait(lmdb, folder, monkeypatch):
    make = module._make
    monkeypatch.setattr(module, "_make", lambda *args: (time.sleep(0.5), make(*args)))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [
        context.Process(target=open_and_report, args=(lmdb, folder, queue)) for _ in range(4)
    ]
    for child in children:
        child.start()
    reports = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join()
    assert all(is_equal for _, is_equal in reports)
    lines = [line for said, _ in reports for line in said]
    assert sum("making" in line for line in lines) == 1
    assert sum("waiting for another process" in line for line in lines) == 3


def build_on(ranks: Ranks, lmdb: Path, folder: Path) -> None:
    """A rank reads its share with and without cache."""
    loaders = [
        build_train_loader(loader_config(lmdb, cache=cache), 2, ranks) for cache in ("null", folder)
    ]
    for plain, cached in zip(*loaders, strict=True):
        assert torch.equal(plain["images"], cached["images"])
        assert torch.equal(plain["masks"], cached["masks"])


def test_ranks_that_start_together_share_one(lmdb, folder):
    spawn(2, build_on, lmdb, folder)
    assert len(contents(folder)) == 1


def test_one_that_was_killed_while_making_it_is_no_obstacle(lmdb, folder, monkeypatch):
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        child = multiprocessing.get_context("fork").Process(target=open_one, args=(lmdb, folder))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [name for name in contents(folder) if name.endswith(".partial")]
    said: list[str] = []
    cache = open_one(lmdb, folder, said)
    assert len(said) == 1
    assert equals_fresh(cache, lmdb)
    assert list(contents(folder)) == [cache.path.name]


# --------------------------------------------------------------------------------------- bad places


def test_a_file_where_the_folder_should_be_is_named(lmdb, folder):
    folder.write_text("mine")
    with pytest.raises(UserError, match=r"DATA\.cache .*cache is a file: give a folder"):
        open_one(lmdb, folder)
    assert folder.read_text() == "mine"


def test_a_disk_without_room_leaves_nothing(lmdb, folder, monkeypatch):
    monkeypatch.setattr("os.posix_fallocate", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        open_one(lmdb, folder)
    assert contents(folder) == {}


def test_a_photo_that_cannot_be_decoded_is_named_and_nothing_is_left(lmdb, tmp_path, folder):
    bad = with_bad_image(lmdb, tmp_path / "bad.lmdb", b"no photo")
    with pytest.raises(UserError, match=r"bad\.lmdb, image image_3\.jpg cannot be decoded"):
        open_one(bad, folder)
    assert contents(folder) == {}


# ------------------------------------------------------------------------------------- as a program


def test_training_with_a_cache_gives_the_same_model(data, tmp_path):
    weights = []
    for name, cache in (("plain", "null"), ("cached", tmp_path / "cache")):
        run = write_config(tmp_path / name, data, epochs=2)
        run_program("train.py", run, "DATA.cache", cache)
        state = torch.load(tmp_path / name / "exp/tiny/last_model.pth", weights_only=True)
        weights.append(state["state_dict"])
    assert all(map(torch.equal, weights[0].values(), weights[1].values()))
    assert len(contents(tmp_path / "cache")) == 1


def test_a_folder_that_may_not_be_written_ends_with_one_line(data, tmp_path):
    (tmp_path / "file").write_text("")
    line = error_of("train.py", write_config(tmp_path, data), "DATA.cache", tmp_path / "file")
    assert "is a file: give a folder" in line
