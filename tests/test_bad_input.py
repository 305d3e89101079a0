"""What a person can get wrong: one line that names it and the remedy, exit code 1, no traceback.

Errors of the data preparation tools are in the tests of those tools.
"""

import pickle
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess
from unittest import mock

import pytest
import torch
from helpers import (
    all_refs,
    error_of,
    load,
    put,
    repack,
    run_command,
    with_bad_image,
    write_config,
)

from utils.errors import UserError, loader_loss, run_entry_point
from utils.records import RecordReader


def left_behind(folder: Path) -> set[str]:
    """What a run wrote below its output folder."""
    return {path.name for path in (folder / "exp").rglob("*") if path.is_file()}


def train_error(config: Path, *opts: object) -> str:
    """How training ends; nothing may be written by then."""
    line = error_of("train.py", config, *opts)
    assert left_behind(config.parent) == set()
    return line


ANY_SPLIT = ("DATA.allow_mismatch", True)


def errors_of(config: Path, lmdb: Path, checkpoint: Path) -> tuple[str, str, str]:
    """How trainings on these records, validations and scorings of them end."""
    scored = ("TEST.weights", checkpoint, "TEST.test_lmdb", lmdb)
    return (
        error_of("train.py", config, "DATA.train_lmdb", lmdb, *ANY_SPLIT),
        error_of("train.py", config, "DATA.val_lmdb", lmdb, *ANY_SPLIT),
        error_of("test.py", config, *scored, *ANY_SPLIT),
    )


# --------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("opts", "messages"),
    [
        (["TRAIN.epoch", 3], ["unknown key TRAIN.epoch", "did you mean TRAIN.epochs?"]),
        (["TRAIN.batch_size", 9000], ["training split has", "one batch of 9000", "batch_size"]),
        (["TRAIN.batch_size", 1], ["TRAIN.batch_size 1 must be", "for batch norm, at least 2"]),
        (["TRAIN.clip_arch", None, "TRAIN.clip_pretrain", "no.pt"],
            ["TRAIN.clip_pretrain: no.pt: there is no such CLIP", "tools/prepare_datasets.md"]),
        (["TRAIN.num_head", 7], ["TRAIN.num_head 7 does not divide the width 64"]),
        (["TRAIN.clip_arch", None], ["TRAIN.clip_pretrain and TRAIN.clip_arch are both null"]),
        (["TRAIN.clip_arch.vocab_size", 512], ["has 512 tokens", "TRAIN.clip_arch.vocab_size"]),
        (["TRAIN.weight", "no.pth"], ["TRAIN.weight: there is no checkpoint no.pth"]),
        (["TRAIN.resume", "no.pth"], ["TRAIN.resume: there is no checkpoint no.pth"]),
        (["DATA.train_lmdb", "no/t.lmdb"], ["no/t.lmdb does not exist", "tools/folder2lmdb.py"]),
        (["DATA.val_lmdb", "no/v.lmdb"], ["no/v.lmdb does not exist", "tools/folder2lmdb.py"]),
    ],
)  # fmt: skip
def test_values_that_cannot_be(config, opts, messages):
    line = train_error(config, *opts)
    for message in messages:
        assert message in line


# ------------------------------------------------------------------------------------- archives


def test_an_archive_that_does_not_fit(config, checkpoint, tmp_path):
    weights = load(checkpoint)["state_dict"]
    clip = {
        key.removeprefix("backbone."): value
        for key, value in weights.items()
        if key.startswith("backbone.") and ".connect." not in key
    }
    opts = ("TRAIN.clip_arch", None, "TRAIN.clip_pretrain", tmp_path / "archive.pt")
    torch.save(clip, opts[-1])
    line = train_error(config, *opts, "TRAIN.word_dim", 1024)
    assert "TRAIN.word_dim 1024 does not fit the CLIP: use 64 or null" in line
    torch.save(clip | {"visual.adapter": torch.ones(3)}, opts[-1])
    assert "unexpected ['visual.adapter']" in train_error(config, *opts)


# ---------------------------------------------------------------------------------------- LMDBs


RELEASE = {b"0": pickle.dumps({"img": b""}), b"__keys__": b"", b"__len__": b"1"}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (RELEASE, "is in the release's pickled format, which is not read: re-pack with"),
        ({b"__meta__": b'{"format_version": 1, "refs": 0}'}, "it holds no refs"),
        (None, "no LMDB can be read from"),
    ],
)
def test_records_that_are_none(config, tmp_path, checkpoint, entries, message):
    path = tmp_path / "split.lmdb"
    path.write_text("train") if entries is None else put(path, entries)
    for line in errors_of(config, path, checkpoint):
        assert message in line
        assert str(path) in line
    assert left_behind(tmp_path) == set()


@pytest.mark.parametrize(("workers", "content"), [(0, b"\xff\xd8\xff\xe0 no photo"), (1, b"")])
def test_an_image_that_cannot_be_decoded(data, tmp_path, checkpoint, workers, content):
    config = write_config(tmp_path, data, workers=workers, workers_val=workers)
    source = data / "lmdb/shapes/val.lmdb"
    bad = with_bad_image(source, tmp_path / "bad.lmdb", content)
    key = RecordReader(source).index.image_keys[-1]
    fault = f"cannot be decoded ({len(content)} bytes" if content else "is an empty file"
    for line in errors_of(config, bad, checkpoint):
        assert line.startswith(f"{bad}, image {key} {fault}")
    names = left_behind(tmp_path)
    assert not any(name.endswith((".pth", ".partial")) for name in names)
    assert not any(name.startswith("test_") for name in names)


def test_records_that_lack_an_image_or_a_whole_mask(config, data, tmp_path, checkpoint):
    source, bad = data / "lmdb/shapes/val.lmdb", tmp_path / "bad.lmdb"
    shutil.copy(source, bad)
    key = RecordReader(bad).index.image_keys[-1]
    put(bad, {f"image:{key}".encode(): None})
    message = f"{bad} has no image:{key}: re-pack with python tools/folder2lmdb.py"
    for line in errors_of(config, bad, checkpoint):
        assert line.startswith(message)
    bad = tmp_path / "masks.lmdb"
    repack(source, bad, [replace(ref, mask=b"no PNG") for ref in all_refs(source)])
    for line in errors_of(config, bad, checkpoint):
        assert re.match(r"mask of ref \d+ cannot be decoded \(6 bytes", line)


def test_an_output_folder_that_is_a_file(config, tmp_path):
    (taken := tmp_path / "taken").write_text("")
    assert str(taken) in error_of("train.py", config, "TRAIN.output_folder", taken)


# -------------------------------------------------------------------------------------- test.py


def test_testing_before_training(config, tmp_path):
    line = error_of("test.py", config)
    assert f"TEST.weights: there is no checkpoint {tmp_path / 'exp/tiny/best_model.pth'}" in line
    assert "train first" in line


def test_a_checkpoint_whose_clip_lacks_something(config, checkpoint, tmp_path):
    content = load(checkpoint)
    del content["state_dict"]["backbone.ln_final.weight"]
    torch.save(content, tmp_path / "torn.pth")
    weights = ("TEST.weights", tmp_path / "torn.pth")
    line = error_of("test.py", config, *weights, "TRAIN.clip_arch", None)
    assert line.startswith(f"TEST.weights: {tmp_path / 'torn.pth'}: ")
    assert "ln_final.weight" in line
    assert 'Missing key(s) in state_dict: "backbone.ln_final.weight"' in error_of(
        "test.py", config, *weights
    )


# ---------------------------------------------------------------------------- as a person sees it


def one_line(ending: CompletedProcess, message: str) -> None:
    last = ending.stderr.splitlines()[-1]
    assert (ending.returncode, ending.stdout) == (1, "")
    assert last.startswith("error: ")
    assert message in last
    assert ending.stderr.count("error: ") == 1
    assert "Traceback" not in ending.stderr


def test_the_terminal_shows_one_line(tmp_path):
    ending = run_command(sys.executable, "-u", "train.py", "--config", tmp_path / "no.yaml")
    one_line(ending, f"config file {tmp_path / 'no.yaml'}")
    assert len(ending.stderr.splitlines()) == 1


def test_the_terminal_shows_one_line_for_an_error_in_a_loaders_process(data, tmp_path):
    config = write_config(tmp_path, data, workers=1)
    bad = with_bad_image(data / "lmdb/shapes/train.lmdb", tmp_path / "bad.lmdb", b"")
    opts = ("--opts", "DATA.train_lmdb", bad, "TRAIN.epochs", 5, *ANY_SPLIT)
    ending = run_command(sys.executable, "-u", "train.py", "--config", config, *opts)
    one_line(ending, "is an empty file")


@pytest.mark.parametrize("error", [UserError("no such thing"), MemoryError()])
def test_a_traceback_is_shown_on_demand(monkeypatch, error):
    with pytest.raises(SystemExit, match="error: "):
        run_entry_point(mock.Mock(side_effect=error))
    monkeypatch.setenv("CRIS_TRACEBACK", "1")
    with pytest.raises(type(error)):
        run_entry_point(mock.Mock(side_effect=error))


def test_too_little_memory_is_told_with_its_remedy():
    on_a_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has")
    for fail, amount in (
        (mock.Mock(side_effect=on_a_gpu), " for 20.00 MiB more"),
        (lambda: torch.empty(10**15), " for 4000000000000000 bytes more"),
        (lambda: bytearray(2**62), ""),
    ):
        with pytest.raises(SystemExit, match=f"error: there is not enough memory{amount}; lower"):
            run_entry_point(fail)
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            fail()
        assert loader_loss(caught.value) is None


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_entry_point(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="must match"):
        run_entry_point(lambda: torch.ones(2) + torch.ones(3))


def test_stopping_by_hand_is_no_error():
    with pytest.raises(SystemExit) as ending:
        run_entry_point(mock.Mock(side_effect=KeyboardInterrupt))
    assert ending.value.code == 130


@pytest.mark.parametrize(
    ("where", "message"),
    [
        *[(">&-", ""), ("2>&-", ""), ("| true", ""), ("2>&1 | true", "")],  # nobody reads it
        (">/dev/full", "error: the output could not be written: No space left on device\n"),
    ],
)
def test_a_program_whose_output_cannot_be_written(where, message):
    program = "from utils.errors import run_entry_point as run; run(lambda: print('a line'))"
    ending = run_command("bash", "-c", f'{sys.executable} -c "{program}" {where}')
    assert (ending.returncode, ending.stderr) == (int(bool(message)), message)


def test_words_that_a_redirected_output_of_windows_has_no_letters_for_are_escaped():
    program = "from utils.errors import run_entry_point as run; run(lambda: print('● 犬', flush=1))"
    ending = run_command(sys.executable, "-c", program, PYTHONIOENCODING="cp1252", PYTHONUTF8="1")
    assert (ending.returncode, ending.stdout, ending.stderr) == (0, "\\u25cf \\u72ac\n", "")


@pytest.mark.parametrize(
    ("key", "option"), [("workers", "size=4k"), ("workers_val", "size=4k"), ("workers", "ro")]
)
def test_training_in_a_container_with_a_small_dev_shm_or_none(config, tmp_path, key, option):
    mount = f"mount -t tmpfs -o {option} tmpfs /dev/shm"
    if run_command("unshare", "-m", "bash", "-c", mount).returncode:
        pytest.skip("no tmpfs may be mounted here")
    command = f"{sys.executable} train.py --config {config} --opts TRAIN.{key} 1"
    ending = run_command("unshare", "-m", "bash", "-c", f"{mount} && exec {command}")
    one_line(ending, "/dev/shm has 0 MB free")
    assert "docker run --shm-size=8g" in ending.stderr
    assert left_behind(tmp_path) == set()
