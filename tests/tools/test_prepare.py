"""tools/prepare.py: from archives or Parquet to verified records, and every way to fail."""

import hashlib
import json
import re
import runpy
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clips import TINY, assert_same_tensors, save_archive, tiny_clip, without_sizes
from helpers import ROOT, all_refs, largest_file, usage_error, user_error
from odd_server import Answer, OddServer
from safetensors.torch import save_file

from engine.evaluator import encode_rle
from model.clip_archive import read_clip
from tools import data_process, folder2lmdb, prepare, refshapes
from tools.parquet import REF
from tools.refer import Refer, load_refs
from utils.errors import UserError
from utils.records import RecordReader

COUNTS = {"train": 6, "val": 3, "testA": 2, "testB": 2}


def zip_folder(folder: Path, out: Path) -> None:
    shutil.make_archive(str(out / folder.name), "zip", folder.parent, folder.name)


def rows_of(refer: Refer) -> list[dict]:
    """Refs as the Hub's Parquet files have them, a row a ref."""
    return [
        {name: ref[name] for name in REF}
        | {
            "split": ref["split"].replace("testA", "test"),
            "raw_anns": json.dumps(refer.annotations(ref)[0]),
            "raw_image_info": json.dumps(refer.image(ref)),
        }
        for ref in refer.refs
    ]


def benchmark_rows(refer: Refer, photos: Path, split: str) -> list[dict]:
    """Refs of an evaluation split as the Hub has them, a row a photo."""
    rows = {}
    for ref in refer.split_refs(split):
        image = refer.image(ref)
        photo = {"bytes": (photos / image["file_name"]).read_bytes(), "path": None}
        row = rows.setdefault(image["id"], {"image": photo, "image_info": image, "ref_list": []})
        row["ref_list"].append({"ref_info": ref, "ann_info": refer.annotations(ref)[0]})
    return list(rows.values())


def refcoco_m_rows(refer: Refer, photos: Path) -> list[dict]:
    """Refs of val as RefCOCO-M has them: run lengths, sentences without ids."""
    rows = benchmark_rows(refer, photos, "val")
    for row in rows:
        image, row["samples"] = row.pop("image_info"), []
        row |= {"image_id": image["id"], "file_name": image["file_name"]}
        for ref, annotation in (item.values() for item in row.pop("ref_list")):
            counts = encode_rle(refer.mask(ref) > 0)
            sample = {"id": ref["ref_id"], "category": "person", "bbox": annotation["bbox"]}
            sample["sentences"] = [sentence["sent"] for sentence in ref["sentences"]]
            sample["mask"] = {"counts": counts, "size": [image["height"], image["width"]]}
            row["samples"].append(sample)
    return rows


def write_parquet(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)


def draw(folder: Path, name: str, any_number: bool = False) -> Path:
    """RefShapes as if it were another data set."""
    refshapes.generate(folder, COUNTS, seed=1, any_number=any_number)
    (folder / "refshapes").rename(folder / name)
    zip_folder(folder / "images/train2014", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def room() -> Iterator[None]:
    """Has room for the real data, whatever disk the machine has: these tests need little."""
    usage = shutil.disk_usage(ROOT)._replace(free=10**12)
    with mock.patch("shutil.disk_usage", return_value=usage):
        yield


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("shapes"), "refcoco")


@pytest.fixture(scope="module")
def refer(shapes) -> Refer:
    return Refer(shapes, "refcoco", "unc")


@pytest.fixture(scope="module")
def files(shapes, refer, tmp_path_factory) -> Path:
    """What can be had: two archives, Parquet files of refs, and two evaluation sets."""
    folder, photos = tmp_path_factory.mktemp("files"), shapes / "images/train2014"
    zip_folder(shapes / "refcoco", folder)
    shutil.copy(shapes / "train2014.zip", folder)
    write_parquet(folder / "refcoco/train-0.parquet", rows_of(refer))
    for split in ("val", "testA"):
        rows = benchmark_rows(refer, photos, split)
        write_parquet(folder / f"refcoco-eval/refcoco_unc_{split}-0.parquet", rows)
    write_parquet(folder / "refcoco-m/validation-0.parquet", refcoco_m_rows(refer, photos))
    return folder


@pytest.fixture
def server(server, files) -> OddServer:
    """Serves the archives, and the Parquet files as the Hub does."""
    for path in files.glob("*.zip"):
        server.put(path.name, path.read_bytes())
    for folder, repository in (("refcoco", "refcoco"), ("refcoco-eval", "refcoco-benchmark")):
        content = {f"data/{p.name}": p.read_bytes() for p in (files / folder).iterdir()}
        server.put_hub(f"datasets/jxu124/{repository}", content | {"README.md": b"hello"})
    return server


def prepared(folder: Path, *arguments: object) -> Path:
    """Prepare a part of the data below a folder."""
    where = ["--root", folder / "data", "--pretrain", folder / "pretrain", "--subset"]
    prepare.main([str(argument) for argument in (*arguments, *where)])
    return folder / "data"


@pytest.fixture
def run(tmp_path) -> Callable[..., Path]:
    """`run("refcoco", …)` prepares a part of the data below the folder that it returns."""
    return partial(prepared, tmp_path)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory) -> Path:
    return prepared(tmp_path_factory.mktemp("whole"), "refcoco", "--from", files)


@pytest.fixture
def made(whole, tmp_path) -> Path:
    """What `run("refcoco", "--from", files)` has made."""
    return shutil.copytree(whole, tmp_path / "data", symlinks=True)


def records(root: Path, target: str = "refcoco") -> dict:
    return {path.stem: all_refs(path) for path in (root / "lmdb" / target).glob("*.lmdb")}


def snapshot(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


# -------------------------------------------------------------------------------- the whole way


def test_one_command_leads_from_addresses_to_verified_records(server, run, capsys):
    root = run("refcoco", "--mirror", "http://127.0.0.1:1", "--mirror", server.url)
    output = capsys.readouterr().out
    assert output.count("checked  every record: no fault") == 4
    assert "refcoco is ready" in output
    for split, images in COUNTS.items():
        meta = RecordReader(root / f"lmdb/refcoco/{split}.lmdb").meta
        assert (meta["dataset"], meta["split"], meta["images"]) == ("refcoco", split, images)
        assert (root / f"lmdb/refcoco/{split}.jpg").is_file()


def test_archives_and_parquet_give_the_same_records_without_network(files, made, run, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    from_archives = records(made)
    assert all(path.is_symlink() for path in (made / "downloads").iterdir())
    for folder in ("refer", "anns", "masks", "lmdb"):
        shutil.rmtree(made / folder)
    assert records(run("refcoco", "--from", files, "--source", "parquet")) == from_archives
    assert sum(map(len, from_archives.values())) > 20


@pytest.mark.slow
def test_real_photos_give_the_same_records_from_archives_and_parquet(mini_root, run, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    for folder in ("refcoco", "images/train2014"):
        zip_folder(mini_root / folder, given)
    write_parquet(given / "refcoco/all.parquet", rows_of(Refer(mini_root, "refcoco", "unc")))
    digests = []
    for source in ("zip", "parquet"):
        root = run("refcoco", "--from", given, "--source", source)
        readers = {path.name: RecordReader(path) for path in root.glob("lmdb/refcoco/*.lmdb")}
        digests.append({name: reader.digest() for name, reader in readers.items()})
        assert readers["val.lmdb"].meta["sentences"] == 36
        root.rename(tmp_path / f"data-{source}")
    assert digests[0] == digests[1]


def test_photos_that_coco_lacks_are_counted_and_may_be_left_out(
    files, shapes, run, tmp_path, capsys
):
    shutil.copytree(shapes / "images", tmp_path / "data/images")
    first, second, *_ = sorted((tmp_path / "data/images/train2014").iterdir())
    first.unlink()
    second.unlink()
    line = user_error(run, "refcoco", "--from", files)
    assert f"{first} and 1 more do not exist" in line
    assert "--skip-odd" in line
    root = run("refcoco", "--from", files, "--skip-odd")
    assert RecordReader(root / "lmdb/refcoco/train.lmdb").meta["left_out"] > 1
    assert "odd refs, when it was packed" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_evaluation_sets_bring_their_photos(files, server, run, refer, source):
    given = ["--from", files] if source == "folder" else []
    root = run("refcoco-eval", *given)
    reader = RecordReader(root / "lmdb/refcoco-eval/testA.lmdb")
    assert (reader.meta["dataset"], reader.meta["split"]) == ("refcoco", "testA")
    assert not (root / "images/train2014").exists()
    expected = refer.split_refs("testA")
    for ref, found in zip(expected, all_refs(reader.path), strict=True):
        mask = cv2.imdecode(np.frombuffer(found.mask, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert found.ref_id == ref["ref_id"]
        assert np.array_equal(mask > 0, refer.mask(ref) > 0)
        assert reader.image(found.image_key)
    before = snapshot(root)
    run("refcoco-eval", *given)
    assert snapshot(root) == before


def test_refcoco_m_is_a_val_split_of_its_own(files, run, refer):
    (got,) = records(run("refcoco-m", "--from", files), "refcoco-m").values()
    for ref, expected in zip(got, refer.split_refs("val"), strict=True):
        sentences = tuple(sentence["sent"] for sentence in expected["sentences"])
        assert (ref.ref_id, ref.sentences) == (expected["ref_id"], sentences)
    ids = [number for ref in got for number in ref.sent_ids]
    assert len(set(ids)) == len(ids)


# ---------------------------------------------------------------------------- once, and resumed


def test_a_second_run_does_nothing_even_without_archives_photos_and_masks(made, run):
    for folder in ("refer", "images", "anns", "masks"):
        shutil.rmtree(made / folder)
    before = snapshot(made)
    run("refcoco", "--mirror", "http://127.0.0.1:1")
    assert snapshot(made) == before


@pytest.mark.parametrize("lost", ["lmdb/refcoco/val.lmdb", "lmdb/refcoco/val.jpg", "refer/refcoco"])
def test_what_is_lost_is_made_again_if_it_is_needed_and_nothing_else(files, made, run, lost):
    before, path = snapshot(made), made / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run("refcoco", "--from", files)
    changed = {str(p.relative_to(made)) for p, at in snapshot(made).items() if before[p] != at}
    assert changed == (set() if lost.startswith("refer") else {lost})


def test_interrupted_before_each_step_the_same_command_goes_on(files, run, monkeypatch):
    """Each run takes one step, and is interrupted before the next: no step is taken twice."""
    taken = []

    def stops(function: Callable) -> Callable:
        def called(*args: object, **kwargs: object) -> object:
            if taken:
                raise KeyboardInterrupt
            taken.append(function)
            return function(*args, **kwargs)

        return called

    for module in (data_process, folder2lmdb):
        monkeypatch.setattr(module, "main", stops(module.main))
    for name in ("unpack", "inspect"):
        monkeypatch.setattr(prepare, name, stops(getattr(prepare, name)))
    for _ in range(2 + 1 + 2 * len(COUNTS) - 1):
        with pytest.raises(KeyboardInterrupt):
            run("refcoco", "--from", files)
        taken.clear()
    assert set(records(run("refcoco", "--from", files))) == set(COUNTS)


@pytest.fixture(scope="module")
def grefcoco(tmp_path_factory) -> Path:
    """RefShapes as gRefCOCO: in each split refs of one object, of several, and of none."""
    folder = draw(tmp_path_factory.mktemp("given"), "grefcoco", any_number=True)
    plain = folder / "grefcoco/refs(unc).p"
    plain.with_name("grefs(unc).json").write_text(json.dumps(load_refs(plain)))
    plain.unlink()
    return folder


def tar_files(path: Path, *files: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for file in files:
            archive.add(file, f"data/odd name/{file.name}")


@pytest.mark.parametrize("source", ["folder", "hub"])
def test_grefcoco_comes_from_its_archive(grefcoco, server, run, tmp_path, source):
    (downloads := tmp_path / "data/downloads").mkdir(parents=True)
    shutil.copy(grefcoco / "train2014.zip", downloads)
    tar_files(archive := tmp_path / "grefs.tar.gz", *(grefcoco / "grefcoco").iterdir())
    words = ["--from", tmp_path]
    if source == "hub":
        server.put_hub("datasets/KeepParallel/gRefCOCO", {archive.name: archive.read_bytes()})
        words = []
    found = records(run("grefcoco", *words), "grefcoco")
    assert set(found) == set(COUNTS)
    for refs in found.values():
        assert {min(ref.num_targets, 2) for ref in refs} == {0, 1, 2}


def test_an_archive_that_lacks_a_file_is_named(grefcoco, shapes, run, tmp_path):
    tar_files(tmp_path / "grefs.tar.gz", grefcoco / "grefcoco/grefs(unc).json")
    told = user_error(run, "grefcoco", "--from", tmp_path)
    folder = tmp_path / "data/refer/grefcoco"
    assert f"lacks instances.json: get it again, or put its files into {folder}" in told
    shutil.copy(shapes / "train2014.zip", tmp_path / "refcoco.zip")
    told = user_error(run, "refcoco", "--from", tmp_path)
    assert "refcoco.zip lacks instances.json and refs(unc).p" in told
    assert not list((tmp_path / "data/refer").glob("*"))


@pytest.mark.parametrize("year", [2014, 2017])
def test_what_a_person_unpacked_is_used_and_no_archive_is_asked_for(shapes, run, tmp_path, year):
    shutil.copytree(shapes / "images/train2014", tmp_path / f"data/images/train{year}")
    shutil.copytree(shapes / "refcoco", tmp_path / "data/refer/refcoco")
    assert set(records(run("refcoco", "--mirror", "http://127.0.0.1:1"))) == set(COUNTS)


# --------------------------------------------------------------------------------------- CLIP


@pytest.fixture
def clip(tmp_path, monkeypatch) -> dict[str, bytes]:
    """A tiny CLIP as OpenAI would publish it, and the same weights as float32 safetensors."""
    model = tiny_clip(half=True)
    archive = save_archive(model, tmp_path / "archive.pt").read_bytes()
    weights = without_sizes(model.state_dict())
    weights = {k: v.float() if v.is_floating_point() else v for k, v in weights.items()}
    save_file(weights, tmp_path / "plain.safetensors")
    digest = hashlib.sha256(archive).hexdigest()
    published = prepare.CLIP["clip-rn50"] | {"sha256": digest, "layers": list(TINY.vision_layers)}
    monkeypatch.setitem(prepare.CLIP, "clip-rn50", published)
    plain = (tmp_path / "plain.safetensors").read_bytes()
    return {"RN50.pt": archive, "open_clip_model.safetensors": plain}


def test_an_archive_and_its_safetensors_give_the_same_clip_from_hub_host_or_folder(
    server, run, clip, tmp_path
):
    path = tmp_path / "pretrain/RN50.pt"
    server.put_hub("timm/resnet50_clip.openai", clip)
    sources = [server.put("none", b"", Answer(404)), prepare.CLIP["clip-rn50"]["sources"][1]]
    prepare.CLIP["clip-rn50"]["sources"] = sources
    run("clip-rn50")
    from_safetensors = read_clip(path)
    path.unlink()
    server.put("RN50.pt", clip["RN50.pt"])
    run("clip-rn50", "--mirror", f"{server.url}/")
    assert path.read_bytes() == clip["RN50.pt"]
    assert_same_tensors(read_clip(path), from_safetensors)
    for content in clip.values():
        (tmp_path / "RN50.pt").write_bytes(content)
        path.unlink()
        run("clip-rn50", "--from", tmp_path)
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights, "is another CLIP"),
        (lambda weights: weights | {"visual.conv1.weight": weights["visual.conv1.weight"] + 1e-6},
            "half precision changes visual.conv1.weight"),
        (lambda weights: {"a": torch.zeros(1)}, "no CLIP"),
    ],
)  # fmt: skip
def test_weights_that_are_not_openais_are_refused(run, clip, tmp_path, monkeypatch, change, reason):
    path = tmp_path / "RN50.pt"
    save_file(change(read_clip(tmp_path / "plain.safetensors")), path)
    if "another" in reason:
        prepare.CLIP["clip-rn50"]["layers"] = [3, 4, 6, 3]
    assert reason in user_error(run, "clip-rn50", "--from", tmp_path)
    assert not list((tmp_path / "pretrain").iterdir())


# ------------------------------------------------------------------------------------ refusals


def changed(row: dict, column: str, **values: object) -> dict:
    """A row with other values in a column of JSON text."""
    return row | {column: json.dumps(json.loads(row[column]) | values)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda rows: [{k: v for k, v in r.items() if k != "raw_anns"} for r in rows],
            r"train-0.parquet: row 0 is no ref \(.*'raw_anns'\), it has ref_id, ann_id"),
        (lambda rows: [rows[0] | {"raw_anns": "no JSON"}], "row 0 is no ref"),
        (lambda rows: [*rows, rows[0] | {"ref_id": None}], "ref_id: must be"),
        (lambda rows: [changed(r, "raw_anns", segmentation=[[1, 2]]) for r in rows],
            "unreadable segmentation"),
        (lambda rows: [changed(r, "raw_image_info", file_name="gone.jpg") for r in rows],
            "gone.jpg does not exist"),
    ],
)  # fmt: skip
def test_parquet_that_is_odd_is_named(shapes, refer, run, tmp_path, rows, message):
    shutil.copytree(shapes / "images", tmp_path / "data/images")
    write_parquet(tmp_path / "given/train-0.parquet", rows(rows_of(refer)))
    told = user_error(run, "refcoco", "--source", "parquet", "--from", tmp_path / "given")
    assert re.search(message, told)
    assert not list((tmp_path / "data").rglob("*.lmdb"))


def test_a_photo_whose_name_is_a_path_is_refused(refer, shapes, run, tmp_path):
    rows = benchmark_rows(refer, shapes / "images/train2014", "val")
    rows[0]["image_info"] |= {"file_name": "../1.jpg"}
    write_parquet(tmp_path / "given/refcoco_unc_val-0.parquet", rows)
    told = user_error(run, "refcoco-eval", "--from", tmp_path / "given")
    assert "row 0 is no ref (ValueError: '../1.jpg' is no name of a photo)" in told


@pytest.mark.parametrize(
    ("words", "found", "message"),
    [
        ("refcoco", {}, "refcoco.zip: there is no such file.*put it into a folder"),
        ("clip-rn50", {}, "RN50.pt: there is no such file.*put it into a folder"),
        ("refcoco-m", {}, r"has no \*.parquet: put the Parquet files of moondream/refcoco-m there"),
        ("refcocog_g --source parquet", {}, "no Parquet files of this split"),
        *(
            (words, {name: content}, f"{name} is no whole")
            for words, name, start in (
                ("refcoco --source parquet", "train.parquet", b"PAR1"),
                ("refcoco", "refcoco.zip", b"PK\x03\x04"),
                ("grefcoco", "grefs.tar.gz", b"\x1f\x8b"),
            )
            for content in (b"", b"<html>", start + b" and no more")
        ),
    ],
)
def test_what_is_not_whole_in_the_folder_is_named_and_not_downloaded(
    run, tmp_path, words, found, message
):
    (tmp_path / "given").mkdir()
    for name, content in found.items():
        (tmp_path / "given" / name).write_bytes(content)
    assert re.search(message, user_error(run, *words.split(), "--from", tmp_path / "given"))


def test_without_any_network_one_line_says_what_to_do(run, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    for target in ("refcoco", "refcoco-eval"):
        told = user_error(run, target)
        assert "could not be" in told
        assert "--from FOLDER" in told


def test_all_of_the_data_is_compared_with_what_is_published(files, made, tmp_path, monkeypatch):
    where = ["--root", str(made), "--mirror", "http://127.0.0.1:1"]
    with pytest.raises(UserError, match=r"train.lmdb: .* refs, where 42,404 are published"):
        prepare.main(["refcoco", *where])
    with pytest.raises(UserError, match=r"images/train2014 has 13 of 82,783 photos"):
        prepare.main(["coco-train2014", *where])
    monkeypatch.setitem(prepare.ARCHIVES["train2014.zip"], "photos", 12)  # train2017 has more
    prepare.main(["coco-train2014", *where])
    with pytest.raises(UserError, match=r"refcoco.zip has .* bytes, not 53,993,993"):
        prepare.main(["refcoco", "--root", str(tmp_path / "other"), "--from", str(files)])


def test_too_little_room_is_told_before_the_first_request(server, run, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage if folder == tmp_path else None)
    told = user_error(run, "refcoco", "--mirror", server.url)
    needs = f"refcoco needs about 3.3 GB in {tmp_path / 'data'}, where 2.0 GB are free"
    assert told.startswith(needs)
    assert not server.requests


def test_a_full_disk_is_told_and_what_is_whole_is_kept(files, run, tmp_path):
    with largest_file(5_000), pytest.raises(OSError, match="File too large") as caught:
        run("refcoco", "--from", files)
    assert str(caught.value.filename).startswith(str(tmp_path / "data"))
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert left == [tmp_path / "data/downloads/refcoco.zip"]


def test_the_program_ends_with_one_line_and_exit_code_1(tmp_path, monkeypatch):
    words = ["prepare.py", "refcoco", "--from", str(tmp_path), "--root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit, match=r"^error: [^\n]*$"):
        runpy.run_path(str(ROOT / "tools/prepare.py"), run_name="__main__")


def test_a_folder_that_is_none_is_refused(run, capsys):
    told = usage_error(capsys, run, "refcoco", "--from", "nowhere")
    assert "--from nowhere is no folder" in told


def test_each_file_has_two_sources():
    files = prepare.ARCHIVES | prepare.CLIP
    hosts = {n: {source.split("/")[2] for source in f["sources"]} for n, f in files.items()}
    assert [name for name in hosts if len(hosts[name]) < 2] == ["grefs.tar.gz"]  # one is known
