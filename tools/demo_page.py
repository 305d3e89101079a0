"""The demo's page: its parts, and what each of them does when a person touches it."""

import html
import re
from collections.abc import Callable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine.answers import Answer, Answers
from engine.predictor import Prediction, Predictor
from utils.errors import UserError
from utils.visualize import PRED_COLOR, heat_map, overlay

if TYPE_CHECKING:
    import gradio

KEPT_FOR = 3600  # seconds, of an uploaded file
ROWS = 20  # of the table on the page
PHOTO = "the photo, before any sentence"  # in it
GONE = "gone"  # in place of the path of a photo that is not kept

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


def _describe(predictor: Predictor) -> str:
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


def _show(answers: Answers, answer: Answer, threshold: float) -> tuple[np.ndarray, np.ndarray, str]:
    """The photo with the mask, the probabilities in colour, and the numbers."""
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


def _numbers(found: Prediction) -> str:
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
