"""Reports in a real browser, opened from the disk: filter, sort, turn pages, look closely."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import Visit
from helpers import (
    HOSTILE,
    ODD_SENTENCES,
    all_refs,
    read_jsonl,
    write_any_number,
    write_odd_records,
    write_records,
    write_result,
)
from pycocotools import mask as coco_mask

from tools import compare_runs
from utils.transforms import load_mask

pytestmark = pytest.mark.slow

PAGE = 24  # cards


@pytest.fixture
def visit(browser) -> Iterator[Visit]:
    """A page; in no test it may ask a network for something, or something go wrong."""
    browser.requests.clear()
    browser.complaints.clear()
    yield browser
    assert browser.requests
    assert [url for url in browser.requests if not url.startswith(("file://", "data:"))] == []
    assert browser.complaints == []


@pytest.fixture
def result(tmp_path, shapes_lmdb) -> Path:
    return write_result(tmp_path / "run", shapes_lmdb)


@pytest.fixture
def lines(result) -> list[dict]:
    return read_jsonl(result)


def go(visit: Visit, path: Path, choices: str = "") -> None:
    """Open a page from the disk and wait until its masks are drawn."""
    visit.page.goto("about:blank")  # else another fragment of the same page would not load it
    visit.page.goto(path.as_uri() + choices)
    visit.page.wait_for_selector("canvas[data-drawn]")


def page_of(result: Path) -> Path:
    return result.parent / "report" / result.stem / "index.html"


def shown(visit: Visit) -> list[str]:
    """Sentences on the visible cards, in order."""
    cards = visit.page.locator(".card .sentence")
    return [text[1:-1] for text in cards.all_text_contents()]


def expected(
    lines: list[dict], key: Callable[[dict], float] = lambda line: line["iou"], page: int = 1
) -> list[str]:
    """What has to be on a page of these lines of the `.jsonl`."""
    chosen = sorted(lines, key=key)[(page - 1) * PAGE : page * PAGE]
    return [line["sentence"] for line in chosen]


def count(visit: Visit) -> int:
    return int(visit.page.inner_text("#count").split()[0].replace(",", ""))


def test_the_worst_come_first_and_pages_turn(visit, result, lines):
    go(visit, page_of(result))
    assert len(lines) > 2 * PAGE
    assert shown(visit) == expected(lines)
    assert count(visit) == len(lines)
    assert visit.page.is_disabled("#previous")
    visit.page.click("#next")
    assert shown(visit) == expected(lines, page=2)
    visit.page.click("#last")
    assert shown(visit) == expected(lines, page=-(-len(lines) // PAGE))
    assert visit.page.is_disabled("#next")
    visit.page.click("#first")
    assert shown(visit) == expected(lines)


def test_filters_leave_what_fits_all_of_them(visit, result, lines):
    go(visit, page_of(result))
    visit.page.fill("[name=low]", "0.2")
    visit.page.fill("[name=high]", "0.8")
    left = [line for line in lines if 0.2 <= line["iou"] <= 0.8]
    assert 0 < count(visit) == len(left) < len(lines)
    assert shown(visit) == expected(left)
    options = visit.page.locator("[name=category] option").all_inner_texts()
    name = next(text for text in options if text.startswith("category 2"))
    visit.page.select_option("[name=category]", label=name)
    left = [line for line in left if line["category"] == 2]
    assert shown(visit) == expected(left)
    words = left[0]["sentence"][:-2]
    visit.page.fill("[name=text]", f"  {words.upper()}")
    left = [line for line in left if words in line["sentence"]]
    assert 0 < count(visit) == len(left)
    assert shown(visit) == expected(left)
    visit.page.fill("[name=text]", "no such words")
    assert shown(visit) == []
    assert "no sentence fits" in visit.page.inner_text("#cards")
    visit.page.click("#clear")
    assert shown(visit) == expected(lines)


def test_sorting(visit, result, lines):
    go(visit, page_of(result))
    visit.page.select_option("[name=sort]", "best")
    assert shown(visit) == expected(lines, key=lambda line: -line["iou"])
    visit.page.select_option("[name=sort]", "smallest")
    share = [line["target_area"] / (line["height"] * line["width"]) for line in lines]
    assert shown(visit) == expected(lines, key=lambda line: share[lines.index(line)])
    visit.page.select_option("[name=sort]", "data")
    assert shown(visit) == [line["sentence"] for line in lines[:PAGE]]


def test_charts_and_tables_choose_sentences(visit, result, lines):
    go(visit, page_of(result))
    visit.page.locator(".chart").first.locator(".hit").first.click()
    assert shown(visit) == expected([line for line in lines if line["iou"] <= 0.05])
    visit.page.click("#clear")
    visit.page.click("#tables summary")
    visit.page.click("#table-category button:text-is('category 4')")
    assert shown(visit) == expected([line for line in lines if line["category"] == 4])


def test_an_address_keeps_the_choices(visit, result, lines):
    go(visit, page_of(result))
    visit.page.fill("[name=text]", "red")
    visit.page.select_option("[name=sort]", "best")
    address = visit.page.url
    assert "#text=red&sort=best" in address
    visit.page.goto("about:blank")
    visit.page.goto(address)
    red = [line for line in lines if "red" in line["sentence"]]
    assert shown(visit) == expected(red, key=lambda line: -line["iou"])
    assert visit.page.input_value("[name=text]") == "red"
    go(visit, page_of(result), "#nonsense=1&sort=nonsense&page=99&low=abc")


def _alpha(visit: Visit, card: int, panel: int) -> np.ndarray:
    """(H, W) opacity of what is drawn over a photo."""
    picture = visit.page.locator(".card").nth(card).locator(".picture").nth(panel)
    height, width, values = picture.locator("canvas[data-drawn]").evaluate("""canvas => {
        const { height, width } = canvas;
        const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
        return [height, width, Array.from(pixels.filter((_, i) => i % 4 === 3))];
    }""")
    return np.array(values).reshape(height, width)


def test_masks_are_drawn_where_they_are(visit, result, lines, shapes_lmdb):
    go(visit, page_of(result), "#sort=data&view=panels")
    mask = load_mask(all_refs(shapes_lmdb)[0]) > 0
    drawn = _alpha(visit, card=0, panel=1) > 0
    wider = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3))) > 0  # the outline is two pixels
    assert drawn[mask].all()
    assert not drawn[~wider].any()
    for card in range(5):
        pred = coco_mask.decode(lines[card]["pred_rle"]) > 0
        alpha = _alpha(visit, card, panel=2)
        tinted = (alpha > 0) & (alpha < 255)  # the outline of the ground truth is opaque
        assert (pred | (alpha == 255))[tinted].all()
        assert tinted[pred & (alpha < 255)].all()
        assert tinted.any()


def test_a_sentence_can_be_enlarged_and_walked_on_from(visit, result, lines):
    go(visit, page_of(result))
    order = expected(lines)
    visit.page.locator(".open").nth(1).click()
    assert visit.page.inner_text("#enlarged .sentence")[1:-1] == order[1]
    visit.page.keyboard.press("ArrowRight")
    assert visit.page.inner_text("#enlarged .sentence")[1:-1] == order[2]
    visit.page.click("#before")
    assert visit.page.inner_text("#enlarged .sentence")[1:-1] == order[1]
    visit.page.wait_for_selector("#enlarged canvas[data-drawn]")
    visit.page.keyboard.press("Escape")
    assert not visit.page.is_visible("#large")


def test_what_a_data_set_says_is_text(visit, tmp_path):
    lmdb = write_odd_records(tmp_path / "val.lmdb")
    result = write_result(tmp_path / "50% #1 犬", lmdb, step=0)
    go(visit, page_of(result), "#sort=data")
    assert shown(visit) == list(ODD_SENTENCES)
    assert HOSTILE in shown(visit)
    assert visit.page.title() == "odd val: published"
    assert visit.page.locator("[name=category]").count() == 0
    loaded = "() => [...document.images].every((i) => i.complete && i.naturalWidth > 0)"
    visit.page.wait_for_function(loaded)


def test_results_of_a_run_are_linked(visit, tmp_path, shapes_lmdb):
    write_result(tmp_path / "run", shapes_lmdb, "both")
    visit.page.goto((tmp_path / "run/report/index.html").as_uri())
    assert visit.page.locator("#scores a").count() == 2
    visit.page.locator("#scores a").first.click()
    visit.page.wait_for_selector("canvas[data-drawn]")
    assert visit.page.url.endswith("/test_shapes_train.aligned/index.html")
    visit.page.click("#results a:not([aria-current]):has-text('published')")
    visit.page.wait_for_url(re.compile("/test_shapes_train/index.html$"))
    visit.page.wait_for_selector("canvas[data-drawn]")


def test_a_single_result_opens_at_once(visit, result):
    go(visit, result.parent / "report/index.html")
    assert visit.page.url == page_of(result).as_uri()
    assert not visit.page.is_visible("#results")


def test_a_comparison_shows_both_and_who_won(visit, tmp_path, shapes_lmdb):
    paths = [write_result(tmp_path / n, shapes_lmdb, step=s) for n, s in (("a", 9), ("b", 5))]
    compare_runs.main([*map(str, paths), "-o", str(tmp_path / "page"), "--margin", "0.1"])
    first, second = map(read_jsonl, paths)
    difference = [b["iou"] - a["iou"] for a, b in zip(first, second, strict=True)]
    go(visit, tmp_path / "page/index.html")

    def order(sign: int) -> list[str]:
        places = sorted(range(len(first)), key=lambda place: sign * difference[place])
        return [first[place]["sentence"] for place in places]

    assert shown(visit) == order(1)[:PAGE]
    visit.page.select_option("[name=sort]", "gain")
    assert shown(visit) == order(-1)[:PAGE]
    for outcome, sign in (("won", 1), ("lost", -1)):
        visit.page.select_option("[name=outcome]", outcome)
        assert 0 < count(visit) == sum(sign * d > 0.1 for d in difference)
    assert visit.page.locator(".card").first.locator(".picture").count() == 4


def test_sentences_about_nothing_are_told_with_their_rule(visit, tmp_path, shapes_lmdb):
    lmdb = write_any_number(shapes_lmdb, tmp_path / "train.lmdb")
    for result in (write_result(tmp_path / name, lmdb, step=n) for name, n in (("a", 9), ("b", 5))):
        go(visit, page_of(result))
        assert "N-acc (none: under 50 pixels)" in visit.page.inner_text("#scores")
    visit.page.click("#tables summary")
    row = visit.page.locator("#table-kind tr", has_text="no target")
    assert row.inner_text().split()[-4:] == ["100.00", "–", "100.00", "–"]
    row.locator("button").click()
    lines = [line for line in read_jsonl(result) if line.get("num_targets") == 0]
    assert count(visit) == len(lines)
    compare_runs.main([str(tmp_path / n / result.name) for n in "ab"] + ["-o", str(tmp_path / "p")])
    go(visit, tmp_path / "p/index.html")
    assert "gIoU" in visit.page.inner_text("#scores")


def test_thousands_of_sentences_stay_usable(visit, tmp_path):
    lmdb = write_records(tmp_path / "val.lmdb", [20] * 100)
    result = write_result(tmp_path / "run", lmdb)
    start = time.perf_counter()
    go(visit, page_of(result))
    opened = time.perf_counter()
    visit.page.fill("[name=text]", "yellow")
    filtered = time.perf_counter()
    assert count(visit) < len(read_jsonl(result)) == 5000
    assert visit.page.locator(".card").count() == PAGE
    assert opened - start < 10  # where other programs use the machine as well
    assert filtered - opened < 5


def test_it_says_so_where_files_are_missing(visit, result):
    (page_of(result).parent / "masks.js").unlink()
    for photo in (result.parent / "report/photos").iterdir():
        photo.unlink()
    visit.page.goto("about:blank")
    visit.page.goto(page_of(result).as_uri())
    visit.page.wait_for_selector(".picture.lost")
    visit.page.wait_for_selector("#legend:has-text('masks.js is not there')")
    visit.complaints.clear()  # of the files
