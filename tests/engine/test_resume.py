"""Stopping and going on: checkpoints within epochs, signals, kills, torn files, full disks."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import count
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
    files,
    largest_file,
    load,
    read_metrics,
    run_command,
    run_program,
    save_photo,
    start_command,
    train_opts,
    write_config,
)

from engine import resume, tester, trainer
from engine.run import Run
from utils import lock, signals
from utils.checkpoint import find_newest
from utils.config import load_config
from utils.errors import UserError

EPOCHS = 2
REMEDIES = ("TRAIN.resume auto", "TRAIN.exp_name another name", "TRAIN.force True")
EACH_STEP = {"save_every": 1, "keep_checkpoints": 99}


def recipe(folder: Path, data: Path, **keys) -> Path:
    """Dropout on, two passes a step, a line every second step: everything that has to be saved."""
    defaults = {"dropout": 0.2, "epochs": EPOCHS, "accumulation_steps": 2, "print_freq": 2}
    return write_config(folder, data, **(defaults | keys))


def train(config: Path, *opts: object, **keys: object) -> None:
    run_program("train.py", config, *opts, *train_opts(**keys))


def refusal(config: Path, *opts: object, **keys: object) -> str:
    return error_of("train.py", config, *opts, *train_opts(**keys))


def built(config: Path, *opts: object, **keys: object) -> Run:
    return build_run(config, *opts, *train_opts(**keys))


@pytest.fixture(scope="module")
def straight(tmp_path_factory, data) -> Path:
    """The folder of an uninterrupted run that kept a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("straight")
    train(recipe(folder, data), **EACH_STEP)
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
    return clone(straight, folder)


@pytest.fixture
def told(capfd) -> Callable[[], str]:
    """Return what was logged since the last call."""
    return lambda: capfd.readouterr().err


def steps_of(folder: Path) -> list[int]:
    """The steps whose checkpoints are kept."""
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.glob("step_*.pth"))


def clone(run: Path, folder: Path) -> Path:
    """Copy a run's folder; its checkpoints, which nobody writes to, become links."""

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pth") else shutil.copy)(source, target)

    return shutil.copytree(run, folder, copy_function=copy, dirs_exist_ok=True)


def changed(checkpoint: Path, path: Path, **changes: object) -> Path:
    """Write a checkpoint again, in part otherwise."""
    torch.save(load(checkpoint) | changes, path)
    return path


# ------------------------------------------------------------------------------ exact resuming


def test_a_run_that_keeps_the_newest_few_checkpoints_is_the_same(straight, config, folder):
    train(config, save_every=1, keep_checkpoints=2)
    assert_equal_runs(folder, straight)
    last = load(folder / "last_model.pth")["step"]
    assert steps_of(folder) == [last - 1, last]
    assert (folder / f"step_{last:08d}.pth").samefile(folder / "last_model.pth")


@pytest.mark.parametrize("step", ["first", "middle of a window", "last of an epoch"])
def test_a_run_resumed_at_any_step_equals_one_that_was_never_stopped(straight, config, ended, step):
    per_epoch = steps_of(straight)[-1] // EPOCHS
    number = {"first": 1, "middle of a window": per_epoch + 1, "last of an epoch": per_epoch}[step]
    # What the run had written since is there, and a line that was being written.
    with (ended / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "epo')
    source = ended / f"step_{number:08d}.pth"
    if step == "last of an epoch":  # its validation was interrupted: the step is saved, not more
        before = {"position": per_epoch, "epoch": 0, "best_iou": -1.0}
        source = changed(source, ended / "before_validation.pth", **before)
        (ended / "best_model.pth").unlink()
    train(config, resume=source)
    assert_equal_runs(ended, straight)


@pytest.mark.slow
def test_a_run_that_is_killed_over_and_over_ends_like_one_that_never_was(tmp_path, data):
    keys = {"epochs": 12, "save_every": "2", "accumulation_steps": 1}
    whole, killed = (recipe(tmp_path / name, data, **keys) for name in ("whole", "killed"))
    train(whole, resume="auto")
    words = ("step=9", "save=5", "validation=2", "epoch=2", "record=2")
    ending = run_command(sys.executable, "tests/kill_runs.py", killed, *words, PYTHONPATH=str(ROOT))
    assert ending.returncode == 0, ending.stderr
    counts = json.loads(ending.stdout.splitlines()[-1])
    assert {f"{phase}={number}" for phase, number in counts.items()} == set(words)
    assert_equal_runs(killed.parent / "exp/tiny", whole.parent / "exp/tiny")
    assert not list((killed.parent / "exp/tiny").rglob(".*.partial"))


def test_what_has_changed_since_the_checkpoint_is_listed(straight, config, data, tmp_path, told):
    lmdb = str(data / "lmdb/shapes/train.lmdb")
    changes = {"threads": 7, "version": "older", "records": {"moved.lmdb": "other"}}
    of_two = {key: 2 * load(straight / "step_00000002.pth")[key] for key in ("rng", "sums")}
    source = changed(straight / "step_00000002.pth", tmp_path / "x.pth", **changes, **of_two)
    run = built(config, resume=source, batch_size=4)
    lines = [line.split(maxsplit=1)[1] for line in told().splitlines() if f"{source} was" in line]
    assert torch.equal(run.sums, sum(of_two["sums"]))
    assert lines[:5] == [
        f"{lmdb} holds other records than the run had when {source} was saved",
        f"ranks was 2 when {source} was saved, now 1",
        f"threads was 7 when {source} was saved, now 1",
        f"code was older when {source} was saved, now {run.version}",
        f"TRAIN.batch_size was 8 when {source} was saved, now 4",
    ]
    keys = {line.split()[0] for line in lines[5:]}
    assert keys == {"TRAIN.output_folder", "TRAIN.save_every", "TRAIN.keep_checkpoints"}


# --------------------------------------------------------------- with another config, or on others


def rates_of(folder: Path) -> list[float]:
    return [r["lr_head"] for r in read_metrics(folder) if r["kind"] == "step"]


def test_rates_and_decay_given_to_a_resumed_run_are_those_that_run(config, folder, told):
    train(config, epochs=1)
    told()
    train(config, resume="auto", base_lr=1e-5, lr_multi=0.1, weight_decay=0.1)
    last = read_metrics(folder)[-2]
    assert (last["lr_head"], last["lr_backbone"]) == pytest.approx((1e-5, 1e-6))
    groups = load(folder / "last_model.pth")["optimizer"]["param_groups"]
    assert [g["initial_lr"] for g in groups] == pytest.approx([1e-6, 1e-5])
    assert [g["weight_decay"] for g in groups] == [0.1, 0.1]
    err = told()
    for key, was in {"base_lr": 0.001, "lr_multi": 1.0, "weight_decay": 0.0}.items():
        assert err.count(f"TRAIN.{key} was {was} when ") == 1


def optimizer_after_steps(kind: str, count: int) -> torch.optim.Optimizer:
    """An optimiser of a small model."""
    model = torch.nn.Linear(3, 2)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)
    for _ in range(count):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "NAdam", "RAdam", "Adam of other shapes"])
def test_an_optimiser_of_another_kind_or_shape_is_refused(kind):
    own, other = (optimizer_after_steps(name, 1) for name in ("Adam", kind.split()[0]))
    if "shapes" in kind:
        for moments in other.state.values():
            moments["exp_avg"] = torch.ones(3)
    with pytest.raises(UserError, match=r"^TRAIN.resume: the optimiser in x.pth does not fit \("):
        resume.restore_optimizer(own, {"optimizer": other.state_dict()}, "x.pth")


def test_a_run_whose_optimiser_does_not_fit_writes_nothing(straight, config, tmp_path):
    state = optimizer_after_steps("Adam", 1).state_dict()
    source = changed(straight / "last_model.pth", tmp_path / "x.pth", optimizer=state)
    line = refusal(config, exp_name="b", resume=source)
    assert line.startswith(f"TRAIN.resume: the optimiser in {source} does not fit (")
    assert not (tmp_path / "exp/b").exists()


@pytest.mark.parametrize("kind", ["Adam", "SGD", "Adagrad"])
def test_an_optimiser_of_the_same_kind_gets_its_moments_back(kind):
    before, after = (optimizer_after_steps(kind, count) for count in (1, 0))
    resume.restore_optimizer(after, {"optimizer": before.state_dict()}, "x.pth")
    assert_same(after.state_dict(), before.state_dict())


def test_another_batch_keeps_the_cosine_and_the_mean_loss(config, folder, told):
    keys = {"schedule": "cosine", "epochs": 4, "print_freq": 1}
    train(config, **keys, save_every=2, keep_checkpoints=99)
    before = rates_of(folder)
    step = len(before) // 2 + 4  # the fourth of the third epoch
    source = folder / f"step_{step:08d}.pth"
    (sums,) = load(source)["sums"]
    for batch in (4, 16):
        told()
        other = folder.parent / str(batch)
        train(config, **keys, resume=source, batch_size=batch, exp_name=batch)
        after, err = rates_of(other), told()
        assert "some refs may come twice" in err
        assert f"{step + len(after)} in all, {step} of them done" in err
        assert after == sorted(after, reverse=True)
        assert after[0] == pytest.approx(before[step])
        assert after[-1] < 2e-4
        records = read_metrics(other)
        *steps, epoch = records[: [r["kind"] for r in records].index("epoch") + 1]
        total = sums.sum(0)[0] + batch * sum(record["loss"] for record in steps)
        refs = 4 * 8 + batch * len(steps)
        assert epoch["loss"] == pytest.approx(float(total) / refs, abs=1e-5)


def test_a_cosine_that_starts_at_an_epoch_ends_at_nothing(config, folder):
    train(config, schedule="cosine", epochs=4, start_epoch=2, print_freq=1)
    rates = rates_of(folder)
    assert rates[0] == pytest.approx(0.5e-3)
    assert rates[-1] < 1e-4


def test_records_that_are_left_out_and_packed_anew_are_told(config, data, tmp_path):
    other = shutil.copy(data / "lmdb/shapes/testA.lmdb", tmp_path / "other.lmdb")
    lmdbs = [str(data / f"lmdb/shapes/{split}.lmdb") for split in ("train", "testB")]
    opts = ("DATA.train_lmdb", lmdbs, "DATA.exclude_lmdb", [str(other)])
    run = build_run(config, *opts, "DATA.allow_mismatch", True)
    before = resume.digests(run)
    shutil.copy(data / "lmdb/shapes/val.lmdb", other)
    after = resume.digests(run)
    assert [path for path in after if before[path] != after[path]] == [str(other)]


@pytest.mark.parametrize(
    ("key", "value", "why"),
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
def test_a_best_score_counts_for_what_it_was_measured_on(
    config, ended, data, key, value, why, told
):
    source = changed(ended / "last_model.pth", ended / "of_a_good_model.pth", best_iou=0.99)
    split = value if key == "DATA.val_split" else "val"
    opts = ("DATA.val_lmdb", data / f"lmdb/shapes/{split}.lmdb", "DATA.allow_mismatch", True)
    assert built(config, *opts, key, value, resume=source).best == (-1.0 if why else 0.99)
    line = f"best score 99.00 of {source} does not count, a new best begins: {why}"
    assert (line in told()) is bool(why)


def test_a_run_begun_from_anothers_checkpoint_writes_its_own_best_model(straight, config, folder):
    train(config, resume=straight / "last_model.pth", epochs=EPOCHS + 1)
    assert load(folder / "best_model.pth")["epoch"] == EPOCHS + 1


@pytest.mark.parametrize("lacks", ["rng", "optimizer", "best_on"])  # no rng: the release's
def test_a_checkpoint_without_what_a_run_needs_is_refused(straight, config, tmp_path, lacks):
    state, source = load(straight / "last_model.pth"), tmp_path / "x.pth"
    torch.save({key: value for key, value in state.items() if key != lacks}, source)
    line = refusal(config, resume=source)
    assert line.startswith(f"TRAIN.resume: {source} holds less than resuming needs; to start a ")
    assert line.endswith("give it as TRAIN.weight")


# -------------------------------------------------------------------- which checkpoints there are


@pytest.mark.parametrize(("minutes_ago", "is_due"), [(9.9, False), (10.1, True)])
def test_checkpoints_may_come_by_the_clock(config, minutes_ago, is_due):
    run = built(config, save_every="10 minutes")
    run.step, run.saved_at = 3, time.monotonic() - 60 * minutes_ago
    resume.save_if_due(run, has_stepped=True, asks=True)
    assert steps_of(run.folder) == ([3] if is_due else [])
    assert (time.monotonic() - run.saved_at < 60) is is_due


def test_auto_resumes_the_newest_whole_one_and_names_torn_ones(straight, config, folder, told):
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
    run, err = built(config, resume="auto"), told()
    assert run.step == steps[-2]
    assert "holds other records" not in err
    for path in (last, newest):
        assert f"{path} is cut off or damaged, skipped" in err


def test_auto_starts_a_new_training_where_there_is_no_checkpoint(straight, config):
    assert built(config, resume="auto").step == 0
    # The same command starts from weights the first time and goes on from then on.
    weights = straight / "best_model.pth"
    run = built(config, resume="auto", weight=weights)
    assert_same(dict(run.model.state_dict()), dict(load(weights)["state_dict"]))


def test_auto_does_not_start_anew_over_damaged_checkpoints(config, folder):
    folder.mkdir(parents=True)
    (folder / "last_model.pth").write_bytes(b"PK half")
    line = refusal(config, resume="auto")
    assert line.startswith(f"every checkpoint in {folder} is cut off or damaged; ")
    assert [path.read_bytes() for path in folder.iterdir()] == [b"PK half"]


# ------------------------------------------------------------------------------------- signals


# In the first of the two passes of the third step, and in the second validation.
STOPS = [(name, "forward_backward", 5, {"step": 3}) for name in signals.NAMES]
STOPS += [("SIGUSR1", "evaluate", 2, {"epoch": 1, "scores": {}})]


@pytest.mark.parametrize(("name", "function", "at_call", "saved"), STOPS)
def test_a_signal_finishes_the_step_saves_and_stops(
    straight, config, folder, name, function, at_call, saved
):
    number, original, calls = getattr(signal, name), getattr(trainer, function), count(1)
    handler = signal.getsignal(number)

    def interrupted(*args, **kwargs):
        if next(calls) == at_call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with mock.patch.object(trainer, function, interrupted), pytest.raises(SystemExit, match="75"):
        train(config)
    assert saved.items() <= load(folder / "last_model.pth").items()
    assert name in (folder / "PREEMPTED").read_text()
    assert signal.getsignal(number) == handler
    if name == "SIGUSR1":
        train(config, resume="auto")
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


@pytest.mark.slow
def test_a_signal_to_the_whole_group_with_its_loaders_saves_and_stops(tmp_path, data):
    config = recipe(tmp_path, data, workers=1, workers_val=1, epochs=1000, milestones=[999])
    log = tmp_path / "exp/tiny/metrics.jsonl"
    process = start_command(sys.executable, "train.py", "--config", config)
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


# What Windows lacks is taken away before a program of the project is imported.
LACKING = """
import runpy, signal, sys
for name in {lacks!r}:
    sys.modules[name] = None
    vars(signal).pop(name, None)
for words in {commands!r}:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
"""
WINDOWS = "fcntl", "SIGUSR1", "SIGHUP"


@pytest.mark.slow
def test_windows_does_what_it_can(tmp_path, data, ended):
    config, out = recipe(tmp_path, data, workers_val=1), tmp_path / "out"
    photo = ("--image", save_photo(tmp_path / "photo.jpg"), "--text", "a circle", "-o", out)
    programs = ("test.py",), ("tools/predict.py", *photo), ("train.py",)
    commands = [[*map(str, words), "--config", str(config)] for words in programs]
    code = LACKING.format(lacks=WINDOWS, commands=commands)
    ending = run_command(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert ending.returncode == 1
    assert "Traceback" not in ending.stderr
    assert ending.stderr.splitlines()[-1].startswith("error: training is supported on Linux and m")
    assert (ended / "test_shapes_val.json").is_file()
    assert list(out.iterdir())


# ---------------------------------------------------------------------------- lost loader processes


def kill_loaders() -> None:
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
        process.join()


def killing(batches):
    for batch in batches:
        yield batch
        kill_loaders()


@pytest.mark.parametrize("name", ["forward_backward", "evaluate"])
def test_a_run_whose_loader_is_killed_saves_first(straight, config, folder, name):
    function = getattr(trainer, name)

    def kill(*args, **kwargs):
        kill_loaders()
        if name == "evaluate":  # its own loader has yet to start
            kwargs["progress"] = killing(kwargs["progress"])
        return function(*args, **kwargs)

    with mock.patch.object(trainer, name, kill):
        line = refusal(config, workers=1, workers_val=1)
    assert line.startswith("a loader process was killed, perhaps because memory is short: lower ")
    assert "is saved: TRAIN.resume auto goes on from there" in line
    train(config, resume="auto")
    assert_equal_runs(folder, straight)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN, errno.EMFILE])
def test_a_run_that_may_start_no_loader_process_saves_and_names_the_limit(config, number):
    error = OSError(number, os.strerror(number))
    with mock.patch("multiprocessing.process.BaseProcess.start", side_effect=error):
        line = refusal(config, workers=1)
    assert line.startswith("a limit of this machine was met (")
    assert f"{os.strerror(number)}): lower TRAIN.workers and TRAIN.workers_val" in line
    assert "step 0 is saved" in line


def test_a_test_whose_loader_process_is_killed_ends_in_one_line(straight, config, monkeypatch):
    function = tester.evaluate

    def kill(*args, **kwargs):
        return function(*args, **kwargs | {"progress": killing(kwargs["progress"])})

    monkeypatch.setattr(tester, "evaluate", kill)
    options = ("TEST.weights", straight / "last_model.pth", "TRAIN.workers_val", 1)
    assert error_of("test.py", config, *options).startswith("a loader process was killed")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_rank_that_lost_its_loader_goes_on_until_ranks_ask(config, monkeypatch, split):
    run, asked, taken = built(config, batch_size=4, accumulation_steps=1, batch_size_val=4), [], []
    run.train_loader.batch_sampler.set_epoch(0)
    loader = run.train_loader if split == "train" else run.val_loader
    batches = list(loader)

    def dying():
        yield from batches[:2]
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(resume, "any_rank", lambda *flags: asked.append(len(taken)) or flags)
    monkeypatch.setattr(resume, "gather_objects", lambda own: [own, 0.06])  # four steps apart
    monkeypatch.setattr(resume, "save_and_stop", mock.Mock(side_effect=SystemExit))
    with suppress(SystemExit):
        for (batch,) in resume.stoppable(run, loader, dying()):
            taken.append(batch)
    assert asked == [0, 1, 5]
    assert_same(taken, batches[:5])


@pytest.mark.parametrize("fewest", [0, 2])
def test_ranks_with_more_batches_than_another_ask_at_the_end(config, monkeypatch, fewest):
    run, asked = built(config), []
    monkeypatch.setattr(resume, "any_rank", lambda *flags: asked.append(len(taken)) or flags)
    taken, batches = [], list(range(5))
    for (batch,) in resume.stoppable(run, run.val_loader, batches, count=fewest):
        taken.append(batch)
    assert taken == batches
    assert asked == [*range(fewest), 5]


@pytest.mark.parametrize(
    ("seconds", "apart"), [([0.1], 1), ([0.01, 0.05], 5), ([0.01, 1.0], 1), ([1e-4, 1e-4], 16)]
)
def test_ranks_ask_each_other_some_times_a_second(monkeypatch, seconds, apart):
    monkeypatch.setattr(resume, "gather_objects", lambda own: [own, *seconds[1:]])
    assert resume.steps_apart(10 * seconds[0], 10) == apart


# ----------------------------------------------------------------------------- space, and company


def test_a_full_disk_keeps_the_checkpoint_before_and_training_goes_on(config):
    run = built(config)
    last, best = (run.folder / f"{name}_model.pth" for name in ("last", "best"))
    assert resume.save(run, {}, is_best=True)
    before = last.read_bytes()
    run.step = 1
    with largest_file(1_000_000):
        assert not resume.save(run, {}, is_best=True)
    assert before == last.read_bytes() == best.read_bytes()
    assert not list(run.folder.glob(".*.partial"))
    assert resume.save(run, {}, is_best=False)
    assert [load(path)["step"] for path in (last, best)] == [1, 0]


def test_a_run_whose_last_checkpoint_could_not_be_written_fails(config, folder, told):
    with largest_file(1_000_000):
        line = refusal(config)
    assert line == f"the last checkpoint is missing: make room in {folder}, then resume"
    fault = f"{folder / 'last_model.pth'} could not be written: File too large"
    assert told().count(fault) == EPOCHS
    assert len(read_metrics(folder)) > EPOCHS


def test_a_second_run_in_one_folder_is_refused_unless_forced(config, folder, monkeypatch):
    monkeypatch.setattr(resume, "PATIENCE", 0.2)
    with resume.hold_run_folder(load_config(config), ALONE) as source:
        assert source is None
        assert refusal(config).startswith(f"another process is training in {folder}; wait for it")
        assert [(path.name, path.read_bytes()) for path in folder.iterdir()] == [("train.log", b"")]
        train(config, force=True)
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


@pytest.mark.parametrize("named", ["null", "auto"])
def test_what_a_run_saves_while_it_ends_is_waited_for(straight, config, folder, named, told):
    folder.mkdir(parents=True)
    held = threading.Event()

    def save_and_leave() -> None:
        with lock.hold(folder / "train.log", pytest.fail):
            held.set()
            time.sleep(1.0)
            clone(straight, folder)

    other = threading.Thread(target=save_and_leave)
    other.start()
    held.wait()
    if named == "auto":
        train(config, resume=named)
        assert f"resumed from {folder / 'last_model.pth'}" in told()
    else:
        assert "a new training would write over it" in refusal(config)
    other.join()
    assert_equal_runs(folder, straight)


def test_a_file_system_without_locks_is_told(config, folder, monkeypatch):
    fault = OSError(errno.ENOSYS, "Function not implemented")
    monkeypatch.setattr("fcntl.flock", mock.Mock(side_effect=fault))
    assert refusal(config) == f"{folder}/train.log: cannot be locked: Function not implemented"


@pytest.mark.parametrize("left", ["last_model.pth", "best_model.pth", "step_00000001.pth"])
@pytest.mark.parametrize("source", [None, "last_model.pth"])
def test_a_training_does_not_write_over_another(straight, config, ended, left, source):
    for path in ended.glob("*.pth") if left != "last_model.pth" else ():
        if path.name != left:
            path.unlink()
    before, source = files(ended), source and straight / source
    kind = f"training from {source}" if source else "new training"
    line = refusal(config, resume=source)
    assert line.startswith(f"{ended / left} is there, and a {kind} would write over it: ")
    assert all(remedy in line for remedy in REMEDIES)
    assert files(ended) == before


def test_the_remedies_of_an_earlier_training_work(straight, config, ended, told):
    train(config, resume="auto")
    assert_equal_runs(ended, straight)
    other = ended.parent / "other"
    other.mkdir()  # records without a checkpoint are no training to be kept
    (other / "metrics.jsonl").write_text('{"kind": "step", "step": 99}\n')
    train(config, exp_name="other")
    assert_equal_runs(other, straight)
    assert steps_of(other) == []
    number = len(list(ended.glob("*.pth")))
    train(config, force=True, epochs=1)
    assert f"TRAIN.force: {number} checkpoint(s) in {ended} are removed" in told()
    assert load(ended / "last_model.pth")["epoch"] == 1
    assert sorted(p.name for p in ended.glob("*.pth")) == ["best_model.pth", "last_model.pth"]
    assert [p.name for p in (ended / "pictures").iterdir()] == ["epoch_0001.jpg"]


@pytest.mark.parametrize("begun_from", [None, "step_00000001.pth"])
def test_restarted_ranks_go_on_only_from_what_this_config_saved(
    straight, config, monkeypatch, begun_from
):
    source = begun_from and straight / begun_from
    train(config, resume=source)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert built(config, resume=source).epoch == EPOCHS
    assert "would write over it" in refusal(config, resume=source, base_lr=0.5)


# ------------------------------------------------------------- from a checkpoint of another run


def test_a_checkpoint_that_was_moved_away_takes_up_its_records(straight, config, folder, tmp_path):
    number = steps_of(straight)[-1] // EPOCHS + 1
    folder.mkdir(parents=True)
    shutil.copy(straight / "metrics.jsonl", folder)
    shutil.copy(straight / f"step_{number:08d}.pth", tmp_path / "archive.pth")
    train(config, resume=tmp_path / "archive.pth")
    assert read_metrics(folder) == read_metrics(straight)


def test_a_checkpoint_is_the_folders_own_by_any_path(straight, config, ended, tmp_path):
    (tmp_path / "link").symlink_to(ended)
    (tmp_path / "link.pth").symlink_to(ended / "last_model.pth")
    (ended / "of_other.pth").symlink_to(straight / "last_model.pth")
    for path in ("link/last_model.pth", "link/../tiny/last_model.pth", "link.pth"):
        assert built(config, resume=tmp_path / path).epoch == EPOCHS
    assert built(config, resume=ended / "of_other.pth").epoch == EPOCHS


def test_a_forced_run_from_anothers_checkpoint_clears_the_folder(straight, config, ended):
    (ended / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "loss": 99}\n')
    train(config, resume=straight / "step_00000001.pth", force=True)
    assert steps_of(ended) == []
    assert_equal_runs(ended, straight)


def test_the_loss_scale_goes_on_where_it_was(config, folder):
    run = built(config, precision="fp16")
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 7})
    resume.save(run, {}, is_best=True)
    again = built(config, precision="fp16", resume=folder / "last_model.pth")
    assert again.scaler.state_dict() == run.scaler.state_dict()
