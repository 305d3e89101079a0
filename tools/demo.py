"""A page in your browser: drop a photo, type a sentence, see what a trained model makes of it."""

import argparse
import errno
import html
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial, wraps
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from utils.errors import UserError, run

if TYPE_CHECKING:
    import gradio
    import numpy as np

    from engine.predictor import EncodedImage, Prediction, Predictor
    from utils.config import Config

EPILOG = """examples:
  python tools/demo.py --config config/refcoco/cris_r50.yaml --weights best_model.pth
  python tools/demo.py --config exp/refcoco/CRIS_R50/config.yaml --port 8000
then open the printed address. Needs: pip install -r requirements-demo.txt

The page is for this machine alone unless --host says otherwise; nothing asks who comes. It uses no
other host, so it works without a network. Photos are kept for an hour, or until the demo ends."""

SHOWN_SIDE = 1280  # pixels; what people see and what is kept of a photo is no larger
PHOTOS, MAPS = 16, 32  # kept in memory, of all people together; at most some 0.5 GB
EXAMPLES = 6
KEPT_FOR = 3600  # seconds, of an uploaded file
ROWS = 20  # of the table on the page
GONE = "gone"  # in place of the path of a photo that is not kept
PHOTO = "the photo, before any sentence"  # in it
MB = 1 << 20
REQUEST_BYTES = 1 * MB  # of a request that uploads nothing, and around an upload
LOCAL = ("127.0.0.1", "localhost", "::1")

T = TypeVar("T")


def main(argv: Sequence[str] | None = None) -> None:
    """Load the model, draw the page, answer until Ctrl-C."""
    args = _parse_args(argv)
    if find_spec("gradio") is None:
        raise UserError("the demo needs gradio: pip install -r requirements-demo.txt")
    door = listen(args.host, args.port)
    # After the cheap checks, so that a mistyped option or a taken port is answered at once.
    import numpy as np

    from engine.predictor import Predictor
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
        serve(page, door, args.max_upload * MB)


# ------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True, eq=False)
class Seen:
    """A photo that was encoded.

    pixels: (H, W, 3) uint8 RGB, no side longer than `SHOWN_SIDE`.
    encoded: its features, from all its pixels; predictions come at the size of `pixels`.
    size: (height, width) that it came with.
    """

    pixels: "np.ndarray"
    encoded: "EncodedImage"
    size: tuple[int, int]


class Answer(NamedTuple):
    """A prediction with what it took, in seconds; None: it was there already."""

    seen: Seen
    found: "Prediction"
    encoding: float | None
    answering: float | None


class Answers:
    """Asks the model, one question at a time, and keeps what was used last.

    Photos are known by the path that they were uploaded to. It holds a digest of the file, which
    only those know who have the file: nobody is given anybody else's.
    """

    def __init__(self, predictor: "Predictor") -> None:
        self.predictor = predictor
        self._seen: OrderedDict[str, Seen] = OrderedDict()
        self._found: OrderedDict[tuple[str, str], Prediction] = OrderedDict()
        self._lock = threading.Lock()

    def look(self, path: str) -> tuple[Seen, float | None]:
        """Encode a photo, unless it was lately; and how many seconds that took, or None.

        Raises:
            UserError: it cannot be read.
        """
        with self._lock:
            return _recall(self._seen, path, lambda: self._encode(path), PHOTOS)

    def ask(self, path: str, sentence: str) -> Answer:
        """Segment what a sentence denotes in a photo, which is encoded once.

        Raises:
            UserError: the photo cannot be read, or the sentence is none.
        """
        from engine.predictor import check_sentence

        check_sentence(sentence)  # the photo is not looked at in vain
        seen, encoding = self.look(path)
        with self._lock:
            found, answering = _recall(
                self._found,
                (path, sentence),
                lambda: self.predictor(seen.encoded, sentence)[0],
                MAPS,
            )
        return Answer(seen, found, encoding, answering)

    def _encode(self, path: str) -> Seen:
        import cv2

        from utils.photos import read_photo

        photo = read_photo(path, self.predictor.max_pixels)
        encoded = self.predictor.encode(photo)
        encoded.features.v5.flatten()[0].item()  # a GPU is waited for, so that the time is true
        size = photo.shape[:2]
        scale = SHOWN_SIDE / max(size)
        if scale < 1:
            height, width = (max(1, round(side * scale)) for side in size)
            photo = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA)
        return Seen(photo, replace(encoded, size=photo.shape[:2]), size)


def _recall(
    kept: OrderedDict[Hashable, T], key: Hashable, make: Callable[[], T], limit: int
) -> tuple[T, float | None]:
    """What lies under a key, made if it is not there; what was used longest ago gives way."""
    seconds = None
    if key not in kept:
        start = time.perf_counter()
        kept[key] = make()
        seconds = time.perf_counter() - start
    kept.move_to_end(key)
    while len(kept) > limit:
        kept.popitem(last=False)
    return kept[key], seconds


# --------------------------------------------------------------------------------------- the page

CSS = """
.gradio-container { width: 100%; max-width: 1500px !important; margin: 0 auto !important; }
#title h1 { margin-bottom: 0; }
#photo img, #mask img, #heat img { width: 100%; height: 100%; object-fit: contain; }
#numbers { font-size: 1.05em; }
#times table { width: 100%; border-collapse: collapse; border: 0 !important; }
#times tr { border: 0 !important; }
#times :is(th, td) { border: 0 !important; padding: 2px 0; text-align: left; }
#times td { overflow-wrap: anywhere; }
#times :is(th, td) + :is(th, td) { text-align: right; white-space: nowrap; }
#times th, .hint { font-weight: normal; opacity: 0.7; }
#examples .grid-wrap { min-height: 0; max-height: none; height: auto; }
#mistake p { color: var(--error-text-color); font-weight: 600; margin: 0; }
"""
HINT = '<span class="hint">Drop a photo, say what to look for in it, and press Enter.</span>'


def build_page(answers: Answers, examples: Sequence[tuple[str, str]]) -> "gradio.Blocks":
    """The page's parts, and what each of them does.

    Args:
        examples: (path of a photo, sentence).
    """
    import gradio as gr

    threshold = answers.predictor.threshold
    with gr.Blocks(
        title="CRIS", analytics_enabled=False, delete_cache=(KEPT_FOR // 12, KEPT_FOR)
    ) as page:
        gr.Markdown(f"# CRIS\n{_describe(answers.predictor)}", elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                photo = gr.Image(
                    label="Photo", type="filepath", image_mode=None, height=320, buttons=[],
                    sources=["upload", "clipboard"], elem_id="photo",
                )  # fmt: skip
                _take_uploads_as_they_are(photo)
                sentence = gr.Textbox(
                    label="Sentence", placeholder="the man on the left", max_lines=3,
                    elem_id="sentence",
                )  # fmt: skip
                button = gr.Button("Find it", variant="primary", elem_id="ask")
                slider = gr.Slider(
                    0.01, 0.99, threshold, step=0.01, label="Threshold", elem_id="threshold",
                    info="Pixels above this probability are the mask; the model is not run again.",
                )  # fmt: skip
            with gr.Column(scale=5, min_width=320):
                with gr.Row():
                    mask = _picture("Mask", "mask")
                    heat = _picture("Probability, dark 0 to bright 1", "heat")
                mistake = gr.HTML(elem_id="mistake")
                numbers = gr.HTML(HINT, elem_id="numbers")
                times = gr.HTML(elem_id="times")
        asked = gr.State(None)  # (path, sentence) of what is shown
        history = gr.State(())  # (path, what, seconds) of the table's rows
        inputs, pictures = [photo, sentence, slider, history], [mask, heat, numbers]
        outputs = [mistake, *pictures, times, asked, history]
        # Not through gradio's queue: its stream loses an answer now and then, when one question
        # follows close on another. The lock of `answers` is the queue.
        private = {"api_visibility": "private", "queue": False}
        answer = _telling(partial(on_ask, answers), len(outputs) - 1)
        look = _telling(partial(on_photo, answers), len(outputs) - 1)
        move = _telling(partial(on_threshold, answers), len(pictures))
        ask = {"fn": answer, "inputs": inputs, "outputs": outputs} | private
        ask |= {"show_progress_on": [mask, heat]}
        gr.on([button.click, sentence.submit], **ask)
        photo.upload(look, photo, outputs, show_progress_on=mask, **private)
        photo.clear(on_clear, None, outputs, show_progress="hidden", **private)
        slider.change(
            move,
            [asked, slider],
            [mistake, *pictures],
            show_progress="hidden", trigger_mode="always_last", **private,
        )  # fmt: skip
        if examples:
            gallery = gr.Gallery(
                list(examples), label="Examples: click one", columns=len(examples), height="auto",
                allow_preview=False, interactive=False, buttons=[], elem_id="examples",
            )  # fmt: skip

            def on_example(chosen: gr.SelectData) -> tuple[str, str]:
                return examples[chosen.index]

            gallery.select(
                on_example, None, [photo, sentence], show_progress="hidden", **private
            ).then(**ask)
    return page


def _describe(predictor: "Predictor") -> str:
    train = predictor.config.TRAIN
    return (
        f"`{train.exp_name}/{Path(predictor.weights).name}`, trained on "
        f"{predictor.config.DATA.dataset}, reads {train.input_size} × {train.input_size} pixels "
        f"and {train.word_len} tokens, start and end among them."
    )


def _picture(label: str, name: str) -> "gradio.Image":
    import gradio as gr

    return gr.Image(
        label=label, interactive=False, format="png", height=420, min_width=320, elem_id=name,
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _take_uploads_as_they_are(photo: "gradio.Image") -> None:
    """Uploads reach `read_photo` unopened: gradio would open any format that Pillow knows.

    Other files of this machine, and addresses, are refused: a client may send any path, and gradio
    checks them in its own `launch` alone.
    """
    folder = Path(photo.GRADIO_CACHE).resolve()

    def is_kept(path: str) -> bool:
        file = Path(path).resolve()
        return file.is_relative_to(folder) and file.is_file()

    async def take(path: str | None) -> str | None:
        return await keep(path) if path is not None and is_kept(path) else path

    def path_of(upload: Any) -> str | None:
        return upload and (upload.path if is_kept(upload.path) else GONE)

    keep = photo.async_move_resource_to_block_cache
    photo.async_move_resource_to_block_cache = take
    photo.preprocess = path_of


# ------------------------------------------------------------------------------ what a person does


def on_ask(
    answers: Answers, path: str | None, sentence: str, threshold: float, history: tuple
) -> tuple:
    """Answer a sentence; the page's outputs."""
    _check_photo(path)
    if not sentence or not sentence.strip():
        raise UserError("the sentence is empty: say what to look for in the photo")
    answer = answers.ask(path, sentence)
    rows = [row for row in history if row[0] == path]
    if answer.encoding is not None or not rows:
        rows.insert(0, (path, PHOTO, answer.encoding))
    rows.insert(0, (path, f"“{sentence}”", answer.answering))
    rows = tuple(rows[:ROWS])
    return *_show(answers, answer, threshold), _table(rows), (path, sentence), rows


def on_threshold(answers: Answers, asked: tuple[str, str] | None, threshold: float) -> tuple:
    """Draw the answer that is shown with another threshold; its map is there already."""
    import gradio as gr

    if asked is None:
        return gr.skip(), gr.skip(), gr.skip()
    return _show(answers, answers.ask(*asked), threshold)


def on_photo(answers: Answers, path: str) -> tuple:
    """Encode a photo as soon as it comes, so that the first answer comes fast."""
    _check_photo(path)
    seen, encoding = answers.look(path)
    height, width = seen.size
    text = f"{_escape(Path(path).name)}: {width} × {height} pixels. Now type a sentence."
    rows = ((path, PHOTO, encoding),)
    return seen.pixels, None, text, _table(rows), None, rows


def _check_photo(path: str | None) -> None:
    if not path:
        raise UserError("there is no photo yet: drop one on the page first")
    if path == GONE:
        raise UserError("the photo is not kept any more: drop it again")


def on_clear() -> tuple:
    """The page as it was before the photo."""
    return "", None, None, HINT, "", None, ()


def _telling(handler: Callable[..., tuple], outputs: int) -> Callable[..., tuple]:
    """The handler of a page, with the text of a mistake or "" before its outputs; the demo goes on.

    Args:
        outputs: of the handler; after a mistake the page keeps them as they are.
    """
    import gradio as gr
    import torch

    @wraps(handler)
    def answer(*args: Any) -> tuple:
        try:
            return "", *handler(*args)
        except (UserError, OSError) as error:
            text = str(error)
        except (MemoryError, torch.OutOfMemoryError):
            text = "there is not enough memory for this: make the photo smaller"
        # An uploaded photo is known to a person by its own name.
        text = _escape(re.sub(r"\S*/[0-9a-f]{64}/", "", text))
        return f'<p role="alert">{text}</p>', *[gr.skip()] * outputs

    return answer


def _show(
    answers: Answers, answer: Answer, threshold: float
) -> tuple["np.ndarray", "np.ndarray", str]:
    """The photo with the mask, the probabilities in colour, and the numbers."""
    from utils.visualize import PRED_COLOR, heat_map, overlay

    found = answer.found.at(threshold)
    shown = overlay(answer.seen.pixels, found.mask, PRED_COLOR)
    text = _numbers(found)
    if found.is_cut:
        limit = answers.predictor.config.TRAIN.word_len
        text += (
            f"<br>⚠ The sentence is longer than the {limit} tokens that this model reads "
            "(TRAIN.word_len): its end was not read."
        )
    return shown, heat_map(found.probability), text


def _numbers(found: "Prediction") -> str:
    if found.box is None:
        best = float(found.probability.max())
        what = f"nothing is above {found.threshold:.2f}; the highest probability is {best:.2f}"
    else:
        share = 100 * found.area / found.mask.size
        mean = found.mean_probability
        what = f"<b>{share:.1f} %</b> of the photo, mean probability <b>{mean:.2f}</b>"
    return f"“{_escape(found.sentence)}”: {what}"


def _table(rows: Sequence[tuple[str, str, float | None]]) -> str:
    """What was computed for a photo, the last first, as HTML."""
    lines = "".join(
        f"<tr><td>{_escape(what)}</td><td>{_milliseconds(seconds)}</td></tr>"
        for _, what, seconds in rows
    )
    return f"<table><tr><th>Computed for this photo</th><th>took</th></tr>{lines}</table>"


def _milliseconds(seconds: float | None) -> str:
    return "kept from before" if seconds is None else f"{1000 * seconds:.0f} ms"


def _escape(text: str, limit: int = 300) -> str:
    return html.escape(text if len(text) <= limit else text[: limit - 1] + "…")


# ----------------------------------------------------------------------------------------- examples


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


# ------------------------------------------------------------------------------------------- server


def listen(host: str, port: int) -> socket.socket:
    """Take a port, so that no one else does.

    Args:
        port: 0 takes a free one.
    Raises:
        UserError: it is taken, may not be used, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except socket.gaierror:
        raise UserError(f"--host {host} is no address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} of {host} is in use: name another, --port N") from None
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} may not be used: name one from 1024 on") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UserError(f"--host {host} is no address of this machine") from None
        raise UserError(f"--host {host} --port {port}: {error.strerror}") from None


def serve(page: "gradio.Blocks", door: socket.socket, max_bytes: int) -> None:
    """Answer at an open door until Ctrl-C or a request to end.

    gradio's own `launch` would look for another port, ask itself over HTTP whether it is there,
    and wait for pages that are still open.

    Args:
        max_bytes: of an uploaded file.
    """
    import fastapi
    import gradio as gr
    import uvicorn
    from loguru import logger

    app = fastapi.FastAPI(openapi_url=None)
    theme = gr.themes.Default(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )  # fonts that are there, so none is fetched
    host, port = door.getsockname()[:2]
    gr.mount_gradio_app(
        app, page, "/", server_name=host, server_port=port, max_file_size=max_bytes,
        show_error=False, footer_links=[], run_history=False, enable_monitoring=False,
        ssr_mode=False, mcp_server=False,
        theme=theme, css=CSS,
    )  # fmt: skip
    server = uvicorn.Server(
        uvicorn.Config(
            limit_requests(app, max_bytes),
            log_level="error",
            timeout_graceful_shutdown=1,
            lifespan="on",
        )
    )

    def end(number: int, frame: FrameType | None) -> None:
        # Pages that are still open are cut off, and nothing needs to be said of it.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        uvicorn.Server.handle_exit(server, number, frame)

    server.handle_exit = end
    # Being told to end by the system is like Ctrl-C: the folder of photos goes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if host not in LOCAL:
        logger.warning(f"{host} is not for this machine alone: whoever reaches it can use the page")
    name = f"[{host}]" if ":" in host else host
    print(f"http://{name}:{port}/ (Ctrl-C ends it)", flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[door])


def limit_requests(app: Callable, max_bytes: int) -> Callable:
    """An ASGI app that refuses what is too long before any of it is read."""
    from starlette.responses import JSONResponse

    async def answer(scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            length = dict(scope["headers"]).get(b"content-length", b"")
            is_upload = scope["path"].rstrip("/").endswith("/upload")
            limit = REQUEST_BYTES + (max_bytes if is_upload else 0)
            if not length.isdigit() or int(length) > limit:
                refusal = JSONResponse({"detail": f"at most {limit} bytes are taken"}, 413)
                await refusal(scope, receive, send)
                return
        await app(scope, receive, send)

    return answer


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
    run(main)
