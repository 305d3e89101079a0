"""What a model costs: parameters and operations by part, time, sentences a second, memory."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.measure import REST, flops_by_part, machine, take_turns, waiting_for
from utils.errors import UserError, run_entry_point
from utils.machine import peak_memory

if TYPE_CHECKING:
    import torch

    from model.segmenter import Segmenter
    from utils.config import Config

EPILOG = """examples:
  python tools/latency.py --config config/refcoco/cris_r50.yaml
  python tools/latency.py --config config/refshapes/cris_tiny.yaml --rounds 200 --json cost.json
  python tools/latency.py --config ... --device cpu --sentences 8 --opts TRAIN.input_size 320

Without the CLIP archive that the config names, the model is built in its published sizes with
random weights, which cost the same. Times are of one photo with one sentence and of one with
--sentences of them; of the network alone, normalised images in, logits out, in float32, with
BatchNorm folded as in evaluation and prediction."""

# What the paper's figure shows as boxes, and the modules that they are.
PARTS = {
    "image backbone": ("backbone.visual",),
    "text backbone": (
        *("backbone.transformer", "backbone.token_embedding", "backbone.ln_final"),
        *("backbone.positional_embedding", "backbone.text_projection", "backbone.logit_scale"),
    ),
    "neck": ("neck",),
    "decoder": ("decoder",),
    "projector": ("proj",),
}
PUBLISHED_ARCH = {  # of OpenAI's archives, by the names that the published configs give them
    "RN50": (1024, 224, (3, 4, 6, 3), 64, 77, 49408, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, 77, 49408, 512, 8, 12),
}


class Times(NamedTuple):
    """Seconds a call: the median, and what one call in ten stays below and above."""

    median: float
    p10: float
    p90: float


def main(argv: Sequence[str] | None = None) -> None:
    """Build the model, count, measure, print."""
    args = _parse_args(argv)
    # After parsing, so that --help and a mistyped option answer at once.
    import torch

    from engine.build import find_device
    from model.fold import fold_batch_norm
    from utils.config import load_config
    from utils.logger import setup_logging

    setup_logging(None, is_main=True)
    cfg = load_config(args.config, args.opts)
    device = find_device(args.device, "--device")
    model = build(cfg, device, args.weights)
    calls = ways(fold_batch_norm(model), cfg, device, args.sentences)
    with torch.inference_mode():
        times = measure(calls, args.rounds, args.warmup, device)
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
            "seconds": {name: found._asdict() for name, found in times.items()},
        }
    report["peak_memory"] = _peak(device)
    print_report(report)
    if args.json is not None:
        from utils.files import atomic_path

        with atomic_path(args.json) as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n")


def build(cfg: "Config", device: "torch.device", weights: str | None) -> "Segmenter":
    """The config's model for inference: from a checkpoint, from CLIP, or of its sizes alone."""
    from loguru import logger

    from engine.build import build_model, restore_trained

    archive = cfg.TRAIN.clip_pretrain
    if weights is not None:
        return restore_trained(cfg, device, weights, "weights")[0].eval()
    if archive and not Path(archive).is_file():
        cfg = with_published_sizes(cfg)
        logger.info(f"there is no {archive}: weights are random, sizes those of the archive")
    return build_model(cfg, device).eval()


def with_published_sizes(cfg: "Config") -> "Config":
    """The config with the sizes of the archive that it names in place of the archive.

    Raises:
        UserError: its sizes are not known here.
    """
    from utils.config import ClipArch

    archive = Path(cfg.TRAIN.clip_pretrain)
    if archive.stem not in PUBLISHED_ARCH:
        raise UserError(
            f"TRAIN.clip_pretrain: there is no {archive}, and its sizes are not known: "
            f"those of {' and '.join(PUBLISHED_ARCH)} are; or give --weights"
        )
    names = list(ClipArch.model_fields)
    arch = ClipArch(**dict(zip(names, PUBLISHED_ARCH[archive.stem], strict=True)))
    train = cfg.TRAIN.model_copy(update={"clip_pretrain": None, "clip_arch": arch})
    return cfg.model_copy(update={"TRAIN": train})


def part_of(name: str) -> str:
    """Which of `PARTS` a parameter of the model belongs to."""
    (part,) = (
        part
        for part, modules in PARTS.items()
        if any(f"{name}.".startswith(f"{module}.") for module in modules)
    )
    return part


def parameters_by_part(model: "Segmenter") -> dict[str, int]:
    """Numbers in each part's parameters; together all there are."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def operations_by_part(model: "Segmenter", cfg: "Config", device: "torch.device") -> dict[str, int]:
    """Floating-point operations of one sentence on one photo, as executed; a product and sum are 2.

    Matrix products, convolutions and attention are counted, elementwise work is not.
    """
    image, tokens = inputs(cfg, device, 1)
    by_module = [module for modules in PARTS.values() for module in modules]
    counted = flops_by_part(model, lambda: model(image, tokens), by_module)
    # The product with text_projection is in no submodule of the backbone.
    owners = {module: part for part, modules in PARTS.items() for module in modules}
    owners[REST] = "text backbone"
    counts = dict.fromkeys(PARTS, 0)
    for module, number in counted.items():
        counts[owners[module]] += number
    return counts


def inputs(
    cfg: "Config", device: "torch.device", sentences: int
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """A photo of noise, (1, 3, S, S), and full rows of tokens, (sentences, L)."""
    import torch

    from utils.tokenizer import END_ID, START_ID
    from utils.transforms import normalize_images

    generator = torch.Generator().manual_seed(0)
    side, length = cfg.TRAIN.input_size, cfg.TRAIN.word_len
    pixels = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, START_ID, (sentences, length), generator=generator)
    tokens[:, 0], tokens[:, -1] = START_ID, END_ID
    return normalize_images(pixels.to(device)), tokens.to(device)


def ways(
    model: "Segmenter", cfg: "Config", device: "torch.device", sentences: int
) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    import torch

    image, tokens = inputs(cfg, device, sentences)
    with torch.inference_mode():
        features = model.encode_image(image)
    one, several = (torch.zeros(n, dtype=torch.int64, device=device) for n in (1, sentences))
    found = {
        "photo and sentence": lambda: model(image, tokens[:1]),
        "photo alone": lambda: model.encode_image(image),
        "sentence on an encoded photo": lambda: model.segment(features.repeat(one), tokens[:1]),
    }
    if sentences > 1:
        found[f"{sentences} sentences on an encoded photo"] = lambda: model.segment(
            features.repeat(several), tokens
        )
    return found


def measure(
    calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int, device: "torch.device"
) -> dict[str, Times]:
    """Time calls that take turns, after `warmup` rounds that are not kept."""
    import numpy as np

    wait = waiting_for(device)

    def waited(call: Callable[[], object]) -> Callable[[], None]:
        def way() -> None:
            call()
            wait()

        return way

    seconds = take_turns({n: waited(call) for n, call in calls.items()}, rounds, warmup)
    found = {}
    for name, values in seconds.items():
        p10, median, p90 = (float(v) for v in np.quantile(values, (0.1, 0.5, 0.9)))
        found[name] = Times(median, p10, p90)
    return found


def _peak(device: "torch.device") -> dict[str, int]:
    """Bytes: what tensors took at most on a GPU, and the process in the machine's memory."""
    import torch

    peak = {"process": peak_memory()}
    if device.type == "cuda":
        peak["gpu"] = torch.cuda.max_memory_allocated(device)
    return peak


def print_report(report: Mapping) -> None:
    """Print two tables: what the model is, and how long it takes."""
    kind = report["machine"]
    where = kind["gpu"] if report["device"].startswith("cuda") else kind["processor"]
    print(
        f"{report['config']}: {report['input_size']} pixels, {report['word_len']} tokens, float32"
    )
    print(f"on {report['device']} ({where}), {kind['threads']} thread(s), torch {kind['torch']}\n")
    parameters, flops = report["parameters"], report["flops"]
    print(f"{'part':<34}{'parameters':>14}{'GFLOP':>10}")
    for part in parameters:
        print(f"{part:<34}{parameters[part]:>14,}{flops[part] / 1e9:>10.3f}")
    print(f"{'all':<34}{sum(parameters.values()):>14,}{sum(flops.values()) / 1e9:>10.3f}\n")
    print(f"{'':<34}{'ms, median':>14}{'p10':>10}{'p90':>10}{'sentences/s':>14}")
    for name, times in report["seconds"].items():
        cells = "".join(
            f"{1000 * times[k]:>{w}.2f}" for k, w in zip(times, (14, 10, 10), strict=True)
        )
        first = name.split()[0]
        count = int(first) if first.isdecimal() else 1
        rate = "" if name == "photo alone" else f"{count / times['median']:.1f}"
        print(f"{name:<34}{cells}{rate:>14}")
    memory = report["peak_memory"].items()
    peaks = ", ".join(f"{size / 1e6:,.0f} MB ({name})" for name, size in memory)
    print(f"\n{report['rounds']} rounds in turn; peak memory {peaks}")


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the model's YAML file")
    parser.add_argument("--weights", metavar="FILE", help="checkpoint (default: none is needed)")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the first GPU, or cpu)")
    parser.add_argument("--sentences", type=int, default=8, help="on one photo (default 8)")
    parser.add_argument("--rounds", type=int, default=50, help="that are timed (default 50)")
    parser.add_argument("--warmup", type=int, default=10, help="that are not (default 10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE")
    args = parser.parse_args(argv)
    for name, low in (("sentences", 1), ("rounds", 1), ("warmup", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name} {getattr(args, name)}: give a number from {low}")
    return args


if __name__ == "__main__":
    run_entry_point(main)
