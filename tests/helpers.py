"""What several test files share: small data, models, configs, and ways to run programs.

Everything is made from fixed seeds and runs on the CPU, whatever the machine has, in one thread,
so that numbers can be compared to the bit.
"""

import json
import os
import pickle
import resource
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import cv2
import lmdb
import numpy as np
import pytest
import torch
import torch.multiprocessing
import yaml
from golden.fill import filled
from PIL import Image
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import train
from engine import tester
from engine.evaluator import score_masks
from engine.pace import MEASURED
from engine.trainer import Run
from model.clip import ClipSizes
from model.segmenter import Segmenter, build_segmenter
from tools import data_process, folder2lmdb
from utils import distributed
from utils.cache import SquareCache
from utils.config import Config, TestConfig, TrainConfig, load_config
from utils.dataset import EvaluationDataset, SentenceTask, TrainingDataset
from utils.distributed import Ranks
from utils.errors import UserError
from utils.logger import Tracker
from utils.records import JoinedReader, RecordReader, RecordWriter, RefRecord
from utils.transforms import load_mask

ROOT = Path(__file__).resolve().parents[1]
SIZES = ClipSizes(  # of the golden case "tiny"
    embed_dim=96, image_resolution=224, context_length=77, vocab_size=512,
    vision_layers=(1, 2, 1, 1), vision_width=8,
    transformer_layers=2, transformer_width=64, transformer_heads=1,
)  # fmt: skip
COLOURS = ("red", "green", "blue", "white", "yellow", "black")


def small_config(**train: object) -> Config:
    """The golden case "tiny" but for these keys of TRAIN."""
    keys = {"clip_pretrain": None, "clip_arch": asdict(SIZES), "fpn_out": (32, 64, 96)}
    keys |= {"num_layers": 2, "num_head": 4, "dim_ffn": 128, "dropout": 0.0} | train
    return Config(TRAIN=TrainConfig(**keys))


def small_segmenter(**train: object) -> Segmenter:
    """The same with the golden weights."""
    model = build_segmenter(small_config(**train))
    model.load_state_dict(filled(model.state_dict()))
    return model


def random_batch(
    count: int, side: int, *, vocab: int = SIZES.vocab_size, word_len: int = 12
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Photos (B, S, S, 3) uint8, tokens (B, L) with 3 + b words, soft masks (B, 1, S, S)."""
    rng = np.random.default_rng(0)
    photos = np.stack([smooth_photo(rng, side, side) for _ in range(count)])
    tokens = np.zeros((count, word_len), np.int64)
    for b, row in enumerate(tokens):
        words = 3 + b
        row[: words + 2] = [vocab - 2, *rng.integers(1, vocab - 2, words), vocab - 1]
    masks = rng.random((count, 1, side, side), np.float32)
    return torch.from_numpy(photos), torch.from_numpy(tokens), torch.from_numpy(masks)


def repack(
    source: Path,
    target: Path,
    refs: Sequence[RefRecord] | None = None,
    photos: Mapping[str, bytes] | None = None,
    dataset: str | None = None,
) -> Path:
    """Pack records anew: these refs in place of all, other files in place of some photos."""
    reader, photos = RecordReader(source), photos or {}
    with RecordWriter.open(target, dataset or reader.meta["dataset"], target.stem) as writer:
        for ref in all_refs(source) if refs is None else refs:
            key = ref.image_key
            writer.add_image(key, photos[key] if key in photos else reader.image(key))
            writer.add_ref(ref)
    return target


def with_bad_image(source: Path, target: Path, content: bytes) -> Path:
    """Pack records anew with other content of the last image's file."""
    return repack(source, target, photos={all_refs(source)[-1].image_key: content})


def write_any_number(source: Path, target: Path) -> Path:
    """Pack records anew: of each three refs one has a target, one several and one none."""
    refs = []
    for position, ref in enumerate(all_refs(source)):
        number = (1, 3, 0)[position % 3]
        nothing = encoded(np.zeros((ref.height, ref.width), np.uint8))
        refs.append(replace(ref, num_targets=number, mask=ref.mask if number else nothing))
    return repack(source, target, refs)


@contextmanager
def kept_bytes() -> Iterator[dict[int, int]]:
    """Collect the sizes of what the forward pass keeps for the backward pass."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


def smooth_photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Coloured clouds: (H, W, 3) uint8."""
    return cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (width, height))


def save_photo(path: Path, seed: int = 1, size: tuple[int, int] = (70, 100)) -> Path:
    """A file of coloured clouds of a (height, width)."""
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(smooth_photo(np.random.default_rng(seed), *size)).save(path)
    return path


def blob(height: int, width: int, share: float = 0.1, seed: int = 0) -> np.ndarray:
    """A smooth random shape that covers `share` of the image: (H, W) uint8, 0 or 255."""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(share * height * width / np.pi)
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    reach = radius * (1 + 0.25 * np.sin(3 * angles + rng.uniform(0, 6)) * rng.uniform(0.4, 1))
    centre = rng.uniform(0.35, 0.65, 2) * (width, height)
    points = centre + reach[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    mask = np.zeros((height, width), np.uint8)
    return cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 255)


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    """An image file's bytes; colours as OpenCV has them (BGR)."""
    return cv2.imencode(suffix, image)[1].tobytes()


def sample_ref(position: int, image: int, size: tuple[int, int], num_sentences: int) -> RefRecord:
    """The ref at `position`: a blob that covers a tenth, and sentences that name no other ref."""
    colour = COLOURS[position % len(COLOURS)]
    return RefRecord(
        ref_id=100 + position,
        image_key=f"image_{image}.jpg",
        image_id=image,
        category=position % 5,
        height=size[0],
        width=size[1],
        mask=encoded(blob(*size, seed=position)),
        sentences=tuple(f"{colour} thing {position} {n}" for n in range(num_sentences)),
        sent_ids=tuple(1000 * position + n for n in range(num_sentences)),
    )


def write_records(path: Path, refs_per_image: Sequence[int]) -> Path:
    """Pack photos of different sizes with so many refs each, of 1-4 sentences each."""
    rng = np.random.default_rng(0)
    position = 0
    with RecordWriter.open(path, "shapes", path.stem) as writer:
        for image, count in enumerate(refs_per_image):
            size = (72 + 8 * (image % 5), 110 - 9 * (image % 7))
            writer.add_image(f"image_{image}.jpg", encoded(smooth_photo(rng, *size), ".jpg"))
            for _ in range(count):
                ref = sample_ref(position, image, size, 1 + position % 4)
                writer.add_ref(ref)
                position += 1
    return path


def all_refs(path: Path) -> list[RefRecord]:
    """Every ref of a file."""
    reader = RecordReader(path)
    return [reader.ref(position) for position in range(len(reader))]


def put(path: Path, entries: dict[bytes, bytes | None]) -> Path:
    """Write raw entries to an LMDB as another program would, or delete them (None)."""
    with lmdb.open(str(path), subdir=False, lock=False) as env, env.begin(write=True) as txn:
        for key, value in entries.items():
            txn.delete(key) if value is None else txn.put(key, value)
    return path


CPU = torch.device("cpu")
ALONE = Ranks(0, 1, 0, 1, CPU)

TINY_MODEL = {
    "clip_pretrain": None,
    "clip_arch": {
        "embed_dim": 64, "image_resolution": 64, "context_length": 20, "vocab_size": 49408,
        "vision_layers": [1, 1, 1, 1], "vision_width": 8,
        "transformer_layers": 1, "transformer_width": 64, "transformer_heads": 1,
    },
    "input_size": 64, "vis_dim": 64, "fpn_out": [32, 64, 64],
    "num_layers": 1, "num_head": 4, "dim_ffn": 64,
}  # fmt: skip
TINY_RECIPE = {
    "workers": 0, "workers_val": 0, "epochs": 1, "milestones": [], "batch_size": 8,
    "batch_size_val": 16, "base_lr": 0.001, "lr_multi": 1.0, "print_freq": 2,
}  # fmt: skip


def pack(refer_root: Path, out: Path, dataset: str, split_by: str, name: str) -> None:
    """A REFER folder -> out/lmdb/<name>/<split>.lmdb for each of its splits."""
    where = ["--data_root", str(refer_root), "--output_dir", str(out), "--dataset", dataset]
    data_process.main([*where, "--split", split_by, "--generate_mask", "--name", name])
    for path in sorted((out / "anns" / name).iterdir()):
        images, masks = refer_root / "images/train2014", out / "masks" / name
        args = ["-j", path, "-i", images, "-m", masks, "-o", out / "lmdb" / name]
        folder2lmdb.main([str(arg) for arg in args])


def refer_ref(ref_id: int, split: str = "train", **changes: object) -> dict:
    """A ref of a REFER folder."""
    sentences = [
        {"sent": text, "sent_id": 10 * ref_id + i, "raw": "?", "tokens": []}
        for i, text in enumerate((" thing é ", "other"))
    ]
    ids = {"ref_id": ref_id, "ann_id": 100 + ref_id, "image_id": 7, "category_id": 13}
    return ids | {"split": split, "sentences": sentences} | changes


def refer_instances(refs: Sequence[dict], **changes: dict[int, dict | None]) -> dict:
    """What instances.json says of these refs: a square each, on photos of 8 × 10 pixels.

    `changes` are to `images` and `annotations`, by their ids; None takes one out.
    """
    square = {"bbox": [2.9, 1.2, 4.7, 4.9], "segmentation": [[2, 1, 6, 1, 6, 5, 2, 5]]}
    image_ids, categories = ({ref[f"{k}_id"] for ref in refs} for k in ("image", "category"))
    size = {"height": 8, "width": 10}
    content = {
        "images": [{"id": i, "file_name": f"a_{i}.jpg", **size} for i in sorted(image_ids)],
        "annotations": [{"id": ref["ann_id"], **square} for ref in refs],
        "categories": [{"id": i} for i in sorted(categories)],
    }
    for kind, by_id in changes.items():
        found = [(item, by_id.get(item["id"], {})) for item in content[kind]]
        content[kind] = [item | change for item, change in found if change is not None]
    return content


def write_refer(
    root: Path,
    refs: Sequence[dict],
    instances: dict | None = None,
    dataset: str = "toys",
    name: str = "refs(me).p",
) -> Path:
    """Write the REFER folder `root`/`dataset`, and return `root`."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    data = json.dumps(refs).encode() if name.endswith("json") else pickle.dumps(refs, 2)
    (folder / name).write_bytes(data)
    (folder / "instances.json").write_text(json.dumps(instances or refer_instances(refs)))
    return root


def write_config(
    folder: Path, data: Path, dataset: str = "shapes", threshold: float | None = None, **train_keys
) -> Path:
    """A config over config/base.yaml: tiny model, few steps, output in `folder`/exp/tiny.

    `data` holds lmdb/<dataset>/*.lmdb; `threshold` is a key of TEST, `train_keys` are of TRAIN.
    """
    lmdb = data / "lmdb" / dataset
    val_lmdb, out = f"{lmdb}/val.lmdb", {"exp_name": "tiny", "output_folder": f"{folder}/exp"}
    tree = {
        "_base_": str(ROOT / "config/base.yaml"),
        "DATA": {"dataset": dataset, "train_lmdb": f"{lmdb}/train.lmdb", "val_lmdb": val_lmdb},
        "TRAIN": TINY_MODEL | TINY_RECIPE | out | train_keys,
        "TEST": {"test_lmdb": val_lmdb, "threshold": threshold},
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
    opts += train_opts(**keys | train)
    return load_config(ROOT / "config/refshapes/cris_tiny.yaml", [str(opt) for opt in opts])


def train_opts(**keys: object) -> list[object]:
    """`TRAIN.key value` for each, as `--opts` takes them."""
    return [word for key, value in keys.items() for word in (f"TRAIN.{key}", value)]


def training_dataset(path: Path, seed: int = 0, cache: SquareCache | None = None, side: int = 32):
    """All refs of a file for training, with sentences of 9 tokens."""
    reader = RecordReader(path)
    records = JoinedReader([(reader, range(len(reader)))])
    return TrainingDataset(records, side, 9, seed, {path: cache} if cache else {})


def run_program(name: str, config: Path, *opts: object, switches: Sequence[str] = ()) -> None:
    """`python <name> <switches> --config <config> --opts <opts>` in this process."""
    argv = [name, *switches, "--config", str(config), "--opts", *map(str, opts)]
    with mock.patch.object(sys, "argv", argv):
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
    return line.removeprefix("error: ")


def user_error(function: Callable, *args: object) -> str:
    """The one line of the UserError that a call raises."""
    with pytest.raises(UserError) as caught:
        function(*args)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def usage_error(capsys: pytest.CaptureFixture, function: Callable, *args: object) -> str:
    """What a program says of a command line that it does not take, and ends with 2."""
    with pytest.raises(SystemExit, match="2"):
        function(*args)
    return capsys.readouterr().err


ONE_CPU = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run_command(*command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A command line from the repository root, in processes of its own."""
    how = {"cwd": ROOT, "env": os.environ | ONE_CPU | env, "text": True, "timeout": 900}
    return subprocess.run(list(map(str, command)), capture_output=True, check=False, **how)


def start_command(*command: object) -> subprocess.Popen[str]:
    """The same in a session of its own, and not waited for."""
    how = {"cwd": ROOT, "env": os.environ | ONE_CPU, "text": True, "start_new_session": True}
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, **how)


def torchrun(num_ranks: int, *command: object) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc_per_node=<num_ranks> <command>` on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return run_command(*launcher, f"--nproc_per_node={num_ranks}", *command)


def tracked(*patterns: str) -> list[Path]:
    """The repository's files of these names; what a person has put beside them breaks no test."""
    names = run_command("git", "ls-files", *(f":(glob){pattern}" for pattern in patterns)).stdout
    found = [ROOT / name for name in names.splitlines()]
    return sorted(found or (path for pattern in patterns for path in ROOT.glob(pattern)))  # no git


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def spawn(num_ranks: int, function: Callable, *args: object) -> list:
    """Call `function(ranks, *args)` in processes joined by gloo; return what each returns."""
    with TemporaryDirectory() as out:
        given = (num_ranks, free_port(), Path(out), function, args)
        torch.multiprocessing.spawn(_join, given, nprocs=num_ranks)
        return [load(Path(out) / f"{rank}.pt") for rank in range(num_ranks)]


def _join(rank: int, num_ranks: int, port: int, out: Path, function: Callable, args: tuple) -> None:
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for scope in ("", "LOCAL_"):
        os.environ |= {f"{scope}RANK": str(rank), f"{scope}WORLD_SIZE": str(num_ranks)}
    torch.set_num_threads(1)
    ranks = distributed.start()
    try:
        torch.save(function(ranks, *args), out / f"{rank}.pt")
    finally:
        distributed.stop()


def build_run(config: Path | Config, *opts: object, ranks: Ranks = ALONE) -> Run:
    """What train.py hands to `fit`, made by train.py itself and not started."""
    if not isinstance(config, Config):
        config = load_config(config, [str(opt) for opt in opts])
    runs: list[Run] = []
    with mock.patch("train.fit", runs.append):
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


def load(path: Path) -> dict:
    """A checkpoint's content."""
    return torch.load(path, weights_only=True)


def load_state(path: Path) -> dict:
    """A checkpoint's content but for its config, which names the run's folder."""
    return {key: value for key, value in load(path).items() if key != "config"}


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run but for what differs from run to run."""
    records = read_jsonl(folder / "metrics.jsonl")
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in records]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path from there."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_same_gradients(got: nn.Module, expected: nn.Module) -> None:
    """Compare them but for what another order of additions may do."""
    pairs = zip(expected.named_parameters(), got.parameters(), strict=True)
    for (name, a), b in pairs:
        if a.requires_grad:
            tolerance = 1e-5 * a.grad.abs().max().item() + 1e-9
            torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=tolerance, msg=name)


def files(folder: Path) -> dict[Path, tuple[int, int]]:
    """Every file and folder below, with its size and the time of its last change."""
    stats = {path: path.stat() for path in folder.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def assert_equal_runs(got: Path, expected: Path) -> None:
    """Compare last and best checkpoint and the records of two run folders to the bit."""
    for name in ("last_model.pth", "best_model.pth"):
        assert_same(load_state(got / name), load_state(expected / name), name)
    assert read_metrics(got) == read_metrics(expected)


def assert_same(got: object, expected: object, where: str = "") -> None:
    """Compare nested containers of tensors and plain values to the bit."""
    assert type(got) is type(expected), where
    if isinstance(expected, list | tuple):
        got, expected = dict(enumerate(got)), dict(enumerate(expected))
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_same(got[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, Tensor):
        assert torch.equal(got, expected), where
    else:
        assert got == expected, where


HOSTILE = "<script>document.title = 'mine'</script><img src=x onerror=\"document.title='mine'\">"
ODD_SENTENCES = (HOSTILE, "日本語 🐕 “café” & <b>bold</b>", "a\u2028b\\\"'`${1}", "x" * 400)


def write_odd_records(path: Path) -> Path:
    """Two photos whose names need care, one far larger than a report shows, with odd sentences."""
    rng = np.random.default_rng(1)
    names, sizes = ("sub/50% #1?.jpg", "фото 犬.png"), ((600, 900), (40, 50))
    with RecordWriter.open(path, "odd", path.stem) as writer:
        for i, (name, size) in enumerate(zip(names, sizes, strict=True)):
            writer.add_image(name, encoded(smooth_photo(rng, *size), Path(name).suffix))
            sentences = ODD_SENTENCES[2 * i : 2 * i + 2]
            mask = encoded(blob(*size, seed=i))
            ref = RefRecord(i, name, None, None, *size, mask, sentences, (2 * i, 2 * i + 1))
            writer.add_ref(ref)
    return path


def write_result(
    folder: Path,
    lmdb: Path,
    protocol: str = "published",
    step: int = 7,
    is_swapped: bool = False,
    **test_keys,
) -> Path:
    """Write what test.py leaves of a model that moves masks aside, by `step` more each time.

    The `.jsonl` is returned; of both protocols, that of aligned.
    """
    train = TrainConfig(output_folder=str(folder.parent), exp_name=folder.name)
    test = TestConfig(protocol=protocol, swap_sentences=is_swapped, report=True, **test_keys)
    cfg, dataset = Config(TRAIN=train, TEST=test), EvaluationDataset(RecordReader(lmdb), 32, 9)
    fewest = test.no_target_pixels if "no_target" in dataset.reader.meta else 1
    lines = []
    for position, ref in enumerate(all_refs(lmdb)):
        mask = load_mask(ref) > 0
        perfect = mask & (mask.sum() >= fewest)
        for place, sentence in enumerate(zip(ref.sentences, ref.sent_ids, strict=True)):
            pred = np.roll(perfect, step * len(lines) % mask.shape[1], axis=1)
            task = SentenceTask((position, place), ref, *sentence)
            lines.append(score_masks(task, mask, pred, perfect))
    made = {"checkpoint": f"{folder.name}/best_model.pth", "seconds": 1.0}
    made |= tester.summarize_lines(lines, test.no_target_pixels)
    heads = tester.result_heads(cfg, dataset.reader).values()
    scored = [(head | made, lines) for head in heads]
    tester.write_split(cfg, dataset, scored)
    return folder / f"{tester.result_stem(scored[0][0])}.jsonl"


def read_script(path: Path) -> dict | list:
    """The value that a data file of a page sets."""
    text = path.read_text("ascii")
    return json.loads(text.partition(" = ")[2].rstrip().removesuffix(";"))
