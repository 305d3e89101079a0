"""Compare speed and memory with the published formulation (tools/published.py).

    python tools/benchmark.py train datasets/lmdb/refcoco/val.lmdb --batch 16 --device cuda

`eval` (sentences a second, all included), `train` (refs a second) and `memory` (peak of training
steps) give both formulations the same weights, photos and sentences. `TRAIN.precision` is that of
both ways to train, `TEST.precision` that of this evaluation. `data` compares ways of reading
training samples. The ways take turns, since a machine is faster in one minute than in another:
medians and the ratios within a round hold.
"""

import argparse
import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
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
from engine.evaluator import evaluate
from engine.guard import optimizer_step
from engine.loaders import build_evaluation_loader
from engine.optim import build_optimizer, parameter_groups
from engine.pace import memory_in_use
from engine.run import Run
from engine.trainer import build_scaler, forward_backward, resolve_precision
from tools import data_process, folder2lmdb, published, refshapes
from tools.latency import Ways, count_flops, describe_machine, machine, take_turns, without_archive
from utils.arguments import check_at_least, parse_with_opts, text_parser
from utils.cache import open_cache
from utils.config import load_config
from utils.dataset import TrainingBatch, TrainingDataset, collate_refs
from utils.distributed import Ranks
from utils.errors import UserError, run_entry_point
from utils.files import write_text
from utils.metrics import Counts
from utils.records import JoinedReader, RecordReader
from utils.seed import deterministic, draw
from utils.tokenizer import tokenize
from utils.transforms import PROTOCOLS

PUBLISHED, OURS, CACHED, COMPILED = "published", "this", "this, DATA.cache", "this, compiled"
FIXED = "TRAIN.accumulation_steps 1 TRAIN.workers_val 0"


def main(argv: Sequence[str] | None = None) -> dict:
    """Measure what the command names; print a table, write JSON and return what is in it."""
    args = parse_args(argv)
    cv2.setNumThreads(1)
    with TemporaryDirectory() as folder:
        args.records = args.records or pack_shapes(Path(folder))
        setting = Setting(args)
        result = COMMANDS[args.command](setting)
    result = {"command": args.command, "machine": machine(setting.device), **result}
    print_table(result)
    if args.json:
        write_text(args.json, json.dumps(result, indent=2) + "\n")
    return result


def pack_shapes(folder: Path) -> Path:
    """Draw a small RefShapes and pack its val split into `folder`."""
    counts = ["--train", "4", "--val", "24", "--testA", "4", "--testB", "4"]
    refshapes.main(["-o", f"{folder}/drawn", *counts])
    words = ["--data_root", f"{folder}/drawn", "--output_dir", f"{folder}", "--generate_mask"]
    data_process.main([*words, "--dataset", "refshapes", "--split", "unc"])
    words = ["-j", f"{folder}/anns/refshapes/val.json", "-i", f"{folder}/drawn/images/train2014"]
    folder2lmdb.main([*words, "-m", f"{folder}/masks/refshapes", "-o", f"{folder}/lmdb"])
    return folder / "lmdb/val.lmdb"


class Setting:
    """Config, records and a model's weights, which both formulations are given."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = find_device(args.device, "--device")
        self.cfg = without_archive(load_config(args.config, [*args.opts, *FIXED.split()]))
        self.dtype = resolve_precision(self.cfg.TRAIN.precision, self.device)
        self.ranks = Ranks(0, 1, 0, 1, self.device)
        self.reader = RecordReader(args.records)
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
            images.append(published.read_image(self.reader, ref, self.side))
            masks.append(published.read_mask(ref, self.side))
        parts = torch.stack(images), tokenize(chosen, self.word_len), torch.stack(masks)
        return tuple(part.to(self.device) for part in parts)

    def dataset(self, caches: Mapping | None = None) -> TrainingDataset:
        """Return the refs as training reads them here."""
        records = JoinedReader([(self.reader, range(len(self.reader)))])
        seed = self.cfg.TRAIN.manual_seed
        return TrainingDataset(records, self.side, self.word_len, seed, caches=caches or {})

    def position_batches(self, size: int) -> list[list[int]]:
        """Shuffle all positions into whole batches."""
        count = len(self.reader)
        if count < size:
            raise UserError(f"{self.reader.path} has {count} refs, fewer than --batch {size}")
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        return [order[start : start + size] for start in range(0, count - size + 1, size)]


def compare_evaluation(setting: Setting) -> dict:
    """Time evaluation from the photo's bytes to pixel counts at the photo's size."""
    precision, reader, device = setting.cfg.TEST.precision, setting.reader, setting.device
    full = build_evaluation_loader(setting.cfg, str(reader.path), setting.ranks)
    groups = full.dataset.groups = full.dataset.groups[: setting.args.photos]
    loader = DataLoader(full.dataset, full.batch_size, collate_fn=full.collate_fn)
    positions = [position for group in groups for position in group]
    ours, theirs = setting.ours(), published.Published(setting.ours())
    found: dict[str, dict] = {}

    def evaluate_published() -> None:
        sizes = setting.side, setting.word_len
        found[PUBLISHED] = published.evaluate(theirs, reader, positions, *sizes, device)

    def evaluate_ours() -> None:
        protocols, size = {"_": PROTOCOLS["published"]}, setting.cfg.TRAIN.batch_size_val
        (scores,) = evaluate(ours, loader, device, protocols, size, precision=precision).values()
        found[OURS] = {s.key: (s.intersection, s.union) for s in scores}

    sentences = sum(len(reader.ref(position).sentences) for position in positions)
    ways = {PUBLISHED: evaluate_published, OURS: evaluate_ours}
    result = time_ways(ways, setting, sentences, "sentences/s")
    theirs_counted, counted = (
        np.array([found[name][key] for key in found[PUBLISHED]]) for name in ways
    )
    mean, theirs_mean = (Counts(*counts.T).scores()["mIoU"] for counts in (counted, theirs_counted))
    return result | {
        "what": f"evaluation of {sentences} sentences on {len(groups)} photos at "
        f"{setting.side} px, {precision} against fp32",
        "differences": {
            "pixels of a sentence": int(np.abs(counted - theirs_counted).max()),
            "mIoU": abs(mean - theirs_mean),
        },
    }


def compare_training(setting: Setting) -> dict:
    """Time training steps, reading included."""
    batch = setting.args.batch
    names = (PUBLISHED, OURS, COMPILED) if setting.args.compile else (PUBLISHED, OURS)
    steps = {name: training_steps(setting, name) for name in names}
    settle_memory(setting.cfg, setting.device)
    losses = {name: next(step) for name, step in steps.items()}
    ways = {name: partial(next, step) for name, step in steps.items()}
    with deterministic(False):  # cuDNN tries algorithms, as in train.py
        result = time_ways(ways, setting, batch, "refs/s")
    return result | {
        "what": f"training steps of {batch} refs at {setting.side} px, {setting.dtype}, "
        f"dropout {setting.cfg.TRAIN.dropout:g}",
        "differences": {
            "loss of the first step, relative": abs(losses[OURS] / losses[PUBLISHED] - 1)
        },
    }


def training_steps(setting: Setting, name: str) -> Iterator[float]:
    """Make a training step of one way at each `next`, and give its loss."""
    cfg, model = setting.cfg, setting.ours().train()
    batches = cycle(setting.position_batches(setting.args.batch))
    if name == PUBLISHED:
        model, scaler = published.Published(model), build_scaler(setting.dtype, setting.device)
        optimizer = torch.optim.Adam(parameter_groups(model, cfg), cfg.TRAIN.base_lr, foreach=True)
        for images, tokens, masks in map(setting.batch, batches):
            step = published.train_step
            yield step(model, optimizer, images, masks, tokens, scaler, setting.dtype)
    if name == COMPILED:
        compile_model(model, setting.device)
    dataset, run = setting.dataset(), build_run(setting, model)
    for positions in batches:
        scores = forward_backward(run, read_batch(dataset, positions), synchronize=True)
        optimizer_step(run)
        yield scores[0].item()


def read_batch(dataset: TrainingDataset, positions: Sequence[int]) -> TrainingBatch:
    """Read refs as training does here."""
    return collate_refs(dataset.__getitems__([(position, 0) for position in positions]))


def build_run(setting: Setting, model: nn.Module) -> Run:
    """Return what a training step here needs of a run."""
    optimizer = build_optimizer(parameter_groups(model, setting.cfg), setting.cfg)
    unused = ("folder", "train_loader", "val_loader", "protocols", "tracker")
    return Run(
        cfg=setting.cfg,
        ranks=setting.ranks,
        model=model,
        optimizer=optimizer,
        scaler=build_scaler(setting.dtype, setting.device),
        dtype=setting.dtype,
        **dict.fromkeys(unused),
    )


def compare_memory(setting: Setting) -> dict:
    """Compare the peak memory of two training steps, each way in a process of its own."""
    rows: dict[str, list[float]] = {PUBLISHED: [], OURS: []}
    for name in [*rows] * setting.args.rounds:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows[name].append(pool.submit(peak_of_two_steps, setting.args, name).result())
    refs = f"{setting.args.batch} refs at {setting.side} px"
    return summarize_ways(rows, "GiB") | {"what": f"peak memory in two training steps of {refs}"}


def peak_of_two_steps(args: argparse.Namespace, name: str) -> float:
    """Make two training steps and return the GiB that the device or process held at most."""
    setting = Setting(args)
    if name == OURS:
        settle_memory(setting.cfg, setting.device)
    steps = training_steps(setting, name)
    next(steps), next(steps)
    return memory_in_use(setting.device)


def compare_reading(setting: Setting) -> dict:
    """Time the reading of every ref on one core: plainly, as here, and from the cache."""
    torch.set_num_threads(1)
    batches = setting.position_batches(min(16, len(setting.reader)))
    count = sum(map(len, batches))
    with TemporaryDirectory() as folder:
        cache = open_cache(folder, setting.reader, setting.side)
        plain, cached = setting.dataset(), setting.dataset({setting.reader.path: cache})
        ways = {
            PUBLISHED: lambda: [setting.batch(batch) for batch in batches],
            OURS: lambda: [read_batch(plain, batch) for batch in batches],
            CACHED: lambda: [read_batch(cached, batch) for batch in batches],
        }
        result = time_ways(ways, setting, count, "refs/s")
    return result | {"what": f"reading {count} refs for training at {setting.side} px, one core"}


def time_ways(ways: Ways, setting: Setting, count: int, unit: str) -> dict:
    """Count the operations of each way's first call, then time the ways in turns.

    Args:
        count: items that a call processes, named by `unit`, such as "refs/s".
    """
    # What a compiled way computes cannot be seen from outside; it is what the plain one does.
    flops = {name: count_flops(ways[OURS if name == COMPILED else name])[1] for name in ways}
    seconds = take_turns(ways, setting.args.rounds, setting.device)
    result = summarize_ways({n: [count / s for s in row] for n, row in seconds.items()}, unit)
    for name, row in result["ways"].items():
        row["GFLOP"] = flops[name] / count / 1e9
        row["GFLOP/s"] = row["GFLOP"] * row[unit]["median"]
    return result | {"rounds": setting.args.rounds}


def summarize_ways(values: Mapping[str, Sequence[float]], unit: str) -> dict:
    """Summarise each way's rounds, and their ratios, round by round, to the published way's."""

    def spread(rounds: Sequence[float]) -> dict[str, float]:
        return {"median": median(rounds), "low": min(rounds), "high": max(rounds)}

    others = {name: rounds for name, rounds in values.items() if name != PUBLISHED}
    return {
        "unit": unit,
        "ways": {name: {unit: spread(rounds)} for name, rounds in values.items()},
        "ratios": {n: spread(np.divide(v, values[PUBLISHED]).tolist()) for n, v in others.items()},
    }


def print_table(result: Mapping) -> None:
    """Print a result for people."""

    def cells(values: Mapping[str, float]) -> str:
        bounds = f"({values['low']:,.2f}-{values['high']:,.2f})"
        return f"{values['median']:>12,.2f}{bounds:>20}"

    print(f"\n{result['what']}\n{describe_machine(result['machine'])}")
    unit = result["unit"]
    print(f"{'':<30}{unit:>12}{'(range)':>20}{'GFLOP each':>12}{'ratio':>12}{'(range)':>20}")
    for name, row in result["ways"].items():
        flops = f"{row['GFLOP']:,.1f}" if row.get("GFLOP") else ""
        ratio = cells(result["ratios"][name]) if name in result["ratios"] else ""
        print(f"{name:<30}{cells(row[unit])}{flops:>12}{ratio}")
    for name, value in result.get("differences", {}).items():
        print(f"largest difference, {name}: {value:.2g}")


COMMANDS = {
    "eval": compare_evaluation,
    "train": compare_training,
    "memory": compare_memory,
    "data": compare_reading,
}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read a command line of this program."""
    parser = text_parser(__doc__)
    parser.add_argument("command", choices=COMMANDS, help="what is compared")
    parser.add_argument("records", type=Path, nargs="?", help="LMDB; without it RefShapes")
    parser.add_argument("--config", default="config/refcoco/cris_r50.yaml", metavar="FILE")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=3, help="that are timed (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    parser.add_argument("--compile", action="store_true", help="train: torch.compile as well")
    parser.add_argument("--batch", type=int, default=4, help="refs a step (default 4)")
    parser.add_argument("--photos", type=int, default=4, help="to evaluate on (default 4)")
    args = parse_with_opts(parser, argv)
    check_at_least(parser, args, rounds=1, photos=1, batch=2)
    return args


if __name__ == "__main__":
    run_entry_point(main)
