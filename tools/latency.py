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
from engine.build import build_model, find_device, restore_trained
from model.fold import fold_batch_norm
from model.segmenter import Segmenter
from utils.arguments import check_at_least, config_parser, parse_with_opts
from utils.config import ClipArch, Config, load_config
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import setup_logging
from utils.machine import peak_memory
from utils.tokenizer import END_ID, START_ID
from utils.transforms import normalize_images

EPILOG = """examples:
  python tools/latency.py --config config/refcoco/cris_r50.yaml --rounds 200 --json cost.json
  python tools/latency.py --config ... --device cpu --sentences 8 --opts TRAIN.input_size 320

Without the CLIP archive that the config names, the model is built in its published sizes with
random weights, which cost the same. Times are of one photo with one sentence and of one with
--sentences of them; of the network alone, normalised images in, logits out, in float32, with
BatchNorm folded as in evaluation and prediction."""

WARMUP = 10  # rounds that are not kept
# Where each part's parameters lie; the image backbone stands first, the text backbone is the rest.
PARTS = {
    "image backbone": "backbone.visual.",
    "text backbone": "backbone.",
    "neck": "neck.",
    "decoder": "decoder.",
    "projector": "proj.",
}
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
    if args.weights is None:
        model = build_model(without_archive(cfg), device)
    else:
        model, *_ = restore_trained(cfg, device, args.weights, "weights")
    model.eval()
    with torch.inference_mode():
        calls = timed_calls(fold_batch_norm(model), cfg, device, args.sentences)
        seconds = take_turns(calls, args.rounds, device, WARMUP)
        report = {
            "config": str(args.config),
            "input_size": cfg.TRAIN.input_size,
            "word_len": cfg.TRAIN.word_len,
            "device": str(device),
            "machine": machine(device),
            "parameters": parameters_by_part(model),
            "flops": operations_by_part(model, cfg, device),
            "sentences": args.sentences,
            "rounds": args.rounds,
            "seconds": {name: quantiles(values) for name, values in seconds.items()},
            "peak_memory": {"process": peak_memory()},
        }
    if device.type == "cuda":
        report["peak_memory"]["gpu"] = torch.cuda.max_memory_allocated(device)
    print_report(report)
    if args.json is not None:
        with atomic_path(args.json) as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n")


def without_archive(cfg: Config) -> Config:
    """Return the config with the published sizes where the CLIP archive that it names is missing.

    Raises:
        UserError: the sizes of that archive are not known here.
    """
    archive = cfg.TRAIN.clip_pretrain
    if not archive or Path(archive).is_file():
        return cfg
    sizes = PUBLISHED_ARCH.get(Path(archive).stem)
    if sizes is None:
        raise UserError(
            f"TRAIN.clip_pretrain: there is no {archive}, and its sizes are not known here; "
            f"known are {' and '.join(PUBLISHED_ARCH)}"
        )
    logger.info(f"there is no {archive}: weights are random, sizes those of the archive")
    arch = ClipArch(**dict(zip(ClipArch.model_fields, sizes, strict=True)))
    train = cfg.TRAIN.model_copy(update={"clip_pretrain": None, "clip_arch": arch})
    return cfg.model_copy(update={"TRAIN": train})


def parameters_by_part(model: Segmenter) -> dict[str, int]:
    """Count each part's parameters; together they are the model's."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        part = next(part for part, prefix in PARTS.items() if name.startswith(prefix))
        counts[part] += parameter.numel()
    return counts


def operations_by_part(model: Segmenter, cfg: Config, device: torch.device) -> dict[str, int]:
    """Count each part's operations for one sentence on one photo, as `count_flops` does."""
    image, tokens = inputs(cfg, device, 1)
    maps = model.backbone.encode_image(image)
    words, state = model.backbone.encode_text(tokens)
    fused = model.neck(model.neck.project(*maps), state)
    pixels = model.decoder(fused, words, tokens == 0)
    calls = (
        lambda: model.backbone.encode_image(image),
        lambda: model.backbone.encode_text(tokens),
        lambda: model.neck(model.neck.project(*maps), state),
        lambda: model.decoder(fused, words, tokens == 0),
        lambda: model.proj(pixels, state),
    )
    return {part: count_flops(call) for part, call in zip(PARTS, calls, strict=True)}


def inputs(cfg: Config, device: torch.device, sentences: int) -> tuple[Tensor, Tensor]:
    """Make a photo of noise, (1, 3, S, S), and full rows of tokens, (sentences, L)."""
    generator = torch.Generator().manual_seed(0)
    side, length = cfg.TRAIN.input_size, cfg.TRAIN.word_len
    pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, START_ID, (sentences, length), generator=generator)
    tokens[:, 0], tokens[:, -1] = START_ID, END_ID
    return normalize_images(pixels.to(device)), tokens.to(device)


def timed_calls(
    model: Segmenter, cfg: Config, device: torch.device, sentences: int
) -> dict[str, Callable[[], object]]:
    """Return the calls that are timed, by what they do."""
    image, tokens = inputs(cfg, device, sentences)
    features = model.encode_image(image)
    image_index = torch.zeros(sentences, dtype=torch.int64, device=device)

    def segment(count: int) -> Tensor:
        return model.segment(features.repeat(image_index[:count]), tokens[:count])

    calls = {
        "photo and sentence": lambda: model(image, tokens[:1]),
        "photo alone": lambda: model.encode_image(image),
        "sentence on an encoded photo": lambda: segment(1),
    }
    if sentences > 1:
        calls[f"{sentences} sentences on an encoded photo"] = lambda: segment(sentences)
    return calls


def quantiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median, and what one call in ten stays below and above."""
    values = np.quantile(seconds, (0.5, 0.1, 0.9)).tolist()
    return dict(zip(("median", "p10", "p90"), values, strict=True))


def take_turns(
    ways: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup: int = 1
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


def count_flops(call: Callable[[], object]) -> int:
    """Count a call's matrix products, convolutions and attention, backward passes included.

    A multiplication and an addition are two operations. Attention is computed by plain matrix
    products meanwhile, since torch's counter does not know the CPU's own kernels of it.
    """
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)
    return counter.get_total_flops()


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


def print_report(report: Mapping) -> None:
    """Print two tables: what the model is, and how long it takes."""
    kind = report["machine"]
    where = kind["gpu"] if report["device"].startswith("cuda") else kind["processor"]
    print(
        f"{report['config']}: {report['input_size']} pixels, {report['word_len']} tokens, float32\n"
        f"on {report['device']} ({where}), {kind['threads']} thread(s), torch {kind['torch']}\n"
    )
    parameters, flops = report["parameters"], report["flops"]
    print(f"{'part':<34}{'parameters':>14}{'GFLOP':>10}")
    for part in parameters:
        print(f"{part:<34}{parameters[part]:>14,}{flops[part] / 1e9:>10.3f}")
    print(f"{'all':<34}{sum(parameters.values()):>14,}{sum(flops.values()) / 1e9:>10.3f}\n")
    print(f"{'':<34}{'ms, median':>14}{'p10':>10}{'p90':>10}{'sentences/s':>14}")
    counts = (1, 0, 1, report["sentences"])  # of the calls, in order
    for (name, times), count in zip(report["seconds"].items(), counts, strict=False):
        median, p10, p90 = (1000 * times[key] for key in ("median", "p10", "p90"))
        rate = f"{1000 * count / median:.1f}" if count else ""
        print(f"{name:<34}{median:>14.2f}{p10:>10.2f}{p90:>10.2f}{rate:>14}")
    memory = report["peak_memory"].items()
    peaks = ", ".join(f"{size / 1e6:,.0f} MB ({name})" for name, size in memory)
    print(f"\n{report['rounds']} rounds in turn; peak memory {peaks}")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = config_parser(__doc__, EPILOG)
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: none is needed)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, or cpu)")
    parser.add_argument("--sentences", type=int, default=8, help="on one photo (default 8)")
    parser.add_argument("--rounds", type=int, default=50, help="that are timed (default 50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parse_with_opts(parser, argv)
    check_at_least(parser, args, sentences=1, rounds=1)
    return args


if __name__ == "__main__":
    run_entry_point(main)
