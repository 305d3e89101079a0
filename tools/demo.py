"""A page in your browser: drop a photo, type a sentence, see what a trained model makes of it."""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.demo_server import MB, listen, serve
from utils.errors import UserError, run_entry_point

if TYPE_CHECKING:
    from utils.config import Config

EPILOG = """examples:
  python tools/demo.py --config config/refcoco/cris_r50.yaml --weights best_model.pth
  python tools/demo.py --config exp/refcoco/CRIS_R50/config.yaml --port 8000
then open the printed address. Needs: pip install -r requirements-demo.txt

The page is for this machine alone unless --host says otherwise; nothing asks who comes. It uses no
other host, so it works without a network. Photos are kept for an hour, or until the demo ends."""

EXAMPLES = 6


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, draw the page, answer until Ctrl-C."""
    args = _parse_args(argv)
    if find_spec("gradio") is None:
        raise UserError("the demo needs gradio: pip install -r requirements-demo.txt")
    door = listen(args.host, args.port)
    # After the cheap checks, so that a mistyped option or a taken port is answered at once.
    import numpy as np

    from engine.answers import Answers
    from engine.predictor import Predictor
    from tools.demo_page import CSS, build_page
    from utils.config import load_config
    from utils.logger import setup_logging

    setup_logging(None, is_main=True)
    config = load_config(args.config, args.opts)
    predictor = Predictor(config, args.weights)
    with door, tempfile.TemporaryDirectory(prefix="cris-demo-") as folder:
        # gradio reads these when it is imported.
        os.environ |= {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_OFFLINE": "1",
        }
        examples = find_examples(config, Path(folder) / "examples")
        predictor(np.zeros((64, 64, 3), np.uint8), "a")  # the first run is slow, and nobody's then
        page = build_page(Answers(predictor), examples)
        serve(page, CSS, door, args.max_upload * MB)


def find_examples(config: "Config", folder: Path) -> list[tuple[str, str]]:
    """Photos with a sentence each: of the config's val split, or else drawn if it is RefShapes.

    Args:
        folder: gets the photos.
    """
    from loguru import logger

    folder.mkdir()
    try:
        if Path(config.DATA.val_lmdb).exists():
            return list(_examples_of(Path(config.DATA.val_lmdb), folder))
        if config.DATA.dataset == "refshapes":
            return list(_draw_examples(folder))
    except (UserError, OSError) as error:
        logger.warning(f"no examples: {error}")
    return []


def _examples_of(records: Path, folder: Path) -> Iterator[tuple[str, str]]:
    """Refs from all over a split, no two of them in one image."""
    from utils.records import RecordReader

    reader = RecordReader(records)
    keys: set[str] = set()
    for number in range(EXAMPLES):
        ref = reader.ref(number * len(reader) // EXAMPLES)
        if ref.image_key not in keys:
            keys.add(ref.image_key)
            path = folder / f"{number}{Path(ref.image_key).suffix}"
            path.write_bytes(reader.image(ref.image_key))
            yield str(path), ref.sentences[number % len(ref.sentences)]


def _draw_examples(folder: Path) -> Iterator[tuple[str, str]]:
    from PIL import Image

    from tools.refshapes import draw_example

    for number in range(EXAMPLES):
        pixels, sentences = draw_example(seed=number)
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        yield str(path), sentences[number % len(sentences)]


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="the model's YAML file")
    parser.add_argument(
        "--weights", metavar="FILE", help="checkpoint (default: TEST.weights, or the run's best)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to answer at (default: %(default)s)"
    )
    parser.add_argument(
        "--port", type=int, default=7860, metavar="N", help="default: %(default)s; 0: a free one"
    )
    parser.add_argument(
        "--max-upload", type=int, default=20, metavar="MB", help="of a photo (default: %(default)s)"
    )
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="override config values; last on the line, such as --opts TEST.threshold 0.5",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port}: give a number from 0 to 65535")
    if args.max_upload < 1:
        parser.error(f"--max-upload {args.max_upload}: give 1 or more")
    return args


if __name__ == "__main__":
    run_entry_point(main)
