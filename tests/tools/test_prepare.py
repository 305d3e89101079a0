"""tools/prepare.py: from archives to verified records, each step once, and every way to fail."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT
from odd_server import Answer, OddServer, serve

from model import clip_archive
from tools import download, prepare, refshapes
from tools.prepare import Done, State, Step
from utils.errors import UserError
from utils.records import RecordReader

COUNTS = {"train": 6, "val": 3, "testA": 2, "testB": 2}
SPLITS = list(COUNTS)
STEPS = ["get refcoco.zip", "unpack refcoco.zip", "annotations and masks", "get train2014.zip",
         "unpack train2014.zip", *(f"pack {split}" for split in SPLITS), "verify"]  # fmt: skip


def zip_folder(path: Path, *folders: tuple[Path, str]) -> Path:
    """An archive of folders, each under a name of its own."""
    with zipfile.ZipFile(path, "w") as archive:
        for folder, name in folders:
            for file in sorted(folder.iterdir()):
                archive.write(file, f"{name}/{file.name}")
    return path


@pytest.fixture(scope="session")
def archives(tmp_path_factory) -> Path:
    """RefShapes as if it were RefCOCO: refcoco.zip and train2014.zip in a folder."""
    shapes, folder = tmp_path_factory.mktemp("shapes"), tmp_path_factory.mktemp("archives")
    refshapes.generate(shapes, COUNTS, seed=1)
    zip_folder(folder / "refcoco.zip", (shapes / "refshapes", "refcoco"))
    zip_folder(folder / "train2014.zip", (shapes / "images/train2014", "train2014"))
    return folder


@pytest.fixture
def server(archives, monkeypatch) -> Iterator[OddServer]:
    """Serves the archives."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.01)
    with serve() as odd:
        for path in archives.iterdir():
            odd.put(path.name, path.read_bytes())
        yield odd


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "data"


def run(root: Path, *arguments: object) -> None:
    where = ["--root", str(root), "--pretrain", str(root / "pretrain")]
    prepare.main([*map(str, arguments), *where])


def steps(output: str) -> list[str]:
    """The steps that a run took."""
    return [line.partition(": ")[2] for line in output.splitlines() if line.startswith("[")]


def publish(monkeypatch, archives: Path, **changes) -> None:
    """Let the archives be what is published; `changes` over that."""
    photos = {"size": (archives / "train2014.zip").stat().st_size, "photos": sum(COUNTS.values())}
    monkeypatch.setattr(prepare, "PHOTOS", replace(prepare.PHOTOS, **(photos | changes)))


def fails(root: Path, *arguments: object) -> str:
    with pytest.raises(UserError) as caught:
        run(root, *arguments)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


# -------------------------------------------------------------------------------- the whole way


def test_one_command_leads_from_addresses_to_verified_records(server, root, capsys):
    run(root, "refcoco", "--mirror", server.url, "--subset")
    output = capsys.readouterr().out
    assert steps(output) == STEPS
    assert sorted(name for name, _ in server.requests) == ["refcoco.zip", "train2014.zip"]
    lmdb = root / "lmdb/refcoco"
    for split, images in COUNTS.items():
        meta = RecordReader(lmdb / f"{split}.lmdb").meta
        assert (meta["dataset"], meta["split"], meta["images"]) == ("refcoco", split, images)
        assert (lmdb / f"{split}.jpg").is_file()
    assert output.count("checked  every record: no fault") == 4
    assert f"refcoco is ready: {lmdb / 'train.lmdb'}" in output
    (record,) = (v for k, v in state_of(root, "refcoco").items() if "get" in k)
    assert record["sha256"] == sha256(root / "downloads/refcoco.zip")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_of(root: Path, owner: str) -> dict:
    return json.loads((root / ".prepare" / f"{owner}.json").read_text())


def test_archives_that_are_there_are_used_without_network(archives, root, capsys, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", None)
    run(root, "refcoco", "--from", archives, "--subset")
    assert steps(capsys.readouterr().out) == STEPS
    assert not (root / "downloads").exists()


@pytest.mark.parametrize(
    ("target", "folder", "splits"),
    [
        ("refcoco", "refcoco", {"train": 38, "val": 13, "testA": 4, "testB": 8}),
        ("refcoco+", "refcoco+", {"val": 13, "testA": 4, "testB": 8}),
        ("refcocog_u", "refcocog", {"train": 23, "val": 8, "test": 4}),
    ],
)
def test_real_photos_go_the_whole_way(mini_root, tmp_path, root, target, folder, splits):
    zip_folder(tmp_path / f"{folder}.zip", (mini_root / folder, folder))
    zip_folder(tmp_path / "train2014.zip", (mini_root / "images/train2014", "train2014"))
    run(root, target, "--from", tmp_path, "--subset")
    files = sorted((root / "lmdb" / target).glob("*.lmdb"))
    assert {path.stem: len(RecordReader(path)) for path in files} == splits


# ------------------------------------------------------------------------------- each step once


def test_a_second_run_does_nothing_even_without_archives_photos_and_masks(
    server, root, capsys, archives
):
    run(root, "refcoco", "--mirror", server.url, "--subset")
    for folder in ("downloads", "images", "masks", "refer", "anns"):
        (root / folder).rename(root.parent / folder)
    capsys.readouterr()
    server.requests.clear()
    run(root, "refcoco", "--mirror", server.url, "--subset")
    output = capsys.readouterr().out
    assert steps(output) == []
    assert "refcoco is ready" in output
    assert server.requests == []


@pytest.mark.parametrize(
    ("lost", "again"),
    [
        ("lmdb/refcoco/val.lmdb", ["pack val", "verify"]),
        ("lmdb/refcoco/val.jpg", ["verify"]),
        ("masks/refcoco", []),
        ("images/train2014", []),
    ],
)
def test_what_is_lost_is_made_again_and_nothing_else(archives, root, capsys, lost, again):
    run(root, "refcoco", "--from", archives, "--subset")
    (root / lost).rename(root.parent / "lost")
    capsys.readouterr()
    run(root, "refcoco", "--from", archives, "--subset")
    assert steps(capsys.readouterr().out) == again


def test_photos_are_unpacked_again_when_packing_needs_them(archives, root, capsys):
    run(root, "refcoco", "--from", archives, "--subset")
    (root / "images/train2014").rename(root.parent / "lost")
    (root / "lmdb/refcoco/val.lmdb").unlink()
    capsys.readouterr()
    run(root, "refcoco", "--from", archives, "--subset")
    assert steps(capsys.readouterr().out) == ["unpack train2014.zip", "pack val", "verify"]


@pytest.mark.parametrize("stop", range(len(STEPS)))
def test_interrupted_anywhere_it_continues(archives, root, capsys, monkeypatch, stop):
    record, taken = State.record, []

    def interrupted(self: State, step: Step, done: Done) -> None:
        taken.append(step)
        if len(taken) == stop + 1:
            raise KeyboardInterrupt
        record(self, step, done)

    with monkeypatch.context() as patch:
        patch.setattr(State, "record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(root, "refcoco", "--from", archives, "--subset")
    capsys.readouterr()
    run(root, "refcoco", "--from", archives, "--subset")
    assert steps(capsys.readouterr().out) == STEPS[stop:]
    assert len(RecordReader(root / "lmdb/refcoco/train.lmdb")) > 0


def test_killed_while_downloading_it_goes_on_at_that_byte(server, root, tmp_path):
    (tmp_path / "x").mkdir()
    for number in range(20):
        (tmp_path / f"x/{number}.jpg").write_bytes(os.urandom(50_000))
    path = zip_folder(tmp_path / "x.zip", (tmp_path / "x", "train2014"))
    half = path.stat().st_size // 2
    server.put("train2014.zip", path.read_bytes(), Answer(cut=half, stall=True))
    command = [sys.executable, "tools/prepare.py", "coco-train2014", "--subset"]
    command += ["--root", root, "--mirror", server.url]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    part = root / "downloads/train2014.zip.part"
    deadline = time.monotonic() + 60
    while not part.exists() or part.stat().st_size < half // 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    here = part.stat().st_size
    assert 0 < here <= half
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert server.requests == [("train2014.zip", None), ("train2014.zip", f"bytes={here}-")]
    assert len(os.listdir(root / "images/train2014")) == 20


def test_what_was_made_from_another_archive_is_made_again(tmp_path):
    state = State(tmp_path, is_subset=False)
    archive, product = tmp_path / "archive", tmp_path / "product"
    first = Step("toys", "get", lambda: Done([archive]))
    second = Step("toys", "pack", lambda: Done([product]), (first,))
    for path in (archive, product):
        path.write_bytes(b"1234")
    state.record(first, Done([archive], sha256="one"))
    state.record(second, Done([product]))
    assert state.is_done(first)
    assert state.is_done(second)
    state.record(first, Done([archive], sha256="two"))
    assert not state.is_done(second)


def test_what_was_done_for_a_part_of_the_data_does_not_count_for_all_of_it(tmp_path):
    (tmp_path / "x").write_bytes(b"1")
    step = Step("toys", "get", lambda: Done([tmp_path / "x"]))
    State(tmp_path, is_subset=True).record(step, Done([tmp_path / "x"]))
    assert not State(tmp_path, is_subset=False).is_done(step)


def test_what_a_person_unpacked_is_used_and_no_archive_is_asked_for(
    archives, root, capsys, monkeypatch, tmp_path
):
    publish(monkeypatch, archives)
    monkeypatch.setattr(prepare, "PUBLISHED", {"refcoco": prepare.PUBLISHED["refcoco"]})
    for name, folder in (("refcoco.zip", "refer"), ("train2014.zip", "images")):
        with zipfile.ZipFile(archives / name) as archive:
            archive.extractall(root / folder)
    (tmp_path / "empty").mkdir()
    message = fails(root, "refcoco", "--from", tmp_path / "empty")
    assert "faults" in message  # of the counts: the data are RefShapes
    assert steps(capsys.readouterr().out) == [s for s in STEPS if "get" not in s]


def test_both_splits_of_gref_share_one_archive_and_all_is_everything(root):
    state = State(root, is_subset=False)
    place = prepare.Workplace(root, root / "pretrain", None, (), False, state)
    needed: dict[str, Step] = {}
    for target in prepare.TARGETS:
        prepare.add_undone(place.target(target), state, needed)
    names = [step.name for step in needed.values()]
    assert len(names) == len(needed) == 31
    for name in ("refcoco.zip", "refcoco+.zip", "refcocog.zip", "train2014.zip", "RN50.pt"):
        assert names.count(f"get {name}") == 1
    assert [k for k in needed if k.startswith("refcocog_g")] == [
        "refcocog_g: annotations and masks",
        "refcocog_g: pack train",
        "refcocog_g: pack val",
        "refcocog_g: verify",
    ]


# --------------------------------------------------------------------------------------- CLIP


@pytest.fixture
def weights(tmp_path, monkeypatch) -> bytes:
    """What RN50.pt is in this test, by its digest."""
    path = tmp_path / "RN50.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("RN50/data.pkl", os.urandom(50_000))
    monkeypatch.setitem(clip_archive.PUBLISHED_DIGESTS, "RN50.pt", sha256(path))
    return path.read_bytes()


def test_clip_goes_into_its_folder_with_its_digest_checked(server, root, weights, capsys):
    server.put("RN50.pt", weights, Answer(cut=20_000), Answer(503))
    run(root, "clip-rn50", "--mirror", server.url)
    assert (root / "pretrain/RN50.pt").read_bytes() == weights
    run(root, "clip-rn50", "--mirror", server.url)
    output = capsys.readouterr().out
    assert steps(output) == ["get RN50.pt"]
    assert output.count(f"clip-rn50 is ready: {root / 'pretrain/RN50.pt'}") == 2


def test_clip_with_another_digest_is_refused(server, root, weights):
    server.put("RN50.pt", weights[:-1] + b"!")
    message = fails(root, "clip-rn50", "--mirror", server.url)
    assert "has SHA-256" in message
    assert os.listdir(root / "pretrain") == []


def test_clip_is_copied_from_the_folder_given(root, weights, tmp_path):
    run(root, "clip-rn50", "--from", tmp_path)
    assert (root / "pretrain/RN50.pt").read_bytes() == weights


def test_a_damaged_clip_in_its_place_is_named(root, weights):
    (root / "pretrain").mkdir(parents=True)
    (root / "pretrain/RN50.pt").write_bytes(weights[:-1])
    message = fails(root, "clip-rn50", "--mirror", "http://127.0.0.1:1")
    assert f"{root / 'pretrain/RN50.pt'} has SHA-256" in message
    assert "delete it" in message


# ------------------------------------------------------------------------------------ refusals


def test_hosts_are_tried_in_order_and_the_bad_one_is_named(server, root, capsys, archives):
    server.put("bad/train2014.zip", b"<html>")
    bad = f"{server.url}/bad"
    run(root, "coco-train2014", "--subset", "--mirror", bad, "--mirror", server.url)
    assert f"{bad}/train2014.zip: answers with a web page" in capsys.readouterr().err
    assert len(os.listdir(root / "images/train2014")) == sum(COUNTS.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"size": 5}, "offers .* bytes, but the file has 5"),
        ({"photos": 99}, "holds 13 photos in train2014/, where 99 are published"),
        ({"folder": "val2014"}, "holds 0 photos in val2014/"),
        ({"sha256": "0" * 64}, "has SHA-256 .*, not 0000"),
        ({"files": ("licence.txt",)}, "is an archive without train2014/licence.txt"),
    ],
)
def test_a_download_that_is_not_the_published_file_is_refused(
    server, root, archives, monkeypatch, change, reason
):
    publish(monkeypatch, archives, **change)
    with pytest.raises(UserError, match=rf"could not be downloaded \(.*{reason}"):
        run(root, "coco-train2014", "--mirror", server.url)
    assert not (root / "images").exists()


def test_an_archive_in_the_folder_that_is_not_the_published_one_is_named(root, archives):
    message = fails(root, "coco-train2014", "--from", archives)
    assert f"{archives / 'train2014.zip'} has" in message
    assert "not 13,510,573,713: delete it" in message


def test_an_archive_without_the_split_asked_for_is_named(root, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/instances.json").write_text("{}")
    (tmp_path / "x/refs(google).p").write_bytes(pickle.dumps([]))
    zip_folder(tmp_path / "refcoco.zip", (tmp_path / "x", "refcoco"))
    message = fails(root, "refcoco", "--from", tmp_path)
    assert "refcoco.zip is an archive without refcoco/refs(unc).p" in message


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 and no more"])
def test_what_is_no_archive_is_named(root, tmp_path, content):
    (tmp_path / "refcoco.zip").write_bytes(content)
    assert "refcoco.zip is no whole zip archive" in fails(root, "refcoco", "--from", tmp_path)


def test_a_hostile_archive_is_refused_and_nothing_is_unpacked(root, tmp_path):
    with zipfile.ZipFile(tmp_path / "refcoco.zip", "w") as archive:
        for name in ("instances.json", "refs(unc).p", "../../../evil"):
            archive.writestr(f"refcoco/{name}", "{}")
    message = fails(root, "refcoco", "--from", tmp_path)
    assert "its entry 'refcoco/../../../evil' is a link or leads out" in message
    assert [p.name for p in root.rglob("*") if p.is_file()] == []
    assert not list(tmp_path.parent.glob("evil"))


def test_an_archive_that_is_not_in_the_folder_is_named_and_not_downloaded(
    root, tmp_path, monkeypatch
):
    monkeypatch.setattr(download.urllib.request, "urlopen", None)
    message = fails(root, "refcoco", "--from", tmp_path)
    assert f"{tmp_path} has no refcoco.zip" in message


def test_too_little_room_for_everything_is_told_before_the_first_request(server, root, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=12 * 10**9))
    message = fails(root, "refcoco", "--mirror", server.url)
    assert "everything that is still to do needs about 30.8 GB in" in message
    assert "where 12.0 GB are free" in message
    assert server.requests == []
    assert not root.exists()


def test_too_little_room_for_the_records_is_told_before_packing(archives, root, monkeypatch):
    run(root, "coco-train2014", "--from", archives, "--subset")

    def check(folder: Path, need: int, what: str) -> None:
        if "packing" in what:
            assert need > sum(
                p.stat().st_size for p in (root / "images/train2014").glob("*_00*1.jpg")
            )
            raise UserError(f"{what} in {folder}: no room")

    monkeypatch.setattr(prepare, "check_space", check)
    assert fails(root, "refcoco", "--from", archives, "--subset").startswith("packing train in")


@pytest.mark.parametrize("content", ["[{", "[3]", "{}"])
def test_annotations_that_were_damaged_meanwhile_are_named(archives, root, content):
    run(root, "refcoco", "--from", archives, "--subset")
    path = root / "anns/refcoco/val.json"
    size = path.stat().st_size
    path.write_text(content.ljust(size))  # of the size recorded
    (root / "lmdb/refcoco/val.lmdb").unlink()
    assert f"{path}" in fails(root, "refcoco", "--from", archives, "--subset")


def test_other_counts_than_published_are_faults(archives, root, capsys, monkeypatch):
    publish(monkeypatch, archives)
    message = fails(root, "refcoco", "--from", archives)
    lmdb = root / "lmdb/refcoco"
    assert message.startswith(f"{lmdb / 'train.lmdb'}, {lmdb / 'val.lmdb'}, ")
    refs = len(RecordReader(lmdb / "val.lmdb"))
    assert f"FAULT    {refs} refs, where 3,811 are published" in capsys.readouterr().out
    assert "refcoco: verify" not in state_of(root, "refcoco")


@pytest.mark.parametrize(
    "content",
    [
        *('{"refcoco: get', "[1]", "null", "[" * 100_000, '{"refcoco.zip: get refcoco.zip": 3}'),
        '{"refcoco: pack val": {"subset": true}}',
    ],
    ids=lambda text: text[:20],
)
def test_a_damaged_record_of_steps_is_named(archives, root, content):
    (root / ".prepare").mkdir(parents=True)
    (root / ".prepare/refcoco.json").write_text(content)
    message = fails(root, "refcoco", "--from", archives, "--subset")
    assert f"{root / '.prepare/refcoco.json'} is damaged: delete it" in message


def test_the_program_ends_with_one_line_and_exit_code_1(root, tmp_path):
    command = [sys.executable, "tools/prepare.py", "refcoco", "--root", root, "--from", tmp_path]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path} has no refcoco.zip")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["refcoc"], "invalid choice: 'refcoc'"),
        ([], "required: TARGET"),
        (["refcoco", "--mirror", "file:///etc"], "does not begin with http"),
        (["refcoco", "--from", "no/such/folder"], "no/such/folder is no folder"),
    ],
)
def test_a_mistyped_command_is_refused(root, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(root, *arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_target_with_its_size(capsys):
    with pytest.raises(SystemExit):
        prepare.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for target in prepare.TARGETS:
        (line,) = (line for line in lines if line.startswith(f"  {target} "))
        assert " MB" in line or " GB" in line
    assert "about 45 MB" in next(line for line in lines if line.startswith("  refcoco "))
