"""What the tests of engine/ and of the two programs share: tiny data, a config, ways to run.

Everything runs on the CPU, whatever the machine has, and in one thread, so that numbers can be
compared to the bit.
"""

import json
import os
import resource
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing
import yaml
from samples import ROOT, threads

import train
from engine.pace import MEASURED
from engine.trainer import Run, save, train_one_epoch
from tools import data_process, folder2lmdb, refshapes
from utils import distributed
from utils.config import Config, load_config
from utils.distributed import Ranks
from utils.logger import Tracker

SPLITS = {"train": 12, "val": 5, "testA": 2, "testB": 2}  # images
CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)

TINY_MODEL = {
    "clip_pretrain": None,
    "clip_arch": {
        "embed_dim": 64,
        "image_resolution": 64,
        "vision_layers": [1, 1, 1, 1],
        "vision_width": 8,
        "context_length": 20,
        "vocab_size": 49408,
        "transformer_width": 64,
        "transformer_heads": 1,
        "transformer_layers": 1,
    },
    "input_size": 64,
    "vis_dim": 64,
    "fpn_out": [32, 64, 64],
    "num_layers": 1,
    "num_head": 4,
    "dim_ffn": 64,
}
TINY_RECIPE = {
    "workers": 0,
    "workers_val": 0,
    "epochs": 1,
    "milestones": [],
    "batch_size": 8,
    "batch_size_val": 16,
    "base_lr": 0.001,
    "lr_multi": 1.0,
    "print_freq": 2,
}


def make_shapes(base: Path) -> Path:
    """RefShapes through the three tools, once below `base`: a folder with lmdb/shapes/*.lmdb."""
    root = base / "shapes"
    if not root.exists():
        counts = [word for split, count in SPLITS.items() for word in (f"--{split}", str(count))]
        refshapes.main(["--output", str(root), *counts, "--seed", "3"])
        pack(root, root, "refshapes", "unc", "shapes")
    return root


def pack(refer_root: Path, out: Path, dataset: str, split_by: str, name: str) -> None:
    """A REFER folder -> out/lmdb/<name>/<split>.lmdb for each of its splits."""
    where = ["--data_root", str(refer_root), "--output_dir", str(out), "--dataset", dataset]
    data_process.main([*where, "--split", split_by, "--generate_mask", "--name", name])
    for path in sorted((out / "anns" / name).iterdir()):
        images, masks = refer_root / "images/train2014", out / "masks" / name
        args = ["-j", path, "-i", images, "-m", masks, "-o", out / "lmdb" / name]
        folder2lmdb.main([str(arg) for arg in args])


def write_config(
    folder: Path, data: Path, dataset: str = "shapes", threshold: float | None = None, **train_keys
) -> Path:
    """A config over config/base.yaml: tiny model, few steps, output in `folder`/exp/tiny.

    Args:
        data: holds lmdb/<dataset>/*.lmdb.
        threshold: of TEST.
        train_keys: of the TRAIN section.
    """
    lmdb = data / "lmdb" / dataset
    tree = {
        "_base_": str(ROOT / "config/base.yaml"),
        "DATA": {
            "dataset": dataset,
            "train_lmdb": str(lmdb / "train.lmdb"),
            "val_lmdb": str(lmdb / "val.lmdb"),
        },
        "TRAIN": TINY_MODEL
        | TINY_RECIPE
        | {"exp_name": "tiny", "output_folder": str(folder / "exp")}
        | train_keys,
        "TEST": {"test_lmdb": str(lmdb / "val.lmdb"), "threshold": threshold},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def loader_config(
    lmdb: Path, files: object = None, exclude: object = (), cache: object = "null", **train: object
) -> Config:
    """For loaders alone: train and validate on `lmdb`, or train on `files`."""
    keys = {"input_size": 32, "word_len": 9, "batch_size": 4, "batch_by": "refs"}
    keys |= {"workers": 0, "workers_val": 0}
    opts = ["DATA.train_lmdb", files or lmdb, "DATA.val_lmdb", lmdb]
    opts += ["DATA.exclude_lmdb", list(exclude), "DATA.cache", cache]
    opts += [w for key, value in (keys | train).items() for w in (f"TRAIN.{key}", value)]
    return load_config(ROOT / "config/refshapes/cris_tiny.yaml", [str(opt) for opt in opts])


def train_a_little(folder: Path, data: Path, threshold: float) -> Path:
    """A config and its run in `folder`, that learnt val enough to predict something.

    Args:
        threshold: goes into the config; probabilities lie on both sides of 0.15.
    """
    recipe = {"target": "area", "base_lr": 2e-3, "batch_size": 6}
    config = write_config(folder, data, threshold=threshold, **recipe)
    val = str(data / "lmdb/shapes/val.lmdb")
    run = build_run(config, "DATA.train_lmdb", val, "DATA.train_split", "val")
    with on_cpu():
        for epoch in range(40):
            train_one_epoch(run, epoch)
    save(run, {}, is_best=True)
    return config


def make_trained(base: Path) -> Path:
    """The config of a run that learnt a little, once below `base`; nothing is written to it."""
    folder = base / "trained"
    if folder.exists():
        return folder / "tiny.yaml"
    return train_a_little(folder, make_shapes(base), threshold=0.15)


@contextmanager
def on_cpu() -> Iterator[None]:
    """No GPU and, so that results are the same to the bit, one thread."""
    with (
        threads(1),
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("torch.cuda.device_count", return_value=0),
    ):
        yield


def run_program(name: str, config: Path, *opts: object, switches: Sequence[str] = ()) -> None:
    """`python <name> <switches> --config <config> --opts <opts>` in this process."""
    argv = [name, *switches, "--config", str(config), "--opts", *map(str, opts)]
    with on_cpu(), mock.patch.object(sys, "argv", argv):
        runpy.run_path(str(ROOT / name), run_name="__main__")


def error_of(name: str, config: Path, *opts: object, switches: Sequence[str] = ()) -> str:
    """The one line with which the program ends, without its `error: `; exit code 1 goes with it."""
    line = None
    try:
        run_program(name, config, *opts, switches=switches)
    except SystemExit as ending:
        line = ending.code
        # What lives on in the frames of an error goes in the garbage collector's own order, and
        # then each process of a loader takes five seconds to end.
        if ending.__context__ is not None:
            traceback.clear_frames(ending.__context__.__traceback__)
    assert isinstance(line, str), f"exit code {line}"
    assert line.startswith("error: ")
    assert len(line.splitlines()) == 1
    assert "Traceback" not in line
    return line.removeprefix("error: ")


def run_command(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A command line from the repository root, in processes of its own."""
    return subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def torchrun(num_ranks: int, *command: object) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node=<num_ranks> <command>` on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run_command(*launcher, f"--nproc_per_node={num_ranks}", *command)


def spawn(num_ranks: int, function: Callable, *args: object) -> None:
    """Call `function(ranks, *args)` in processes joined by gloo; a failure in one is raised."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_join, (num_ranks, port, function, args), nprocs=num_ranks)


def _join(rank: int, num_ranks: int, port: int, function: Callable, args: tuple) -> None:
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    ranks = distributed.start()
    try:
        function(ranks, *args)
    finally:
        distributed.stop()


def build_run(config: Path | Config, *opts: object, ranks: Ranks = ALONE) -> Run:
    """What train.py hands to `fit`, made by train.py itself and not started."""
    if not isinstance(config, Config):
        config = load_config(config, [str(opt) for opt in opts])
    runs: list[Run] = []
    with on_cpu(), mock.patch("engine.trainer.fit", runs.append):
        train.train(config, ranks)
    (run,) = runs
    run.tracker = Tracker(None)
    return run


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The system refuses to write more than so many bytes to a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Batches(list):
    """A loader of given batches."""

    @property
    def batch_sampler(self) -> "Batches":
        return self

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Every epoch is the same."""


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def drop_measured(record: dict) -> None:
    """Take out of a record of metrics.jsonl what differs from run to run: speed and memory."""
    for name in MEASURED:
        record.pop(name, None)


def load(path: Path) -> dict:
    """A checkpoint's content."""
    return torch.load(path, weights_only=True)


def assert_same(got: object, expected: object, where: str = "") -> None:
    """Compare nested containers of tensors and plain values to the bit."""
    assert type(got) is type(expected), where
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), where
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    else:
        assert got == expected, where
