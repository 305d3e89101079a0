"""Several data sets in one run: what is left out, what is kept, and that nothing is mixed up."""

import pickle
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    ALONE,
    ROOT,
    all_refs,
    assert_same,
    encoded,
    error_of,
    loader_config,
    pack,
    repack,
    run_program,
    sample_ref,
    smooth_photo,
)
from torch.utils.data import DataLoader

from engine.loaders import build_train_loader, report_records, training_records
from tools.inspect_lmdb import PUBLISHED
from utils.config import Config, load_config
from utils.dataset import TrainingDataset
from utils.errors import UserError
from utils.records import (
    JoinedReader,
    RecordReader,
    RecordWriter,
    group_positions,
    on_images_of,
)
from utils.transforms import load_image

SIZE = (40, 60)


def write(path: Path, images: Sequence[tuple[int, int | None]], seed: int) -> Path:
    """Records of images (number in the key, id) with 1-3 refs each; pixels by seed and number."""
    position = 0
    with RecordWriter.open(path, path.parent.name, path.stem) as writer:
        for number, image_id in images:
            photo = smooth_photo(np.random.default_rng([seed, number]), *SIZE)
            key = f"image_{number}.jpg"
            writer.add_image(key, encoded(photo, ".jpg"))
            for _ in range(1 + number % 3):
                ref = sample_ref(position, number, SIZE, 1 + position % 4)
                writer.add_ref(replace(ref, image_id=image_id))
                position += 1
    return path


def numbered(*numbers: int) -> list[tuple[int, int]]:
    return [(number, number) for number in numbers]


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    """Two training files that share photos with each other, with val and with test."""
    return {
        "one": write(tmp_path / "one/train.lmdb", numbered(*range(12)), seed=0),
        "two": write(tmp_path / "two/train.lmdb", numbered(*range(6, 20)), seed=0),
        "val": write(tmp_path / "one/val.lmdb", numbered(3, 7, 30), seed=0),
        "test": write(tmp_path / "two/test.lmdb", numbered(8, 15, 31), seed=0),
    }


def joined(files: dict[str, Path], **more: object):
    """A config over both files that leaves out the images of val and test."""
    train, exclude = ([str(files[n]) for n in names] for names in (("one", "two"), ("val", "test")))
    return loader_config(files["val"], files=train, exclude=exclude, **more)


def report(cfg: Config, log_lines: list[str]) -> list[str]:
    """What is said about the records that the config trains on."""
    report_records(cfg, training_records(cfg))
    return log_lines


# ---------------------------------------------------------------------------------------- left out


@pytest.mark.parametrize("batch_by", ["refs", "images"])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("cache", [False, True])
def test_no_excluded_image_is_trained_on(files, tmp_path, batch_by, workers, cache):
    """Neither a ref nor a pixel of one, in three epochs."""
    folder = tmp_path / "cache" if cache else "null"
    cfg = joined(files, batch_by=batch_by, workers=workers, batch_size=2, cache=folder)
    loader = build_train_loader(cfg, 2, ALONE)
    records = loader.dataset.records
    excluded = [RecordReader(files[name]) for name in ("val", "test")]
    forbidden_ids = {i for reader in excluded for i in reader.index.image_ids}
    forbidden_pixels = {
        load_image(reader, reader.ref(i), 32).tobytes()
        for reader in excluded
        for i in range(len(reader))
    }
    assert len(forbidden_pixels) == 6
    trained: Counter = Counter()
    for epoch in range(3):
        loader.batch_sampler.set_epoch(epoch)
        for batch in loader:
            trained.update(records.ref(p).image_id for p in batch["positions"].tolist())
            for image in batch["images"]:
                assert image.numpy().tobytes() not in forbidden_pixels
    assert not forbidden_ids & trained.keys()
    assert trained.keys() == set(range(20)) - {3, 7, 8, 15}


def test_everything_else_is_trained_on_once_an_epoch(files):
    loader = build_train_loader(joined(files, batch_size=2), 2, ALONE)
    records = loader.dataset.records
    seen = [records.places[p] for batch in loader for p in batch["positions"].tolist()]
    assert len(seen) == len(set(seen)) == len(records) - len(records) % 2
    kept = {
        (reader.path, i)
        for reader in (RecordReader(files["one"]), RecordReader(files["two"]))
        for i in range(len(reader))
        if reader.ref(i).image_id not in {3, 7, 8, 15}
    }
    assert len(records) == len(kept)
    assert {(reader.path, i) for reader, i in seen} <= kept


def test_what_is_left_out_is_counted(files, log_lines):
    *counts, overlap = report(joined(files), log_lines)
    for line, name, numbers in zip(counts, ("one", "two"), ([3, 7, 8], [7, 8, 15]), strict=True):
        total = len(RecordReader(files[name]))
        out = sum(1 + number % 3 for number in numbers)
        assert line.startswith(f"{files[name]}: {total - out} of {total} refs, {out} left out on ")
    assert overlap.startswith("0 of ")
    assert overlap.endswith(f"training refs are on images of {files['val']}")


def test_an_image_is_known_by_its_id_and_without_one_by_its_name(tmp_path):
    of_train = [(0, None), (1, None), (2, 2), (3, 3), (4, 4), (5, 10)]
    of_val = [(0, None), (2, None), (1, 77), (9, 3), (5, 20)]
    train, val = (
        RecordReader(write(tmp_path / f"{split}.lmdb", images, seed))
        for seed, (split, images) in enumerate((("train", of_train), ("val", of_val)))
    )
    held = on_images_of([val], train)
    by_key = {train.ref(i).image_key: bool(held[i]) for i in range(len(train))}
    assert by_key == {
        "image_0.jpg": True,  # neither side has an id
        "image_1.jpg": True,  # the excluded one has an id, this has not
        "image_2.jpg": True,  # the other way round
        "image_3.jpg": True,  # the same id under another name
        "image_4.jpg": False,
        "image_5.jpg": False,  # two ids decide, whatever the names say
    }


def test_an_overlap_with_val_that_is_not_excluded_is_a_warning(files, log_lines):
    cfg = loader_config(files["val"], files=[str(files["one"]), str(files["two"])])
    shared = 1 + 3 % 3 + 2 * (1 + 7 % 3)
    assert report(cfg, log_lines)[-1] == (
        f"{shared} of {2 * 12 + 27} training refs are on images of {files['val']}; "
        "name it in DATA.exclude_lmdb to leave them out"
    )


def test_a_single_data_set_is_never_thinned_out_and_its_overlap_is_said(files, log_lines):
    loaders = []
    for train in (files["one"], [str(files["one"])]):
        cfg = loader_config(files["val"], files=train, exclude=[str(files["val"])], batch_size=2)
        loaders.append(build_train_loader(cfg, 2, ALONE))
        assert len(loaders[-1].dataset) == len(RecordReader(files["one"])) == 24
        assert report(cfg, log_lines)[-2:] == [
            "DATA.exclude_lmdb does nothing with a single DATA.train_lmdb",
            f"3 of 24 training refs are on images of {files['val']}; they are kept, as published",
        ]
    assert_same(*map(list, loaders))


def test_real_photos_of_val_and_test_are_left_out(mini_root, tmp_path):
    for dataset, split_by, name in (
        ("refcoco", "unc", "refcoco"),
        ("refcoco+", "unc", "refcoco+"),
        ("refcocog", "umd", "refcocog_u"),
    ):
        pack(mini_root, tmp_path, dataset, split_by, name)
    lmdb = tmp_path / "lmdb"
    train = [lmdb / "refcoco/train.lmdb", lmdb / "refcocog_u/train.lmdb", lmdb / "refcoco/val.lmdb"]
    for excluded in ("refcoco", "refcoco+", "refcocog_u"):
        exclude = [path for path in (lmdb / excluded).glob("*.lmdb") if path.stem != "train"]
        cfg = loader_config(train[0], files=[*map(str, train)], exclude=[*map(str, exclude)])
        loader = build_train_loader(cfg, 4, ALONE)
        records = loader.dataset.records
        ids = {records.ref(p).image_id for batch in loader for p in batch["positions"].tolist()}
        forbidden = {i for path in exclude for i in RecordReader(path).index.image_ids}
        held = sum(i in forbidden for path in train for i in RecordReader(path).index.image_ids)
        assert not ids & forbidden
        assert len(records) == sum(len(RecordReader(path)) for path in train) - held
        assert excluded == "refcocog_u" or held >= 13  # all of RefCOCO's val, as RefCOCO+'s


# ------------------------------------------------------------------------------ kept, not mixed up


@pytest.fixture
def strangers(tmp_path) -> list[Path]:
    """Two files with other photos under the same names and ids."""
    return [write(tmp_path / f"{s}/train.lmdb", numbered(*range(8)), seed=s) for s in (1, 2)]


@pytest.mark.parity
@pytest.mark.parametrize("batch_by", ["refs", "images"])
@pytest.mark.parametrize("cache", [False, True])
def test_photos_of_one_name_in_two_files_are_two_photos(strangers, tmp_path, batch_by, cache):
    cfg = loader_config(
        strangers[0],
        files=[str(path) for path in strangers],
        batch_by=batch_by,
        batch_size=8,
        cache=tmp_path / "cache" if cache else "null",
    )
    loader = build_train_loader(cfg, 8, ALONE)
    records = loader.dataset.records
    checked = 0
    for batch in loader:
        index = batch["image_index"]
        images = batch["images"] if index is None else batch["images"][index]
        for image, position in zip(images, batch["positions"].tolist(), strict=True):
            reader, place = records.places[position]
            assert np.array_equal(image, load_image(reader, reader.ref(place), 32))
            checked += 1
    assert checked == 24
    groups = group_positions(records.image_names())
    assert len(groups) == 16
    assert all(len({records.places[p][0] for p in group}) == 1 for group in groups)


def test_positions_run_through_the_files_in_order_past_those_of_which_nothing_is_left(strangers):
    one, two = (RecordReader(path) for path in strangers)
    count = len(one)
    parts = [(two, []), (one, range(count)), (two, np.array([1, 4])), (one, []), (one, [1])]
    records = JoinedReader(parts)
    assert len(records) == count + 3
    assert records.places == [*((one, i) for i in range(count)), (two, 1), (two, 4), (one, 1)]
    assert records.ref(count + 1) == two.ref(4)


def test_spawned_workers_read_several_files(files):
    records = build_train_loader(joined(files), 4, ALONE).dataset.records
    assert len(pickle.dumps(records)) < 2_000
    dataset = TrainingDataset(records, 32, 9, 0)
    visits = [(position, 0) for position in range(len(records))]
    options = {"num_workers": 1, "multiprocessing_context": "spawn"}
    loader = DataLoader(dataset, None, sampler=visits, **options)
    images = [sample["image"] for sample in loader]
    assert_same(images, [dataset[visit]["image"] for visit in visits])


# ------------------------------------------------------------------------------- configs and faults


@pytest.mark.parametrize("model", ["r50", "r101"])
def test_the_combined_config_leaves_out_every_val_and_test_split_that_is_published(model):
    cfg = load_config(ROOT / f"config/combined/cris_{model}.yaml")
    names = ("refcoco", "refcoco+", "refcocog_u")
    assert cfg.DATA.train_lmdb == tuple(f"datasets/lmdb/{name}/train.lmdb" for name in names)
    assert set(cfg.DATA.exclude_lmdb) == {
        f"datasets/lmdb/{name}/{split}.lmdb"
        for name, splits in PUBLISHED.items()
        for split in splits
        if split != "train" and name != "refcoco-m"  # whose photos are those of RefCOCO's val
    }
    assert cfg.DATA.val_lmdb in cfg.DATA.exclude_lmdb
    single = load_config(ROOT / f"config/refcocog_u/cris_{model}.yaml")
    differs = {"output_folder": cfg.TRAIN.output_folder}
    assert vars(cfg.TRAIN) == {**vars(single.TRAIN), **differs}


def test_one_of_several_files_that_is_missing_or_another_split_is_named(config, files, data):
    train, other = (str(data / f"lmdb/shapes/{split}.lmdb") for split in ("train", "testA"))
    both = ([train, str(files["one"])], "DATA.exclude_lmdb", ["no/v.lmdb"])
    for opts, message in (
        (([train, "no/t.lmdb"],), "no/t.lmdb does not exist"),
        (both, "no/v.lmdb does not exist"),
        (([train, other],), f"{other} holds shapes testA, the config says shapes train"),
    ):
        assert error_of("train.py", config, "DATA.train_lmdb", *opts).startswith(message)


def test_leaving_out_everything_is_an_error(files):
    held_out = [str(files["val"]), str(files["test"])]
    cfg = loader_config(files["val"], files=held_out, exclude=held_out)
    with pytest.raises(UserError, match=r"every ref of DATA\.train_lmdb is on an image of DATA\.e"):
        build_train_loader(cfg, 4, ALONE)


def test_a_run_on_two_data_sets_says_what_it_leaves_out_trains_and_is_scored(
    config, data, tmp_path
):
    shapes, other = data / "lmdb/shapes", tmp_path / "lmdb/other"
    both = [str(shapes / "train.lmdb"), str(other / "train.lmdb")]
    held_out, refs = other / "val.lmdb", all_refs(shapes / "train.lmdb")
    for path, some in ((other / "train.lmdb", refs), (held_out, refs[:5])):
        repack(shapes / "train.lmdb", path, some, dataset="other")
    run_program(
        "train.py",
        config,
        *("DATA.dataset", "combined", "DATA.train_lmdb", both, "DATA.cache", tmp_path / "cache"),
        *("DATA.exclude_lmdb", [str(held_out), str(shapes / "val.lmdb")]),
    )
    log = (tmp_path / "exp/tiny/train.log").read_text()
    names = RecordReader(shapes / "train.lmdb").index.image_keys
    out = sum(name in names[:5] for name in names)
    assert 5 <= out < len(names)
    for path in both:
        assert (
            f"{path}: {len(names) - out} of {len(names)} refs, {out} left out on images of" in log
        )
    run_program("test.py", config)  # of one of the data sets
    assert (tmp_path / "exp/tiny/test_shapes_val.json").exists()
