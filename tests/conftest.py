"""Fixtures that more than one test file uses."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
import torch
from browser import Visit, open_browser
from helpers import ALONE, ROOT, build_run, pack, write_config, write_records
from loguru import logger
from odd_server import OddServer

from engine.loaders import build_evaluation_loader
from engine.trainer import save
from tools import refshapes
from utils.transforms import normalize_images

# Tests fork. A child whose parent had OpenCV's pool of threads can wait for one of them for ever.
cv2.setNumThreads(1)
# Another number of threads gives other last bits, and tests compare to the bit.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Hide a GPU from all tests but those of `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def mini_root() -> Path:
    """The folder of real RefCOCO photos and sentences, which may not lie in this repository."""
    root = Path(os.environ.get("REFCOCO_MINI", ROOT.parent / "shared" / "refcoco_mini"))
    if not root.is_dir():
        pytest.skip(f"real photos are not part of the repository: no {root} (set REFCOCO_MINI)")
    return root


@pytest.fixture(scope="session")
def shapes_lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 12 images with 1-4 refs each (29 refs), 1-4 sentences a ref."""
    path = tmp_path_factory.mktemp("records") / "train.lmdb"
    return write_records(path, [2, 3, 1, 4, 2, 2, 3, 1, 4, 2, 3, 2])


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small RefShapes: its REFER files, and lmdb/shapes/{train,val,testA,testB}.lmdb."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    counts = "--train 12 --val 5 --testA 2 --testB 2"  # images
    refshapes.main(["--output", str(root), *counts.split(), "--seed", "3"])
    pack(root, root, "refshapes", "unc", "shapes")
    return root


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    """The config of a tiny model that is to be trained on them."""
    return write_config(tmp_path, data)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """The config of a run whose model masks a quarter of the pixels of val.

    Its weights are initial ones, and the projector's are scaled and shifted until the threshold
    lies among the logits. So masks are neither empty nor full on any processor, and they depend on
    photo and sentence.
    """
    threshold = 0.15
    config = write_config(tmp_path_factory.mktemp("trained"), data, threshold=threshold)
    run = build_run(config)
    model, text = run.model, run.model.proj.txt
    loader = build_evaluation_loader(run.cfg, run.cfg.DATA.val_lmdb, ALONE)
    with torch.no_grad():
        model.eval()
        text.weight[-1] = 0  # no offset by the sentence
        for parameter in text.parameters():
            taps = parameter[:-1].unflatten(0, (-1, 9))
            taps -= taps.mean(1, keepdim=True)  # each sentence's logits lie around 0
        batches = [(normalize_images(b["images"]), b["tokens"], b["image_index"]) for b in loader]
        # Without the outermost, which lean on padding.
        logits = torch.cat([model(*batch)[..., 1:-1, 1:-1].flatten() for batch in batches])
        spread = logits.std()
        for parameter in text.parameters():
            parameter.div_(spread)
        text.bias[-1] += torch.logit(torch.tensor(threshold)) - logits.quantile(3 / 4) / spread
    save(run, {}, is_best=True)
    return config


@pytest.fixture(scope="session")
def checkpoint(trained: Path) -> Path:
    """The last checkpoint of that run."""
    return trained.parent / "exp/tiny/last_model.pth"


@pytest.fixture(autouse=True)
def end_of_logs() -> Iterator[None]:
    """Close the logs that a test has opened: they would take the lines of those after it."""
    yield
    logger.remove()


@pytest.fixture
def log_lines() -> list[str]:
    """What is logged during the test, on any level."""
    lines: list[str] = []
    logger.add(lambda message: lines.append(message.record["message"]))
    return lines


@pytest.fixture(scope="module")
def browser() -> Iterator[Visit]:
    with open_browser() as visit:
        yield visit


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    """A web server that is the Hugging Face Hub too; nobody waits between two tries."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("time.sleep", lambda _: None)
    with OddServer() as odd:
        monkeypatch.setenv("HF_ENDPOINT", odd.url)
        threading.Thread(target=odd.serve_forever, kwargs={"poll_interval": 0.02}).start()
        yield odd
        odd.shutdown()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With -v, print the differences that tests measured (`record_property("difference", …)`)."""
    reports = terminalreporter.getreports("passed")
    rows = [row for r in reports for key, row in r.user_properties if key == "difference"]
    if rows and terminalreporter.verbosity > 0:
        terminalreporter.section("largest differences measured")
        for case, what, found, limit in rows:
            terminalreporter.write_line(f"{case:<22} {what:<32} {found:>9.2e}  (limit {limit:.0e})")
