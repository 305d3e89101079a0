"""`train.py --dry-run`: a step and a validation batch, and not one file."""

import re
import sys
from unittest import mock

import pytest
import torch
from helpers import (
    build_run,
    error_of,
    files,
    read_jsonl,
    run_command,
    run_program,
    torchrun,
    write_config,
)

from engine.dry_run import dry_run
from utils import distributed
from utils.machine import peak_memory


@pytest.mark.parametrize("ranks", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_of_their_own_take_a_step_and_write_nothing(config, data, tmp_path, ranks):
    opts = ("TRAIN.accumulation_steps", 2, "TRAIN.wandb", "offline", "TRAIN.workers", 1)
    opts += ("DATA.cache", tmp_path / "cache")
    command = ("train.py", "--dry-run", "--config", config, "--opts", *opts)
    before = files(tmp_path), files(data)
    ending = torchrun(ranks, *command) if ranks else run_command(sys.executable, *command)
    text = ending.stderr
    assert ending.returncode == 0, text
    step = r"step of 8 refs in [\d.]+ s: loss [\d.]+; peak memory ([\d.]+) GiB"
    (peak,) = re.findall(step, text)
    assert 0.1 < float(peak) < 8
    assert re.search(r"one validation batch, \d+ sentences, in [\d.]+ s: mIoU [\d.]+;", text)
    assert "dry run: nothing was written to " in text
    assert (files(tmp_path), files(data)) == before


def test_the_launcher_hands_it_to_every_rank(monkeypatch):
    command = ["train.py", "--dry-run", "--config", "x.yaml"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with mock.patch("torch.distributed.run.main") as main:
        distributed.launch()
    assert main.call_args.args[0][-4:] == command


def test_it_is_the_step_that_training_would_take(data, tmp_path, capfd):
    config = write_config(tmp_path, data, dropout=0.2, accumulation_steps=2, print_freq=1)
    run_program("train.py", config)
    opts = ("TRAIN.epochs", 2, "TRAIN.resume", "auto")
    before = files(tmp_path)
    run_program("train.py", config, *opts, switches=("--dry-run",))
    assert files(tmp_path) == before
    told = re.search(r"one step of 8 refs in .*: loss ([\d.]+);", capfd.readouterr().err)
    run_program("train.py", config, *opts)
    losses = [r["loss"] for r in read_jsonl(tmp_path / "exp/tiny/metrics.jsonl") if r["epoch"] == 2]
    assert float(told[1]) == pytest.approx(losses[0], abs=1e-4)


def test_a_run_that_is_in_the_folder_already_stays(config, tmp_path, capfd):
    old = tmp_path / "exp" / "tiny" / "last_model.pth"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"of an earlier run")
    before = files(tmp_path)
    run_program("train.py", config, switches=("--dry-run",))
    assert files(tmp_path) == before
    assert "TRAIN.force" not in capfd.readouterr().err  # the options are those that were given


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_run_that_was_stopped_in_its_validation_takes_a_step_of_the_next_epoch(
    config, capfd, precision
):
    run = build_run(config, "TRAIN.precision", precision)
    run.position = run.step = len(run.train_loader)
    dry_run(run)
    loss = re.search(r"loss ([\d.]+)", capfd.readouterr().err)
    assert float(loss[1]) > 0


def test_errors_are_those_of_a_training(config, tmp_path):
    for opts, message in (
        (("TRAIN.batch_size", 7, "TRAIN.accumulation_steps", 2), "must be a multiple of 1 x 2"),
        (("DATA.val_lmdb", tmp_path / "no.lmdb"), "no.lmdb"),
        (("TRAIN.resume", tmp_path / "no.pth"), "there is no checkpoint"),
    ):
        assert message in error_of("train.py", config, *opts, switches=("--dry-run",))
    assert not (tmp_path / "exp").exists()


def test_an_option_after_opts_is_refused(config, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_program("train.py", config, "TRAIN.epochs", 1, "--dry-run")
    assert "--dry-run must stand before --opts" in capsys.readouterr().err


def test_a_step_that_is_left_out_is_told(config, capfd):
    run = build_run(config)
    with torch.no_grad():
        run.model.proj.txt.weight[0, 0] = torch.nan
    dry_run(run)
    assert "the step was left out: its gradients are not finite" in capfd.readouterr().err


def test_peak_memory_counts_what_was_held_and_given_back():
    before = peak_memory()
    assert before > 50 * 2**20
    torch.zeros(max(before, 2**30) // 4).sum()  # as much again, at least
    grown = peak_memory()
    assert grown > before + 2**29
    assert peak_memory() >= grown
