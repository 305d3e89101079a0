"""Compare speed and memory with the published formulation (tools/published.py).

`eval` (sentences a second, all included), `train` (refs a second) and `memory` (peak of training
steps) give both formulations the same weights, photos and sentences; `--precision` is that of their
training steps, and of this evaluation. `data` compares ways of reading training samples. The ways
take turns, since a machine is faster in one minute than in another: medians and the ratios within a
round hold.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.build import build_model, compile_model, find_device, settle_memory
from engine.evaluator import evaluate, resolve_protocols
from engine.guard import optimizer_step
from engine.loaders import build_evaluation_loader
from engine.optim import build_optimizer, build_schedule, parameter_groups
from engine.run import Run
from engine.trainer import PRECISIONS, build_scaler, forward_backward
from tools import data_process, folder2lmdb, published, refshapes
from tools.latency import count_flops, machine, take_turns, without_archive
from utils.arguments import check_at_least, parse_with_opts, text_parser
from utils.cache import open_cache
from utils.config import Config, load_config
from utils.dataset import TrainingDataset, collate_refs
from utils.distributed import Ranks
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import progress
from utils.machine import peak_memory
from utils.metrics import summarize
from utils.records import JoinedReader, RecordReader
from utils.seed import deterministic, draw
from utils.tokenizer import tokenize

EPILOG = """examples:
  python tools/benchmark.py eval
  python tools/benchmark.py train datasets/lmdb/refcoco/val.lmdb --batch 16 --device cuda
  python tools/benchmark.py memory
  python tools/benchmark.py data datasets/lmdb/refcoco/val.lmdb --rounds 9"""

PUBLISHED, OURS, CACHED = "published", "this", "this, DATA.cache"
COMPILED = "this, compiled"

Ways = Mapping[str, Callable[[], object]]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the command names, print a table, write JSON."""
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    compare = COMMANDS[args.command][0]
    with TemporaryDirectory() as folder:
        args.records = args.records or pack_shapes(Path(folder))
        setting = Setting(args)
        result = compare(setting, args)
    result = {"command": args.command, "machine": machine(setting.device), **result}
    print_table(result)
    if args.json:
        with atomic_path(args.json) as partial:
            partial.write_text(json.dumps(result, indent=2) + "\n")


# ------------------------------------------------------------------------------------------- inputs


def pack_shapes(folder: Path) -> Path:
    """Draw a small RefShapes and pack its val split into `folder`."""
    root, name = folder / "refshapes", "refshapes"
    counts = {"train": 4, "val": 24, "testA": 4, "testB": 4}
    words = [word for split, count in counts.items() for word in (f"--{split}", str(count))]
    refshapes.main(["--output", str(root), *words])
    where = ["--data_root", root, "--output_dir", folder, "--dataset", name, "--split", "unc"]
    data_process.main([str(word) for word in [*where, "--generate_mask"]])
    words = ["-j", folder / f"anns/{name}/val.json", "-i", root / "images/train2014"]
    words += ["-m", folder / f"masks/{name}", "-o", folder / "lmdb"]
    folder2lmdb.main([str(word) for word in words])
    return folder / "lmdb/val.lmdb"


def find_config(path: str, opts: Sequence[str]) -> Config:
    """Load the config; where CLIP's archive is not at hand, its published sizes do."""
    if "TRAIN.precision" in opts:
        raise UserError("TRAIN.precision: leave it out; --precision sets that of all ways")
    fixed = "TRAIN.precision fp32 TRAIN.accumulation_steps 1 TRAIN.workers_val 0"
    return without_archive(load_config(path, [*opts, *fixed.split()]))


class Setting:
    """Config, records and a model's weights, which both formulations are given."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.device = find_device(args.device, "--device")
        self.cfg = find_config(args.config, args.opts)
        self.dtype = PRECISIONS[args.precision]
        self.ranks = Ranks(0, 1, 0, 1, self.device)
        self.lmdb, self.reader = args.records, RecordReader(args.records)
        self.records = JoinedReader([(self.reader, range(len(self.reader)))])
        self.side, self.word_len = self.cfg.TRAIN.input_size, self.cfg.TRAIN.word_len

    def ours(self) -> nn.Module:
        """Build this repository's model, whose weights make masks with outlines.

        Statistics of BatchNorm are those of photos, and the logits have mean -0.6, deviation 2.
        """
        torch.manual_seed(0)
        model = build_model(self.cfg, self.device).train()
        images, tokens, _ = self.batch(range(min(4, len(self.reader))))
        # The sentence's BatchNorm keeps its own: the statistics of four would magnify rounding.
        for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.momentum = 1.0
        with torch.no_grad():
            model(images, tokens)
            logits, last = model.eval()(images, tokens), model.proj.txt
            last.weight.mul_(2 / logits.std())
            last.bias.mul_(2 / logits.std())
            last.bias[-1] -= 2 * logits.mean() / logits.std() + 0.6
        return model

    def batch(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Read refs as the release's loader does: images, tokens, masks, on the device."""
        images, chosen, masks = [], [], []
        for position in positions:
            ref = self.reader.ref(position)
            place = draw("sentence", len(ref.sentences), self.cfg.TRAIN.manual_seed, 0, position)
            chosen.append(ref.sentences[place])
            images.append(published.read_image(self.reader.image(ref.image_key), self.side))
            masks.append(published.read_mask(ref.mask, self.side))
        parts = torch.stack(images), tokenize(chosen, self.word_len), torch.stack(masks)
        return tuple(part.to(self.device) for part in parts)

    def dataset(self, caches: Mapping | None = None) -> TrainingDataset:
        """Return the refs as training reads them here."""
        seed = self.cfg.TRAIN.manual_seed
        return TrainingDataset(self.records, self.side, self.word_len, seed, caches=caches or {})

    def position_batches(self, size: int) -> list[list[int]]:
        """Shuffle all positions into whole batches."""
        count = len(self.reader)
        if count < size:
            raise UserError(f"{self.lmdb} has {count} refs, fewer than --batch {size}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        return [part.tolist() for part in order.split(size) if len(part) == size]


# -------------------------------------------------------------------------------------- comparisons


def compare_evaluation(setting: Setting, args: argparse.Namespace) -> dict:
    """Time evaluation from the photo's bytes to pixel counts at the photo's size."""
    full = build_evaluation_loader(setting.cfg, str(setting.lmdb), setting.ranks)
    groups = full.dataset.groups = full.dataset.groups[: args.photos]
    loader = DataLoader(full.dataset, full.batch_size, collate_fn=full.collate_fn)
    positions = [position for group in groups for position in group]
    sentences = sum(len(setting.reader.ref(position).sentences) for position in positions)
    ours, theirs = setting.ours(), published.Published(setting.ours())
    found: dict[str, dict] = {}

    def evaluate_published() -> None:
        found[PUBLISHED] = published.evaluate(
            theirs, setting.reader, positions, setting.side, setting.word_len, setting.device
        )

    def evaluate_ours() -> None:
        protocols, batch_size = resolve_protocols("published"), setting.cfg.TRAIN.batch_size_val
        common = ours, loader, setting.device, protocols, batch_size
        (scores,) = evaluate(*common, precision=args.precision).values()
        found[OURS] = {score.key: (score.intersection, score.union) for score in scores}

    ways = {PUBLISHED: evaluate_published, OURS: evaluate_ours}
    result = time_ways(ways, args.rounds, sentences, "sentences/s", setting.device)
    keys = list(found[PUBLISHED])
    theirs_counted, counted = (np.array([found[name][key] for key in keys]) for name in ways)
    mean, theirs_mean = (summarize(*counts.T)["mIoU"] for counts in (counted, theirs_counted))
    return result | {
        "what": f"evaluation of {sentences} sentences on {len(groups)} photos at "
        f"{setting.side} px, {args.precision} against fp32",
        "differences": {
            "pixels of a sentence": int(np.abs(counted - theirs_counted).max()),
            "mIoU": abs(mean - theirs_mean),
        },
    }


def compare_training(setting: Setting, args: argparse.Namespace) -> dict:
    """Time training steps, reading included."""
    names = (PUBLISHED, OURS, COMPILED)[: 3 if args.compile else 2]
    steps = {name: training_steps(setting, name, args.batch) for name in names}
    settle_memory(setting.cfg, setting.device)
    losses = {name: next(step) for name, step in steps.items()}
    change = abs(losses[OURS] / losses[PUBLISHED] - 1)
    ways = {name: partial(next, step) for name, step in steps.items()}
    with deterministic(False):  # cuDNN tries algorithms, as in train.py
        result = time_ways(ways, args.rounds, args.batch, "refs/s", setting.device)
    return result | {
        "what": f"training steps of {args.batch} refs at {setting.side} px, "
        f"{args.precision}, dropout {setting.cfg.TRAIN.dropout:g}",
        "differences": {"loss of the first step, relative": change},
    }


def training_steps(setting: Setting, name: str, batch: int) -> Iterator[float]:
    """Make a training step of one way at each `next`, and give its loss."""
    cfg, model = setting.cfg, setting.ours().train()
    batches = cycle(setting.position_batches(batch))
    if name == PUBLISHED:
        model, scaler = published.Published(model), build_scaler(setting.dtype, setting.device)
        optimizer = torch.optim.Adam(parameter_groups(model, cfg), cfg.TRAIN.base_lr, foreach=True)
        for positions in batches:
            images, tokens, masks = setting.batch(positions)
            step = published.train_step
            yield step(model, optimizer, images, masks, tokens, scaler, setting.dtype)[0]
    if name == COMPILED:
        compile_model(model, setting.device)
    dataset, run = setting.dataset(), build_run(setting, model)
    for positions in batches:
        samples = dataset.__getitems__([(position, 0) for position in positions])
        scores = forward_backward(run, collate_refs(samples), synchronize=True)
        optimizer_step(run)
        yield scores[0].item()


def build_run(setting: Setting, model: nn.Module) -> Run:
    """Return what a training step here needs of a run."""
    optimizer = build_optimizer(parameter_groups(model, setting.cfg), setting.cfg)
    unused = ("folder", "train_loader", "val_loader", "protocols", "tracker")
    return Run(
        cfg=setting.cfg,
        ranks=setting.ranks,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, setting.cfg),
        scaler=build_scaler(setting.dtype, setting.device),
        dtype=setting.dtype,
        **dict.fromkeys(unused),
    )


def compare_memory(setting: Setting, args: argparse.Namespace) -> dict:
    """Compare the peak memory of two training steps, each way in a process of its own."""
    rows: dict[str, list[float]] = {PUBLISHED: [], OURS: []}
    for _ in range(args.rounds):
        for name in rows:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                peak = pool.submit(peak_of_two_steps, args, name).result()
            rows[name].append(peak / 1e6)
    return {
        "what": f"peak memory in two training steps of {args.batch} refs at {setting.side} px",
        "unit": "MB",
        "ways": {name: {"MB": spread(values)} for name, values in rows.items()},
        "ratios": {OURS: ratios(rows[OURS], rows[PUBLISHED])},
    }


def peak_of_two_steps(args: argparse.Namespace, name: str) -> int:
    """Make two training steps and return the bytes that the device or process held at most."""
    setting = Setting(args)
    if name == OURS:
        settle_memory(setting.cfg, setting.device)
    steps = training_steps(setting, name, args.batch)
    next(steps), next(steps)
    is_on_gpu = setting.device.type == "cuda"
    return torch.cuda.max_memory_allocated(setting.device) if is_on_gpu else peak_memory()


def compare_reading(setting: Setting, args: argparse.Namespace) -> dict:
    """Time the reading of every ref on one core: plainly, as here, and from the cache."""
    torch.set_num_threads(1)
    batches = setting.position_batches(min(16, len(setting.reader)))
    with TemporaryDirectory() as folder:
        cache = open_cache(folder, setting.reader, setting.side, progress)
        plain, cached = setting.dataset(), setting.dataset({setting.reader.path: cache})

        def read(dataset: TrainingDataset) -> None:
            for batch in batches:
                collate_refs(dataset.__getitems__([(position, 0) for position in batch]))

        ways = {
            PUBLISHED: lambda: [setting.batch(batch) for batch in batches],
            OURS: lambda: read(plain),
            CACHED: lambda: read(cached),
        }
        count = sum(map(len, batches))
        result = time_ways(ways, args.rounds, count, "refs/s", torch.device("cpu"))
    return result | {"what": f"reading {count} refs for training at {setting.side} px, one core"}


# ------------------------------------------------------------------------------------------- rulers


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median of some values, and the smallest and largest of them."""
    return {"median": median(values), "low": min(values), "high": max(values)}


def ratios(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Summarise `values` over `others`, round by round."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


def time_ways(ways: Ways, rounds: int, count: int, unit: str, device: torch.device) -> dict:
    """Count the operations of each way's first call, then time the ways in turns.

    Args:
        count: items that a call processes, named by `unit`, such as "refs/s".
    """
    # What a compiled way computes cannot be seen from outside; it is what the plain one does.
    flops = {name: count_flops(ways[OURS if name == COMPILED else name]) for name in ways}
    seconds = take_turns(ways, rounds, device, warmup=0)
    first = next(iter(ways))
    return {
        "unit": unit,
        "rounds": rounds,
        "ways": {
            name: {
                unit: spread([count / s for s in values]),
                "GFLOP": flops[name] / count / 1e9,
                "GFLOP/s": flops[name] / 1e9 / median(values),
            }
            for name, values in seconds.items()
        },
        "ratios": {n: ratios(seconds[first], seconds[n]) for n in ways if n != first},
    }


def print_table(result: Mapping) -> None:
    """Print a result for people."""

    def cells(values: Mapping[str, float]) -> str:
        bounds = f"({values['low']:,.2f}-{values['high']:,.2f})"
        return f"{values['median']:>12,.2f}{bounds:>20}"

    print(f"\n{result['what']}")
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    unit = result["unit"]
    print(f"{'':<30}{unit:>12}{'(range)':>20}{'GFLOP each':>12}{'ratio':>12}{'(range)':>20}")
    for name, row in result["ways"].items():
        flops = f"{row['GFLOP']:,.1f}" if row.get("GFLOP") else ""
        ratio = cells(result["ratios"][name]) if name in result["ratios"] else ""
        print(f"{name:<30}{cells(row[unit])}{flops:>12}{ratio}")
    for name, value in result.get("differences", {}).items():
        print(f"largest difference, {name}: {value:.2g}")


COMMANDS = {  # function, rounds
    "eval": (compare_evaluation, 3),
    "train": (compare_training, 5),
    "memory": (compare_memory, 1),
    "data": (compare_reading, 7),
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line of this program."""
    parser = text_parser(__doc__, EPILOG)
    parser.add_argument("command", choices=COMMANDS, help="what is compared")
    parser.add_argument("records", type=Path, nargs="?", help="LMDB; without it RefShapes")
    parser.add_argument("--config", default="config/refcoco/cris_r50.yaml", metavar="FILE")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0: its own choice")
    parser.add_argument("--rounds", type=int, help="default 3, 5, 1, 7 by command")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default fp32")
    parser.add_argument("--compile", action="store_true", help="train: torch.compile as well")
    parser.add_argument("--batch", type=int, default=4, help="refs a step (default 4)")
    parser.add_argument("--photos", type=int, default=4, help="to evaluate on (default 4)")
    args = parse_with_opts(parser, argv)
    if args.rounds is None:
        args.rounds = COMMANDS[args.command][1]
    check_at_least(parser, args, rounds=1, photos=1, batch=2, threads=0)
    return args


if __name__ == "__main__":
    run_entry_point(main)
