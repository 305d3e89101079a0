"""Write a trained model for other programs: safetensors with its config, or two ONNX graphs."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.build import restore_trained
from engine.export import NAMES, Case, Difference, compare, export_graphs, random_cases
from engine.predictor import check_sentence
from engine.tester import print_aligned
from model.segmenter import Segmenter
from tools.refshapes import draw_example
from utils.arguments import model_parser, parse_with_opts
from utils.checkpoint import save_weights
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

safetensors writes model.safetensors and config.yaml; onnx writes image_encoder.onnx,
text_head.onnx and config.yaml, after it has run both graphs by ONNX Runtime beside PyTorch, on
random inputs and on a photo with sentences (none given: a picture of RefShapes), and prints the
differences. A larger one than the tolerance ends with an error and without a file."""

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"


def main(argv: Sequence[str] | None = None) -> None:
    """Restore the model and write it."""
    args = _parse_args(argv)
    setup_logging(None, is_main=True)
    cfg = load_config(args.config, args.opts)
    folder = args.output or cfg.run_folder / "export"
    model, weights, state = restore_trained(cfg, torch.device("cpu"), args.weights, "weights")
    model.eval()
    if args.format == "onnx":
        write_graphs(model, cfg, folder, real_case(cfg, args.image, args.text), args.tolerance)
    else:
        save_weights(model.state_dict(), state | {"config": to_dict(cfg)}, folder / WEIGHTS)
    save_config(cfg, folder / CONFIG)
    print(f"{weights} is in {folder}, with its config")


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
    """Write both graphs, or neither if they do not compute what the model does."""
    with TemporaryDirectory() as scratch:
        paths = {kind: Path(scratch) / kind for kind in NAMES}
        export_graphs(model, cfg, paths)
        check(list(compare(model, cfg, paths, [*random_cases(cfg), real])), tolerance)
        for kind, path in paths.items():
            print(f"{kind}: {path.stat().st_size / 1e6:.1f} MB")
            with atomic_path(folder / kind) as partial:
                shutil.copyfile(path, partial)


def check(differences: Sequence[Difference], tolerance: float) -> None:
    """Print how far the graphs are from PyTorch; raise UserError for more than the tolerance."""
    rows = [("", "output", "|difference|", "|value|", "relative")]
    for d in differences:
        numbers = f"{d.largest:.2e}", f"{d.magnitude:.3g}", f"{d.relative:.1e}"
        rows.append((d.case, d.output, *numbers))
    print_aligned(rows, left=2)
    for d in differences:
        if not d.relative <= tolerance:  # so that what is no number fails too
            raise UserError(
                f"{d.output} differs from PyTorch's by {d.relative:.1e} ({d.case}), more than "
                f"--tolerance {tolerance:g}: nothing was written"
            )


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = model_parser(__doc__, EPILOG)
    parser.add_argument("--format", required=True, choices=("safetensors", "onnx"))
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="default: export/ in the run's folder"
    )
    parser.add_argument("--image", metavar="FILE", help="a photo to compare the graphs on")
    parser.add_argument("--text", action="append", default=[], help="a sentence for it; repeatable")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest difference: of a probability as it "
        "is, of other outputs over their largest value (default: %(default)s)",
    )  # fmt: skip
    args = parse_with_opts(parser, argv)
    if (args.image is None) != (not args.text):
        parser.error("--image and --text go together")
    return args


if __name__ == "__main__":
    run_entry_point(main)
