"""What a model costs: parameters and operations by part, time, sentences a second, memory."""

import argparse
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from loguru import logger
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.build import build_model, find_device
from engine.pace import memory_in_use
from model.fold import fold_batch_norm
from model.segmenter import Segmenter
from utils.arguments import check_at_least, config_parser, parse_with_opts
from utils.config import ClipArch, Config, load_config
from utils.errors import run_entry_point
from utils.files import write_text
from utils.logger import setup_logging

EPILOG = """examples:
  python tools/latency.py --config config/refcoco/cris_r50.yaml --rounds 200 --json cost.json
  python tools/latency.py --config ... --device cpu --sentences 8 --opts TRAIN.input_size 320

No checkpoint is needed, nor the CLIP archive that the config names: random weights cost the same.
Times are of one photo with one sentence and of one with --sentences of them; of the network alone,
normalised images in, logits out, in float32, with BatchNorm folded as in evaluation and prediction.
"""

Ways = Mapping[str, Callable[[], object]]

WARMUP = 10  # rounds that are not kept
QUANTILES = {"median": 0.5, "p10": 0.1, "p90": 0.9}  # of the times of a call
PARTS = ("image backbone", "text backbone", "neck", "decoder", "projector")
PUBLISHED_ARCH = {  # of OpenAI's archives, by the names that the published configs give them
    "RN50": (1024, 224, (3, 4, 6, 3), 64, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, 77, 49408, 512, 8, 12),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Build the model, count, time, print."""
    args = _parse_args(argv)
    setup_logging(None, is_main=True)
    cfg = load_config(args.config, args.opts)
    device = find_device(args.device, "--device")
    model = build_model(without_archive(cfg), device).eval()
    with torch.inference_mode():
        image, tokens = inputs(cfg, device, args.sentences)
        calls = timed_calls(fold_batch_norm(model), image, tokens)
        seconds = {
            name: dict(zip(QUANTILES, np.quantile(times, [*QUANTILES.values()]), strict=True))
            for name, times in take_turns(calls, args.rounds, device, WARMUP).items()
        }
        report = {
            "config": str(args.config),
            "input_size": cfg.TRAIN.input_size,
            "word_len": cfg.TRAIN.word_len,
            "device": str(device),
            "machine": machine(device),
            "parameters": parameters_by_part(model),
            "flops": operations_by_part(model, image, tokens[:1]),
            "sentences": args.sentences,
            "rounds": args.rounds,
            "seconds": seconds,
            "memory_gib": memory_in_use(device),
        }
    print_report(report)
    if args.json is not None:
        write_text(args.json, json.dumps(report, indent=2) + "\n")


def without_archive(cfg: Config) -> Config:
    """Return the config with the published sizes where its CLIP archive is known and missing."""
    archive = Path(cfg.TRAIN.clip_pretrain or "")
    if archive.is_file() or archive.stem not in PUBLISHED_ARCH:
        return cfg
    logger.info(f"there is no {archive}: weights are random, sizes those of the archive")
    sizes = zip(ClipArch.model_fields, PUBLISHED_ARCH[archive.stem], strict=True)
    changes = {"clip_pretrain": None, "clip_arch": ClipArch(**dict(sizes))}
    return cfg.model_copy(update={"TRAIN": cfg.TRAIN.model_copy(update=changes)})


def inputs(cfg: Config, device: torch.device, sentences: int) -> tuple[Tensor, Tensor]:
    """Make a photo of noise, (1, 3, S, S), and rows of tokens without padding, (sentences, L)."""
    side, length = cfg.TRAIN.input_size, cfg.TRAIN.word_len
    image = torch.randn(1, side, side, 3, device=device).permute(0, 3, 1, 2)  # as photos lie
    return image, torch.ones(sentences, length, dtype=torch.int64, device=device)


def parameters_by_part(model: Segmenter) -> dict[str, int]:
    """Count each part's parameters; together they are the model's."""
    parts = (model.backbone.visual, model.backbone, model.neck, model.decoder, model.proj)
    visual, backbone, *others = (sum(p.numel() for p in m.parameters()) for m in parts)
    return dict(zip(PARTS, (visual, backbone - visual, *others), strict=True))


def operations_by_part(model: Segmenter, image: Tensor, tokens: Tensor) -> dict[str, int]:
    """Count each part's operations for these inputs, as `count_flops` does."""
    maps, image_flops = count_flops(model.backbone.encode_image, image)
    (words, state), text_flops = count_flops(model.backbone.encode_text, tokens)
    fused, neck_flops = count_flops(lambda: model.neck(model.neck.project(*maps), state))
    pixels, decoder_flops = count_flops(model.decoder, fused, words, tokens == 0)
    _, projector_flops = count_flops(model.proj, pixels, state)
    counts = (image_flops, text_flops, neck_flops, decoder_flops, projector_flops)
    return dict(zip(PARTS, counts, strict=True))


def count_flops(function: Callable[..., object], *inputs: object) -> tuple[object, int]:
    """Call a function; count its matrix products, convolutions, attention, backward passes too.

    A multiplication and an addition are two operations. Attention is computed by plain matrix
    products meanwhile, since torch's counter does not know the CPU's own kernels of it.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            output = function(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
    return output, counter.get_total_flops()


def timed_calls(model: Segmenter, image: Tensor, tokens: Tensor) -> Ways:
    """Return the calls that are timed, by what they do."""
    features, rows = model.encode_image(image), torch.zeros_like(tokens[:, 0])
    several = f"{len(tokens)} sentences on an encoded photo"
    return {
        "photo and sentence": lambda: model(image, tokens[:1]),
        "photo alone": lambda: model.encode_image(image),
        "sentence on an encoded photo": lambda: model.segment(features, tokens[:1]),
        several: lambda: model.segment(features.repeat(rows), tokens),
    }


def take_turns(
    ways: Ways, rounds: int, device: torch.device, warmup: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of each way in each round; the first `warmup` rounds are not kept."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(warmup + rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[warmup:] for name, values in seconds.items()}


def machine(device: torch.device) -> dict[str, str | int]:
    """Return what a figure depends on: processor, threads, GPU, versions."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    return {
        "processor": f"{name} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def describe_machine(machine: Mapping[str, str | int]) -> str:
    """Return what `machine` has found as a line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def print_report(report: Mapping) -> None:
    """Print two tables: what the model is, and how long it takes."""
    sizes = f"{report['input_size']} pixels, {report['word_len']} tokens"
    print(f"{report['config']}: {sizes}, float32, on {report['device']}")
    print(f"{describe_machine(report['machine'])}\n\n{'part':<34}{'parameters':>14}{'GFLOP':>10}")
    parameters, flops = report["parameters"], report["flops"]
    totals = ("all", sum(parameters.values()), sum(flops.values()))
    for part, count, operations in [*((p, parameters[p], flops[p]) for p in PARTS), totals]:
        print(f"{part:<34}{count:>14,}{operations / 1e9:>10.3f}")
    print(f"\n{'':<34}{'ms, median':>14}{'p10':>10}{'p90':>10}{'sentences/s':>14}")
    counts = (1, 0, 1, report["sentences"])  # of the calls, in order
    for (name, times), count in zip(report["seconds"].items(), counts, strict=True):
        median, p10, p90 = (1000 * times[key] for key in QUANTILES)
        rate = f"{1000 * count / median:.1f}" if count else ""
        print(f"{name:<34}{median:>14.2f}{p10:>10.2f}{p90:>10.2f}{rate:>14}")
    print(f"\n{report['rounds']} rounds in turn; peak memory {report['memory_gib']:.2f} GiB")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = config_parser(__doc__, EPILOG)
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, or cpu)")
    parser.add_argument("--sentences", type=int, default=8, help="on one photo (default 8)")
    parser.add_argument("--rounds", type=int, default=50, help="that are timed (default 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parse_with_opts(parser, argv)
    check_at_least(parser, args, sentences=1, rounds=1)
    return args


if __name__ == "__main__":
    run_entry_point(main)
