"""The demo as a person meets it: its page in a browser, and its process in a terminal."""

import http.client
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from browser import Visit
from helpers import ROOT, save_photo
from PIL import Image

from engine.predictor import Predictor
from utils.config import load_config
from utils.signals import obeyed
from utils.visualize import PRED_COLOR, fade, heat_map, overlay

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow

SIZE = (90, 120)
# Of gradio's own, in every page of its; it says nothing of what was asked.
KNOWN_COMPLAINT = "Method not implemented."
API = "/gradio_api"
# Each kind of part comes with a script of its own, so one may be there well before another.
PARTS = ("photo input[type=file]", "sentence textarea", "threshold input[type=number]", "ask",
         "mask", "heat", "numbers")  # fmt: skip


class Demo(NamedTuple):
    url: str
    process: subprocess.Popen
    folder: Path  # in which it makes its temporary one
    log: Path


@contextmanager
def started(trained: Path, folder: Path, *words: str) -> Iterator[Demo]:
    """`python tools/demo.py` on a free port, with proxies set that would answer nothing."""
    pytest.importorskip("gradio", reason="no gradio (requirements-demo.txt)")
    folder.mkdir()
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    env |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "tools/demo.py", "--config", str(trained), "--port", "0", *words]
    log, pipes = folder / "log", {"stdout": subprocess.PIPE, "text": True}
    with (
        log.open("w") as errors,
        subprocess.Popen(command, cwd=ROOT, env=env, stderr=errors, **pipes) as process,
    ):
        try:
            line = process.stdout.readline()
            address = re.match(r"http://127\.0\.0\.1:\d+/", line)
            assert address, f"{line!r} {log.read_text()}"
            yield Demo(address[0], process, folder, log)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def demo(trained, tmp_path_factory) -> Iterator[Demo]:
    with started(trained, tmp_path_factory.mktemp("demo") / "tmp", "--max-upload", "1") as demo:
        yield demo


@pytest.fixture
def visit(browser, demo) -> Visit:
    browser.requests.clear()
    browser.complaints.clear()
    enter(browser.page, demo)
    return browser


@pytest.fixture
def page(visit) -> "Page":
    return visit.page


@pytest.fixture
def photo(tmp_path) -> Path:
    return save_photo(tmp_path / "street.png", 1, SIZE)


def enter(page: "Page", demo: Demo) -> None:
    page.goto(demo.url)
    for part in PARTS:
        page.wait_for_selector(f"#{part}", state="attached")


def drop(page: "Page", photo: Path) -> None:
    """Upload a photo, and wait until the page shows it."""
    page.set_input_files("#photo input[type=file]", photo)
    page.wait_for_selector("#photo img")


def type_in(page: "Page", sentence: str) -> None:
    page.fill("#sentence textarea", sentence)
    page.press("#sentence textarea", "Enter")


def ask(page: "Page", sentence: str) -> None:
    """Ask, and wait for the answer."""
    type_in(page, sentence)
    page.wait_for_function("text => numbers.innerText.startsWith(`“${text}”`)", arg=sentence)


def set_threshold(page: "Page", value: float) -> None:
    page.fill("#threshold input[type=number]", str(value))
    page.press("#threshold input[type=number]", "Enter")


def picture(page: "Page", name: str) -> np.ndarray:
    """The pixels that an image of the page shows: (H, W, 3)."""
    image = page.wait_for_selector(f"#{name} img")
    page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=image)
    data = page.request.get(image.evaluate("image => image.src")).body()
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def eventually(check: Callable[[], bool]) -> None:
    """Wait until the page shows what it was sent; pictures are loaded after it."""
    end = time.monotonic() + 10
    while not check():
        assert time.monotonic() < end
        time.sleep(0.05)


def marked(page: "Page", photo: Path) -> int:
    """Pixels in which the overlay differs from the faded photo."""
    shown = picture(page, "mask")
    return int((shown != fade(np.asarray(Image.open(photo)))).any(axis=2).sum())


def message(page: "Page") -> str:
    """What the page says of a mistake."""
    told = page.locator(".toast-body")
    told.last.wait_for()
    return told.last.inner_text()


# ---------------------------------------------------------------------------------------- answers


def test_a_photo_and_a_sentence_give_an_overlay_and_a_map_that_the_threshold_moves(
    page, photo, trained
):
    (found,) = Predictor(trained)(photo, "red circle")
    low, high = np.quantile(found.probability, (0.5, 0.9)).round(2).tolist()
    assert 0.01 <= low < high <= 0.98

    def shows(threshold: float) -> bool:
        mask = found.at(threshold).mask
        expected = overlay(fade(np.asarray(Image.open(photo))), mask, PRED_COLOR)
        return mask.any() and (picture(page, "mask") != expected).any(axis=2).mean() < 0.01

    drop(page, photo)
    set_threshold(page, low)
    ask(page, "red circle")
    eventually(lambda: shows(low))
    heat = picture(page, "heat")
    assert np.abs(heat.astype(int) - heat_map(found.probability)).max() <= 2
    set_threshold(page, high)
    eventually(lambda: shows(high))
    assert not shows(low)
    assert np.array_equal(picture(page, "heat"), heat)
    set_threshold(page, 0.99)
    page.wait_for_function("() => numbers.innerText.includes('nothing is above 0.99')")
    eventually(lambda: marked(page, photo) == 0)
    drop(page, save_photo(photo.with_name("next.png"), 2, SIZE))
    value = "threshold.querySelector('input[type=number]').value"
    page.wait_for_function(f"() => {value} == {load_config(trained).TEST.threshold}")
    assert "0.99" in page.inner_text("#numbers")  # nothing was asked of the new photo


def test_an_example_is_answered_with_a_click(page):
    page.locator("#examples tbody tr").first.click()
    page.wait_for_function("() => numbers.innerText.startsWith('“')")
    sentence = page.input_value("#sentence textarea")
    assert page.inner_text("#numbers").startswith(f"“{sentence}”")
    assert picture(page, "mask").shape == picture(page, "heat").shape


# ---------------------------------------------------------------------------------------- mistakes


def test_mistakes_are_told_and_the_next_question_is_answered(page, photo):
    type_in(page, "red circle")
    assert "there is no photo yet" in message(page)
    drop(page, photo)
    ask(page, "red circle")
    for sentence, told in [("   ", "cannot be read"), ("a" * 10_001, "at most 10,000")]:
        type_in(page, sentence)
        page.wait_for_selector(f".toast-body:has-text('{told}')")
        assert page.locator("#mask img").is_visible()  # of the last answer
    ask(page, "blue square")


@pytest.mark.parametrize(
    ("write", "told"),
    [
        (lambda path: path.write_bytes(b"no photo at all"), "cannot identify image file"),
        (Image.new("1", (20_000, 6_000)).save, "has 120.0 million pixels, at most 100 million"),
        (lambda path: path.write_bytes(bytes(1_500_000)), "exceed the maximum allowed size"),
    ],
    ids=["no photo", "huge", "large file"],
)
def test_a_file_that_cannot_be_read_is_told_of_and_the_next_one_read(
    page, demo, tmp_path, photo, write, told
):
    write(path := tmp_path / "odd.png")
    page.set_input_files("#photo input[type=file]", path)
    if path.stat().st_size < 1_000_000:
        page.wait_for_timeout(1000)
        type_in(page, "red circle")
    assert told in message(page)
    enter(page, demo)
    drop(page, photo)
    ask(page, "red circle")


# ------------------------------------------------------------------------------- alone and together


def test_the_page_asks_no_other_host_and_shows_what_is_typed_as_it_is(visit, demo, photo):
    drop(visit.page, photo)
    ask(visit.page, "<img src=x onerror=document.title='taken'> <b>circle</b> 🙂")
    picture(visit.page, "heat")
    assert visit.page.title() == "CRIS"
    assert len(visit.requests) > 10
    local = (demo.url, "data:", "blob:")
    assert [url for url in visit.requests if not url.startswith(local)] == []
    assert set(visit.complaints) <= {KNOWN_COMPLAINT}


def test_people_do_not_see_each_others_photos(page, demo, tmp_path):
    mine, yours = (save_photo(tmp_path / f"{seed}.png", seed, SIZE) for seed in (21, 22))
    other = page.context.new_page()
    enter(other, demo)
    drop(page, mine)
    drop(other, yours)
    ask(page, "red circle")
    ask(other, "blue square")
    most = SIZE[0] * SIZE[1] * 0.7  # more than the masks cover
    eventually(lambda: marked(page, mine) < most < marked(page, yours))
    eventually(lambda: marked(other, yours) < most < marked(other, mine))
    assert "blue square" not in page.inner_text("#numbers")
    assert "red circle" not in other.inner_text("#numbers")
    other.close()


# ------------------------------------------------------------------------------------ by its server


def test_a_client_cannot_name_what_it_did_not_upload(demo, photo):
    file = {"path": str(photo), "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
    question = {"data": [file, "red circle", 0.5], "fn_index": 0, "session_hash": "thief"}
    kept = {file for file in demo.folder.rglob("*") if file.is_file()}
    server = http.client.HTTPConnection(demo.url.split("/")[2], timeout=20)
    json_body = {"Content-Type": "application/json"}
    server.request("POST", f"{API}/queue/join", json.dumps(question), json_body)
    server.getresponse().read()
    server.request("GET", f"{API}/queue/data?session_hash=thief")
    assert b"process_completed" in (told := server.getresponse().read())
    server.close()
    assert b'"success":false' in told
    assert {file for file in demo.folder.rglob("*") if file.is_file()} == kept


@pytest.mark.parametrize("number", obeyed())  # all but a SIGHUP that nohup has ignored
def test_it_ends_at_once_and_leaves_nothing_even_with_a_page_open(
    trained, tmp_path, browser, photo, number
):
    with started(trained, tmp_path / "tmp") as demo:
        enter(browser.page, demo)
        drop(browser.page, photo)
        assert list(demo.folder.glob("cris-demo-*/*/street.png"))
        demo.process.send_signal(number)
        assert demo.process.wait(timeout=15) == 0
        assert [file.name for file in demo.folder.iterdir()] == ["log"]
        assert demo.log.read_text() == ""
