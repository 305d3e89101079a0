"""Write a trained model for other programs: safetensors with its config, or two ONNX graphs."""

import argparse
import math
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.build import restore_trained
from engine.export import (
    IMAGE_ENCODER,
    TEXT_HEAD,
    Case,
    Difference,
    compare,
    export_graphs,
    random_cases,
)
from engine.predictor import check_sentence
from model.segmenter import Segmenter
from tools.refshapes import draw_example
from utils.checkpoint import read_checkpoint, save_weights
from utils.config import Config, load_config, save_config, to_dict
from utils.errors import UserError, run_entry_point
from utils.files import atomic_path
from utils.logger import setup_logging
from utils.photos import read_photo
from utils.tokenizer import tokenize
from utils.transforms import letterbox_image

EPILOG = """examples:
  python tools/export.py --config config/refcoco/cris_r50.yaml --format safetensors -o cris
  python test.py --config cris/config.yaml --opts TEST.weights cris/model.safetensors

  python tools/export.py --config ... --format onnx -o cris --image photo.jpg --text "left man"

safetensors writes model.safetensors and config.yaml, and reads them back; onnx writes
image_encoder.onnx, text_head.onnx and config.yaml, runs both graphs by ONNX Runtime beside
PyTorch, on random inputs and on a photo with sentences (none given: a picture of RefShapes), and
prints the differences. A larger one than the tolerance ends with an error and without a file."""

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
TOLERANCE = 1e-4


def main(argv: Sequence[str] | None = None) -> None:
    """Restore the model, write it, check what was written."""
    args = _parse_args(argv)
    setup_logging(None, is_main=True)
    cfg = load_config(args.config, args.opts)
    folder = args.output or cfg.run_folder / "export"
    model, weights = restore_trained(cfg, torch.device("cpu"), args.weights, "weights")
    model.eval()
    is_new = not folder.exists()
    try:
        if args.format == "onnx":
            write_graphs(model, cfg, folder, real_case(cfg, args.image, args.text), args.tolerance)
        else:
            write_safetensors(model, cfg, folder)
    except BaseException:
        if is_new:
            with suppress(OSError):
                folder.rmdir()
        raise
    print(f"{weights} is in {folder}, with its config")


def write_safetensors(model: Segmenter, cfg: Config, folder: Path) -> None:
    """Write weights and config, after the weights have been read back to the bit."""
    state = model.state_dict()
    with atomic_path(folder / WEIGHTS) as partial:
        save_weights(state, to_dict(cfg), partial)
        again = read_checkpoint(partial, "export")["state_dict"]
        if again.keys() != state.keys() or not all(torch.equal(again[k], state[k]) for k in state):
            raise UserError(f"{folder / WEIGHTS}: what was read back differs; is the disk sound?")
        save_config(cfg, folder / CONFIG)
    print(
        f"{len(state)} tensors, {(folder / WEIGHTS).stat().st_size / 1e6:.1f} MB, read back alike"
    )


def real_case(cfg: Config, image: str | None, texts: Sequence[str]) -> Case:
    """Return a photo with sentences as the model gets them; without one, a picture of RefShapes."""
    if image is None:
        photo, sentences = draw_example(seed=0)
        name = "a picture of RefShapes"
    else:
        photo, sentences, name = read_photo(image), list(texts), Path(image).name
    tokens = tokenize([check_sentence(s) for s in sentences], cfg.TRAIN.word_len)
    return Case(
        f"{name}, sentences {len(sentences)}",
        letterbox_image(photo, cfg.TRAIN.input_size)[None],
        np.zeros(len(sentences), np.int64),
        tokens.numpy(),
    )


def write_graphs(model: Segmenter, cfg: Config, folder: Path, real: Case, tolerance: float) -> None:
    """Write both graphs and the config, if the graphs compute what the model does.

    Raises:
        UserError: they do not; nothing is left behind.
    """
    with ExitStack() as stack:
        paths = {
            kind: stack.enter_context(atomic_path(folder / kind))
            for kind in (IMAGE_ENCODER, TEXT_HEAD)
        }
        export_graphs(model, cfg, paths)
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        cases = [*random_cases(cfg), real]
        check(list(compare(model, cfg, paths, cases)), tolerance)
        save_config(cfg, folder / CONFIG)
    for kind, size in sizes.items():
        print(f"{kind}: {size / 1e6:.1f} MB")


def check(differences: Sequence[Difference], tolerance: float) -> None:
    """Print how far the graphs are from PyTorch.

    Raises:
        UserError: further than the tolerance (see `Difference.relative`).
    """
    width = max(len(d.case) for d in differences)
    print(f"{'':<{width}}  {'output':<11}  {'|difference|':>12}  {'|value|':>9}  {'relative':>9}")
    for d in differences:
        print(
            f"{d.case:<{width}}  {d.output:<11}  {d.largest:>12.2e}  {d.magnitude:>9.3g}"
            f"  {d.relative:>9.1e}"
        )
    worst = max(differences, key=lambda d: math.inf if math.isnan(d.relative) else d.relative)
    if not worst.relative <= tolerance:  # so that what is no number fails too
        raise UserError(
            f"{worst.output} differs from PyTorch's by {worst.relative:.1e} "
            f"({worst.case}), more than --tolerance {tolerance:g}: nothing was written"
        )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the model's YAML file")
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint (default: TEST.weights, or the run's best)"
    )
    parser.add_argument("--format", required=True, choices=("safetensors", "onnx"))
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="default: export/ in the run's folder"
    )
    parser.add_argument("--image", metavar="FILE", help="a photo to compare the graphs on")
    parser.add_argument("--text", action="append", default=[], help="a sentence for it; repeatable")
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE,
        help=f"largest difference: of a probability as it is, of other outputs over their largest "
        f"value (default: {TOLERANCE:g})",
    )  # fmt: skip
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE")
    args = parser.parse_args(argv)
    if (args.image is None) != (not args.text):
        parser.error("--image and --text go together")
    return args


if __name__ == "__main__":
    run_entry_point(main)
