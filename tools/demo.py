"""Show a page in the browser: drop a photo, type a sentence, see the mask that a model finds."""

import html
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from engine.predictor import EncodedImage, Prediction, Predictor, check_sentence
from utils.arguments import model_parser, parse_with_opts
from utils.config import Config, load_config
from utils.errors import UserError, run_entry_point
from utils.logger import setup_logging
from utils.photos import read_photo
from utils.records import RecordReader
from utils.signals import obeyed
from utils.visualize import PRED_COLOR, fade, heat_map, overlay

EPILOG = """example:
  python tools/demo.py --config config/refcoco/cris_r50.yaml --weights best_model.pth --port 8000
then open the printed address. Needs: pip install -r requirements-demo.txt
The page is for this machine alone unless --host says otherwise; nothing asks who comes. It uses no
other host, so it works without a network. Photos are kept for an hour, or until the demo ends."""

EXAMPLES = 6
SHOWN_SIDE = 1280  # pixels; what is shown and kept of a photo is no larger
PHOTOS, MAPS = 16, 32  # kept in memory, of all people together; at most some 0.5 GB
CLEANING = (300, 3600)  # seconds: how often uploaded files are looked through, and their age then
# What data sets show, by how their names begin, and a sentence that fits.
SHOWN = {
    "refshapes": ("drawings of coloured shapes (RefShapes)", "the red star"),
    "refcocog": ("everyday photos (G-Ref)", "the man in a blue shirt holding a cup"),
    "refcoco+": ("everyday photos (RefCOCO+)", "the man in a blue shirt"),
    "refcoco": ("everyday photos (RefCOCO)", "the man on the left"),
    "combined": ("everyday photos (RefCOCO, RefCOCO+ and G-Ref)", "the man on the left"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, show the page, answer until Ctrl-C."""
    parser = model_parser(__doc__, EPILOG)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to answer at (default: %(default)s)")
    add("--port", type=int, default=7860, metavar="N", help="default: %(default)s; 0: a free one")
    add("--max-upload", type=int, default=20, metavar="MB", help="of a photo (default: 20)")
    args = parse_with_opts(parser, argv)
    if find_spec("gradio") is None:
        raise UserError("the demo needs gradio: pip install -r requirements-demo.txt")
    port = find_port(args.host, args.port)
    setup_logging(None, is_main=True)
    predictor = Predictor(load_config(args.config, args.opts), args.weights)
    for number in obeyed():  # all are like Ctrl-C: the folder of photos goes
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="cris-demo-") as folder:
        # gradio reads these when it is imported; it asks for its own page before it goes on.
        quiet = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
        hosts = f"{os.environ.get('no_proxy', '')},{args.host}".strip(",")
        os.environ |= {"GRADIO_TEMP_DIR": folder, "no_proxy": hosts} | quiet
        import gradio as gr

        page = build_page(predictor, find_examples(predictor.config, Path(folder) / "examples"))
        page.launch(
            server_name=args.host, server_port=port, max_file_size=args.max_upload << 20,
            theme=gr.themes.Default(font="system-ui", font_mono="ui-monospace"),
            footer_links=[], show_error=True, ssr_mode=False, quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
        print(f"{page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def find_port(host: str, port: int) -> int:
    """Return the port if this host can use it; for 0, a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as door:
            return door.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port} cannot be used: {error}") from None


def build_page(predictor: Predictor, examples: list[list[str]]) -> Any:
    """Return the page, a `gradio.Blocks`; an example is the path of a photo and a sentence."""
    import gradio as gr

    answer = answerer(predictor)

    def show(path: str | None, sentence: str, threshold: float) -> tuple:
        try:
            return answer(path, sentence, threshold)
        except (UserError, OSError) as error:
            # A person knows an uploaded photo by its own name.
            text = str(error).replace(path, Path(path).name) if path else str(error)
            raise gr.Error(html.escape(text), print_exception=False) from None

    with gr.Blocks(title="CRIS", delete_cache=CLEANING) as page:
        seen, hint = describe_data(predictor.config.DATA.dataset)
        trained = f"This model was trained on {seen}. On other pictures its answers mean little."
        gr.Markdown(f"# CRIS\n{trained}\n\n`{predictor.weights}`", elem_id="model")
        with gr.Row():
            with gr.Column(scale=2):
                photo = gr.Image(label="Photo", height=320, elem_id="photo", type="filepath",
                    image_mode=None, sources=["upload", "clipboard"])  # fmt: skip
                hint = examples[0][1] if examples else hint
                sentence = gr.Textbox(label="Sentence", placeholder=hint, elem_id="sentence")
                button = gr.Button("Find it", variant="primary", elem_id="ask")
                info = "Pixels above this probability are the mask."
                slider = gr.Slider(0.01, 0.99, predictor.threshold, step=0.01, label="Threshold",
                    elem_id="threshold", info=info)  # fmt: skip
            with gr.Column(scale=5), gr.Row():
                drawn = {"interactive": False, "format": "png", "height": 420}
                mask = gr.Image(label="Mask", elem_id="mask", **drawn)
                heat = gr.Image(label="Probability, dark 0 to bright 1", elem_id="heat", **drawn)
        numbers = gr.HTML("Drop a photo, say what to look for, press Enter.", elem_id="numbers")
        asked = {"inputs": [photo, sentence, slider], "outputs": [mask, heat, numbers]}
        # One question at a time: they share the model and what is kept.
        shared = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        gr.on([button.click, sentence.submit], show, **asked, **shared)
        slider.input(show, **asked, **shared, trigger_mode="always_last", show_progress="hidden")
        photo.change(None, outputs=slider, js=f"() => {predictor.threshold}")
        if examples:
            ask = partial(show, threshold=predictor.threshold)
            gr.Examples(examples, [photo, sentence], asked["outputs"], fn=ask, elem_id="examples",
                run_on_click=True, api_visibility="private")  # fmt: skip
    return page


def describe_data(name: str) -> tuple[str, str]:
    """Return what pictures a data set has, in plain words, and a fitting sentence."""
    known = (words for start, words in SHOWN.items() if name.startswith(start))
    return next(known, (f"the data set {name}", "what to look for"))


def answerer(predictor: Predictor) -> Callable[[str | None, str, float], tuple]:
    """Return a function that answers a question with overlay, heat map and text.

    A photo is encoded once for all its sentences: the path of an upload holds its digest.
    """

    @lru_cache(PHOTOS)
    def encode(path: str) -> tuple[np.ndarray, EncodedImage]:
        photo = read_photo(path)
        shown = Image.fromarray(photo)
        shown.thumbnail((SHOWN_SIDE, SHOWN_SIDE))  # if it is larger
        return np.asarray(shown), replace(predictor.encode(photo), size=shown.size[::-1])

    @lru_cache(MAPS)
    def find(path: str, sentence: str) -> Prediction:
        return predictor(encode(path)[1], sentence)[0]

    def answer(path: str | None, sentence: str, threshold: float) -> tuple:
        if path is None:
            raise UserError("there is no photo yet: drop one on the page first")
        found = find(path, check_sentence(sentence)).at(threshold)
        shown = overlay(fade(encode(path)[0]), found.mask, PRED_COLOR)
        return shown, heat_map(found.probability), _numbers(found)

    return answer


def _numbers(found: Prediction) -> str:
    if found.box is not None:
        share, mean = found.area / found.mask.size, found.mean_probability
        what = f"{share:.1%} of the photo, mean probability {mean:.2f}"
    else:
        few, best = found.no_target_pixels, found.probability.max()
        lacking = "nothing is" if few == 1 else f"fewer than {few} pixels are"
        what = f"{lacking} above {found.threshold:.2f}; the highest probability is {best:.2f}"
    cut = ". The sentence is too long: its end was not read" if found.is_cut else ""
    return f"“{html.escape(found.sentence[:300])}”: {what}{cut}"


def find_examples(config: Config, folder: Path) -> list[list[str]]:
    """Copy photos of the val split to a folder; return their paths with a sentence each."""
    try:
        reader = RecordReader(config.DATA.val_lmdb)
        folder.mkdir()
        examples = {}
        for ref in (reader.ref(number * len(reader) // EXAMPLES) for number in range(EXAMPLES)):
            path = folder / f"{ref.ref_id}{Path(ref.image_key).suffix}"
            path.write_bytes(reader.image(ref.image_key))
            examples[ref.image_key] = [str(path), ref.sentences[0]]
        return list(examples.values())
    except (UserError, OSError) as error:
        logger.warning(f"no examples: {error}")
        return []


if __name__ == "__main__":
    run_entry_point(main)
