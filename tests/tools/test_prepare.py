"""tools/prepare.py: from archives or Parquet to verified records, and every way to fail."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from clips import (
    TINY,
    assert_same_tensors,
    save_torchscript,
    tiny_clip,
    without_sizes,
)
from helpers import ROOT, all_refs, largest_file, run_program
from odd_server import Answer, OddServer, serve
from pycocotools import mask as coco
from safetensors.torch import save_file

from model import clip_archive
from model.clip_archive import read_clip
from tools import data_process, folder2lmdb, prepare, refshapes
from tools.refer import Refer
from utils.errors import UserError
from utils.records import RecordReader

COUNTS = {"train": 6, "val": 3, "testA": 2, "testB": 2}


def zip_folder(path: Path, folder: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"{name}/{file.name}")


def rows_of(refer: Refer) -> list[dict]:
    """Refs as the Hub's Parquet files have them, a row a ref."""
    names = ("ref_id", "ann_id", "image_id", "category_id", "split", "sentences")
    return [
        {name: ref[name] for name in names}
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
        image = row.pop("image_info")
        row |= {"image_id": image["id"], "file_name": image["file_name"], "samples": []}
        for item in row.pop("ref_list"):
            mask = coco.encode(
                np.asfortranarray((refer.mask(item["ref_info"]) > 0).astype("uint8"))
            )
            row["samples"].append(
                {
                    "id": item["ref_info"]["ref_id"],
                    "category": "person",
                    "sentences": [s["sent"] for s in item["ref_info"]["sentences"]],
                    "bbox": item["ann_info"]["bbox"],
                    "mask": {"counts": mask["counts"].decode(), "size": mask["size"]},
                }
            )
    return rows


def write_parquet(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """RefShapes as if it were RefCOCO."""
    folder = tmp_path_factory.mktemp("shapes")
    refshapes.generate(folder, COUNTS, seed=1)
    (folder / "refshapes").rename(folder / "refcoco")
    return folder


@pytest.fixture(scope="module")
def refer(shapes) -> Refer:
    return Refer(shapes, "refcoco", "unc")


@pytest.fixture(scope="module")
def files(shapes, refer, tmp_path_factory) -> Path:
    """What can be had: two archives, Parquet files of refs, and two evaluation sets."""
    folder, photos = tmp_path_factory.mktemp("files"), shapes / "images/train2014"
    zip_folder(folder / "refcoco.zip", shapes / "refcoco", "refcoco")
    zip_folder(folder / "train2014.zip", photos, "train2014")
    write_parquet(folder / "refcoco/train-0.parquet", rows_of(refer))
    for split in ("val", "testA"):
        rows = benchmark_rows(refer, photos, split)
        write_parquet(folder / f"refcoco-eval/refcoco_unc_{split}-0.parquet", rows)
    write_parquet(folder / "refcoco-m/validation-0.parquet", refcoco_m_rows(refer, photos))
    return folder


@pytest.fixture
def server(files, monkeypatch) -> Iterator[OddServer]:
    """Serves the archives, and the Parquet files as the Hub does."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub = {"refcoco": "jxu124/refcoco", "refcoco-eval": "jxu124/refcoco-benchmark"}
    with serve() as odd:
        monkeypatch.setenv("HF_ENDPOINT", odd.url)
        for path in files.glob("*.zip"):
            odd.put(path.name, path.read_bytes())
        for folder, repository in hub.items():
            content = {f"data/{p.name}": p.read_bytes() for p in (files / folder).iterdir()}
            odd.put_hub(f"datasets/{repository}", content | {"README.md": b"hello"})
        yield odd


@pytest.fixture
def run(tmp_path) -> Callable[..., Path]:
    """`run("refcoco", …)` prepares a part of the data below the folder that it returns."""

    def prepare_part(*arguments: object) -> Path:
        where = ["--root", str(tmp_path / "data"), "--pretrain", str(tmp_path / "pretrain")]
        prepare.main([*map(str, arguments), *where, "--subset"])
        return tmp_path / "data"

    return prepare_part


def error(run: Callable[..., Path], *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        run(*arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


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


def test_archives_and_parquet_give_the_same_records_without_network(files, run, tmp_path):
    os.environ.pop("HF_ENDPOINT", None)
    root = run("refcoco", "--from", files)
    from_archives = records(root)
    assert all(path.is_symlink() for path in (root / "downloads").iterdir())
    for folder in ("refer", "anns", "masks", "lmdb"):
        shutil.rmtree(root / folder)
    assert records(run("refcoco", "--from", files, "--source", "parquet")) == from_archives
    assert sum(map(len, from_archives.values())) > 20


@pytest.mark.slow
def test_real_photos_give_records_that_are_whole_and_score_alike(mini_root, run, trained, tmp_path):
    given = tmp_path / "given"
    given.mkdir()
    zip_folder(given / "refcoco.zip", mini_root / "refcoco", "refcoco")
    zip_folder(given / "train2014.zip", mini_root / "images/train2014", "train2014")
    write_parquet(given / "refcoco/all.parquet", rows_of(Refer(mini_root, "refcoco", "unc")))
    scores = []
    for source in ("zip", "parquet"):
        root = run("refcoco", "--from", given, "--source", source)
        out = ("TRAIN.output_folder", tmp_path, "TRAIN.exp_name", source)
        where = ("TEST.test_lmdb", root / "lmdb/refcoco/val.lmdb")
        weights = trained.parent / "exp/tiny/best_model.pth"
        run_program("test.py", trained, *out, *where, "TEST.weights", weights)
        (table,) = (tmp_path / source).glob("*.jsonl")
        scores.append(table.read_text())
        root.rename(tmp_path / f"data-{source}")
    assert scores[0] == scores[1]
    assert len(scores[0].splitlines()) == 36


def test_photos_that_coco_lacks_are_counted_and_may_be_left_out(files, run, tmp_path, capsys):
    (photos := tmp_path / "data/images/train2014").mkdir(parents=True)
    with zipfile.ZipFile(files / "train2014.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")]
        for name in names[2:]:
            (photos / Path(name).name).write_bytes(archive.read(name))
    line = error(run, "refcoco", "--from", files)
    assert f"{photos / Path(names[0]).name} and 1 more do not exist" in line
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
    expected = {ref["ref_id"]: refer.mask(ref) > 0 for ref in refer.split_refs("testA")}
    for ref in all_refs(reader.path):
        mask = cv2.imdecode(np.frombuffer(ref.mask, np.uint8), cv2.IMREAD_GRAYSCALE)
        assert np.array_equal(mask > 0, expected.pop(ref.ref_id))
        assert reader.image(ref.image_key)
    assert not expected
    before = snapshot(root)
    run("refcoco-eval", *given)
    assert snapshot(root) == before


def test_refcoco_m_is_a_val_split_of_its_own(files, run, refer):
    (got,) = records(run("refcoco-m", "--from", files), "refcoco-m").values()
    expected = refer.split_refs("val")
    assert [r.ref_id for r in got] == [r["ref_id"] for r in expected]
    assert [list(r.sentences) for r in got] == [
        [s["sent"] for s in r["sentences"]] for r in expected
    ]
    assert len({number for ref in got for number in ref.sent_ids}) == sum(
        len(r.sentences) for r in got
    )


# ---------------------------------------------------------------------------- once, and resumed


def test_a_second_run_does_nothing_even_without_archives_photos_and_masks(files, run):
    root = run("refcoco", "--from", files)
    for folder in ("refer", "images", "anns", "masks"):
        shutil.rmtree(root / folder)
    before = snapshot(root)
    run("refcoco", "--mirror", "http://127.0.0.1:1")
    assert snapshot(root) == before


@pytest.mark.parametrize("lost", ["lmdb/refcoco/val.lmdb", "lmdb/refcoco/val.jpg", "refer/refcoco"])
def test_what_is_lost_is_made_again_if_it_is_needed_and_nothing_else(files, run, lost):
    root = run("refcoco", "--from", files)
    before = snapshot(root)
    path = root / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run("refcoco", "--from", files)
    changed = {
        p.relative_to(root).as_posix() for p, at in snapshot(root).items() if before[p] != at
    }
    assert changed == (set() if lost.startswith("refer") else {lost})


@pytest.mark.parametrize("call", range(9))
def test_interrupted_anywhere_the_same_command_goes_on(files, run, monkeypatch, tmp_path, call):
    calls = iter(range(99))

    def stops(function: Callable) -> Callable:
        def called(*args: object, **kwargs: object) -> object:
            result = function(*args, **kwargs) if call % 2 else None
            if next(calls) == call:
                raise KeyboardInterrupt
            return result if call % 2 else function(*args, **kwargs)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "unzip", stops(prepare.unzip))
        patch.setattr(data_process, "main", stops(data_process.main))
        patch.setattr(folder2lmdb, "main", stops(folder2lmdb.main))
        patch.setattr(prepare, "inspect", stops(prepare.inspect))
        with pytest.raises(KeyboardInterrupt):
            run("refcoco", "--from", files)
    assert set(records(run("refcoco", "--from", files))) == set(COUNTS)


@pytest.fixture(scope="module")
def grefcoco(shapes, tmp_path_factory) -> Path:
    """RefShapes as gRefCOCO: in each split one ref of two objects, and one of none."""
    content = json.loads((shapes / "refcoco/instances.json").read_text())
    refs, seen = [dict(ref) for ref in Refer(shapes, "refcoco", "unc").refs], set()
    of_image = Counter(ref["image_id"] for ref in refs)
    for ref in refs:
        number, ids = ref["ann_id"], [ref["ann_id"]]
        if ref["split"] not in seen and of_image[ref["image_id"]] > 1:
            seen.add(ref["split"])
            ids = [r["ann_id"] for r in refs if r["image_id"] == ref["image_id"]]
            ids = [number, *(i for i in ids if i != number)][:2]
        ref |= {"ann_id": ids, "category_id": [ref["category_id"]] * len(ids)}
    for split in COUNTS:
        last = [ref for ref in refs if ref["split"] == split][-1]
        last |= {"ann_id": [-1], "category_id": [-1]}
    folder = tmp_path_factory.mktemp("given")
    (folder / "grefcoco").mkdir()
    (folder / "grefcoco/grefs(unc).json").write_text(json.dumps(refs))
    (folder / "grefcoco/instances.json").write_text(json.dumps(content))
    zip_folder(folder / "train2014.zip", shapes / "images/train2014", "train2014")
    return folder


def tar_folder(path: Path, *files: Path) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for file in files:
            archive.add(file, f"data/odd name/{file.name}")
    return path


@pytest.mark.parametrize("form", ["folder", "archive", "hub"])
def test_grefcoco_comes_from_its_files_its_archive_or_the_hub(
    grefcoco, server, run, tmp_path, form
):
    given, words = tmp_path / "other", []
    given.mkdir()
    (given / "train2014.zip").symlink_to(grefcoco / "train2014.zip")
    if form == "folder":
        words = ["--from", grefcoco]
    else:
        tar_folder(given / "grefs.tar.gz", *(grefcoco / "grefcoco").iterdir())
    if form == "archive":
        words = ["--from", given]
    if form == "hub":
        content = {"grefs.tar.gz": (given / "grefs.tar.gz").read_bytes()}
        server.put_hub("datasets/KeepParallel/gRefCOCO", content)
        (tmp_path / "data/downloads").mkdir(parents=True)
        shutil.copy(given / "train2014.zip", tmp_path / "data/downloads")
    found = records(run("grefcoco", *words), "grefcoco")
    assert set(found) == set(COUNTS)
    for refs in found.values():
        assert {min(ref.num_targets, 2) for ref in refs} == {0, 1, 2}


def test_an_archive_of_grefcoco_that_lacks_a_file_says_where_to_put_it(grefcoco, run, tmp_path):
    tar_folder(tmp_path / "grefs.tar.gz", grefcoco / "grefcoco/grefs(unc).json")
    told = error(run, "grefcoco", "--from", tmp_path)
    assert "lacks instances.json: put instances.json and grefs(unc).json into a folder" in told
    (tmp_path / "grefs.tar.gz").write_bytes(b"<html>")
    assert "grefs.tar.gz is no whole tar archive" in error(run, "grefcoco", "--from", tmp_path)
    assert not list((tmp_path / "data/refer").glob("*"))


def test_what_a_person_unpacked_is_used_and_no_archive_is_asked_for(shapes, run, tmp_path):
    shutil.copytree(shapes / "images", tmp_path / "data/images")
    shutil.copytree(shapes / "refcoco", tmp_path / "data/refer/refcoco")
    assert set(records(run("refcoco", "--mirror", "http://127.0.0.1:1"))) == set(COUNTS)


# --------------------------------------------------------------------------------------- CLIP


@pytest.fixture
def clip(tmp_path, monkeypatch) -> dict[str, bytes]:
    """A tiny CLIP as OpenAI would publish it, and the same weights as float32 safetensors."""
    model = tiny_clip(half=True)
    archive = save_torchscript(model, tmp_path / "RN50.pt")
    weights = without_sizes(
        {k: v.float() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    )
    save_file(weights, tmp_path / "plain.safetensors")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    published = prepare.CLIP["clip-rn50"] | {"sha256": digest, "layers": list(TINY.vision_layers)}
    monkeypatch.setitem(prepare.CLIP, "clip-rn50", published)
    monkeypatch.setitem(clip_archive.PUBLISHED_DIGESTS, "RN50.pt", digest)
    made = {name: (tmp_path / name).read_bytes() for name in ("RN50.pt", "plain.safetensors")}
    archive.unlink()
    return made


def test_an_archive_and_its_safetensors_give_the_same_clip(server, run, clip, tmp_path):
    path = tmp_path / "pretrain/RN50.pt"
    server.put_hub(
        "timm/resnet50_clip.openai", {"open_clip_model.safetensors": clip["plain.safetensors"]}
    )
    sources = [server.put("none", b"", Answer(404)), prepare.CLIP["clip-rn50"]["sources"][1]]
    prepare.CLIP["clip-rn50"]["sources"] = sources
    run("clip-rn50")
    from_safetensors = read_clip(path)
    path.unlink()
    run("clip-rn50", "--mirror", server.put("RN50.pt", clip["RN50.pt"]).removesuffix("RN50.pt"))
    assert path.read_bytes() == clip["RN50.pt"]
    assert_same_tensors(read_clip(path), from_safetensors)


@pytest.mark.parametrize("name", ["RN50.pt", "plain.safetensors"])
def test_clip_comes_from_the_folder_given_in_either_form(run, clip, tmp_path, name):
    (tmp_path / "RN50.pt").write_bytes(clip[name])
    run("clip-rn50", "--from", tmp_path)
    assert (tmp_path / "pretrain/RN50.pt").read_bytes() == clip[name]


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
    assert reason in error(run, "clip-rn50", "--from", tmp_path)
    assert not list((tmp_path / "pretrain").iterdir())


# ------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("refcoco", lambda rows: [{k: v for k, v in r.items() if k != "raw_anns"} for r in rows],
            r"train-0.parquet has no column raw_anns: it has ref_id"),
        ("refcoco", lambda rows: [rows[0] | {"raw_anns": "no JSON"}], "row 0 is no ref"),
        ("refcoco", lambda rows: [*rows, rows[0] | {"ref_id": None}], "ref_id: must be"),
        ("refcoco", lambda rows: [polygon(r, [[1, 2]]) for r in rows], "unreadable segmentation"),
        ("refcoco", lambda rows: [photo(r, "gone.jpg") for r in rows], "gone.jpg does not exist"),
    ],
)  # fmt: skip
def test_parquet_that_is_odd_is_named(files, shapes, refer, run, tmp_path, name, rows, message):
    shutil.copytree(shapes / "images", tmp_path / "data/images")
    write_parquet(tmp_path / "given/train-0.parquet", rows(rows_of(refer)))
    told = error(run, name, "--source", "parquet", "--from", tmp_path / "given")
    assert re.search(message, told)
    assert not list((tmp_path / "data").rglob("*.lmdb"))


def polygon(row: dict, value: object) -> dict:
    return row | {"raw_anns": json.dumps(json.loads(row["raw_anns"]) | {"segmentation": value})}


def photo(row: dict, name: str) -> dict:
    return row | {
        "raw_image_info": json.dumps(json.loads(row["raw_image_info"]) | {"file_name": name})
    }


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more", b"<html>"])
def test_a_parquet_file_that_is_cut_off_is_named(run, tmp_path, content):
    (tmp_path / "train.parquet").write_bytes(content)
    told = error(run, "refcoco", "--source", "parquet", "--from", tmp_path)
    assert f"{tmp_path / 'train.parquet'} is no whole Parquet file" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("refcoco",), "empty/refcoco.zip: there is no such file.*put it into a folder"),
        (("clip-rn50",), "empty/RN50.pt: there is no such file.*put it into a folder"),
        (("refcoco-m",), r"has no \*.parquet: put the Parquet files of moondream/refcoco-m there"),
        (("refcocog_g", "--source", "parquet"), "no Parquet files of this split"),
    ],
)
def test_what_is_not_in_the_folder_is_named_and_not_downloaded(run, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    assert re.search(message, error(run, *arguments, "--from", tmp_path / "empty"))


def test_a_truncated_archive_in_the_folder_is_named(files, run, tmp_path):
    (tmp_path / "refcoco.zip").write_bytes((files / "refcoco.zip").read_bytes()[:-100])
    assert "refcoco.zip is no whole zip archive" in error(run, "refcoco", "--from", tmp_path)


def test_an_archive_without_the_annotations_is_named(shapes, run, tmp_path):
    zip_folder(tmp_path / "refcoco.zip", shapes / "images/train2014", "refcoco")
    assert "refcoco.zip lacks refcoco/instances.json" in error(run, "refcoco", "--from", tmp_path)


def test_without_any_network_one_line_says_what_to_do(run, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    for target in ("refcoco", "refcoco-eval"):
        told = error(run, target)
        assert "could not be" in told
        assert "--from FOLDER" in told


def test_all_of_the_data_is_compared_with_what_is_published(files, run, tmp_path):
    root = run("refcoco", "--from", files)
    where = ["--root", str(root), "--mirror", "http://127.0.0.1:1"]
    with pytest.raises(UserError, match=r"train.lmdb: .* refs, where 42,404 are published"):
        prepare.main(["refcoco", *where])
    with pytest.raises(UserError, match=r"images/train2014 has 13 photos, where 82,783"):
        prepare.main(["coco-train2014", *where])
    with pytest.raises(UserError, match=r"refcoco.zip has .* bytes, not 53,993,993"):
        prepare.main(["refcoco", "--root", str(tmp_path / "other"), "--from", str(files)])


def test_too_little_room_is_told_before_the_first_request(server, run, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = error(run, "refcoco", "--mirror", server.url)
    assert "annotations of refcoco needs about" in told
    assert not server.requests


def test_a_full_disk_is_told_and_what_is_whole_is_kept(files, run, tmp_path):
    with largest_file(5_000), pytest.raises(OSError, match="File too large") as caught:
        run("refcoco", "--from", files)
    assert str(caught.value.filename).startswith(str(tmp_path / "data"))
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert left == [tmp_path / "data/downloads/refcoco.zip"]


def test_the_program_ends_with_one_line_and_exit_code_1(tmp_path):
    command = [
        sys.executable,
        "tools/prepare.py",
        "refcoco",
        "--from",
        tmp_path,
        "--root",
        tmp_path,
    ]
    ending = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ending.returncode == 1
    assert ending.stderr.startswith("error: ")
    assert len(ending.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "arguments are required"),
        (("refcocog",), "invalid choice: 'refcocog'"),
        (("refcoco", "--from", "nowhere"), "--from nowhere is no folder"),
    ],
)
def test_a_mistyped_command_is_refused(run, capsys, arguments, message):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_each_file_has_two_sources_and_help_names_each_target(capsys):
    files = prepare.ARCHIVES | prepare.CLIP
    hosts = {n: {source.split("/")[2] for source in f["sources"]} for n, f in files.items()}
    assert [name for name in hosts if len(hosts[name]) < 2] == ["grefs.tar.gz"]  # one is known
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    told = capsys.readouterr().out
    assert all(target in told for target in prepare.TARGETS)
