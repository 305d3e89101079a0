"""This repository's network against the published formulation: rates, memory, and what they give.

Both have the same random weights (or a checkpoint's) and see the same photos and sentences. The
ways take turns: evaluation in one process, training steps in a process for each way, since
train.py settles for a whole process how it uses memory.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.measure import (
    count_flops,
    gemm_peak,
    machine,
    ratios,
    spread,
    take_turns,
    waiting_for,
)
from tools.parts import measure_parts, show_parts
from utils.errors import UserError
from utils.machine import peak_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from engine.run import Run
    from utils.config import Config
    from utils.records import RecordReader

PUBLISHED, OURS, BY_IMAGES = "published", "this", "this, TRAIN.batch_by images"
RN50 = (
    "{embed_dim: 1024, image_resolution: 224, vision_layers: [3, 4, 6, 3], vision_width: 64, "
    "context_length: 77, vocab_size: 49408, transformer_width: 512, transformer_heads: 8, "
    "transformer_layers: 12}"
)
SETS = {"refcoco": "refcoco", "refshapes": "refshapes"}  # REFER's folders, and our names


# --------------------------------------------------------------------------------------- the inputs


def find_records(given: Path | None, folder: Path) -> Path:
    """The LMDB to measure on, packed into `folder` if there is none.

    Args:
        given: an LMDB, or a folder in REFER's layout, whose val, testA and testB are taken; None
            draws RefShapes.
    """
    if given is not None and not given.exists():
        raise UserError(f"{given} does not exist: give an LMDB or a folder in REFER's layout")
    if given is None:
        from tools import refshapes

        given = folder / "refshapes"
        counts = {"train": 4, "val": 24, "testA": 4, "testB": 4}
        words = [word for split, count in counts.items() for word in (f"--{split}", str(count))]
        refshapes.main(["--output", str(given), *words])
    if not (given / "images").is_dir():
        return given
    from tools import data_process, folder2lmdb

    dataset = next((name for name in SETS if (given / name).is_dir()), None)
    if dataset is None:
        raise UserError(f"{given} has neither of the folders {', '.join(SETS)}")
    where = ["--data_root", given, "--output_dir", folder, "--dataset", dataset]
    words = [*where, "--split", "unc", "--generate_mask"]
    data_process.main([str(word) for word in words])
    splits = [folder / f"anns/{dataset}/{split}.json" for split in ("val", "testA", "testB")]
    lmdb = folder / "lmdb"
    words = ["-j", *splits, "-i", given / "images/train2014", "-m", folder / f"masks/{dataset}"]
    folder2lmdb.main([str(word) for word in [*words, "-o", lmdb]])
    return lmdb / "val+testA+testB.lmdb"


def find_config(args: argparse.Namespace) -> "Config":
    """The config that is measured; where CLIP's archive is not at hand, RN50's sizes do."""
    from utils.config import load_config

    if "TRAIN.precision" in args.opts:
        raise UserError("TRAIN.precision: both ways are measured in float32; leave it out")
    opts = [*args.opts, "TRAIN.precision", "fp32", "TRAIN.accumulation_steps", "1"]
    opts += ["TRAIN.workers_val", "0"]
    cfg = load_config(args.config, opts)
    if cfg.TRAIN.clip_arch is None and not Path(cfg.TRAIN.clip_pretrain or "").is_file():
        opts += ["TRAIN.clip_pretrain", "null", "TRAIN.clip_arch", RN50]
        cfg = load_config(args.config, opts)
    return cfg


class Setting:
    """Config, records and a state of weights that both formulations are given."""

    def __init__(self, args: argparse.Namespace, lmdb: Path) -> None:
        import cv2
        import torch

        from engine.build import find_device
        from utils.distributed import Ranks
        from utils.records import RecordReader

        if args.threads:
            torch.set_num_threads(args.threads)
        cv2.setNumThreads(1)
        self.cfg = find_config(args)
        self.device = find_device(args.device, "--device")
        self.ranks = Ranks(0, 1, 0, 1, self.device)
        self.reader: RecordReader = RecordReader(lmdb)
        self.side, self.word_len = self.cfg.TRAIN.input_size, self.cfg.TRAIN.word_len
        self.weights = self._weights()

    def _weights(self) -> dict[str, "Tensor"]:
        """Random ones under which activations and masks look like a trained network's.

        Statistics of BatchNorm are those of photos, and the logits are scaled to mean -0.6 and
        deviation 2, so that masks have outlines.
        """
        import torch

        from engine.build import build_model

        torch.manual_seed(0)
        model = build_model(self.cfg, self.device).train()
        images, tokens, _ = self.published_batch(list(range(min(4, len(self.reader)))))
        # Not the sentence's, whose statistics of four would magnify what rounding does.
        norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            model(images, tokens)
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            logits = model.eval()(images, tokens)
            last = model.proj.txt
            last.weight.mul_(2 / logits.std())
            last.bias.mul_(2 / logits.std())
            last.bias[-1] -= 2 * logits.mean() / logits.std() + 0.6
        return model.state_dict()

    def ours(self) -> "nn.Module":
        """This repository's model with those weights."""
        from engine.build import build_model

        model = build_model(self.cfg, self.device)
        model.load_state_dict(self.weights)
        return model

    def published(self) -> "nn.Module":
        """The published formulation with the same."""
        from tools.published import Published

        return Published(self.ours())

    def published_batch(self, positions: Sequence[int]) -> tuple["Tensor", "Tensor", "Tensor"]:
        """Refs as its loader hands them over: images, tokens, masks, on the device."""
        import torch

        from tools.published import read_image, read_mask
        from utils.seed import draw
        from utils.tokenizer import tokenize

        refs = [self.reader.ref(position) for position in positions]
        images = [read_image(self.reader.image(ref.image_key), self.side) for ref in refs]
        seed = self.cfg.TRAIN.manual_seed
        tokens = [
            tokenize(ref.sentences[draw(len(ref.sentences), seed, 0, position)], self.word_len)[0]
            for ref, position in zip(refs, positions, strict=True)
        ]
        masks = [read_mask(ref.mask, self.side) for ref in refs]
        images, tokens, masks = (torch.stack(part) for part in (images, tokens, masks))
        return images.to(self.device), tokens.to(self.device), masks.to(self.device)


# --------------------------------------------------------------------------------------- evaluation


def compare_evaluation(args: argparse.Namespace, lmdb: Path) -> dict:
    """Sentences a second, from the photo's bytes to pixel counts at the photo's size."""
    from torch.utils.data import DataLoader

    from engine.evaluator import evaluate, resolve_protocols
    from engine.loaders import build_evaluation_loader
    from tools import published
    from utils.metrics import summarize

    setting = Setting(args, lmdb)
    full = build_evaluation_loader(setting.cfg, str(lmdb), setting.ranks)
    sentences = _keep_images(full.dataset, args.sentences)
    positions = [position for group in full.dataset.groups for position in group]
    loader = DataLoader(full.dataset, full.batch_size, collate_fn=full.collate_fn)
    ours, theirs = setting.ours(), setting.published()
    counts: dict[str, dict] = {}

    def evaluate_published() -> None:
        counts[PUBLISHED] = published.evaluate(
            theirs, setting.reader, positions, setting.side, setting.word_len, setting.device
        )

    def evaluate_ours() -> None:
        scores = evaluate(
            ours,
            loader,
            setting.device,
            resolve_protocols("published"),
            setting.cfg.TRAIN.batch_size_val,
        )["published"]
        counts[OURS] = {score.key: (score.intersection, score.union) for score in scores}

    ways = {PUBLISHED: evaluate_published, OURS: evaluate_ours}
    flops = {name: count_flops(way) for name, way in ways.items()}
    clocked = {name: partial(processor_seconds, way) for name, way in ways.items()}
    result = _measure(clocked, flops, args.rounds, sentences, "sentences/s", setting.device)
    assert counts[OURS].keys() == counts[PUBLISHED].keys()
    pairs = [(counts[OURS][key], counts[PUBLISHED][key]) for key in counts[OURS]]
    pixels = max(abs(a - b) for pair in pairs for a, b in zip(*pair, strict=True))
    means = [summarize(*zip(*side, strict=True))["mIoU"] for side in zip(*pairs, strict=True)]
    union = spread(pair[1][1] for pair in pairs).median
    images, tokens, _ = setting.published_batch(positions[:1])
    result |= {
        "what": f"evaluation of {sentences} sentences on {len(loader.dataset)} photos "
        f"({len(positions)} refs) at {setting.side} pixels: from the photo's bytes to pixel counts "
        "at the photo's size",
        "difference": {
            "logits, over the kernel's largest response": _logits_off(ours, theirs, images, tokens),
            "intersection or union of a sentence, pixels": pixels,
            "the median sentence's union, pixels": union,
            "mIoU": abs(means[0] - means[1]),
        },
    }
    return result


def _keep_images(dataset: Any, wanted: int) -> int:
    """Leave only the first images that have so many sentences; gives their number."""
    counts, kept, total = dataset.reader.index.num_sentences, [], 0
    for group in dataset.groups:
        if total >= wanted:
            break
        kept.append(group)
        total += sum(int(counts[position]) for position in group)
    dataset.groups = kept
    return total


def _logits_off(ours: "nn.Module", theirs: "nn.Module", image: "Tensor", tokens: "Tensor") -> float:
    """The largest difference of evaluation's logits, over the largest response of the kernel.

    Without the kernel's bias: random weights have one that cancels most of the response.
    """
    import torch

    from model.fold import fold_batch_norm

    with torch.inference_mode():
        stages = theirs.eval().stages(image, tokens)
        expected, bias = stages["logits"], theirs.proj.txt(stages["state"])[:, -1]
        found = fold_batch_norm(ours)(image.contiguous(memory_format=torch.channels_last), tokens)
    return float(
        (found - expected).abs().max() / (expected - bias[:, None, None, None]).abs().max()
    )


# ----------------------------------------------------------------------------------------- training


def build_run(setting: Setting) -> "Run":
    """What `engine.trainer` steps with; it has no loader, folder or tracker."""
    import torch

    from engine.optim import build_optimizer, build_schedule, parameter_groups
    from engine.run import Run
    from engine.trainer import build_scaler

    model = setting.ours().train()
    optimizer = build_optimizer(parameter_groups(model, setting.cfg), setting.cfg)
    return Run(
        cfg=setting.cfg,
        ranks=setting.ranks,
        folder=None,
        model=model,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, setting.cfg, steps_per_epoch=1000),
        scaler=build_scaler(torch.float32, setting.device),
        dtype=torch.float32,
        train_loader=None,
        val_loader=None,
        protocols={},
        tracker=None,
    )


def our_steps(setting: Setting, batches: Sequence[Sequence[int]], by_images: bool) -> Iterator:
    """Each `next` reads a batch of refs and makes a step of this repository's training."""
    from engine.trainer import forward_backward, optimizer_step
    from utils.dataset import TrainingDataset, collate_refs, collate_refs_by_image

    cfg = setting.cfg
    dataset = TrainingDataset(setting.reader, setting.side, setting.word_len, cfg.TRAIN.manual_seed)
    collate = collate_refs_by_image if by_images else collate_refs
    run = build_run(setting)
    for number in range(sys.maxsize):
        visits = [(position, 0) for position in batches[number % len(batches)]]
        scores = forward_backward(run, collate(dataset.__getitems__(visits)), synchronize=True)
        optimizer_step(run)
        yield scores.tolist()


def published_steps(setting: Setting, batches: Sequence[Sequence[int]]) -> Iterator:
    """The same of the published formulation."""
    from engine.optim import parameter_groups
    from tools import published

    model = setting.published().train()
    rate = setting.cfg.TRAIN.base_lr
    optimizer = published.build_optimizer(parameter_groups(model, setting.cfg), rate)
    for number in range(sys.maxsize):
        image, tokens, mask = setting.published_batch(batches[number % len(batches)])
        yield published.train_step(model, optimizer, image, mask, tokens)


def make_batches(reader: "RecordReader", size: int, by_images: bool) -> list[list[int]]:
    """Positions in batches of `size`: refs at random, or those of an image side by side."""
    import torch

    from utils.dataset import group_by_image

    groups = group_by_image(reader) if by_images else [[i] for i in range(len(reader))]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    flat = [position for i in order for position in groups[i]]
    if len(flat) < size:
        raise UserError(f"{reader.path} has {len(flat)} refs, fewer than --batch {size}")
    return [flat[i : i + size] for i in range(0, len(flat) - size + 1, size)]


def compare_training(args: argparse.Namespace, lmdb: Path) -> dict:
    """Images (refs) a second of a training step, reading included."""
    from engine.build import settle_memory

    setting = Setting(args, lmdb)
    by_refs = make_batches(setting.reader, args.batch, by_images=False)
    difference = _training_off(setting, by_refs[0])
    names = [PUBLISHED, OURS, *([BY_IMAGES] if args.by_images else [])]
    with ExitStack() as stack:
        workers = {name: stack.enter_context(worker(args, lmdb, name)) for name in names}
        flops = {name: ask(workers[name])["flops"] for name in names}
        ways = {name: lambda name=name: ask(workers[name])["processor_seconds"] for name in names}
        result = _measure(ways, flops, args.rounds, args.batch, "images/s", setting.device)
    result |= {
        "what": f"training steps of {args.batch} refs at {setting.side} pixels, float32, dropout "
        f"{setting.cfg.TRAIN.dropout:g}, from the photos' bytes to the optimiser's step",
        "difference": difference,
    }
    if args.parts:
        batch, run = setting.published_batch(by_refs[0]), build_run(setting)
        settle_memory(setting.cfg, setting.device)
        wait = waiting_for(setting.device)
        result["parts"] = measure_parts(run.model, run.optimizer, batch, wait, args.rounds)
    return result


def _training_off(setting: Setting, positions: Sequence[int]) -> dict[str, float]:
    """How far losses and gradients of the first step are apart, without dropout (it is random)."""
    import torch

    from model.loss import text_to_pixel_loss

    image, tokens, mask = setting.published_batch(positions)
    losses, norms = [], []
    for model in (setting.published(), setting.ours()):
        _without_dropout(model.train())
        loss = text_to_pixel_loss(model(image, tokens), mask)
        loss.backward()
        losses.append(loss.item())
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
    return {
        "loss of the first step, relative": abs(losses[1] / losses[0] - 1),
        "norm of its gradient, relative": abs(norms[1] / norms[0] - 1),
    }


def _without_dropout(model: "nn.Module") -> None:
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0


# ------------------------------------------------------------------------------------------- memory


def compare_memory(args: argparse.Namespace, lmdb: Path) -> dict:
    """Peak memory of two training steps, each way in a process of its own."""
    from engine.build import find_device

    device = find_device(args.device, "--device")
    rows: dict[str, list[int]] = {PUBLISHED: [], OURS: []}
    for name, values in rows.items():
        for _ in range(args.rounds):
            with worker(args, lmdb, name) as process:
                ask(process)
                values.append(ask(process)["peak_memory"])
    side = find_config(args).TRAIN.input_size
    where = "resident size" if device.type == "cpu" else "memory allocated on the GPU"
    return {
        "what": f"peak {where} in two training steps of {args.batch} refs at {side} pixels",
        "unit": "bytes",
        "machine": machine(device),
        "ways": {name: {"bytes": spread(values)._asdict()} for name, values in rows.items()},
        "ratios": {OURS: ratios(rows[OURS], rows[PUBLISHED])._asdict()},
    }


# -------------------------------------------------------------------------- a way's process


@contextmanager
def worker(args: argparse.Namespace, lmdb: Path, name: str) -> Iterator[subprocess.Popen]:
    """A process that makes a training step of one way whenever it is asked to (see `serve`)."""
    program = Path(__file__).with_name("benchmark.py")
    command = [sys.executable, program, args.command, lmdb, "--way", name]
    command += ["--config", args.config, "--batch", args.batch, "--device", args.device]
    command += ["--threads", args.threads or 0, "--opts", *args.opts]
    with subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            with suppress(BrokenPipeError):  # it has ended, and never read what it was asked
                process.stdin.close()  # which ends it


def ask(process: subprocess.Popen) -> dict:
    """Have a worker make a step; what `serve` says of it."""
    with suppress(BrokenPipeError):  # it has ended: there is no answer either
        print("step", file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        way = process.args[process.args.index("--way") + 1]
        raise UserError(
            f"the process that measured {way!r} has ended: see above, or memory is short"
        )
    return json.loads(line)


def serve(args: argparse.Namespace, lmdb: Path) -> dict:
    """Make a training step of `args.way` for every line that comes in, and tell of it in one.

    Of the first one operations are counted, in the others none. The way that trains here keeps
    freed memory, as train.py does.
    """
    import torch

    from engine.build import settle_memory

    setting = Setting(args, lmdb)
    is_on_gpu = setting.device.type == "cuda"
    taken = partial(torch.cuda.max_memory_allocated, setting.device) if is_on_gpu else peak_memory
    by_images = args.way == BY_IMAGES
    batches = make_batches(setting.reader, args.batch, by_images)
    if args.way == PUBLISHED:
        steps = published_steps(setting, batches)
    else:
        settle_memory(setting.cfg, setting.device)
        steps = our_steps(setting, batches, by_images)
    report: dict[str, float] = {}
    for number, _ in enumerate(sys.stdin):
        if number == 0:
            report["flops"] = count_flops(steps.__next__)
            setting.weights.clear()  # the model has its own now
        else:
            report["processor_seconds"] = processor_seconds(steps.__next__)
        report["peak_memory"] = taken()
        print(json.dumps(report), flush=True)
    return report


def processor_seconds(call: Callable[[], object]) -> float:
    """Those of this process that a call takes, over all its threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


# ---------------------------------------------------------------------------------------- the table


def _measure(
    ways: Mapping[str, Callable[[], float]],
    flops: Mapping[str, int],
    rounds: int,
    count: int,
    unit: str,
    device: "torch.device",
) -> dict[str, Any]:
    """Time the ways in turns; each gives the processor's seconds, and has run once before."""
    peak = gemm_peak(device=device)
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    turns = {name: lambda name=name, way=way: cpu[name].append(way()) for name, way in ways.items()}
    seconds = take_turns(turns, rounds, warmup=0)
    peak = max(peak, gemm_peak(device=device))
    rows = {
        name: {
            unit: spread(count / s for s in values)._asdict(),
            "GFLOP": flops[name] / count / 1e9,
            "share_of_peak": flops[name] / spread(values).median / peak,
            "cpu_seconds": spread(cpu[name])._asdict(),
        }
        for name, values in seconds.items()
    }
    others = {
        name: ratios(seconds[PUBLISHED], values)._asdict()
        for name, values in seconds.items()
        if name != PUBLISHED
    }
    hints = {name: ratios(cpu[PUBLISHED], cpu[name])._asdict() for name in others}
    result = {"unit": unit, "rounds": rounds, "machine": machine(device), "gemm_gflops": peak / 1e9}
    return result | {"ways": rows, "ratios": others, "ratios_of_cpu_time": hints}


def show(result: dict) -> None:
    """Print a result for people."""
    unit, is_memory = result["unit"], result["unit"] == "bytes"
    print(f"\n{result['what']}")
    print(", ".join(f"{name} {value}" for name, value in result["machine"].items()))
    heads = ["MB" if is_memory else unit, "(range)", "ratio", "(range)"]
    heads += [] if is_memory else ["GFLOP each", "of peak"]
    print(f"{'':<30}" + "".join(f"{head:>16}" for head in heads))
    for name, row in result["ways"].items():
        scale, digits = (1e6, 0) if is_memory else (1, 3)
        cells = _bounds(row[unit], digits, scale)
        ratio = result["ratios"].get(name)
        cells += ["1", ""] if ratio is None else _bounds(ratio, 2)
        if not is_memory:
            cells += [f"{row['GFLOP']:.1f}", f"{100 * row['share_of_peak']:.0f} %"]
        print(f"{name:<30}" + "".join(f"{cell:>16}" for cell in cells))
    if not is_memory:
        print(f"medians of {result['rounds']} rounds in turn; ratio: within a round")
        print(f"peak: {result['gemm_gflops']:.0f} GFLOP/s, the best matrix product of side 2048")
    for name, values in result.get("ratios_of_cpu_time", {}).items():
        middle, bounds = _bounds(values, 2)
        print(f"processor time, which other programs disturb less, {name}: {middle} {bounds}")
    for name, value in result.get("difference", {}).items():
        print(f"largest difference, {name}: {value:.2g}")
    if "parts" in result:
        show_parts(result["parts"], result["gemm_gflops"])


def _bounds(values: Mapping[str, float], digits: int, scale: float = 1) -> list[str]:
    low, middle, high = (f"{values[k] / scale:,.{digits}f}" for k in ("low", "median", "high"))
    return [middle, f" ({low}-{high})"]
