"""Stopping and going on: checkpoints within epochs, signals, kills, torn files, full disks."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    ALONE,
    ROOT,
    assert_equal_runs,
    assert_same,
    build_run,
    error_of,
    largest_file,
    load,
    on_cpu,
    read_metrics,
    run_command,
    run_program,
    save_photo,
    write_config,
)

from engine import resume, tester, trainer
from utils import lock, signals
from utils.checkpoint import find_newest
from utils.config import load_config
from utils.errors import UserError

EPOCHS = 2
REMEDIES = ("TRAIN.resume auto", "TRAIN.exp_name another name", "TRAIN.force True")


def recipe(folder: Path, data: Path, **train_keys) -> Path:
    """Dropout on, two passes a step, a line every second step: everything that has to be saved."""
    keys = {"dropout": 0.2, "epochs": EPOCHS, "accumulation_steps": 2, "print_freq": 2}
    return write_config(folder, data, **(keys | train_keys))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data) -> Path:
    """The folder of an uninterrupted run that kept a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("straight")
    run_program("train.py", recipe(folder, data, save_every="1", keep_checkpoints=99))
    return folder / "exp/tiny"


@pytest.fixture
def config(tmp_path, data) -> Path:
    """The config of the same run in a folder of its own, where nothing is yet."""
    return recipe(tmp_path, data)


@pytest.fixture
def folder(config) -> Path:
    """The run folder of `config`."""
    return config.parent / "exp/tiny"


@pytest.fixture
def ended(straight, folder) -> Path:
    """The run folder of `config`, in which the uninterrupted run has trained."""
    return shutil.copytree(straight, folder)


def steps_of(folder: Path) -> list[int]:
    """The steps whose checkpoints are kept."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pth"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------ exact resuming


def test_saving_within_epochs_changes_nothing(straight, config, folder):
    run_program("train.py", config)
    assert_equal_runs(folder, straight)
    assert steps_of(folder) == []


@pytest.mark.parametrize("step", ["first", "middle of a window", "last of an epoch"])
def test_a_run_resumed_at_any_step_equals_one_that_was_never_stopped(straight, config, ended, step):
    per_epoch = steps_of(straight)[-1] // EPOCHS
    number = {"first": 1, "middle of a window": per_epoch + 1, "last of an epoch": per_epoch}[step]
    # What the run had written since is there, and a line that was being written.
    with (ended / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "epo')
    source = ended / f"step_{number:08d}.pth"
    if step == "last of an epoch":  # its validation was interrupted: the step is saved, not more
        state = load(source) | {"position": per_epoch, "epoch": 0, "best_iou": -1.0}
        assert state["step"] == number
        source = ended / "before_validation.pth"
        torch.save(state, source)
        (ended / "best_model.pth").unlink()
    run_program("train.py", config, "TRAIN.resume", source)
    assert_equal_runs(ended, straight)


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_ends_like_one_that_never_was(tmp_path, data, capsys):
    keys = {"epochs": 14, "save_every": "2", "accumulation_steps": 1}
    whole = recipe(tmp_path / "whole", data, **keys)
    killed = recipe(tmp_path / "killed", data, **keys)
    run_program("train.py", whole, "TRAIN.resume", "auto")
    wanted = {"step": 10, "save": 6, "validation": 4, "boundary": 3}
    words = [f"{phase}={count}" for phase, count in wanted.items()]
    ending = run_command(sys.executable, "tests/kill_runs.py", killed, *words, PYTHONPATH=str(ROOT))
    assert ending.returncode == 0, ending.stderr
    counts = json.loads(ending.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\nkilled {sum(counts.values())} times: {counts}")
    assert sum(counts.values()) >= 20
    assert counts["save"] >= 5
    assert counts["validation"] >= 3
    assert counts["boundary"] >= 2
    assert_equal_runs(killed.parent / "exp/tiny", whole.parent / "exp/tiny")
    assert not list((killed.parent / "exp/tiny").rglob(".*.partial"))


def test_what_has_changed_since_the_checkpoint_is_listed(straight, config, tmp_path, capfd):
    source = tmp_path / "x.pth"
    torch.save(load(straight / "last_model.pth") | {"threads": 7, "version": "older"}, source)
    run = build_run(config, "TRAIN.resume", source, "TRAIN.batch_size", 4)
    lines = [line for line in capfd.readouterr().err.splitlines() if f"when {source} was" in line]
    assert [line.split(maxsplit=1)[1] for line in lines] == [
        f"threads was 7 when {source} was saved, now 1",
        f"code was older when {source} was saved, now {run.version}",
        f"TRAIN.batch_size was 8 when {source} was saved, now 4",
        *(line.split(maxsplit=1)[1] for line in lines[3:]),
    ]
    keys = {line.split()[1] for line in lines[3:]}
    assert keys == {"TRAIN.output_folder", "TRAIN.save_every", "TRAIN.keep_checkpoints"}


# --------------------------------------------------------------- with another config, or on others


def saved_run(
    straight: Path, path: Path, step: int, without: Sequence[str] = (), **changes
) -> Path:
    """Write a checkpoint of the uninterrupted run again, changed as told."""
    state = load(straight / f"step_{step:08d}.pth") | changes
    torch.save({key: value for key, value in state.items() if key not in without}, path)
    return path


def rates_of(folder: Path) -> list[float]:
    return [r["lr_head"] for r in read_metrics(folder) if r["kind"] == "step"]


def test_rates_and_decay_given_to_a_resumed_run_are_those_that_run(config, folder, capfd):
    run_program("train.py", config, "TRAIN.epochs", 1)
    opts = ("TRAIN.base_lr", 1e-5, "TRAIN.lr_multi", 0.1, "TRAIN.weight_decay", 0.1)
    capfd.readouterr()
    run_program("train.py", config, "TRAIN.resume", "auto", *opts)
    err = capfd.readouterr().err
    last = read_metrics(folder)[-2]
    assert (last["lr_head"], last["lr_backbone"]) == pytest.approx((1e-5, 1e-6))
    groups = load(folder / "last_model.pth")["optimizer"]["param_groups"]
    assert [g["initial_lr"] for g in groups] == pytest.approx([1e-6, 1e-5])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1]
    for key, was in {"base_lr": 0.001, "lr_multi": 1.0, "weight_decay": 0.0}.items():
        assert err.count(f"TRAIN.{key} was {was} when ") == 1


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, "shapes"])
def test_an_optimiser_of_another_kind_or_shape_is_refused(straight, config, tmp_path, kind):
    run = build_run(config)
    if kind == "shapes":
        state = load(straight / "last_model.pth")["optimizer"]
        for moments in state["state"].values():
            moments["exp_avg"] = torch.ones(3)
    else:
        options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        groups = [{k: g[k] for k in ("name", "params")} for g in run.optimizer.param_groups]
        kind = torch.optim.Adam if kind is type(run.optimizer) else kind
        other = kind(groups, lr=0.1, **options)
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        other.step()
        state = other.state_dict()
    source = saved_run(straight, tmp_path / "x.pth", 2, optimizer=state)
    line = error_of("train.py", config, "TRAIN.exp_name", "b", "TRAIN.resume", source)
    assert line.startswith(f"TRAIN.resume: the optimiser in {source} does not fit (")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_an_optimiser_of_the_same_kind_gets_its_moments_back(kind):
    model = torch.nn.Linear(3, 2)
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    before, after = (kind(model.parameters(), lr=0.1, **options) for _ in range(2))
    model(torch.ones(1, 3)).sum().backward()
    before.step()
    resume.restore_optimizer(after, {"optimizer": before.state_dict()}, "x.pth")
    assert_same(after.state_dict(), before.state_dict())
    assert after.state


@pytest.mark.parametrize("batch", [4, 16])
def test_a_cosine_goes_on_where_it_was_with_another_batch(config, folder, batch, capfd):
    opts = ("TRAIN.schedule", "cosine", "TRAIN.epochs", 4, "TRAIN.print_freq", 1)
    run_program("train.py", config, *opts, "TRAIN.save_every", 1, "TRAIN.keep_checkpoints", 99)
    before = rates_of(folder)
    step = len(before) // 2 + 1
    opts += ("TRAIN.resume", folder / f"step_{step:08d}.pth", "TRAIN.batch_size", batch)
    capfd.readouterr()
    run_program("train.py", config, *opts, "TRAIN.exp_name", "b")
    after, err = rates_of(folder.parent / "b"), capfd.readouterr().err
    assert "some refs may come twice" in err
    assert f"{step + len(after)} in all, {step} of them done" in err
    assert after == sorted(after, reverse=True)
    assert after[0] == pytest.approx(before[step])
    assert after[-1] < 2e-4


def test_a_cosine_that_starts_at_an_epoch_ends_at_nothing(config, folder):
    opts = ("TRAIN.schedule", "cosine", "TRAIN.epochs", 4, "TRAIN.start_epoch", 2)
    run_program("train.py", config, *opts, "TRAIN.print_freq", 1)
    rates = rates_of(folder)
    assert rates[0] == pytest.approx(0.5e-3)
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("batch", [4, 16])
def test_an_epochs_loss_after_resuming_with_another_batch_is_a_mean(
    straight, config, folder, batch
):
    source = straight / "step_00000004.pth"
    opts = ("TRAIN.resume", source, "TRAIN.batch_size", batch, "TRAIN.print_freq", 1)
    run_program("train.py", config, *opts, "TRAIN.epochs", 1)
    *steps, epoch = read_metrics(folder)
    (summed,) = load(source)["sums"]
    total = summed[0, 0] + 2 * sum(record["loss"] for record in steps)  # two passes a step
    assert epoch["loss"] == pytest.approx(float(total) / (8 + 2 * len(steps)), abs=1e-5)


def test_records_packed_anew_since_the_checkpoint_are_told(straight, config, tmp_path, data, capfd):
    lmdb = str(data / "lmdb/shapes/train.lmdb")
    source = saved_run(straight, tmp_path / "x.pth", 2)
    build_run(config, "TRAIN.resume", source)
    assert "holds other records now" not in capfd.readouterr().err
    source = saved_run(straight, tmp_path / "y.pth", 2, records={lmdb: "other"})
    build_run(config, "TRAIN.resume", source, "TRAIN.exp_name", "b")
    assert f"{lmdb} holds other records now than when {source} was saved" in capfd.readouterr().err


def test_records_that_are_left_out_and_packed_anew_are_told(straight, config, data, tmp_path):
    other = shutil.copy(data / "lmdb/shapes/testA.lmdb", tmp_path / "other.lmdb")
    lmdbs = [data / "lmdb/shapes/train.lmdb", data / "lmdb/shapes/testB.lmdb"]
    opts = ("DATA.train_lmdb", list(map(str, lmdbs)), "DATA.exclude_lmdb", [str(other)])
    run = build_run(config, *opts, "DATA.allow_mismatch", True)
    found = resume.digests(run)
    shutil.copy(data / "lmdb/shapes/val.lmdb", other)
    assert {path for path, digest in resume.digests(run).items() if found[path] != digest} == {
        str(other)
    }


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("DATA.val_split", "testA", "split val, now testA; records "),
        ("TEST.protocol", "aligned", "protocol published, now aligned; threshold 0.35, now 0.5"),
        ("TEST.threshold", 0.05, "threshold 0.35, now 0.05"),
        ("TRAIN.val_sentences", "first", "val_sentences all, now first"),
        ("TRAIN.input_size", 32, "input_size 64, now 32"),
        ("TRAIN.word_len", 9, "word_len 17, now 9"),
        ("TRAIN.batch_size_val", 4, ""),
    ],
)
def test_a_best_score_counts_only_for_what_it_was_measured_on(
    config, ended, data, key, value, told, capfd
):
    last = ended / "last_model.pth"
    torch.save(load(last) | {"best_iou": 0.99}, last)
    split = value if key == "DATA.val_split" else "val"
    opts = ("TRAIN.resume", last, "DATA.val_lmdb", data / f"lmdb/shapes/{split}.lmdb", key, value)
    opts += ("DATA.allow_mismatch", True)
    assert build_run(config, *opts).best == (-1.0 if told else 0.99)
    line = f"best score 99.00 of {last} does not count, a new best begins: {told}"
    assert (line in capfd.readouterr().err) is bool(told)


def test_a_run_begun_from_anothers_checkpoint_writes_its_own_best_model(straight, config, folder):
    source = straight / "last_model.pth"
    run_program("train.py", config, "TRAIN.resume", source, "TRAIN.epochs", EPOCHS + 1)
    assert load(folder / "best_model.pth")["epoch"] == EPOCHS + 1


OLD = ("length", "progress", "best_on", "records", "faults", "sums", "threads", "version")


@pytest.mark.parametrize("without", [*([key] for key in OLD), (*OLD, "position", "config", "rng")])
def test_a_checkpoint_of_an_older_version_goes_on(straight, config, folder, tmp_path, without):
    source = saved_run(straight, tmp_path / "x.pth", 1, without)
    run_program("train.py", config, "TRAIN.resume", source)
    assert load(folder / "last_model.pth")["epoch"] == EPOCHS


@pytest.mark.parametrize("key", ["epoch", "step", "optimizer"])
def test_a_checkpoint_without_what_a_run_needs_is_refused(straight, config, tmp_path, key):
    source = saved_run(straight, tmp_path / "x.pth", 1, [key])
    line = error_of("train.py", config, "TRAIN.resume", source)
    assert line.startswith(f"TRAIN.resume: {source} holds weights, not a run to continue; ")


def test_sums_of_an_older_version_are_counted(straight, config, tmp_path, folder):
    state = load(straight / "step_00000003.pth")
    old = [sums[:, :3].clone() for sums in state["sums"]]
    source = saved_run(straight, tmp_path / "x.pth", 3, ("length", "progress"), sums=old)
    run_program("train.py", config, "TRAIN.resume", source)
    got, expected = (
        [r["loss"] for r in read_metrics(f) if r["kind"] == "epoch"] for f in (folder, straight)
    )
    assert got == pytest.approx(expected, abs=1e-5)


# -------------------------------------------------------------------- which checkpoints there are


def test_the_newest_few_checkpoints_are_kept(config, folder):
    run_program("train.py", config, "TRAIN.save_every", 1, "TRAIN.keep_checkpoints", 2)
    last = load(folder / "last_model.pth")["step"]
    assert steps_of(folder) == [last - 1, last]
    assert (folder / f"step_{last:08d}.pth").samefile(folder / "last_model.pth")


@pytest.mark.parametrize(("minutes_ago", "is_due"), [(9.9, False), (10.1, True)])
def test_checkpoints_may_come_by_the_clock(config, minutes_ago, is_due):
    run = build_run(config, "TRAIN.save_every", "10 minutes")
    run.step, run.saved_at = 3, time.monotonic() - 60 * minutes_ago
    resume.save_if_due(run)
    assert steps_of(run.folder) == ([3] if is_due else [])
    assert (time.monotonic() - run.saved_at < 60) is is_due


@pytest.mark.parametrize("text", ["0", "ten", "10 days", "-3", "1.5"])
def test_an_interval_that_is_none_is_refused(config, text):
    line = error_of("train.py", config, "TRAIN.save_every", text)
    assert "TRAIN.save_every must match pattern" in line


def test_auto_resumes_from_the_newest_whole_checkpoint_and_names_torn_ones(
    straight, config, folder, capfd
):
    shutil.copytree(straight, folder, copy_function=shutil.copy2)
    steps = steps_of(folder)
    last, newest = folder / "last_model.pth", folder / f"step_{steps[-1]:08d}.pth"
    assert find_newest(folder) == last
    last.write_bytes(last.read_bytes()[:-5000])
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1  # a single bit, in the middle of the weights
    stat = newest.stat()
    newest.write_bytes(content)
    os.utime(newest, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (folder / "best_model.pth").unlink()
    run = build_run(config, "TRAIN.resume", "auto")
    err = capfd.readouterr().err
    assert run.step == steps[-2]
    for path in (last, newest):
        assert f"{path} is cut off or damaged, skipped" in err


def test_auto_starts_a_new_training_where_there_is_no_checkpoint(straight, config):
    assert build_run(config, "TRAIN.resume", "auto").step == 0
    # The same command starts from weights the first time and goes on from then on.
    weights = straight / "best_model.pth"
    run = build_run(config, "TRAIN.resume", "auto", "TRAIN.weight", weights)
    assert_same(dict(run.model.state_dict()), dict(load(weights)["state_dict"]))


def test_auto_does_not_start_anew_over_damaged_checkpoints(config, folder):
    folder.mkdir(parents=True)
    (folder / "last_model.pth").write_bytes(b"PK half")
    line = error_of("train.py", config, "TRAIN.resume", "auto")
    assert line.startswith(f"every checkpoint in {folder} is cut off or damaged; ")
    assert contents(folder) == {"last_model.pth": b"PK half"}


# ------------------------------------------------------------------------------------- signals


def stopped_by(number: int, monkeypatch, name: str, at_call: int, config: Path) -> int:
    """Train, sending this process a signal in a call of the trainer's function: the exit code."""
    function, calls = getattr(trainer, name), []

    def wrapper(*args, **kwargs):
        calls.append(None)
        if len(calls) == at_call:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, name, wrapper)
        with pytest.raises(SystemExit) as ending:
            run_program("train.py", config)
    return ending.value.code


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_finishes_the_step_saves_and_stops(straight, config, folder, monkeypatch, name):
    number = getattr(signal, name)
    handler = signal.getsignal(number)
    # In the first of the two passes of the third step.
    assert stopped_by(number, monkeypatch, "forward_backward", 5, config) == 75
    assert load(folder / "last_model.pth")["step"] == 3
    assert name in (folder / "PREEMPTED").read_text()
    assert signal.getsignal(number) == handler
    if name == "SIGUSR1":
        run_program("train.py", config, "TRAIN.resume", "auto")
        assert_equal_runs(folder, straight)
        assert not (folder / "PREEMPTED").exists()


def test_a_hang_up_that_nohup_has_ignored_stays_ignored():
    request = signals.StopRequest()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listen(request):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert request.name is None


# What Windows and macOS lack is taken away before a program of the project is imported.
LACKING = """
import runpy, signal, sys
for name in {lacks!r}:
    sys.modules[name] = None
    vars(signal).pop(name, None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
WINDOWS = "fcntl", "SIGUSR1", "SIGHUP", "sigwaitinfo", "pthread_sigmask"


@pytest.mark.slow
def test_windows_and_macos_do_what_they_can(tmp_path, data):
    config = recipe(tmp_path, data, workers=1, workers_val=1, epochs=1)

    def run(lacks: tuple[str, ...], *command: object) -> str:
        code = LACKING.format(lacks=lacks)
        ending = run_command(sys.executable, "-c", code, *command, PYTHONPATH=str(ROOT))
        assert "Traceback" not in ending.stderr
        return f"{ending.returncode} {ending.stderr}"

    refused = run(WINDOWS, "train.py", "--config", config)
    assert refused.startswith("1 error: training is supported on Linux and macOS")
    assert run(("sigwaitinfo",), "train.py", "--config", config).startswith("0")
    assert run(WINDOWS, "test.py", "--config", config).startswith("0")
    predict = ("--weights", tmp_path / "exp/tiny/last_model.pth", "-o", tmp_path / "out")
    photo = save_photo(tmp_path / "photo.jpg")
    command = ("tools/predict.py", "--config", config, "--image", photo, "--text", "a circle")
    assert run(WINDOWS, *command, *predict).startswith("0")


def kill_loaders() -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def killing(batches):
    for batch in batches:
        yield batch
        kill_loaders()


@pytest.mark.parametrize("name", ["forward_backward", "evaluate"])
def test_a_run_whose_loader_process_is_killed_saves_first(
    straight, config, folder, monkeypatch, name
):
    function, workers = getattr(trainer, name), ("TRAIN.workers", 1, "TRAIN.workers_val", 1)

    def kill(*args, **kwargs):
        kill_loaders()
        if name == "evaluate":  # its own loader has yet to start
            kwargs["progress"] = killing(kwargs["progress"])
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, name, kill)
        line = error_of("train.py", config, *workers)
    assert line.startswith("a loader process was killed, perhaps because memory is short: lower ")
    assert "is saved: TRAIN.resume auto goes on from there" in line
    run_program("train.py", config, "TRAIN.resume", "auto")
    assert_equal_runs(folder, straight)


def test_ranks_ask_each_other_seldom_and_one_that_lost_its_loader_takes_the_steps_until_then(
    config, monkeypatch
):
    run = build_run(config, "TRAIN.batch_size", 4, "TRAIN.accumulation_steps", 1)
    run.train_loader.batch_sampler.set_epoch(0)
    batches, asked = list(run.train_loader), []

    def dying():
        yield from batches[:2]
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    def any_rank(*flags: bool) -> tuple[bool, ...]:
        asked.append(run.step)
        return flags

    monkeypatch.setattr(resume, "any_rank", any_rank)
    monkeypatch.setattr(resume, "gather_objects", lambda own: [own, 0.06])  # four steps apart
    monkeypatch.setattr(resume, "save_and_stop", mock.Mock(side_effect=SystemExit))
    taken, steps = [], resume.stoppable_steps(run, dying())
    with suppress(SystemExit):
        while True:
            taken += next(steps)
            run.step, run.position = run.step + 1, run.position + 1
    assert asked == [0, 1, 5]
    for got, expected in zip(taken, batches[:5], strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize(
    ("seconds", "apart"), [([0.1], 1), ([0.01, 0.05], 5), ([0.01, 1.0], 1), ([1e-4, 1e-4], 16)]
)
def test_ranks_ask_each_other_some_times_a_second(monkeypatch, seconds, apart):
    monkeypatch.setattr(resume, "gather_objects", lambda own: [own, *seconds[1:]])
    assert resume.steps_apart(10 * seconds[0], 10) == apart


def test_a_test_whose_loader_process_is_killed_ends_in_one_line(straight, config, monkeypatch):
    function = tester.evaluate

    def kill(*args, **kwargs):
        return function(*args, **kwargs | {"progress": killing(kwargs["progress"])})

    monkeypatch.setattr(tester, "evaluate", kill)
    options = ("TEST.weights", straight / "last_model.pth", "TRAIN.workers_val", 1)
    assert error_of("test.py", config, *options).startswith("a loader process was killed")


def test_a_signal_while_validating_stops_there(straight, config, folder, monkeypatch):
    assert stopped_by(signal.SIGTERM, monkeypatch, "evaluate", 2, config) == 75
    state = load(folder / "last_model.pth")
    assert (state["epoch"], state["scores"]) == (1, {})
    run_program("train.py", config, "TRAIN.resume", "auto")
    assert_equal_runs(folder, straight)


@pytest.mark.slow
def test_a_signal_to_the_whole_group_leaves_the_loaders_working(tmp_path, data):
    config = recipe(tmp_path, data, workers=1, workers_val=1, epochs=1000, milestones=[999])
    log = tmp_path / "exp/tiny/metrics.jsonl"
    command = [sys.executable, "train.py", "--config", str(config)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "Traceback" not in err
    assert (tmp_path / "exp/tiny/PREEMPTED").is_file()


# ----------------------------------------------------------------------------- space, and company


def test_a_full_disk_keeps_the_checkpoint_before_and_training_goes_on(config):
    run = build_run(config)
    last = run.folder / "last_model.pth"
    with on_cpu():
        assert resume.save(run, {}, is_best=False)
        before = last.read_bytes()
        run.step = 1
        with largest_file(1_000_000):
            assert not resume.save(run, {}, is_best=True)
        assert last.read_bytes() == before
        assert [path.name for path in run.folder.glob("*.pth")] == ["last_model.pth"]
        assert not list(run.folder.glob(".*.partial"))
        assert resume.save(run, {}, is_best=False)
    assert load(last)["step"] == 1


def test_a_run_whose_last_checkpoint_could_not_be_written_fails(config, folder, capfd):
    with largest_file(1_000_000):
        line = error_of("train.py", config)
    assert line == f"the last checkpoint is missing: make room in {folder}, then resume"
    fault = f"{folder / 'last_model.pth'} could not be written: File too large"
    assert capfd.readouterr().err.count(fault) == EPOCHS
    assert len(read_metrics(folder)) > EPOCHS


def test_a_second_run_in_one_folder_is_refused_unless_forced(config, folder, monkeypatch):
    monkeypatch.setattr(resume, "PATIENCE", 0.2)
    with resume.hold_run_folder(load_config(config), ALONE) as source:
        assert source is None
        line = error_of("train.py", config)
        assert line.startswith(f"another process is training in {folder}; wait for it")
        assert contents(folder) == {"train.log": b""}
        run_program("train.py", config, "TRAIN.force", True)
    assert (folder / "last_model.pth").is_file()


def test_a_run_that_fails_before_it_begins_leaves_no_folder(config, folder):
    with suppress(KeyError), resume.hold_run_folder(load_config(config), ALONE):
        assert folder.is_dir()
        raise KeyError
    assert not folder.parent.exists()


def test_who_waited_for_a_lock_that_was_removed_does_not_hold_it(tmp_path):
    path, busy = tmp_path / "lock", mock.Mock(side_effect=UserError)
    with ThreadPoolExecutor(1) as pool:
        with lock.hold(path, pytest.fail):
            waiting = pool.submit(lock.hold(path, busy, 5.0).__enter__)
            time.sleep(0.3)
            path.unlink()
        with pytest.raises(UserError):
            waiting.result()


@pytest.mark.parametrize("opts", [(), ("TRAIN.resume", "auto")])
def test_what_another_process_saves_while_its_end_is_waited_for_is_kept(
    straight, config, folder, opts, capfd
):
    folder.mkdir(parents=True)
    released = threading.Event()

    def save_and_leave() -> None:
        with lock.hold(folder / "train.log", pytest.fail):
            released.set()
            time.sleep(1.0)
            shutil.copytree(straight, folder, dirs_exist_ok=True)

    other = threading.Thread(target=save_and_leave)
    other.start()
    released.wait()
    if opts:
        run_program("train.py", config, *opts)
        assert f"resumed from {folder / 'last_model.pth'}" in capfd.readouterr().err
    else:
        assert "a new training would write over it" in error_of("train.py", config)
    other.join()
    assert_equal_runs(folder, straight)


def test_a_file_system_without_locks_is_told(config, folder, monkeypatch):
    fault = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=fault))
    line = error_of("train.py", config)
    assert line == f"{folder}/train.log: cannot be locked: Function not implemented"


@pytest.mark.parametrize("left", ["last_model.pth", "best_model.pth", "step_00000001.pth"])
def test_a_new_training_does_not_write_over_an_earlier_one(config, ended, left):
    for path in ended.glob("*.pth") if left != "last_model.pth" else ():
        if path.name != left:
            path.unlink()
    before = contents(ended)
    line = error_of("train.py", config)
    assert line.startswith(f"{ended / left} is there, and a new training would write over it: ")
    assert all(remedy in line for remedy in REMEDIES)
    assert contents(ended) == before


def test_the_remedies_of_an_earlier_training_work(straight, config, ended, capfd):
    run_program("train.py", config, "TRAIN.resume", "auto")
    assert_equal_runs(ended, straight)
    run_program("train.py", config, "TRAIN.exp_name", "other")
    assert_equal_runs(ended.parent / "other", straight)
    count = len(list(ended.glob("*.pth")))
    capfd.readouterr()
    run_program("train.py", config, "TRAIN.force", True, "TRAIN.epochs", 1)
    assert f"TRAIN.force: {count} checkpoint(s) in {ended} are removed" in capfd.readouterr().err
    assert load(ended / "last_model.pth")["epoch"] == 1
    assert sorted(p.name for p in ended.glob("*.pth")) == ["best_model.pth", "last_model.pth"]
    assert [p.name for p in (ended / "pictures").iterdir()] == ["epoch_0001.jpg"]


def test_ranks_that_are_restarted_go_on_only_from_what_this_very_config_has_saved(
    config, monkeypatch
):
    run_program("train.py", config)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert build_run(config).epoch == EPOCHS
    assert "would write over it" in error_of("train.py", config, "TRAIN.base_lr", 0.5)


# ------------------------------------------------------------- from a checkpoint of another run


def test_a_checkpoint_that_was_moved_away_takes_up_the_records_of_its_run(
    straight, config, folder, tmp_path
):
    number = steps_of(straight)[-1] // EPOCHS + 1
    folder.mkdir(parents=True)
    shutil.copy(straight / "metrics.jsonl", folder)
    shutil.copy(straight / f"step_{number:08d}.pth", tmp_path / "archive.pth")
    run_program("train.py", config, "TRAIN.resume", tmp_path / "archive.pth")
    assert read_metrics(folder) == read_metrics(straight)


def test_a_run_from_anothers_checkpoint_does_not_write_over_its_own_folders(
    straight, config, ended
):
    other, last, before = straight / "step_00000001.pth", ended / "last_model.pth", contents(ended)
    line = error_of("train.py", config, "TRAIN.resume", other)
    assert line.startswith(f"{last} is there, and a training from {other} would write over it: ")
    assert all(remedy in line for remedy in REMEDIES)
    assert contents(ended) == before


def test_a_checkpoint_is_the_folders_own_by_whatever_path_it_is_named(
    straight, config, ended, tmp_path
):
    (tmp_path / "link").symlink_to(ended)
    (tmp_path / "link.pth").symlink_to(ended / "last_model.pth")
    (ended / "of_other.pth").symlink_to(straight / "last_model.pth")
    for path in ("link/last_model.pth", "link/../tiny/last_model.pth", "link.pth"):
        assert build_run(config, "TRAIN.resume", tmp_path / path).epoch == EPOCHS
    assert build_run(config, "TRAIN.resume", ended / "of_other.pth").epoch == EPOCHS


def test_a_forced_run_from_anothers_checkpoint_removes_what_was_there(
    straight, config, ended, capfd
):
    (ended / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 99}\n')
    opts = ("TRAIN.resume", straight / "step_00000001.pth", "TRAIN.force", True)
    count = len(list(ended.glob("*.pth")))
    run_program("train.py", config, *opts)
    assert f"TRAIN.force: {count} checkpoint(s) in {ended} are removed" in capfd.readouterr().err
    assert steps_of(ended) == []
    assert_equal_runs(ended, straight)


def test_records_without_a_checkpoint_are_no_training_to_be_kept(config, folder):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"kind": "step", "step": 99}\n')
    run_program("train.py", config, "TRAIN.epochs", 1)
    assert all(record["step"] != 99 for record in read_metrics(folder))


def test_the_loss_scale_goes_on_where_it_was(config, folder):
    fp16 = ("TRAIN.precision", "fp16")
    run = build_run(config, *fp16)
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 7})
    resume.save(run, {}, is_best=True)
    again = build_run(config, *fp16, "TRAIN.resume", folder / "last_model.pth")
    assert again.scaler.state_dict() == run.scaler.state_dict()
    assert again.scaler.get_scale() == 128.0
