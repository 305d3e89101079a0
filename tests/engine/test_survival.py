"""Ranks under torchrun that are killed, asked to stop or fail, and two launchers: all real."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import (
    assert_equal_runs,
    assert_same,
    build_run,
    free_port,
    load,
    load_state,
    read_metrics,
    repack,
    spawn,
    start_command,
    write_config,
)

import train
from utils.config import load_config
from utils.distributed import Ranks
from utils.records import RecordReader

pytestmark = pytest.mark.slow
LIMIT = 120  # seconds
EPOCHS = 3
RESUMED = "resumed from "  # once a start, in the banner
ONE = ("--standalone", "--nproc_per_node=2")  # launcher, with both ranks


def recipe(folder: Path, data: Path, **train_keys) -> Path:
    keys = {"dropout": 0.1, "save_every": "2", "resume": "auto"}
    return write_config(folder, data, **(keys | train_keys))


def train_on_rank(ranks: Ranks, config: Path) -> None:
    train.train(load_config(config), ranks)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """The folder of two ranks' run that nothing happened to, with a checkpoint of each 2 steps."""
    keys = {"epochs": EPOCHS, "workers": 1, "workers_val": 1, "keep_checkpoints": 99}
    config = recipe(tmp_path_factory.mktemp("whole"), data, **keys)
    spawn(2, train_on_rank, config)
    return folder_of(config)


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start `torchrun <options> train.py --config <config>`; none outlives the test."""
    started = []

    def launch(config: Path, *options: object) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", *options]
        started.append(start_command(*launcher, "train.py", "--config", config))
        return started[-1]

    yield launch
    for process in started:
        ranks = children_of(process)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for pid in ranks:  # in sessions of their own, and they hold the pipe open
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()


def wait_for(process: subprocess.Popen, config: Path, name: str = "metrics.jsonl") -> None:
    """Until the run has written something: by default the record of the first step."""
    path = folder_of(config) / name
    deadline = time.monotonic() + LIMIT
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, while it lives."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def pid_of_rank(rank: int, *processes: subprocess.Popen) -> int:
    """Of the process that one of the launchers has started for a rank."""
    wanted = f"RANK={rank}".encode()
    children = [pid for process in processes for pid in children_of(process)]
    (found,) = [
        pid for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    return found


def end(process: subprocess.Popen) -> str:
    """Wait for it: what it said."""
    return process.communicate(timeout=LIMIT)[1]


def folder_of(config: Path) -> Path:
    return config.parent / "exp/tiny"


def finish_after_kill(start: Callable, config: Path) -> str:
    """Train with two ranks, kill the first after it has saved, and let torchrun restart it."""
    process = start(config, *ONE, "--max-restarts=1")
    wait_for(process, config, "last_model.pth")
    os.kill(pid_of_rank(0, process), signal.SIGKILL)
    err = end(process)
    assert process.returncode == 0, err
    return err


def test_torchrun_restarts_after_a_killed_rank_and_nothing_differs(data, tmp_path, start, whole):
    config = recipe(tmp_path, data, epochs=EPOCHS)
    assert finish_after_kill(start, config).count(RESUMED) == 1
    assert_equal_runs(folder_of(config), whole)
    epochs = [r["epoch"] for r in read_metrics(folder_of(config)) if r["kind"] == "epoch"]
    assert epochs == [1, 2, 3]
    state = load(folder_of(config) / "last_model.pth")
    first, second = (rng["torch"] for rng in state["rng"])
    assert not torch.equal(first, second)
    assert not any(key.startswith("module.") for key in state["state_dict"])


def test_a_restart_takes_what_the_run_has_saved_not_what_it_began_from(
    data, tmp_path, start, whole
):
    other = whole / "step_00000002.pth"
    config = recipe(tmp_path, data, epochs=EPOCHS, resume=str(other), force=True)
    last = folder_of(config) / "last_model.pth"
    last.parent.mkdir(parents=True)
    shutil.copy(whole / "last_model.pth", last.with_name("step_00000099.pth"))
    err = finish_after_kill(start, config)
    assert err.count("TRAIN.force: 1 checkpoint(s)") == 1
    assert [err.count(f"{RESUMED}{path}") for path in (other, last)] == [1, 1]
    assert_same(load_state(last), load_state(whole / "last_model.pth"))


def test_one_process_resumes_what_two_ranks_saved_and_says_what_differs(
    data, tmp_path, whole, capfd
):
    last, config = whole / "last_model.pth", recipe(tmp_path, data, epochs=EPOCHS + 1)
    run = build_run(config, "TRAIN.resume", last)
    assert run.epoch == EPOCHS
    assert f"ranks was 2 when {last} was saved, now 1" in capfd.readouterr().err
    assert_same(dict(run.model.state_dict()), dict(load(last)["state_dict"]))


def test_two_launchers_train_as_one_and_restart_after_a_killed_rank(data, tmp_path, start, whole):
    config = recipe(tmp_path, data, epochs=EPOCHS)
    meeting = ("--rdzv_backend=c10d", "--rdzv_id=test", f"--rdzv_endpoint=127.0.0.1:{free_port()}")
    nodes = ("--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1", "--max-restarts=1")
    agents = [start(config, *nodes, *meeting) for _ in range(2)]
    wait_for(agents[0], config, "last_model.pth")
    os.kill(pid_of_rank(1, *agents), signal.SIGKILL)
    errors = [end(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], errors
    assert sum(error.count("2 rank(s) x 4 x 1") for error in errors) == 2
    assert sum(error.count(RESUMED) for error in errors) == 1
    assert_equal_runs(folder_of(config), whole)


@pytest.mark.parametrize("to", ["a rank", "the launcher"])
def test_a_signal_stops_all_ranks_which_save_and_are_not_restarted(data, tmp_path, start, to):
    config = recipe(tmp_path, data, epochs=1000)
    folder, process = folder_of(config), start(config, *ONE, "--max-restarts=1")
    wait_for(process, config)
    if to == "a rank":
        os.kill(pid_of_rank(1, process), signal.SIGUSR1)
    else:
        process.terminate()
    err, told = end(process), (folder / "PREEMPTED").read_text()
    assert process.returncode != 0
    assert told.startswith("a signal to another rank" if to == "a rank" else "SIGTERM")
    assert err.count(f"{told.strip()}; TRAIN.resume auto goes on from there") == 1
    assert to == "the launcher" or "exitcode  : 75" in err
    state = load(folder / "last_model.pth")
    assert read_metrics(folder)[-1]["step"] <= state["step"]
    assert len(state["rng"]) == 2


def test_one_failing_rank_ends_all_at_once_and_its_error_is_told(data, tmp_path, start):
    source = data / "lmdb/shapes/val.lmdb"
    reader = RecordReader(source)
    key = list(dict.fromkeys(reader.index.image_keys))[1]  # goes to rank 1
    val = repack(source, tmp_path / "val.lmdb", photos={key: reader.image(key)[:200]})
    config = recipe(tmp_path, data)
    config.write_text(config.read_text().replace(str(source), str(val)))
    process = start(config, *ONE)
    wait_for(process, config)
    since = time.monotonic()
    err = end(process)
    assert time.monotonic() - since < 60
    assert process.returncode == 1
    faults = ("error: ", "Traceback", "[rank")
    first = next(line for line in err.splitlines() if line.startswith(faults))
    assert first.startswith("error: "), err
    assert key in first
