"""DATA.cache: the samples are the same to the bit, and whatever does not fit is made again."""

import multiprocessing
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALONE,
    CPU,
    all_refs,
    assert_same,
    largest_file,
    loader_config,
    pack,
    training_dataset,
    user_error,
    with_bad_image,
    write_records,
)
from torch.utils.data import DataLoader

from engine.loaders import build_train_loader
from utils import cache as module
from utils.cache import SquareCache
from utils.dataset import collate_refs
from utils.distributed import Ranks
from utils.records import RecordReader
from utils.transforms import load_image, load_square_mask


def open_cache(path: Path, folder: Path, side: int = 32) -> SquareCache:
    return module.open_cache(folder, RecordReader(path), side)


def contents(folder: Path) -> dict[str, int]:
    """Name and date of each file in the folder but locks."""
    return {p.name: p.stat().st_mtime_ns for p in folder.iterdir() if p.suffix != ".lock"}


def equals_fresh(cache: SquareCache, path: Path) -> bool:
    """Whether the cache gives every ref's photo and mask as they are made anew."""
    reader = RecordReader(path)
    return all(
        np.array_equal(cache.image(i), load_image(reader, ref, 32))
        and np.array_equal(cache.mask(i), load_square_mask(ref, 32))
        for i, ref in enumerate(all_refs(path))
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
    options = {"files": [str(shapes_lmdb), str(lmdb)][:num_files], "batch_by": batch_by}
    plain, cached = (
        build_train_loader(
            loader_config(shapes_lmdb, cache=c, workers=workers, **options), 4, ALONE
        )
        for c in ("null", folder)
    )
    assert len(contents(folder)) == num_files
    for epoch in range(2):
        for loader in (plain, cached):
            loader.batch_sampler.set_epoch(epoch)
        batches = list(plain)
        assert len(batches) == len(plain) > 6
        assert_same(list(cached), batches)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("read_before", [False, True])
def test_workers_read_the_cache_however_they_are_started(lmdb, folder, method, read_before):
    dataset = training_dataset(lmdb, cache=open_cache(lmdb, folder))
    visits = [(position, 0) for position in range(len(dataset))]
    if read_before:
        dataset[0, 0]
    options = {"collate_fn": collate_refs, "multiprocessing_context": method}
    loader = DataLoader(dataset, 4, sampler=visits, num_workers=1, **options)
    fresh = training_dataset(lmdb)
    assert_same(list(loader), list(DataLoader(fresh, 4, sampler=visits, collate_fn=collate_refs)))


def test_real_photos_come_out_of_the_cache_as_they_are_made(mini_root, tmp_path, folder):
    pack(mini_root, tmp_path, "refcoco", "unc", "refcoco")
    for split in ("train", "val"):
        path = tmp_path / f"lmdb/refcoco/{split}.lmdb"
        assert equals_fresh(open_cache(path, folder), path)


def test_neither_jpegs_nor_masks_are_decoded_with_a_cache(lmdb, folder, monkeypatch):
    dataset = training_dataset(lmdb, cache=open_cache(lmdb, folder))
    monkeypatch.setattr("utils.transforms.decode_image", None)
    monkeypatch.setattr("utils.transforms.decode_mask", None)
    assert dataset[5, 0]["image"].shape == (32, 32, 3)


def test_only_names_travel_to_another_process_and_copies_are_given(lmdb, folder):
    cache = open_cache(lmdb, folder)
    cache.image(0)[:] = 0
    assert cache.image(0).any()
    data = pickle.dumps(cache)
    assert len(data) < 1000
    assert np.array_equal(pickle.loads(data).mask(3), cache.mask(3))


# ------------------------------------------------------------------------------ made once, and anew


def test_it_is_made_once_and_its_size_is_said_before(lmdb, folder, log_lines):
    cache = open_cache(lmdb, folder)
    assert log_lines == [f"DATA.cache: making {cache.path}, 0.00 GB"]
    before = contents(folder)
    assert list(before) == [cache.path.name]
    assert cache.path.stat().st_size == 4096 + 4 * 32 * 32 * 3 + 8 * 32 * 32
    assert equals_fresh(open_cache(lmdb, folder), lmdb)
    assert len(log_lines) == 1
    assert contents(folder) == before


def test_other_sizes_and_files_of_the_same_name_have_their_own(lmdb, tmp_path, folder):
    other = write_records(tmp_path / "elsewhere/shapes/train.lmdb", [1, 1])
    paths = {open_cache(path, folder, side).path for path in (lmdb, other) for side in (32, 64)}
    assert sorted(contents(folder)) == sorted(path.name for path in paths)
    assert len(paths) == 4


def repacked(lmdb: Path, path: Path) -> None:
    write_records(lmdb, [2, 3, 1, 1, 1])


def write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGES = {
    "LMDB packed anew": repacked,
    "LMDB touched": lambda lmdb, path: os.utime(lmdb, ns=(1, 1)),
    "cut off": lambda lmdb, path: os.truncate(path, 24_575),
    "cut to its head": lambda lmdb, path: os.truncate(path, 100),
    "empty": lambda lmdb, path: path.write_bytes(b""),
    "foreign": lambda lmdb, path: path.write_bytes(b"[1]".ljust(24_576)),
    "an image's pixels": lambda lmdb, path: write_at(path, 4096, b"\0\1\2\3\4"),
    "a mask's pixels": lambda lmdb, path: write_at(path, 24_575, b"\7"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_cache_that_does_not_fit_is_made_again(lmdb, folder, log_lines, damage):
    path = open_cache(lmdb, folder).path
    damage(lmdb, path)
    cache = open_cache(lmdb, folder)
    assert len(log_lines) == 2
    assert "making anew" in log_lines[1]
    assert cache.path == path
    assert equals_fresh(cache, lmdb)
    assert list(contents(folder)) == [path.name]


@pytest.mark.parametrize(("name", "value"), [("CACHE_VERSION", 99), ("cv2.__version__", "4.0")])
def test_another_version_makes_it_again(lmdb, folder, monkeypatch, log_lines, name, value):
    open_cache(lmdb, folder)
    monkeypatch.setattr(f"utils.cache.{name}", value)
    open_cache(lmdb, folder)
    assert len(log_lines) == 2


def test_a_cache_that_was_replaced_under_a_reader_is_noticed(lmdb, folder):
    cache = pickle.loads(pickle.dumps(open_cache(lmdb, folder)))
    repacked(lmdb, cache.path)
    open_cache(lmdb, folder)
    assert "was replaced while it was in use" in user_error(cache.image, 0)


# --------------------------------------------------------------------------------- several at once


def test_of_several_ranks_one_makes_it_and_the_others_wait(lmdb, folder, monkeypatch, log_lines):
    make, context = SquareCache.make, multiprocessing.get_context("fork")
    queue, start = context.Queue(), context.Barrier(4)

    def read_share(rank: int) -> None:
        start.wait(60)
        ranks = Ranks(rank, 4, rank, 4, CPU)
        plain, cached = (
            build_train_loader(loader_config(lmdb, cache=c), 1, ranks) for c in ("null", folder)
        )
        assert_same(list(cached), list(plain))
        queue.put(log_lines)

    monkeypatch.setattr(SquareCache, "make", lambda *args: (time.sleep(0.5), make(*args)))
    children = [context.Process(target=read_share, args=(rank,)) for rank in range(4)]
    for child in children:
        child.start()
    lines = [line for _ in children for line in queue.get(timeout=60)]
    for child in children:
        child.join()
    assert sum("making" in line for line in lines) == 1
    assert sum("waiting for another process" in line for line in lines) == 3
    assert len(contents(folder)) == 1


def test_one_that_was_killed_while_making_it_is_no_obstacle(lmdb, folder, monkeypatch, log_lines):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        child = multiprocessing.get_context("fork").Process(target=open_cache, args=(lmdb, folder))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [name for name in contents(folder) if name.endswith(".partial")]
    cache = open_cache(lmdb, folder)
    assert len(log_lines) == 1
    assert equals_fresh(cache, lmdb)
    assert list(contents(folder)) == [cache.path.name]


# --------------------------------------------------------------------------------------- bad places


def test_a_disk_without_room_is_named_and_nothing_is_left(lmdb, folder):
    with largest_file(10_000), pytest.raises(OSError, match=r"too large: .*\.squares"):
        open_cache(lmdb, folder)
    assert contents(folder) == {}


def test_a_file_where_the_folder_should_be_is_left_alone(lmdb, tmp_path):
    (tmp_path / "file").write_text("mine")
    line = user_error(open_cache, lmdb, tmp_path / "file")
    assert "file is a file: give a folder, or null for no cache" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_photo_that_cannot_be_decoded_is_named_and_nothing_is_left(lmdb, tmp_path, folder):
    bad = with_bad_image(lmdb, tmp_path / "bad.lmdb", b"no photo")
    assert f"{bad}, image image_3.jpg cannot be decoded" in user_error(open_cache, bad, folder)
    assert contents(folder) == {}
